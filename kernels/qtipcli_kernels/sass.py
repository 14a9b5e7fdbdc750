"""Owns what a compiled kernel costs: its machine code, the loop where it spends its time, and that loop's instructions by kind.

Read with the `nvdisasm` that Triton brings, so no GPU and no CUDA toolkit are needed. Counts are instructions that one warp
issues in one trip of the loop; predicated ones count in full, and both sides of a branch do.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

KINDS = {
    "mma": "HMMA IMMA BMMA DMMA QMMA OMMA HGMMA IGMMA QGMMA UTCHMMA UTCIMMA UTCQMMA UTCOMMA",
    "imad": "IMAD IMUL",
    "integer": "IADD3 IADD IADD64 VIADD VIADDMNMX LEA ISETP IMNMX VIMNMX VIMNMX3 SEL IABS POPC FLO IDP"
    " VABSDIFF VABSDIFF4 VHMNMX",
    "logic": "LOP3 LOP SHF SHL SHR PRMT PLOP3 BREV SGXT BMSK P2R R2P",
    "float": "FADD FADD2 FMUL FMUL2 FFMA FFMA2 FSETP FSET FSEL FMNMX FMNMX3 FCHK MUFU DADD DMUL DFMA DSETP"
    " HADD2 HMUL2 HFMA2 HSETP2 HSET2 HMNMX2",
    "convert": "F2F F2I F2IP I2F I2FP F2FP FRND I2I I2IP HADD2.F32",
    "move": "MOV CS2R S2R IMAD.MOV",
    "ldg": "LDG LD LDGSTS LDGMC",
    "stg": "STG ST RED REDG ATOM ATOMG",
    "lds": "LDS LDSM",
    "sts": "STS STSM ATOMS",
    "spill": "LDL STL",
    "constant": "LDC LDCU",
    "shuffle": "SHFL VOTE MATCH REDUX",
    "barrier": "BAR DEPBAR LDGDEPBAR WARPSYNC MEMBAR ERRBAR SYNCS FENCE ARRIVES CCTL",
    "branch": "BRA BRX JMP JMX EXIT RET CALL BSSY BSYNC BREAK BMOV YIELD NANOSLEEP WARPSYNC.COLLECTIVE",
    "uniform": "R2UR S2UR REDUXU VOTEU",
}
"""Kind of instruction -> NVIDIA's opcodes of it (a longer one, with modifiers, decides before its stem)."""

_KIND_OF = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}

SAME_IN_PTX = {
    "mma": ("mma", "wgmma"),
    "ldg": ("ld.global", "cp.async.c", "cp.async.s", "ld.relaxed", "ld.volatile"),
    "lds": ("ld.shared", "ldmatrix"),
    "sts": ("st.shared", "stmatrix"),
    "shuffle": ("shfl", "redux", "vote"),
}
"""Kinds that ptxas neither adds nor drops, so that their ratio shows how often it unrolled a loop; surest first."""


@dataclass(frozen=True)
class Instruction:
    """One machine (or PTX) instruction: `predicate` without its @, `target` the label that it may jump to."""

    opcode: str
    predicate: str = ""
    operands: str = ""
    target: str = ""
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """One of KINDS, or "other"."""
        if self.predicate == "!PT":
            return "other"  # never executed: Hopper's stand-ins in front of asynchronous copies
        parts = self.opcode.split(".")
        for length in (2, 1):
            if kind := _KIND_OF.get(".".join(parts[:length])):
                return kind
        return "uniform" if self.opcode.startswith("U") else "other"

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that one lane reads or writes."""
        if self.opcode.startswith(("LDSM", "STSM")):
            return 4 * int(self.opcode[-1]) if self.opcode[-1] in "24" else 4
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
        return next((widths[part] for part in self.opcode.split(".") if part in widths), 4)


@dataclass(frozen=True)
class LoopCost:
    """What one trip of a kernel's hot loop issues.

    counts: kind -> instructions. unrolled: trips of the PTX's loop in one of the machine code's; 1 where nobody asked.
    shared_read, shared_written: bytes a thread. weights: weights that a thread decodes in a trip of the machine code's loop.
    """

    counts: dict[str, int]
    unrolled: int
    shared_read: int
    shared_written: int
    weights: int | None

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def per_weight(self) -> dict[str, float] | None:
        """Kind -> instructions for one decoded weight, with "total"; None for a kernel that decodes none."""
        if self.weights is None:
            return None
        return {kind: round(count / self.weights, 4) for kind, count in {**self.counts, "total": self.total}.items()}


@lru_cache(maxsize=4)
def disassemble(cubin: bytes) -> list[Instruction]:
    """The machine code of a compiled kernel, in the order of its addresses."""
    return parse_sass(_run_tool("nvdisasm", cubin, "--print-code"))


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump reports of the kernel: REG (a thread), STACK (bytes a thread; spilled registers lie there), SHARED, ..."""
    text = _run_tool("cuobjdump", cubin, "--dump-resource-usage")
    line = text[text.index("Function ") :]
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}


def loop_cost(cubin: bytes, ptx: str, weights_per_thread: int | None = None) -> LoopCost:
    """What the hot loop of a kernel issues: of the innermost loops the longest, or the whole kernel where nothing loops.

    weights_per_thread: weights that a thread decodes in one trip of the loop as the PTX has it.
    Raises ValueError where the machine code's loop is no whole number of the PTX's trips.
    """
    hot = hot_loop(disassemble(cubin))
    counts = Counter(instruction.kind for instruction in hot)
    unrolled = 1 if weights_per_thread is None else _unrolled(counts, hot_loop(parse_ptx(ptx)))
    moved = Counter()
    for instruction in hot:
        moved[instruction.kind] += instruction.shared_bytes
    return LoopCost(
        counts={kind: counts[kind] for kind in (*KINDS, "other") if counts[kind]},
        unrolled=unrolled,
        shared_read=moved["lds"],
        shared_written=moved["sts"],
        weights=None if weights_per_thread is None else weights_per_thread * unrolled,
    )


