"""Computes the table of docs/processes.md: hours of `qtip quantize` for large models on several GPUs, from measured rates.

    python docs/hours.py [--rate 20] [--at-once 132] [--tflops 40] [--tflops64 30] [--network 50] [--devices 1 8 64]

Nothing is measured here; give the rates that were. Text of 256 windows of 2,048 tokens, of which 131,072 tokens go back.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

TOKENS, TOKENS_BACK, TILE = 256 * 2048, 1 << 17, 16

MODELS = {
    "8B": (32, 4096, 1024, 14336),
    "70B": (80, 8192, 1024, 28672),
    "405B": (126, 16384, 1024, 53248),
}
"""Blocks; hidden size, key and value features, and intermediate size of Llama 3.1."""

HESSIAN_SUMS = 2 * (1 + 1 / 8)
"""Of x x^T and of changes, over all tokens and over the held-out eighth."""


@dataclass(frozen=True)
class Rates:
    """Of one device. weights: encoded in a second where it has tiles enough. at_once: tiles that it encodes side by side.

    flops, flops64: of products in float32 and of factors in float64. network: bytes a second between devices.
    """

    weights: float
    at_once: int
    flops: float
    flops64: float
    network: float


def groups_of(hidden: int, key: int, middle: int) -> list[tuple[int, list[int]]]:
    """(inputs, outputs of each layer) of the groups of a block."""
    return [(hidden, [hidden, key, key]), (hidden, [hidden]), (hidden, [middle, middle]), (middle, [hidden])]


def encoding(inputs: int, outputs: int, rates: Rates, devices: int = 1) -> float:
    """Seconds of one two-sided layer, antidiagonal after antidiagonal, the tiles of each shared by `devices`."""
    rows, columns = outputs // TILE, inputs // TILE
    wave = rates.at_once * TILE * TILE / rates.weights
    seconds = 0.0
    for diagonal in range(rows + columns - 1):
        tiles = min(rows, columns, diagonal + 1, rows + columns - 1 - diagonal)
        seconds += math.ceil(math.ceil(tiles / devices) / rates.at_once) * wave
    return seconds


def around(inputs: int, outputs: list[int], rates: Rates) -> float:
    """Seconds that a group's factors and products of error and factor take."""
    factors = 3 * inputs**3 + sum(2 * rows**3 for rows in outputs)
    products = sum(2 * rows * inputs * (rows + inputs) for rows in outputs)
    return factors / rates.flops64 + products / rates.flops


def calibrating(model: str, rates: Rates, devices: int) -> float:
    """Seconds of `qtip calibrate` with as many slices as devices or more."""
    blocks, *sizes = MODELS[model]
    flops = traffic = 0.0
    for inputs, outputs in groups_of(*sizes):
        weights = inputs * sum(outputs)
        flops += TOKENS * 2 * (weights + inputs**2)
        flops += TOKENS_BACK * (6 * weights + 2 * sum(rows**2 for rows in outputs))
        traffic += 4 * (inputs**2 + 2 * sum(rows**2 for rows in outputs))
    return blocks * (flops / rates.flops / devices + (traffic / rates.network if devices > 1 else 0))


def behind_prefix(model: str, rates: Rates, devices: int) -> float:
    """Seconds of `qtip quantize`, whose groups follow one another: text and tiles are shared."""
    blocks, *sizes = MODELS[model]
    seconds = 0.0
    for inputs, outputs in groups_of(*sizes):
        weights = inputs * sum(outputs)
        # Some 3.4 passes of the block in all: the original, parts of the rounded one for each group, and on to the next block.
        flops = TOKENS * (3.4 * 2 * weights + HESSIAN_SUMS * 2 * inputs**2)
        seconds += flops / rates.flops / devices + around(inputs, outputs, rates)
        seconds += sum(encoding(inputs, rows, rates, devices) for rows in outputs)
        seconds += 4 * HESSIAN_SUMS * inputs**2 / rates.network if devices > 1 else 0
    return blocks * seconds


def spread(model: str, rates: Rates, devices: int) -> float:
    """Seconds of `qtip quantize --original-prefix`: whole groups, each to the device with the least to do."""
    blocks, *sizes = MODELS[model]
    costs = [
        around(inputs, outputs, rates) + sum(encoding(inputs, rows, rates) for rows in outputs)
        for inputs, outputs in groups_of(*sizes)
    ]
    loads = [0.0] * devices
    for _ in range(blocks):
        for cost in sorted(costs, reverse=True):
            loads[loads.index(min(loads))] += cost
    return max(loads)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=20.0, help="million weights a second of the encoder on one device")
    parser.add_argument("--at-once", type=int, default=132, help="tiles that one device encodes side by side")
    parser.add_argument("--tflops", type=float, default=40.0, help="10^12 float32 operations a second in products")
    parser.add_argument("--tflops64", type=float, default=30.0, help="the same of float64")
    parser.add_argument("--network", type=float, default=50.0, help="10^9 bytes a second between two devices")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    asked = parser.parse_args()
    rates = Rates(asked.rate * 1e6, asked.at_once, asked.tflops * 1e12, asked.tflops64 * 1e12, asked.network * 1e9)
    print("| model | devices | calibrate | quantize | quantize --original-prefix |\n|---|---|---|---|---|")
    for model in MODELS:
        for devices in asked.devices:
            hours = [stage(model, rates, devices) / 3600 for stage in (calibrating, behind_prefix, spread)]
            print(f"| {model} | {devices} | " + " | ".join(f"{each:.2g} h" for each in hours) + " |")


if __name__ == "__main__":
    main()
