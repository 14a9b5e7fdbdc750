"""Owns the benchmark of whole models: prefill and decode speed and memory, packed against plain, in turns in one run."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from qtipcli.errors import QtipError, SettingsError
from qtipcli.nn.linear import TrellisLinear
from qtipcli.nn.swap import dequantize, packed_layers, packed_modules
from qtipcli.quant.transform import Transform
from qtipcli.stages import random_model
from qtipcli.stages.bench import chosen_device, device_name
from qtipcli.stages.load import load_model
from qtipcli.stages.model_passes import Decoder, Prefill, in_turns
from qtipcli.stages.progress import Silent, Watcher
from qtipcli.stages.room import free_bytes
from qtipcli.stages.sizes import config_of
from qtipcli_kernels import device as kernel_device
from qtipcli_kernels import dispatch
from qtipcli_kernels.spec import TrellisSpec

DTYPES = ("float16", "bfloat16", "float32")

LARGEST_ERROR = 4.0
"""Most error of a packed layer against float64, in units of torch's product in the same dtype: besides the product, which may
have twice that error, each of its two transforms rounds once more."""

CHECKED_ROWS = 3

STRIP_OUTPUTS = 2048
"""Outputs of the dense oracle that are taken to float64 at a time."""

DECODE_PROMPT = 128
"""Tokens in the cache when decoding begins."""

HEADROOM = 1.25
"""A model is taken to fit where this many times its weights are free: activations and the cache come on top."""


@dataclass(frozen=True)
class Asked:
    """What to measure a packed model with.

    prompts: lengths of the prefills, in tokens. tokens: to decode. seconds: measuring time of each row. graphs: CUDA graphs on
    a GPU. compiled: decode through torch.compile. baseline: measure the plain model, too.
    """

    prompts: tuple[int, ...] = (512, 2048)
    tokens: int = 64
    seconds: float = 2.0
    graphs: bool = True
    compiled: bool = False
    baseline: bool = True

    def __post_init__(self) -> None:
        if not self.prompts or min(*self.prompts, self.tokens) < 1:
            raise SettingsError("there are no tokens to measure with", "give prompts and tokens of 1 or more")


def run(
    directory: str | None = None,
    against: str | None = None,
    random: str | None = None,
    spec: TrellisSpec | None = None,
    transform: Transform | None = None,
    device: str | None = None,
    dtype: str | None = None,
    asked: Asked | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Measure a packed model: one from `directory`, or one with random weights in the sizes of `random`.

    against: the unquantized model; None is the packed one with its weights decoded to dense ones, which has the same speed.
    random: a known name (`stages.sizes`), a config.json or a directory with one; packed with `spec` and `transform`.
    device: None is a GPU where there is one, else the CPU. dtype: of the activations and of the plain weights; None is the
    model's own on a GPU (float16 for random ones) and bfloat16 on a CPU.

    Returns {"device", "dtype", "model", "original", "bits_per_weight", "implementation", "notes", "rows"}. Rows are prefills,
    decode, weights and peak memory: measure, unit, packed, original (None where it was not measured), ratio (above 1 the packed
    one is better), how. Raises QtipError, and gives no speed, where the packed model computes something wrong.
    """
    if (directory is None) == (random is None):
        raise SettingsError("one model is measured at a time", "give a packed directory, or --random NAME")
    if random is not None and against is not None:
        raise SettingsError("a random model has no original on disk", "leave --against out: its own weights are decoded")
    if dtype is not None and dtype not in DTYPES:
        raise SettingsError(f"there is no dtype {dtype!r}", f"choose one of {', '.join(DTYPES)}")
    asked, watcher, where = asked or Asked(), watcher or Silent(), chosen_device(device)
    with torch.no_grad():
        packed = _packed_model(directory, random, spec, transform, where, dtype)
        return _Bench(packed, where, asked, watcher).run(random or str(directory), against)


def _packed_model(
    directory: str | None,
    random: str | None,
    spec: TrellisSpec | None,
    transform: Transform | None,
    device: torch.device,
    dtype: str | None,
) -> Any:
    kind = getattr(torch, dtype) if dtype else None if device.type == "cuda" else torch.bfloat16
    if random is not None:
        return random_model.build(config_of(random), device, kind or torch.float16, spec or TrellisSpec("hyb", 4), transform)
    model = load_model(directory, kind).to(device)
    if not packed_layers(model):
        raise QtipError(f"{directory} is not a qtip model", "give a directory that qtip packed; qtip quantize makes one")
    return model


