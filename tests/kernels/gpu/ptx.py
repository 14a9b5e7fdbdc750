"""Owns a PTX emulator: runs the PTX that Triton generates on NumPy arrays, thread for thread, so that a compiled kernel can be
checked bit for bit, and its memory accesses one by one, without a GPU.

    ptx.launch(text, grid=(4,), num_warps=8, arguments=[x, weight, out, 4096], shared_bytes=metadata.shared)

A batch of CTAs runs in lockstep: a register is one array over all their threads. Threads that branch apart wait for those whose
place in the text is lowest, so they meet again behind a loop or an if. Instructions that Triton does not emit for our kernels
raise NotImplementedError with their text; asynchronous matrix instructions (wgmma, tcgen05), TMA and atomics are among them.
Beyond a GPU's own faults it raises MemoryAccessError (ptx_memory.py), DeadlockError and DivergedError. Source: PTX ISA 8.5.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ptx_alu import ALU, BYTE_DOTS, COUNT_OPERANDS, bits_of, compare, convert, dtype_of
from ptx_memory import SHARED_LIMIT, WARP, AsyncCopies, GlobalMemory, MemoryAccessError, SharedMemory, Traffic
from ptx_text import Op, Program, parse
from ptx_warp import WARP_INSTRUCTIONS, DivergedError

__all__ = ["DeadlockError", "DivergedError", "MemoryAccessError", "Report", "launch"]

BATCH_THREADS = 8192
"""Threads that run in lockstep: enough to hide NumPy's overhead, few enough for the cache."""

MAX_STEPS = 20_000_000
"""Instructions of a batch after which a kernel is taken to loop for ever."""

Array = np.ndarray


class DeadlockError(RuntimeError):
    """A barrier that some threads of the CTA never reach, or a kernel without an end."""


@dataclass(frozen=True)
class Report:
    """What a launch did. warp_instructions: instructions times the warps that took part; by_opcode the same, by first word."""

    warp_instructions: int
    by_opcode: dict[str, int]
    traffic: Traffic


