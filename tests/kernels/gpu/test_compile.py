"""Every GPU kernel compiled for the GPUs it claims: no decoder spills, none costs more than docs/benchmarks/sass.json says.

In `make test` for one GPU of each kind that the compiler treats apart; in `make test-slow` for every one.

The count is what the bundled nvdisasm shows of the hot loop (sass.py). After a change that is meant to cost or to save:
`python -m qtipcli_kernels.compiling --targets sm_80 sm_89 sm_90 --json docs/benchmarks/sass.json`.
"""

import json
from pathlib import Path

import compiled
import pytest
import triton

from qtipcli_kernels import compiling, sass
from qtipcli_kernels.device import DeviceError

RECORDED = Path(__file__).parents[3] / "docs" / "benchmarks" / "sass.json"

SLACK = 1.1
"""A count may grow by a tenth before the test fails."""

DATA_MOVES = ("ldg", "stg", "lds", "sts", "shuffle", "barrier")
"""Kinds that are held to their recorded count one by one: a layout conversion is few instructions, and shows here."""


def growth(row: dict, before: dict) -> list[str]:
    """What one trip of a row's loop issues more of than the recorded row's: the total, by weight where there is one."""
    found = []
    total, total_before = (r["per_weight"]["total"] if r["per_weight"] else r["loop_total"] for r in (row, before))
    pairs = {"instructions": (total, total_before)}
    pairs["bytes spilled"] = row["stack_bytes"], before["stack_bytes"]
    pairs |= {kind: tuple(r["loop"].get(kind, 0) / r["unrolled"] for r in (row, before)) for kind in DATA_MOVES}
    for what, (now, then) in pairs.items():
        if now > SLACK * then:
            found.append(f"{row['case']} for {row['target']}: {what} {then:g} -> {now:g}")
    return found


def failures(rows: list[dict]) -> list[str]:
    return [f"{row['case']} for {row['target']}: {row['error']}" for row in rows if "error" in row]


def spills(rows: list[dict]) -> list[str]:
    """Rows of NVIDIA targets whose threads keep something in memory that should be in registers."""
    nvidia = [row for row in rows if row["target"].startswith("sm_") and "error" not in row]
    return [f"{r['case']} for {r['target']}: {r['stack_bytes']} bytes" for r in nvidia if r["stack_bytes"] or r.get("spills")]


def expect_none(lines: list[str]) -> None:
    """Fails with all of them, a line each."""
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


ONE_OF_A_KIND = ("sm_80", "sm_90", "sm_120", "gfx942", "gfx1100")
"""A target of each generation for which matrix products and copies are compiled differently, and both of AMD."""


@pytest.fixture(
    scope="module", params=[ONE_OF_A_KIND, pytest.param(tuple(compiling.TARGETS), marks=pytest.mark.slow)], ids=["some", "all"]
)
def rows(request):
    """The table of all kernels; compiled by as many processes as there are processors."""
    _, result, printed = compiled.table("--targets", *request.param)
    assert result["rows"], printed
    triton_version = tuple(map(int, triton.__version__.split(".")[:2]))
    assert {row["target"] for row in result["rows"]} == {
        name for name in request.param if compiling.TARGETS[name].since <= triton_version
    }
    return result["rows"]


@pytest.fixture(scope="module")
def faulty():
    """(case, target) -> row of example_faulty.py's kernels; the table's exit status."""
    status, result, _ = compiled.table("--module", "example_faulty", "--targets", "sm_90", "gfx942", "--jobs", "1")
    return {(row["case"], row["target"]): row for row in result["rows"]}, status


def test_every_kernel_compiles_for_every_target(rows):
    expect_none(failures(rows))


def test_no_kernel_that_decodes_spills_on_nvidia(rows):
    """Transforms and encoder do in some shapes: there the recorded bytes are the bound."""
    decoders = [row for row in rows if row["case"].startswith(("matvec", "decode"))]
    assert decoders
    expect_none(spills(decoders))


def test_no_kernel_costs_more_than_recorded(rows):
    recorded = json.loads(RECORDED.read_text())
    if recorded["triton"] != triton.__version__:
        pytest.skip(f"counts are recorded for Triton {recorded['triton']}, this is {triton.__version__}")
    compiled_for = {row["target"] for row in rows}
    before = {(row["case"], row["target"]): row for row in recorded["rows"] if row["target"] in compiled_for}
    counted = {(row["case"], row["target"]): row for row in rows if row["target"] in compiling.COUNTED and "error" not in row}
    changed = [f"{case} for {target}: recorded and compiled differ" for case, target in counted.keys() ^ before.keys()]
    expect_none([*changed, "record the counts anew: this file's docstring says how"] if changed else [])
    expect_none([line for key, row in counted.items() for line in growth(row, before[key])])


