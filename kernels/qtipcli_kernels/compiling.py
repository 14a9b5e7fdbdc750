"""Owns the cross-compilation of the Triton kernels: each for every target, without a GPU, and a table of what their loops cost.

    python -m qtipcli_kernels.compiling                       every kernel, every target
    python -m qtipcli_kernels.compiling --targets sm_80 sm_89 sm_90 --json docs/benchmarks/sass.json

A kernel's gpu.py describes its specialisations by `compile_cases()`. The process must not run under TRITON_INTERPRET=1,
which replaces Triton's compiler by its interpreter when a kernel is defined.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

from qtipcli_kernels import sass as machine_code
from qtipcli_kernels.device import INTERPRETED, DeviceError


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of one kernel.

    signature: argument -> Triton's type string ("*fp16", "i32") for every argument that is no constexpr; constexprs: the rest.
    divisible: arguments (pointers, integers) that are multiples of 16 when the kernel is launched.
    weights_per_thread: weights that a thread decodes in a trip of the innermost loop; None for a kernel that decodes none.
    gluon: the kernel is Gluon's, not plain Triton's, which takes Triton 3.6. nvidia_only: it holds PTX, or is Gluon's for
    NVIDIA's layouts. maxnreg: most registers a thread, on NVIDIA.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int = 2
    divisible: tuple[str, ...] = ()
    weights_per_thread: int | None = None
    gluon: bool = False
    nvidia_only: bool = False
    maxnreg: int | None = None


@dataclass(frozen=True)
class Target:
    """A kind of GPU, as triton.backends.compiler.GPUTarget has it; since: the first Triton that compiles for it."""

    name: str
    backend: str
    arch: int | str
    warp_size: int = 32
    since: tuple[int, int] = (3, 2)


TARGETS = {
    target.name: target
    for target in (
        *(Target(f"sm_{arch}", "cuda", arch) for arch in (80, 86, 89, 90)),
        *(Target(f"sm_{arch}", "cuda", arch, since=(3, 3)) for arch in (100, 120)),
        Target("gfx942", "hip", "gfx942", 64, since=(3, 6)),  # older ones want ROCm's linker installed
        Target("gfx1100", "hip", "gfx1100", 32, since=(3, 6)),
    )
}
_START = "fork" if "fork" in get_all_start_methods() else "spawn"  # forked workers have everything imported already

COUNTED = ("sm_80", "sm_89", "sm_90")
"""Targets whose machine code is counted in docs/benchmarks/sass.json."""


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel. asm: "ttgir", "llir", "ptx" and "cubin", or "amdgcn" and "hsaco". Registers are a thread's.

    stack_bytes: a thread's local memory: spilled registers, and arrays that the compiler could not keep in registers.
    """

    case: CompileCase
    target: Target
    asm: dict[str, Any]
    shared_bytes: int
    registers: int
    stack_bytes: int


def collect(package: str = "qtipcli_kernels") -> dict[str, CompileCase]:
    """Every case of `package`, by name: those of its gpu modules, or of the module itself if it has compile_cases().

    Raises ValueError where two cases bear one name.
    """
    root = importlib.import_module(package)
    modules = [root] if hasattr(root, "compile_cases") else list(_gpu_modules(root))
    cases = {}
    for module in modules:
        for case in module.compile_cases() if hasattr(module, "compile_cases") else ():
            if case.name in cases:
                raise ValueError(f"two compile cases are called {case.name}; the second one is in {module.__name__}")
            cases[case.name] = case
    return cases


def _gpu_modules(root: Any) -> Iterator[Any]:
    for found in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        if found.name.rpartition(".")[2].startswith("gpu"):
            yield importlib.import_module(found.name)


def serves(case: CompileCase, target: Target) -> bool:
    """Whether `case` is meant for `target`, and this Triton knows it (and Gluon, where that is wanted)."""
    version = _triton_version()
    fits = target.backend == "cuda" or not case.nvidia_only
    return fits and version >= max(target.since, (3, 6) if case.gluon else (3, 2))


