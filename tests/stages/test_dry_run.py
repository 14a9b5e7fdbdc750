"""The dry run: its oracle is what the same command then writes, and what the same functions take when they run in full."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qtipcli.config import QuantizeSettings
from qtipcli.job.directory import RunDirectory
from qtipcli.model import remote
from qtipcli.model.imagined import Imagined
from qtipcli.model.source import ModelSource
from qtipcli.stages import allocate, memory, plan, rounding_rates
from qtipcli.stages.live_bytes import LiveBytes
from qtipcli.stages.memory import Sizes, Text
from qtipcli.stages.rates import Passes
from qtipcli.stages.rounding_rates import Group, RoundingRates
from qtipcli_kernels.spec import TrellisSpec
from stages.short_measure import shorten, stand_in_for_hub
from stages.tiny import FAST_OPTIONS, save_model, snapshot

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    shorten(monkeypatch)


def weights_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", ("--bits", "3")),
        ("llama", ("--bits", "2", "--code", "hyb", "--embedding-bits", "4")),
        ("qwen2", ("--bits", "2", "--skip", "*.v_proj", "--layer", "*.down_proj=4", "--head-bits", "4")),
    ],
)
def test_sizes_are_those_of_the_directory_to_the_byte(qtip, text, tmp_path, kind, options):
    """Oracle: the sizes of the files that the same command writes."""
    model = save_model(kind, tmp_path / "model")
    say = ("quantize", model, "--data", text, *FAST_OPTIONS, *options, "--out", tmp_path / "out")
    before = snapshot(tmp_path)
    dry = qtip(*say, "--dry-run", "--json")
    assert dry.status == 0, dry.err
    assert snapshot(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.name not in {"model", text.name}]
    found = json.loads(dry.out)
    assert qtip(*say).status == 0
    out = tmp_path / "out"
    assert found["stored"]["weights"] == weights_of(out) == sum(kind["bytes"] for kind in found["layers"]) + headers(out)
    assert found["stored"]["index"] == (out / "model.safetensors.index.json").stat().st_size
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    packed = config["layers"]
    assert sum(kind["count"] for kind in found["layers"] if kind["bits"]) == len(packed)


def headers(directory: Path) -> int:
    """Bytes that come before the tensors."""
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in directory.glob("*.safetensors"))


def test_no_weight_is_read(qtip, tiny_model, text, monkeypatch):
    """Oracle: a checkpoint whose every read fails."""

    def refuse(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(ModelSource, "read", refuse)
    for command in ("quantize", "calibrate"):
        done = qtip(command, tiny_model, "--data", text, "--samples", 6, "--context", 32, "--dry-run")
        assert done.status == 0, done.err
        assert "nothing was written" in done.out


def test_the_table_says_what_is_left_and_why(qtip, text, tmp_path):
    model = save_model("qwen2", tmp_path / "model")
    done = qtip("quantize", model, "--data", text, *FAST_OPTIONS, "--skip", "*.0.*v_proj", "--dry-run", "--json")
    kinds = {(kind["name"], kind["why"]): kind for kind in json.loads(done.out)["layers"]}
    assert kinds["model.layers.*.self_attn.v_proj", ""]["count"] == 1
    assert kinds["model.layers.*.self_attn.v_proj.weight", "skipped by the settings"]["count"] == 1
    assert kinds["lm_head.weight", "outside the decoder blocks"]["bits"] is None
    assert kinds["model.layers.*.mlp.gate_proj", ""]["shape"] == [100, 64]
    shown = qtip("quantize", model, "--data", text, *FAST_OPTIONS, "--skip", "*.0.*v_proj", "--dry-run").out
    assert "skipped by the settings" in shown
    assert "peak RAM" in shown
    assert "time here and now" in shown


def test_hessians_that_are_there_are_not_made_again(quantize, qtip, tiny_model, text, tmp_path):
    """Oracle: the calibrate stage's own files, and what a finished job's time no longer holds."""
    calibrating = qtip("calibrate", tiny_model, "--data", text, "--samples", 6, "--context", 32, "--dry-run", "--json")
    predicted = json.loads(calibrating.out)
    assert quantize("--out", "out").status == 0
    found = 0
    for shard in tmp_path.glob("*.hessians/*.safetensors"):
        with safe_open(shard, "pt") as reader:
            found += sum(reader.get_tensor(name).nbytes for name in reader.keys())  # noqa: SIM118, no mapping
    assert predicted["disk"] == {"Hessians": found}
    again = json.loads(quantize("--out", "out", "--dry-run", "--json").out)
    assert "calibrate" not in again["seconds"]
    assert "output side" not in again["seconds"]
    assert "Hessians" not in again["disk"]


def test_pack_to_the_byte(quantize, qtip, tiny_model, tmp_path):
    """Oracle: what pack writes, in shards of its own size."""
    assert quantize("--out", "out", "--no-pack").status == 0
    say = ("pack", tiny_model, "out.job", "--out", "packed", "--max-shard-size", "300KB")
    found = json.loads(qtip(*say, "--dry-run", "--json").out)
    assert not (tmp_path / "packed").exists()
    assert qtip(*say).status == 0
    assert found["stored"]["weights"] == weights_of(tmp_path / "packed")
    assert found["stored"]["files"] == len(list((tmp_path / "packed").glob("*.safetensors"))) > 1


def test_the_budget_of_a_measured_allocation_is_that_of_the_run(quantize, tmp_path):
    """Oracle: the table that the run decides on, and what it packs."""
    say = ("--bits", "2.4", "--windows", 1, "--out", "out")
    found = json.loads(quantize(*say, "--dry-run", "--json").out)
    assert not list(tmp_path.iterdir())
    (row,) = found["tables"]["measured allocation"]
    assert any("not counted" in note for note in found["notes"])
    assert "measuring layers" in found["ram"]
    assert quantize(*say).status == 0
    table = RunDirectory.load(tmp_path / "out.allocation.job", allocate.STAGE).report(allocate.TABLE)
    assert row["budget_bytes"] == table["budget"]
    assert row["best uniform"] == table["uniform"]
    assert row["its_bytes"] == table["bytes"]["uniform"]
    assert sum(kind["bytes"] for kind in found["layers"]) == table["bytes"]["uniform"]


def test_a_budget_that_is_too_small_is_refused(quantize):
    done = quantize("--size", "10KB", "--dry-run")
    assert done.status == 2
    assert "is too small" in done.err


def test_a_hub_model_is_described_by_its_headers(tiny_model, monkeypatch):
    """Oracle: the same model in a local directory. The Hub is stood in for by that directory."""
    where = stand_in_for_hub(monkeypatch, tiny_model)
    settings = QuantizeSettings(state_bits=8)

    def stored(source: ModelSource) -> plan.Stored:
        skeleton = Imagined(source)
        return plan.stored_of(skeleton, plan.layouts_of(skeleton, settings)[0])[0]

    with remote.described("org/model") as source:
        assert stored(source) == stored(ModelSource.open(tiny_model))
    assert not where[0].exists()


def test_live_bytes_are_those_of_storages():
    """Oracle: counted by hand. A view takes nothing, and what was there before is not counted."""
    before = torch.zeros(1000)
    with LiveBytes() as live:
        first = before + 1
        view = first[:10]
        second = view * 2
        del first
        assert live.now == 4000 + 40
        del view
        assert live.now == 40
    assert live.peak == 4040
    assert len(second) == 10


@pytest.mark.parametrize("group", [Group((700, 320), 704), Group((256,), 1100), Group((1200,), 208)])
def test_rounding_memory_grows_with_the_square(group):
    """Oracle: the same rounding counted in full. A tenth: constants and the search of scales do not grow so."""
    settings = QuantizeSettings(state_bits=8, search=False)
    spec = TrellisSpec.at_bits("3inst", 2.0, 8)
    with LiveBytes() as live:
        rounding_rates._round(group, settings, spec, CPU, search=False)
    assert rounding_rates.rounding_bytes(group, settings, spec, CPU) == pytest.approx(live.peak, rel=0.1)


def test_a_fit_finds_what_made_the_times():
    """Oracle: times made of known coefficients; to half a percent, since each is read where it counts most."""
    true = RoundingRates(layer=3e-3, step=2e-4, cube=1e-9, searched=0.0)
    rows = [[1.0, float(group.steps), group.cubes] for side in (64, 256, 768) for group in [Group((side,), side)]]
    found = rounding_rates._positive_fit(rows, [row[0] * true.layer + row[1] * true.step + row[2] * true.cube for row in rows])
    group = Group((2048, 512), 2048)
    predicted = RoundingRates(*found, 0.0).seconds(group, 1e6)
    assert predicted == pytest.approx(true.seconds(group, 1e6), rel=0.2)


def test_streams_beyond_the_limit_are_not_in_memory():
    """Oracle: the limit that streams have, 4 GiB; beyond it one batch is held."""
    sizes = Sizes(blocks=2, block=10, linears=8, outer=5, head=0, token=4096, vocabulary=100, read=0)
    passes = Passes(0, 0, 0, 0, 0, 0, 0, kept_bytes=0, tokens=1)
    small, large = (
        memory.quantize_phases(sizes, Text(rows, 2048), passes, [], [], prefix=True)["quantize, on to the next block"]
        for rows in (256, 257)
    )
    assert small == 2 * 256 * 2048 * 4096 + 8192 * 4096 + 18
    assert large == 3 * 8192 * 4096 + 18


def test_tuning_of_blocks_is_counted(quantize):
    """It adds its own time and phases, on top of what it is not asked for."""
    plain, tuned = (json.loads(quantize("--dry-run", "--json", *more).out) for more in ((), ("--tune-blocks",)))
    assert set(tuned["seconds"]) - set(plain["seconds"]) == {"tune blocks"}
    assert tuned["seconds"]["tune blocks"] > 0
    assert set(tuned["ram"]) - set(plain["ram"]) == {
        "by block, in front of the blocks", "by block, the original", "by block, training"
    }  # fmt: skip
    assert tuned["notes"] == plain["notes"]


def test_push_names_the_files_without_asking_anybody(qtip, own_packed, monkeypatch):
    """Oracle: the directory's own files, all but hidden ones; the card's use names the repository, and may be longer."""
    monkeypatch.setattr("qtipcli.stages.push.Repository.open", lambda *arguments: pytest.fail("the Hub was asked"))
    done = qtip("push", own_packed, "me/model", "--dry-run", "--json")
    assert done.status == 0, done.err
    rows = {row["file"]: row["bytes"] for row in json.loads(done.out)["tables"]["files"]}
    there = {file.name: file.stat().st_size for file in own_packed.iterdir() if not file.name.startswith(".")}
    assert rows.keys() == there.keys()
    assert {name: size for name, size in rows.items() if name != "README.md"} == {
        name: size for name, size in there.items() if name != "README.md"
    }
    assert qtip("push", own_packed / "absent", "me/model", "--dry-run").status != 0
