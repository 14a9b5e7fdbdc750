"""Owns the reading of PTX text: the emulator (ptx.py) gets instructions with parsed operands from it.

What it understands is what Triton 3.2 to 3.9 emits and what our inline assembler adds: scopes in braces, with registers and
labels of their own, and shared arrays declared anywhere. Source: PTX ISA 8.5, chapters 4 to 6.
"""

import re
import struct
from dataclasses import dataclass, field, replace
from functools import lru_cache

RESERVED_BYTES = 1024
"""What the system keeps at the start of a CTA's shared memory (CUDA C++ Programming Guide, compute capability 8.0 on): a
kernel's first array does not lie at address 0."""

TYPE = re.compile(r"^(pred|tf32|f64|f32|bf16x2|bf16|f16x2|f16|[usb](8|16|32|64))$")
NAME = r"[%$\w.]+"


@dataclass(frozen=True)
class Op:
    """One instruction. Operands are tuples, by kind:

    ("register", name), ("special", name), ("immediate", bits, float or None), ("symbol", name), ("label", name),
    ("address", operand, offset), ("vector", operands), ("pair", operands) for d|p, ("sink",) for _.
    predicate: register, and the truth value at which the instruction runs.
    """

    text: str
    name: str
    modifiers: tuple[str, ...]
    types: tuple[str, ...]
    operands: tuple[tuple, ...]
    predicate: tuple[str, bool] | None = None


@dataclass
class Program:
    """A kernel. registers: name -> bits; parameters: (name, bits); shared: symbol -> address; labels: name -> place in ops.

    static_bytes: shared memory up to the end of what the text itself declares; the dynamic array (size []) begins there.
    """

    ops: list[Op] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    parameters: list[tuple[str, int]] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)
    static_bytes: int = RESERVED_BYTES


def type_bits(name: str) -> int:
    """Width of a register or parameter of a fundamental type."""
    return 1 if name == "pred" else int(name.lstrip("usbf"))