def compile_case(case: CompileCase, target: Target) -> Compiled:
    """Compile one kernel for one target.

    Raises DeviceError under TRITON_INTERPRET=1, and for a case that this Triton does not compile for `target` (see serves);
    what Triton's compiler raises passes through.
    """
    if INTERPRETED:
        raise DeviceError("TRITON_INTERPRET=1 replaces Triton's compiler: compile in a process that is started without it")
    if not serves(case, target):
        raise DeviceError(f"Triton {'.'.join(map(str, _triton_version()))} does not compile {case.name} for {target.name}")
    import triton
    from triton.backends.compiler import GPUTarget

    options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.maxnreg is not None and target.backend == "cuda":
        options["maxnreg"] = case.maxnreg
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton's notices of its own future defaults
        kernel = triton.compile(_source(case), target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)
    registers, stack = _registers(kernel.asm)
    return Compiled(case, target, dict(kernel.asm), kernel.metadata.shared, registers, stack)


def _source(case: CompileCase) -> Any:
    from triton.compiler import ASTSource

    kernel = case.kernel
    _check_arguments(case, kernel.arg_names)
    divisible = [kernel.arg_names.index(name) for name in case.divisible]
    if _triton_version() < (3, 3):
        from triton.backends.compiler import AttrsDescriptor

        attrs = AttrsDescriptor.from_dict({"arg_properties": {"tt.divisibility": divisible}, "cls": "AttrsDescriptor"})
        return ASTSource(kernel, case.signature, constants=case.constexprs, attrs=attrs)
    if case.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource  # the one way to name a target
    signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {(position,): [["tt.divisibility", 16]] for position in divisible}
    return ASTSource(kernel, signature, constexprs=case.constexprs, attrs=attrs)


def _check_arguments(case: CompileCase, names: list[str]) -> None:
    given = [*case.signature, *case.constexprs]
    if sorted(given) != sorted(names):
        missing, unknown = sorted(set(names) - set(given)), sorted(set(given) - set(names))
        raise ValueError(f"compile case {case.name}: arguments missing: {missing}, unknown: {unknown}, or given twice")


def _registers(asm: dict[str, Any]) -> tuple[int, int]:
    if "cubin" in asm:
        usage = machine_code.resource_usage(asm["cubin"])
        return usage["REG"], usage["STACK"]
    fields = dict(re.findall(r"^ +\.(vgpr_count|private_segment_fixed_size): +(\d+)$", asm["amdgcn"], flags=re.MULTILINE))
    return int(fields["vgpr_count"]), int(fields["private_segment_fixed_size"])


@lru_cache(maxsize=1)
def _triton_version() -> tuple[int, int]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def sass(compiled: Compiled) -> list[machine_code.Instruction]:
    """The machine code of a kernel compiled for NVIDIA."""
    return machine_code.disassemble(compiled.asm["cubin"])


def loop_cost(compiled: Compiled, case: CompileCase) -> machine_code.LoopCost:
    """What the hot loop of a kernel compiled for NVIDIA issues (see sass.loop_cost)."""
    return machine_code.loop_cost(compiled.asm["cubin"], compiled.asm["ptx"], case.weights_per_thread)


def measure(package: str, name: str, target_name: str, asm_folder: Path | None = None, counts: bool = True) -> dict[str, Any]:
    """One row of the table: case `name` of `package` compiled for a target; on failure the row says `error` instead.

    asm_folder: where the assembly goes, PTX or AMD's; the row then has its path (`asm`). counts: whether to read the machine
    code of COUNTED targets.
    """
    row: dict[str, Any] = {"case": name, "target": target_name}
    try:
        case, target = _collected(package)[name], TARGETS[target_name]
        compiled = compile_case(case, target)
        row |= {"num_warps": case.num_warps, "registers": compiled.registers, "stack_bytes": compiled.stack_bytes}
        row["shared_bytes"] = compiled.shared_bytes
        if counts and target_name in COUNTED:
            row |= _counted(compiled, case)
        if asm_folder is not None:
            kind = "ptx" if target.backend == "cuda" else "amdgcn"
            file = asm_folder / f"{re.sub(r'[^-_.a-zA-Z0-9]', '_', name)}.{target_name}.{kind}"
            file.write_text(compiled.asm[kind])
            row["asm"] = str(file)
    except Exception as error:  # whatever the compiler raises belongs in the table, beside the kernel's name
        row["error"] = f"{type(error).__name__}: {error}"
    return row


