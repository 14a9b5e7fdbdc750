"""Owns the small PTX programs that the emulator's tests run: a body with its inputs, or one instruction on vectors."""

import numpy as np
import ptx

LANES = 32
DYNAMIC = ".extern .shared .align 16 .b8 dynamic[];"
WIDTHS = {"r": ("b32", 4), "h": ("b16", 2), "d": ("b64", 8)}


def program(body: str, inputs: int, outside: str = "") -> str:
    """A kernel of pointers in0, in1, ... and out; its body finds the thread in %tid and byte offsets in %off1 to %off16."""
    names = [f"in{n}" for n in range(inputs)] + ["out"]
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 k_{name}" for name in names)
    pointers = "\n".join(f"ld.param.b64 %{name}, [k_{name}];" for name in names)
    return f"""
.version 8.5
.target sm_90
.address_size 64
{outside}
.visible .entry k({parameters})
{{
    .reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %d<16>; .reg .b32 %tid, %cta, %n;
    .reg .b64 {", ".join(f"%{name}" for name in names)}, %i, %off1, %off2, %off4, %off8, %off16, %at;
    {pointers}
    mov.u32 %tid, %tid.x; mov.u32 %cta, %ctaid.x; mov.u32 %n, %ntid.x;
    mad.lo.s32 %tid, %cta, %n, %tid; cvt.u64.u32 %i, %tid; mov.u64 %off1, %i;
    mul.lo.u64 %off2, %i, 2; mul.lo.u64 %off4, %i, 4; mul.lo.u64 %off8, %i, 8; mul.lo.u64 %off16, %i, 16;
    {body}
    ret;
}}
"""


def compute(instruction: str, result: np.dtype | type, *inputs: np.ndarray) -> np.ndarray:
    """Runs an instruction of $0 = f($1, $2, ...) on vectors, an element a thread; $n are registers of the arrays' sizes."""
    count = len(inputs[0])
    padded = -(-count // LANES) * LANES
    arrays = [np.resize(array, padded) for array in inputs]
    lines, out = [], np.zeros(padded, dtype=result)
    for number, array in enumerate([out, *arrays]):
        letter, (kind, size) = next((k, v) for k, v in WIDTHS.items() if v[1] == array.dtype.itemsize)
        register = f"%{letter}{number}"
        instruction = instruction.replace(f"${number}", register)
        if number:
            lines.append(f"add.s64 %at, %in{number - 1}, %off{size}; ld.global.{kind} {register}, [%at];")
        else:
            last = f"add.s64 %at, %out, %off{size}; st.global.{kind} [%at], {register};"
    body = "\n".join([*lines, instruction, last])
    ptx.launch(program(body, len(arrays)), (padded // LANES,), 1, [*arrays, out])
    return out[:count]


def integers(draw, dtype, count=512):
    """Random bits, with the ends and neighbours of zero among them."""
    limits = np.iinfo(dtype)
    some = draw.integers(limits.min, limits.max, count, dtype=dtype, endpoint=True)
    some[:5] = limits.min, limits.max, 0, 1, limits.max - 1
    return draw.permutation(some)