def _unrolled(counts: Counter, ptx_loop: list[Instruction]) -> int:
    ratios = []
    for kind, prefixes in SAME_IN_PTX.items():
        in_ptx = sum(instruction.opcode.startswith(prefixes) for instruction in ptx_loop)
        if in_ptx and counts[kind]:
            ratios.append(f"{counts[kind]} {kind} for {in_ptx}")
            if counts[kind] % in_ptx == 0:
                return counts[kind] // in_ptx
    if ratios:
        raise ValueError(f"the machine code's loop is no whole number of trips of the PTX's: {', '.join(ratios)}")
    return 1


def hot_loop(code: list[Instruction]) -> list[Instruction]:
    """The instructions of the longest innermost loop, those of branches out of line among them; all where nothing loops."""
    blocks = _basic_blocks(code)
    edges = _edges(code, blocks)
    loops = _loops(edges)
    inner = [body for header, body in loops.items() if not any(other != header and other in body for other in loops)]
    if not inner:
        return code
    sizes = [sum(len(blocks[block]) for block in body) for body in inner]
    body = inner[sizes.index(max(sizes))]
    return [code[position] for block in sorted(body) for position in blocks[block]]


def _basic_blocks(code: list[Instruction]) -> list[range]:
    starts = {0} | {n for n, instruction in enumerate(code) if instruction.labels}
    starts |= {n + 1 for n, instruction in enumerate(code[:-1]) if _ends_block(instruction)}
    bounds = [*sorted(starts), len(code)]
    return [range(a, b) for a, b in pairwise(bounds)]


def _ends_block(instruction: Instruction) -> bool:
    return bool(instruction.target) or instruction.opcode.split(".")[0] in ("EXIT", "RET", "ret", "exit", "trap")


def _edges(code: list[Instruction], blocks: list[range]) -> list[list[int]]:
    block_of_label = {label: n for n, block in enumerate(blocks) for label in code[block[0]].labels}
    edges = []
    for n, block in enumerate(blocks):
        last, nexts = code[block[-1]], []
        # BRA.DIV leads to the slow path of a shuffle whose warp has diverged: not what the kernel normally issues.
        if last.target and not last.opcode.startswith(("BRA.DIV", "CALL")):
            nexts.append(block_of_label[last.target])
        unconditional = _ends_block(last) and not last.predicate and not last.opcode.startswith(("BRA.DIV", "CALL"))
        if not unconditional and n + 1 < len(blocks):
            nexts.append(n + 1)
        edges.append(nexts)
    return edges


def _loops(edges: list[list[int]]) -> dict[int, set[int]]:
    """Natural loops: header block -> blocks of its body. A loop's header dominates the block that jumps back to it."""
    reachable, todo = {0}, [0]
    while todo:
        new = set(edges[todo.pop()]) - reachable
        reachable |= new
        todo += new
    before = {n: [m for m in reachable if n in edges[m]] for n in reachable}
    dominators = {n: set(reachable) for n in reachable} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for n in sorted(reachable - {0}):
            new = {n} | set.intersection(*(dominators[m] for m in before[n]))
            changed |= new != dominators[n]
            dominators[n] = new
    loops = {}
    for n in reachable:
        for header in set(edges[n]) & dominators[n]:
            body, todo = loops.setdefault(header, {header}), [n]
            while todo:
                block = todo.pop()
                if block not in body:
                    body.add(block)
                    todo += before[block]
    return loops


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of nvdisasm's listing."""
    code, labels = [], []
    for line in text.splitlines():
        if found := re.match(r"\s*(\.L\w+):", line):
            labels.append(found[1])
        elif found := re.match(r"\s*/\*\w+\*/\s+(?:@(!?U?PT?\d*)\s+)?([\w.]+)\s*(.*?)\s*;", line):
            predicate, opcode, operands = found[1] or "", found[2], found[3]
            target = re.search(r"`\((\.L\w+)\)", operands)
            jumps = target is not None and opcode.startswith(("BRA", "CALL", "JMP"))
            if jumps and not predicate and (condition := re.match(r"(!?U?P\d)\b", operands)):
                predicate = condition[1]
            code.append(Instruction(opcode, predicate, operands, target[1] if jumps else "", tuple(labels)))
            labels = []
    return code


def parse_ptx(text: str) -> list[Instruction]:
    """The instructions of Triton's PTX, as far as loops need them."""
    code, labels = [], []
    body = re.sub(r"//[^\n]*", "", text[text.index(".entry") :])
    for line in re.split(r"[;\n]", body):
        if found := re.match(r"\s*(\$?\w+):", line):
            labels.append(found[1])
        elif found := re.match(r"\s*(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", line):
            predicate, opcode, operands = found[1] or "", found[2], found[3]
            target = operands.strip() if opcode.split(".")[0] == "bra" else ""
            code.append(Instruction(opcode, predicate, operands, target, tuple(labels)))
            labels = []
        elif line.strip() == "}" and code and code[-1].opcode == "ret":
            break
    return code


def _run_tool(tool: str, cubin: bytes, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([_tool(tool), *options, str(file)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout


@lru_cache(maxsize=2)
def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