class _Bench:
    """One run with one packed model."""

    def __init__(self, packed: Any, device: torch.device, asked: Asked, watcher: Watcher) -> None:
        self.packed, self.device, self.asked, self.watcher = packed, device, asked, watcher
        self.notes: list[str] = []
        self.original: Any = None

    def run(self, name: str, against: str | None) -> dict[str, Any]:
        steps = len(self.asked.prompts) + 3
        self.watcher.begin("model", steps)
        peaks = [self._peak(self.packed, 0)]
        self.watcher.advance("packed model runs")
        self._check_layers()
        self.watcher.advance("packed layers are right")
        what = self._load_original(against)
        if self.original is not None:
            peaks.append(self._peak(self.original, weight_bytes(self.packed)))
        rows = [self._speed(f"prefill of {length}", Prefill, length) for length in self.asked.prompts]
        rows.append(self._speed("decode", Decoder, DECODE_PROMPT, self.asked.tokens))
        weights = [weight_bytes(model) / 1e6 for model in self._models()]
        rows.append(_row("weights", "MB", weights, "all tensors of the model", smaller_is_better=True))
        how = "torch.cuda.max_memory_allocated" if self.device.type == "cuda" else "of the process, its libraries included"
        rows.append(_row("peak memory", "MB", [peak and peak / 1e6 for peak in peaks], how, smaller_is_better=True))
        served = dispatch.implementation(self.device)
        if served == "reference":
            why = kernel_device.why_not(self.device) or "none is written for it"
            self.notes.append(f"served by the slow reference, not by a kernel: {why}")
        return {
            "device": device_name(self.device),
            "dtype": str(self.packed.dtype).removeprefix("torch."),
            "model": name,
            "original": what,
            "bits_per_weight": random_model.stored_bits(self.packed),
            "implementation": served,
            "notes": self.notes,
            "rows": rows,
        }

    def _models(self) -> list[Any]:
        return [model for model in (self.packed, self.original) if model is not None]

    def _speed(self, measure: str, kind: type, *sizes: int) -> dict[str, Any]:
        graphs = self.asked.graphs and self.device.type == "cuda"
        more = {"compiled": self.asked.compiled} if kind is Decoder else {}
        passes = [kind(model, *sizes, graphs=graphs, **more) for model in self._models()]
        rates = in_turns(passes, self.asked.seconds, self.device)
        self.watcher.advance(f"{measure}: {rates[0]:.4g} tokens/s")
        return _row(measure, "tokens/s", rates, " against ".join(dict.fromkeys(each.how for each in passes)))

    def _peak(self, model: Any, others: int) -> float | None:
        """Most bytes in use during the longest prefill and a few decoded tokens, less `others`: another model's weights."""
        if not _reset_peak(self.device):
            self.notes.append("peak memory is not known: this system does not let a process set its peak back")
            return None
        Prefill(model, max(self.asked.prompts), graphs=False)
        Decoder(model, DECODE_PROMPT, 2, graphs=False).run()
        return _peak_bytes(self.device) - others

    def _check_layers(self) -> None:
        """One packed layer of each layout against a float64 product with the matrix that it stands for."""
        layers = {layer.layout: (name, layer) for name, layer in packed_layers(self.packed).items()}
        for name, layer in layers.values():
            error = layer_error(layer, self.packed.dtype)
            if not error <= LARGEST_ERROR:
                raise QtipError(
                    f"layer {name} is wrong by {error:.3g} times torch's {self.packed.dtype} error: no speed is given",
                    "report this as a bug",
                )

    def _load_original(self, against: str | None) -> str | None:
        if not self.asked.baseline:
            return None
        if against is not None:
            self.original = load_model(against, self.packed.dtype).to(self.device)
            return against
        size = self.packed.dtype.itemsize
        dense = sum(layer.layout.weights * size for layer in packed_modules(self.packed).values()) + weight_bytes(self.packed)
        free = free_bytes(self.device)
        if dense * HEADROOM > free:
            self.notes.append(f"the plain model needs {dense * HEADROOM / 1e9:.1f} GB, {free / 1e9:.1f} are free: not measured")
            return None
        self.original = copy.deepcopy(self.packed)
        dequantize(self.original, self.packed.dtype)
        return f"its own weights, decoded to {str(self.packed.dtype).removeprefix('torch.')}"


def _row(measure: str, unit: str, figures: list[float | None], how: str, smaller_is_better: bool = False) -> dict[str, Any]:
    packed, original = (*figures, None)[:2]
    ratio = None
    if packed and original:
        ratio = original / packed if smaller_is_better else packed / original
    return {"measure": measure, "unit": unit, "packed": packed, "original": original, "ratio": ratio, "how": how}


def layer_error(layer: TrellisLinear, dtype: torch.dtype) -> float:
    """Error of a packed layer on random rows in `dtype` against float64, over that of torch's product in `dtype`.

    The oracle is the layer's matrix as `weight_dense` gives it, which shares the decoder with the layer, but not the product;
    the decoder has tests of its own, equality bit for bit.
    """
    device = layer.trellis.device
    x = torch.randn(CHECKED_ROWS, layer.in_features, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    found, dense_OI = layer(x).double(), layer.weight_dense()
    squares = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(0, layer.out_features, STRIP_OUTPUTS):
        place = slice(first, first + STRIP_OUTPUTS)
        strip = dense_OI[place]
        bias = None if layer.bias is None else layer.bias[place]
        exact = functional.linear(x.double(), strip.double(), None if bias is None else bias.double())
        plain = functional.linear(x, strip.to(dtype), None if bias is None else bias.to(dtype))
        squares += torch.stack([(y - exact).square().sum() for y in (found[:, place], plain.double())])
    return float((squares[0] / squares[1].clamp(min=torch.finfo(torch.float64).tiny)).sqrt())


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _reset_peak(device: torch.device) -> bool:
    """Set the peak back to what is in use now; False where the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak_bytes(device: torch.device) -> int:
    """Most bytes since `_reset_peak`; on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