def _counted(compiled: Compiled, case: CompileCase) -> dict[str, Any]:
    cost = loop_cost(compiled, case)
    return {
        "spills": sum(instruction.kind == "spill" for instruction in sass(compiled)),
        "unrolled": cost.unrolled,
        "loop": cost.counts,
        "loop_total": cost.total,
        "loop_shared_bytes": {"read": cost.shared_read, "written": cost.shared_written},
        "per_weight": cost.per_weight(),
    }


@lru_cache(maxsize=4)
def _collected(package: str) -> dict[str, CompileCase]:
    return collect(package)


def table(
    package: str,
    targets: list[str],
    jobs: int = 1,
    only: str = "",
    asm_folder: Path | None = None,
    counts: bool = True,
) -> dict[str, Any]:
    """Triton's version and a row for every case and target that this Triton serves, in a fixed order (see measure).

    jobs: processes. only: keep the cases whose name contains it. A kernel that crashes the compiler (LLVM aborts the
    process) costs its worker, is retried alone and then gets a row that says so.
    """
    import triton

    cases = _collected(package).values()
    wanted = [(c.name, t) for c in cases if only in c.name for t in targets if serves(c, TARGETS[t])]
    task = partial(measure, package, asm_folder=asm_folder, counts=counts)
    rows = _measure_all(task, wanted, jobs)
    for each in wanted:
        if each not in rows:
            rows |= _measure_all(task, [each], 1)
        rows.setdefault(each, {"case": each[0], "target": each[1], "error": "the compiler crashed"})
    return {"triton": triton.__version__, "rows": [rows[each] for each in wanted]}


def _measure_all(task: Callable, wanted: list[tuple[str, str]], jobs: int) -> dict[tuple[str, str], dict[str, Any]]:
    rows = {}
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context(_START)) as pool:
        futures = {pool.submit(task, *each): each for each in wanted}
        for future in as_completed(futures):
            try:
                rows[futures[future]] = future.result()
            except BrokenProcessPool:
                break
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """The table as plain text: a line for a case and target, and under it the loop's instructions by kind."""
    width = max((len(row["case"]) for row in rows), default=4)
    lines = [f"{'case':{width}}  target    regs  stack  shared  loop  per weight"]
    for row in rows:
        head = f"{row['case']:{width}}  {row['target']:8}"
        if "error" in row:
            lines.append(f"{head}  FAILED {row['error'].splitlines()[0]}")
            continue
        weight = (row.get("per_weight") or {}).get("total", "-")
        memory = f"{row['registers']:4}  {row['stack_bytes']:5}  {row['shared_bytes']:6}"
        lines.append(f"{head}  {memory}  {row.get('loop_total', '-'):>4}  {weight:>10}")
        if "loop" in row:
            kinds = "  ".join(f"{kind} {count}" for kind, count in row["loop"].items())
            lines.append(f"{'':{width}}  {kinds}" + (f"  (unrolled {row['unrolled']}x)" if row["unrolled"] > 1 else ""))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit status is 1 when a kernel did not compile for a target."""
    parser = argparse.ArgumentParser(prog="python -m qtipcli_kernels.compiling", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS), metavar="TARGET", help="%(choices)s"
    )
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--asm", type=Path, metavar="FOLDER", help="also write each kernel's assembly there")
    parser.add_argument("--no-counts", action="store_true", help="compile only: do not read the machine code")
    parser.add_argument("--module", default="qtipcli_kernels", help="package or module that has the cases")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        raise DeviceError("TRITON_INTERPRET=1 replaces Triton's compiler: unset it")
    if options.asm:
        options.asm.mkdir(parents=True, exist_ok=True)
    result = table(options.module, options.targets, options.jobs, options.only, options.asm, not options.no_counts)
    print(f"Triton {result['triton']}\n{render(result['rows'])}")
    if options.json:
        lines = ",\n".join(json.dumps(row) for row in result["rows"])  # a line a row: a change shows which
        options.json.write_text(f'{{"triton": "{result["triton"]}", "rows": [\n{lines}\n]}}\n')
    return int(any("error" in row for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