@lru_cache(maxsize=32)
def parse(text: str) -> Program:
    """Read the first entry of a PTX text. Raises NotImplementedError for declarations that the emulator has no memory for."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*\.(loc|file|section)\b[^\n]*$", "", text, flags=re.MULTILINE)
    found = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)[^{]*\{", text, flags=re.DOTALL)
    if found is None:
        raise NotImplementedError("the PTX has no kernel")
    reader = _Reader()
    dynamic = re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\s*\]", text[: found.start()])
    for statement in re.findall(r"\.shared[^;]*;", text[: found.start()]):
        reader.declare_shared(statement.rstrip(";"))
    for parameter in filter(str.strip, found[2].split(",")):
        words = parameter.split()
        width = next(type_bits(word[1:]) for word in words if TYPE.match(word[1:]))
        reader.program.parameters.append((words[-1], width))
    reader.read_body(text[found.end() :])
    program = reader.finish()
    program.static_bytes = -(-program.static_bytes // 16) * 16
    program.shared |= dict.fromkeys(dynamic, program.static_bytes)
    return program


class _Reader:
    """Walks through a kernel's body; a scope maps the names declared in it to names that are unique in the kernel."""

    def __init__(self) -> None:
        self.program = Program()
        self._scopes: list[dict[str, str]] = [{}]
        self._chain = [0]  # numbers of the open scopes
        self._numbered = 0

    def read_body(self, text: str) -> None:
        position = 0
        while True:
            position = re.compile(r"\s*").match(text, position).end()
            if text[position] == "{":
                self._numbered += 1
                self._chain.append(self._numbered)
                self._scopes.append({})
                position += 1
            elif text[position] == "}":
                if len(self._scopes) == 1:
                    return
                self._scopes.pop()
                self._chain.pop()
                position += 1
            elif label := re.compile(r"([$\w]+)\s*:(?!:)").match(text, position):
                self.program.labels[f"{label[1]}@{self._chain[-1]}"] = len(self.program.ops)
                position = label.end()
            else:
                end = text.index(";", position)
                if statement := text[position:end].strip():
                    self._statement(statement)
                position = end + 1

    def finish(self) -> Program:
        """Branches get the label of the innermost scope that has it."""
        ops = self.program.ops
        for place, op in enumerate(ops):
            if op.name == "bra":
                label = next((name for name in op.operands[0][1] if name in self.program.labels), None)
                if label is None:
                    raise NotImplementedError(f"a branch to no label of the kernel: {op.text}")
                ops[place] = replace(op, operands=(("label", label),))
        return self.program

    def declare_shared(self, statement: str) -> None:
        found = re.search(rf"\.align\s+(\d+)\s+\.([bus]\d+)\s+({NAME})\[\s*(\d+)\s*\]", statement)
        if found is None:
            return  # the dynamic array
        align, width = int(found[1]), type_bits(found[2]) // 8
        start = -(-self.program.static_bytes // align) * align
        self.program.shared[found[3]] = start
        self.program.static_bytes = start + width * int(found[4])

    def _statement(self, statement: str) -> None:
        if statement.startswith(".reg"):
            self._declare_registers(statement)
        elif statement.startswith(".shared"):
            self.declare_shared(statement)
        elif statement.startswith((".pragma", ".param")):
            pass
        elif statement.startswith("."):
            raise NotImplementedError(f"PTX declaration: {statement}")
        else:
            self.program.ops.append(self._instruction(" ".join(statement.split())))

    def _declare_registers(self, statement: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement, flags=re.DOTALL).groups()
        for name in re.split(r"\s*,\s*", names.strip()):
            numbered = re.match(rf"({NAME})<(\d+)>$", name)
            all_names = [f"{numbered[1]}{n}" for n in range(int(numbered[2]))] if numbered else [name]
            for each in all_names:
                unique = f"{each}@{self._chain[-1]}"
                self._scopes[-1][each] = unique
                self.program.registers[unique] = type_bits(kind)

    def _instruction(self, text: str) -> Op:
        found = re.match(rf"(?:@(!?)\s*({NAME})\s+)?([\w.:]+)\s*(.*)$", text)
        predicate = (self._lookup(found[2]), not found[1]) if found[2] else None
        name, *parts = found[3].split(".")
        types = tuple(part for part in parts if TYPE.match(part))
        modifiers = tuple(part for part in parts if not TYPE.match(part))
        if name == "bra":
            operands = (("label", tuple(f"{found[4].strip()}@{scope}" for scope in reversed(self._chain))),)
        else:
            operands = tuple(self._operand(each) for each in _split(found[4]))
        return Op(text, name, modifiers, types, operands, predicate)

    def _lookup(self, name: str) -> str | None:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    def _operand(self, text: str) -> tuple:
        text = text.strip()
        if text.startswith("{"):
            return ("vector", tuple(self._operand(each) for each in _split(text[1:-1])))
        if text.startswith("["):
            base, sign, offset = re.match(rf"\[\s*({NAME})\s*(?:([+-])\s*(-?\w+))?\s*\]$", text).groups()
            return ("address", self._operand(base), int(offset or "0", 0) * (-1 if sign == "-" else 1))
        if "|" in text:
            return ("pair", tuple(self._operand(each) for each in text.split("|")))
        if text == "_":
            return ("sink",)
        if register := self._lookup(text):
            return ("register", register)
        if text.startswith("%"):
            return ("special", text)
        return _immediate(text) or ("symbol", text)


def _immediate(text: str) -> tuple | None:
    if found := re.match(r"0[fF]([0-9a-fA-F]{8})$|0[dD]([0-9a-fA-F]{16})$", text):
        return ("immediate", int(found[1] or found[2], 16), None)
    if re.match(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$", text):
        number = text.rstrip("U")
        octal = re.match(r"-?0\d+$", number)
        return ("immediate", int(number, 8 if octal else 0) & (2**64 - 1), None)
    if re.match(r"-?\d+\.\d*([eE][+-]?\d+)?$", text):
        return ("immediate", struct.unpack("<Q", struct.pack("<d", float(text)))[0], float(text))
    return None


def _split(operands: str) -> list[str]:
    """At commas outside of braces and brackets."""
    return [part for part in re.split(r",\s*(?![^{]*\})(?![^\[]*\])", operands) if part.strip()]
