"""Owns kernels that the checks of test_compile.py must find fault with, and one pair of which one costs more than the other."""

import os

import triton
import triton.language as tl

from qtipcli_kernels.compiling import CompileCase


@triton.jit
def decode_kernel(word_ptr, out_ptr, n, TURNS: tl.constexpr):
    """A loop that decodes four weights a thread, each in TURNS steps of two instructions."""
    lane = tl.arange(0, 32)
    total = tl.zeros((32,), tl.int32)
    for step in range(n):
        word = tl.load(word_ptr + step * 32 + lane)
        for shift in tl.static_range(4):
            state = word >> shift
            for _ in tl.static_range(TURNS):
                state = state * 34038481 + 76625530
                state ^= state >> 7
            total += state
    tl.store(out_ptr + lane, total)


@triton.jit
def spilling_kernel(word_ptr, out_ptr, n, SIZE: tl.constexpr):
    """Keeps more numbers in a thread than it has registers."""
    place = tl.arange(0, SIZE)
    x = tl.load(word_ptr + place)
    y = x
    for _ in range(n):
        y += x * y + (y >> 3)
        x ^= y
    tl.store(out_ptr + place, x + y)


@triton.jit
def wrong_kernel(word_ptr, out_ptr, n):
    tl.static_assert(False, "this kernel is wrong")


class Crashing:
    """In a kernel's place: takes the whole process down, as LLVM does where it meets what it cannot compile."""

    @property
    def arg_names(self) -> list[str]:
        os.abort()


def compile_cases():
    signature = {"word_ptr": "*i32", "out_ptr": "*i32", "n": "i32"}
    yield CompileCase("crashing", Crashing(), {}, {}, 1, nvidia_only=True)
    for turns in (4, 5):
        yield CompileCase(f"decode {turns}", decode_kernel, signature, {"TURNS": turns}, 1, weights_per_thread=4)
    yield CompileCase("spilling", spilling_kernel, signature, {"SIZE": 8192}, 1)
    yield CompileCase("wrong", wrong_kernel, signature, {}, 1)