def launch(
    text: str,
    grid: Sequence[int],
    num_warps: int,
    arguments: Sequence[object],
    shared_bytes: int | None = None,
    profile: bool = False,
) -> Report:
    """Run the (one) kernel of a PTX text; arrays are changed in place.

    arguments: for pointers contiguous NumPy arrays or CPU tensors (any dtype), else ints and floats, in the kernel's order;
    Triton's scratch pointers at the end may be left out. shared_bytes: dynamic shared memory (Triton's metadata.shared); None
    allows as much as there is. profile: also count memory sectors and bank conflicts.
    Raises NotImplementedError, MemoryAccessError, DeadlockError, DivergedError; TypeError for arguments that do not fit.
    """
    program = parse(text)
    traffic = Traffic(wanted=profile)
    arrays = [_as_array(a) for a in arguments if isinstance(a, (np.ndarray, torch.Tensor))]
    memory = GlobalMemory(arrays, traffic)
    values = _parameter_values(program, arguments, list(memory.addresses))
    dynamic = SHARED_LIMIT - program.static_bytes if shared_bytes is None else shared_bytes
    sizes = (*grid, 1, 1)[:3]
    ctas = np.arange(int(np.prod(sizes)))
    at_once = max(1, BATCH_THREADS // (num_warps * WARP))
    counts: dict[str, int] = {}
    for start in range(0, len(ctas), at_once):
        batch = ctas[start : start + at_once]
        shared = SharedMemory(len(batch), program.static_bytes + dynamic, num_warps * WARP, traffic)
        machine = Machine(program, batch, sizes, num_warps, values, memory, shared)
        machine.run()
        for name, count in machine.counts.items():
            counts[name] = counts.get(name, 0) + count
    memory.copy_back()
    return Report(sum(counts.values()), counts, traffic)


def _as_array(argument: object) -> Array:
    array = argument
    if isinstance(argument, torch.Tensor):
        if not argument.is_contiguous():
            raise TypeError("a tensor must be contiguous")
        array = argument.detach().reshape(-1).view(torch.uint8).numpy()
    if not array.flags.c_contiguous:
        raise TypeError("an array must be contiguous")
    return array


def _parameter_values(program: Program, arguments: Sequence[object], addresses: list[int]) -> dict[str, int]:
    if not len(arguments) <= len(program.parameters) <= len(arguments) + 2:
        raise TypeError(f"the kernel takes {len(program.parameters)} arguments (two may be scratch), got {len(arguments)}")
    padded = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    values = {}
    for (name, width), argument in zip(program.parameters, padded, strict=True):
        if isinstance(argument, (np.ndarray, torch.Tensor)):
            values[name] = addresses.pop(0)
        elif isinstance(argument, float):
            values[name] = int(np.array(argument, dtype=f"f{width // 8}").view(f"u{width // 8}"))
        else:
            values[name] = int(argument) & ((1 << width) - 1)
    return values


class Machine:
    """Some CTAs of a launch. Instructions reach registers by `value` and `assign`, in bits or as a type's values."""

    def __init__(self, program, ctas, grid, num_warps, parameters, memory, shared) -> None:
        self.program, self.memory, self.shared, self.parameters = program, memory, shared, parameters
        threads = num_warps * WARP
        self.threads = len(ctas) * threads
        thread, cta = np.tile(np.arange(threads), len(ctas)), np.repeat(ctas, threads)
        self.cta = np.repeat(np.arange(len(ctas)), threads)
        special = {"tid.x": thread, "ntid.x": threads, "laneid": thread % WARP, "warpid": thread // WARP, "nwarpid": num_warps}
        special |= {"ctaid.x": cta % grid[0], "ctaid.y": cta // grid[0] % grid[1], "ctaid.z": cta // (grid[0] * grid[1])}
        special |= {f"nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)}
        special |= dict.fromkeys(("tid.y", "tid.z"), 0) | dict.fromkeys(("ntid.y", "ntid.z"), 1)
        self._special = {f"%{n}": np.broadcast_to(np.asarray(v, dtype=np.uint32), self.threads) for n, v in special.items()}
        self._registers: dict[str, Array] = {}
        self.everyone = np.ones(self.threads, dtype=bool)
        self.copies = AsyncCopies(memory, shared, self.threads)
        self.counts: dict[str, int] = {}

    def run(self) -> None:
        """Until every thread has returned."""
        ops, waiting = self.program.ops, np.zeros(self.threads, dtype=bool)
        at: dict[int, Array] = {0: self.everyone}  # place in the text -> the threads that are there
        resume = np.full(self.threads, -1)  # where threads that wait at a barrier go on
        for _ in range(MAX_STEPS):
            if not at:
                break
            place = min(at)
            op, lanes = ops[place], at.pop(place)
            runs = lanes if op.predicate is None else lanes & self._predicate(op)
            self._count(op, runs)
            if op.name == "bra":
                self._go(at, self.program.labels[op.operands[0][1]], runs)
                self._go(at, place + 1, lanes & ~runs)
            elif op.name in ("ret", "exit"):
                self._go(at, place + 1, lanes & ~runs)
                self._release(at, waiting, resume)
            elif op.name in ("bar", "barrier") and "warp" not in op.modifiers:
                waiting |= runs
                resume[runs] = place + 1
                self._go(at, place + 1, lanes & ~runs)
                self._release(at, waiting, resume)
            else:
                if runs is lanes or runs.any():
                    execute(self, op, runs)
                self._go(at, place + 1, lanes)
        else:
            raise DeadlockError(f"no end after {MAX_STEPS} instructions")
        if waiting.any():
            raise DeadlockError(f"{int(waiting.sum())} threads wait at a barrier that the rest of their CTA left out")

    @staticmethod
    def _go(at: dict[int, Array], place: int, lanes: Array) -> None:
        if lanes.any():
            at[place] = at[place] | lanes if place in at else lanes

    def _release(self, at: dict[int, Array], waiting: Array, resume: Array) -> None:
        """Let those CTAs pass their barrier none of whose threads is on its way to it."""
        ctas = np.unique(self.cta[waiting])
        busy = np.unique(self.cta[np.logical_or.reduce([*at.values(), np.zeros(self.threads, dtype=bool)])])
        free = np.setdiff1d(ctas, busy)
        if len(free) == 0:
            return
        self.shared.barrier(free)
        released = waiting & np.isin(self.cta, free)
        places = np.unique(resume[released])
        if len(places) > 1 and any(len(np.unique(resume[released & (self.cta == c)])) > 1 for c in free):
            raise DeadlockError("threads of one CTA wait at different barriers")
        waiting &= ~released
        for place in places:
            self._go(at, int(place), released & (resume == place))

    def _count(self, op: Op, lanes: Array) -> None:
        warps = self.threads // WARP if lanes is self.everyone else int(lanes.reshape(-1, WARP).any(axis=1).sum())
        self.counts[op.name] = self.counts.get(op.name, 0) + warps

    def _predicate(self, op: Op) -> Array:
        register, wanted = op.predicate
        bits = self.bits(("register", register)).astype(bool)
        return bits if wanted else ~bits

    def bits(self, operand: tuple) -> Array:
        """An operand as it is stored: unsigned, as wide as its register (an immediate: uint64, one element)."""
        kind = operand[0]
        if kind == "register":
            return self._register(operand[1])
        if kind == "special":
            if operand[1] not in self._special:
                raise NotImplementedError(f"special register {operand[1]}")
            return self._special[operand[1]]
        if kind == "immediate":
            return np.array([operand[1]], dtype=np.uint64)
        if kind == "symbol":
            return np.array([self.program.shared[operand[1]]], dtype=np.uint64)
        raise NotImplementedError(f"operand {operand}")

    def _register(self, name: str) -> Array:
        if name not in self._registers:
            width = self.program.registers[name]
            poison = True if width == 1 else 0xDEADBEEFDEADBEEF >> (64 - width)  # never written: must not look harmless
            dtype = np.bool_ if width == 1 else np.dtype(f"u{width // 8}")
            self._registers[name] = np.full(self.threads, poison, dtype=dtype)
        return self._registers[name]

    def value(self, operand: tuple, type_name: str) -> Array:
        """An operand as values of a type; a packed type's have a last axis of two."""
        bits = self.bits(operand)
        if type_name == "pred":
            return bits.astype(bool)
        dtype, width = np.dtype(dtype_of(type_name)), bits_of(type_name) // 8
        if operand[0] == "immediate" and operand[2] is not None and dtype.kind == "f" and not type_name.endswith("x2"):
            return np.array([operand[2]], dtype=dtype)
        packed = np.ascontiguousarray(bits.astype(f"u{width}"))
        return packed.view(dtype).reshape(-1, 2) if type_name.endswith("x2") else packed.view(dtype)

    def assign(self, operand: tuple, value: Array, lanes: Array) -> None:
        """Write values to a register, for some threads; narrower ones are extended by their sign."""
        if operand[0] == "sink":
            return
        name = operand[1]
        width = self.program.registers[name]
        if width == 1:
            bits = value.astype(bool)
        else:
            if value.ndim == 2:
                value = np.ascontiguousarray(value).view(np.uint32).reshape(-1)
            if value.dtype.kind != "i":
                value = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
            bits = value.astype(f"{value.dtype.kind}{width // 8}").view(f"u{width // 8}")
        if lanes is self.everyone:
            self._registers[name] = bits if len(bits) == self.threads else np.broadcast_to(bits, self.threads)
        else:
            self._registers[name] = np.where(lanes, bits, self._register(name))

    def addresses(self, operand: tuple) -> Array:
        """uint64 addresses of a memory operand."""
        _, base, offset = operand
        start = self.bits(base).astype(np.uint64)
        width = self.program.registers.get(base[1], 64) if base[0] == "register" else 64
        return np.broadcast_to((start + np.uint64(offset % 2**64)) & np.uint64(2**width - 1), self.threads)


def execute(machine: Machine, op: Op, lanes: Array) -> None:
    """One instruction that is neither a branch nor a barrier, for the threads of `lanes`."""
    if op.name in WARP_INSTRUCTIONS:
        WARP_INSTRUCTIONS[op.name](machine, op, lanes)
    elif op.name in ALU:
        _alu(machine, op, lanes)
    elif op.name in _OTHERS:
        _OTHERS[op.name](machine, op, lanes)
    else:
        raise NotImplementedError(f"PTX instruction: {op.text}")


def _alu(machine: Machine, op: Op, lanes: Array) -> None:
    type_name = op.types[-1]
    counted = COUNT_OPERANDS.get(op.name, ())
    sources = []
    for number, operand in enumerate(op.operands[1:]):
        wide = op.name == "mad" and "wide" in op.modifiers and number == 2
        plain = "u32" if number in counted else f"{type_name[0]}{2 * bits_of(type_name)}" if wide else type_name
        sources.append(machine.value(operand, plain))
    with np.errstate(all="ignore"):
        machine.assign(op.operands[0], ALU[op.name](type_name, op.modifiers, *sources), lanes)


def _byte_dot(machine: Machine, op: Op, lanes: Array) -> None:
    signs = tuple(t for t in op.types)
    sources = [machine.value(operand, "u32") for operand in op.operands[1:]]
    sources = [np.broadcast_to(source, machine.threads) for source in sources]
    machine.assign(op.operands[0], BYTE_DOTS[op.name]((*op.modifiers, *signs), *sources), lanes)


def _move(machine: Machine, op: Op, lanes: Array) -> None:
    target, source = op.operands
    if target[0] == "vector":  # unpack
        width = bits_of(op.types[-1]) // len(target[1])
        bits = machine.value(source, f"b{bits_of(op.types[-1])}").astype(np.uint64)
        for part, register in enumerate(target[1]):
            machine.assign(register, (bits >> np.uint64(part * width)) & np.uint64(2**width - 1), lanes)
    elif source[0] == "vector":  # pack
        width = bits_of(op.types[-1]) // len(source[1])
        packed = np.zeros(1, dtype=np.uint64)
        for part, each in enumerate(source[1]):
            packed = packed | machine.value(each, f"b{width}").astype(np.uint64) << np.uint64(part * width)
        machine.assign(target, packed, lanes)
    else:
        machine.assign(target, machine.value(source, op.types[-1]), lanes)


def _convert(machine: Machine, op: Op, lanes: Array) -> None:
    with np.errstate(all="ignore"):
        if op.types[0].endswith("x2"):  # two floats to a pair: the first one to the upper half
            to = op.types[0][:-2]
            high, low = (convert(to, op.types[1], op.modifiers, machine.value(o, op.types[1])) for o in op.operands[1:])
            pair = high.view(np.uint16).astype(np.uint32) << np.uint32(16) | low.view(np.uint16)
            machine.assign(op.operands[0], pair, lanes)
        else:
            to, from_ = op.types
            machine.assign(op.operands[0], convert(to, from_, op.modifiers, machine.value(op.operands[1], from_)), lanes)


def _compare(machine: Machine, op: Op, lanes: Array) -> None:
    a, b = (machine.value(operand, op.types[-1]) for operand in op.operands[1:3])
    result = compare(op.modifiers[0], op.types[-1], a, b)
    join = next((m for m in op.modifiers[1:] if m in ("and", "or", "xor")), None)
    targets = op.operands[0][1] if op.operands[0][0] == "pair" else (op.operands[0],)
    for target, each in zip(targets, (result, ~result), strict=False):
        if join:
            other = machine.value(op.operands[3], "pred")
            each = {"and": each & other, "or": each | other, "xor": each ^ other}[join]
        machine.assign(target, each, lanes)


def _select(machine: Machine, op: Op, lanes: Array) -> None:
    a, b = (machine.value(operand, op.types[-1].replace("f", "b")) for operand in op.operands[1:3])
    machine.assign(op.operands[0], np.where(machine.value(op.operands[3], "pred"), a, b), lanes)


def _elements(operand: tuple) -> tuple[tuple, ...]:
    return operand[1] if operand[0] == "vector" else (operand,)


def _load(machine: Machine, op: Op, lanes: Array) -> None:
    targets = _elements(op.operands[0])
    if "param" in op.modifiers:
        start = machine.parameters[op.operands[1][1][1]] >> (8 * op.operands[1][2])
        for number, target in enumerate(targets):
            width = bits_of(op.types[-1])
            bits = np.array([start >> (number * width) & (2**width - 1)], dtype=np.uint64)
            machine.assign(target, bits.astype(f"u{width // 8}").view(dtype_of(op.types[-1])), lanes)
        return
    memory = _space(machine, op)
    values = memory.read(machine.addresses(op.operands[1]), dtype_of(op.types[-1]), len(targets), lanes)
    for target, value in zip(targets, values, strict=True):
        machine.assign(target, value, lanes)


def _store(machine: Machine, op: Op, lanes: Array) -> None:
    bits = f"b{bits_of(op.types[-1])}"
    values = [np.broadcast_to(machine.value(each, bits), machine.threads) for each in _elements(op.operands[1])]
    _space(machine, op).write(machine.addresses(op.operands[0]), values, lanes)


def _space(machine: Machine, op: Op) -> GlobalMemory | SharedMemory:
    if any(modifier.startswith("shared") for modifier in op.modifiers):
        return machine.shared
    if "global" in op.modifiers:
        return machine.memory
    raise NotImplementedError(f"state space of {op.text}")


def _copy(machine: Machine, op: Op, lanes: Array) -> None:
    if op.modifiers[0] != "async" or "bulk" in op.modifiers or "mbarrier" in op.modifiers:
        raise NotImplementedError(f"PTX instruction: {op.text}")
    if "commit_group" in op.modifiers:
        machine.copies.commit(lanes)
    elif "wait_group" in op.modifiers:
        machine.copies.wait(op.operands[0][1], lanes)
    elif "wait_all" in op.modifiers:
        machine.copies.wait(None, lanes)
    else:
        size = op.operands[2][1]
        taken = np.full(machine.threads, size)
        if len(op.operands) > 3:
            taken = np.broadcast_to(machine.value(op.operands[3], "u32"), machine.threads)
        if np.any(lanes & (taken != size) & (taken != 0)):
            raise NotImplementedError(f"a copy of a part: {op.text}")
        machine.copies.start(machine.addresses(op.operands[0]), machine.addresses(op.operands[1]), size, taken, lanes)


def _nothing(machine: Machine, op: Op, lanes: Array) -> None:
    """Fences, hints and barriers of a warp: the emulator runs warps in step and memory in order."""


def _trap(machine: Machine, op: Op, lanes: Array) -> None:
    raise RuntimeError(f"the kernel trapped: {op.text}")


_OTHERS: dict[str, Callable] = {
    **dict.fromkeys(BYTE_DOTS, _byte_dot),
    **dict.fromkeys(("membar", "fence", "bar", "barrier", "griddepcontrol", "prefetch", "prefetchu"), _nothing),
    "trap": _trap,
    "mov": _move,
    "cvta": _move,
    "cvt": _convert,
    "setp": _compare,
    "selp": _select,
    "ld": _load,
    "st": _store,
    "cp": _copy,
}