def test_a_kernel_that_does_not_compile_is_named_with_its_message(faulty):
    rows, status = faulty
    assert status == 1
    found = failures(list(rows.values()))
    assert len(found) == 3
    assert any(line.startswith("wrong for gfx942") and "this kernel is wrong" in line for line in found)


def test_a_compiler_that_crashes_costs_only_its_own_row(faulty):
    rows, _ = faulty
    assert "crashed" in rows["crashing", "sm_90"]["error"]
    assert "error" not in rows["decode 4", "sm_90"]
    assert "error" not in rows["decode 4", "gfx942"]


def test_a_kernel_that_spills_is_found(faulty):
    rows, _ = faulty
    assert [line.split(":")[0] for line in spills(list(rows.values()))] == ["spilling for sm_90"]


def test_a_kernel_that_grew_is_found(faulty):
    rows, _ = faulty
    small, large = rows["decode 4", "sm_90"], rows["decode 5", "sm_90"]
    assert growth(large, small)
    assert not growth(small, large)
    assert not growth(small, small)
    converting = small | {"loop": small["loop"] | {"lds": small["unrolled"]}}  # a trip reads shared memory once
    assert growth(converting, small) == ["decode 4 for sm_90: lds 0 -> 1"]
    assert growth(small | {"stack_bytes": 8}, small) == ["decode 4 for sm_90: bytes spilled 0 -> 8"]


def test_counts_are_for_one_weight_however_often_the_assembler_unrolls(faulty):
    """decode_kernel loads one word for four weights, each of which takes four or five multiplications."""
    rows, _ = faulty
    for turns in (4, 5):
        row = rows[f"decode {turns}", "sm_90"]
        assert row["loop"]["ldg"] == row["unrolled"]
        assert turns <= row["per_weight"]["imad"] <= turns + 1
        assert row["per_weight"]["total"] == pytest.approx(sum(row["loop"].values()) / (4 * row["unrolled"]), abs=1e-4)


LISTING = """
.text.k:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R4.64] ;
.L_x_1:
        /*0020*/              @!P1 LDS.64 R6, [R2+UR4] ;
        /*0030*/                   BRA.DIV UR4, `(.L_x_3) ;
        /*0040*/                   SHFL.BFLY PT, R3, R2, 0x1, 0x1f ;
.L_x_4:
        /*0050*/                   IMAD.MOV.U32 R1, RZ, RZ, R2 ;
        /*0060*/               @P0 BRA P2, `(.L_x_1) ;
        /*0070*/                   HMMA.16816.F32 R8, R2, R4, R8 ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   WARPSYNC.COLLECTIVE R5, `(.L_x_5) ;
.L_x_5:
        /*00b0*/                   SHFL.BFLY PT, R3, R2, 0x1, 0x1f ;
        /*00c0*/                   BRA `(.L_x_4) ;
.L_x_2:
        /*00d0*/                   BRA `(.L_x_2);
        /*00e0*/                   NOP ;
"""


def test_the_hot_loop_is_the_innermost_without_paths_for_diverged_warps():
    code = sass.parse_sass(LISTING)
    assert [i.opcode for i in sass.hot_loop(code)] == ["LDS.64", "BRA.DIV", "SHFL.BFLY", "IMAD.MOV.U32", "BRA"]
    assert [i.kind for i in sass.hot_loop(code)] == ["lds", "branch", "shuffle", "move", "branch"]
    assert code[2].shared_bytes == 8
    outer = [i for i in code if i.opcode != "BRA" or i.operands != "P2, `(.L_x_1)"]
    assert [i.kind for i in sass.hot_loop(outer)] == ["ldg", "lds", "branch", "shuffle", "move", "mma", "branch"]
    straight = [i for i in code if not i.opcode.startswith("BRA")]
    assert sass.hot_loop(straight) == straight


def test_a_loop_that_was_unrolled_unevenly_is_refused():
    text = sass.parse_ptx(".entry k()\n{\nmma.sync.a; mma.sync.a; ret;\n}")
    with pytest.raises(ValueError, match="3 mma for 2"):
        sass._unrolled({"mma": 3, "ldg": 0}, text)


def test_cases_must_name_every_argument_once():
    case = compiling.CompileCase("odd", None, {"a": "i32", "b": "i32"}, {"B": 1}, 1)
    with pytest.raises(ValueError, match=r"missing: \['c'\], unknown: \['b'\]"):
        compiling._check_arguments(case, ["a", "c", "B"])


def test_the_interpreter_cannot_compile(monkeypatch):
    monkeypatch.setattr(compiling, "INTERPRETED", True)
    case = compiling.CompileCase("any", None, {}, {}, 1)
    with pytest.raises(DeviceError, match="without it"):
        compiling.compile_case(case, compiling.TARGETS["sm_90"])
    with pytest.raises(DeviceError, match="unset it"):
        compiling.main([])
