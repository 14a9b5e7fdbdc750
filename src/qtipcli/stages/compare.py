"""Owns `qtip eval --compare`: several models on the same windows beside one original, as rows from which one can be chosen.

Only this file knows when a comparison is a fair one, which rows are on the Pareto front, and which row is compared to which.
One evaluated model is in memory at a time, and the original only while its logits are not kept (stages.reference).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, prod
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import cached_file

from qtipcli.data.text import EVALUATION_DATA, EVALUATION_SPLIT, SHORT_NAMES_WINDOWS, load_documents
from qtipcli.data.windows import Windows
from qtipcli.errors import QtipError, SettingsError
from qtipcli.hub.config import METHOD, QtipConfig
from qtipcli.job.header import read_header
from qtipcli.model.source import AGAIN, CONFIG_FILE, SINGLE_FILE, index_weight_map
from qtipcli.stages import blockwise, evaluate, measure
from qtipcli.stages.evaluate import EvaluationResult, Predictions
from qtipcli.stages.load import check_name, load_config
from qtipcli.stages.pack import INDEX_FILE
from qtipcli.stages.progress import Silent, Watcher
from qtipcli.stages.reference import DEFAULT_CACHE_GIB, KeptLogits
from qtipcli.untrusted import read_table


@dataclass(frozen=True)
class Stored:
    """What a model takes on disk.

    Attributes:
        bits_per_weight: of its packed layers, with scales and tables; of a plain model's matrices; None for another format.
        megabytes: of all its tensors, 10^6 bytes; None where it has no safetensors.
        layers: names of the packed layers; None for a model that is not packed.
    """

    bits_per_weight: float | None
    megabytes: float | None
    layers: frozenset[str] | None


@dataclass(frozen=True)
class _Measured:
    """One model's part of the comparison.

    original: the original's own perplexity, as this model's evaluation saw it. kl_WP: KL to it of every prediction, float64.
    """

    name: str
    stored: Stored
    result: EvaluationResult
    original: EvaluationResult
    kl_WP: np.ndarray


def run(
    models: Sequence[str],
    base: str | None,
    data: str | None = None,
    context: int | None = None,
    windows: int | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    against: str | None = None,
    cache_gib: float | None = None,
    stream: bool | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Evaluate every model of `models` on the same windows, beside `base`.

    data, context, windows, dtype: as in measure.run, for all models alike; the windows are cut by the base's tokenizer.
    against: one of `models`, to which all others are compared; None compares each row to the one above it.
    cache_gib: of the file that keeps the original's logits; None is DEFAULT_CACHE_GIB.
    stream: every model block by block or not; None decides by whether the largest fits into the free memory.

    Returns {"base", "protocol", "rows"}: the original with its perplexity; what the figures mean; one row a model, sorted by
    stored bits, with the figures of EvaluationResult and
        label: the shortest ending of its path that no other has; bits_per_weight, size_MB: see Stored;
        pareto: whether it is on the front (see `pareto_front`); None without stored bits;
        compared_to, kl_difference, kl_difference_stderr: KL less that of another row, and the standard error over windows of
            that difference. Both rows saw the same windows, so it is smaller than their own two errors suggest, and the
            smaller the more alike the two models are.

    Raises SettingsError where there is nothing to compare, or the same model twice; QtipError where a model's vocabulary or
    tokenizer is not the base's, and what evaluating a model raises.
    """
    watcher = watcher or Silent()
    base, against = checked(models, base, against)
    chosen = measure.chosen_dtype(dtype)
    if cache_gib is not None and not 0 <= cache_gib < inf:
        raise SettingsError(f"a cache of {cache_gib:g} GiB cannot be", "0 keeps nothing, 16 is the default")
    rows = _windows((base, *models), data, context, windows, trust_remote_code)
    measure.note_shortage(rows, watcher)
    cap_bytes = int((DEFAULT_CACHE_GIB if cache_gib is None else cache_gib) * 2**30)
    streamed = any(blockwise.must_stream([(name, chosen)], trust_remote_code, stream, watcher) for name in (base, *models))

    def logits_of(name: str) -> evaluate.Logits:
        return blockwise.open_model(name, chosen, trust_remote_code, streamed, watcher)(rows)

    reference = KeptLogits(logits_of(base), rows.rows, cap_bytes, watcher)
    try:
        measured = [_measure(name, logits_of, rows, reference, watcher) for name in models]
    finally:
        reference.close()
    _note_other_layers(measured, watcher)
    protocol = measured[0].result.protocol
    dtypes = ", ".join(dict.fromkeys(each.result.protocol.dtype for each in measured))
    return {
        "base": _original(base, measured[0]),
        "protocol": asdict(replace(protocol, dtype=dtypes)),
        "rows": _rows(measured, against),
    }


def _original(base: str, first: _Measured) -> dict[str, Any]:
    """What the report says of the original, as `first` saw it."""
    stored = stored_of(base)
    return {
        "model": base,
        "bits_per_weight": stored.bits_per_weight,
        "size_MB": stored.megabytes,
        "dtype": first.result.protocol.base_dtype,
        "perplexity": first.original.perplexity,
        "perplexity_stderr": first.original.perplexity_stderr,
    }


def checked(models: Sequence[str], base: str | None, against: str | None) -> tuple[str, str | None]:
    """(the base, the model to compare to as `models` has it), after everything that can be refused without a model.

    Raises SettingsError, and QtipError where a name is none.
    """
    if len(models) < 2:
        raise SettingsError("one model cannot be compared", "give several directories, or leave --compare out")
    if base is None:
        raise SettingsError("a comparison needs the original model", "give --base MODEL")
    for name in (*models, base):
        check_name(name)
    places: dict[str, str] = {}
    for name in models:
        if (first := places.get(_place(name))) is not None:
            same = f"{name} is given twice" if first == name else f"{first} and {name} are the same model"
            raise SettingsError(same, "give each model once")
        places[_place(name)] = name
    if _place(base) in places:
        raise SettingsError(
            f"{places[_place(base)]} is the original itself", "leave it out: the report has the original's perplexity"
        )
    if against is not None and _place(against) not in places:
        raise SettingsError(f"--against {against} is none of the models compared", f"choose one of {', '.join(models)}")
    return base, None if against is None else places[_place(against)]


def _place(name: str) -> str:
    """The same for two names of one directory."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _windows(names: Sequence[str], data: str | None, context: int | None, windows: int | None, trust: bool) -> Windows:
    """The first model's windows, after making sure that all others would be evaluated on the very same."""
    base, *models = names
    config = load_config(base, trust)
    size = config.get_text_config().vocab_size
    for name in models:
        if (other := load_config(name, trust).get_text_config().vocab_size) != size:
            raise QtipError(
                f"{name} has a vocabulary of {other:,} tokens, the original {base} one of {size:,}",
                "compare models that were made from one original, and give that as --base",
            )
    cut: list[Windows] = []
    for name in names:
        tokenizer = measure.load_tokenizer(name, trust)
        # Read again for each: a chat template is the tokenizer's, and so is how much of a stream it takes.
        documents = load_documents(data or EVALUATION_DATA, tokenizer, EVALUATION_SPLIT)
        count = windows or SHORT_NAMES_WINDOWS.get(data or "")
        cut.append(measure.windows_for(config, tokenizer, documents, context, count))
        if cut[-1].content_hash != cut[0].content_hash:
            raise QtipError(
                f"the tokenizer of {name} reads the text as other tokens than that of the original {base}",
                "compare models that were made from one original, and give that as --base",
            )
    return cut[0]


def _measure(
    name: str, logits_of: Callable[[str], evaluate.Logits], rows: Windows, reference: KeptLogits, watcher: Watcher
) -> _Measured:
    """One model's part; the model is gone from memory before the next one is loaded."""
    gc.collect()  # a model with a cycle of references, such as a hook that knows it, would still be there
    own = logits_of(name)
    watcher.begin(f"eval {name}", rows.rows)
    with contextlib.closing(own):
        predictions = evaluate.predict(own, rows, reference, progress=lambda done, total: watcher.advance("windows"))
    protocol, stored = evaluate.protocol_of(rows, own, reference), stored_of(name)
    result = evaluate.summarize(predictions, protocol, stored.bits_per_weight)
    original = evaluate.summarize(Predictions(predictions.base_surprisal), protocol, None)
    return _Measured(name, stored, result, original, predictions.kl)


def stored_of(name: str) -> Stored:
    """What the model takes on disk, from headers alone. A hub model must be in the cache already."""
    directory = Path(name) if Path(name).is_dir() else Path(cached_file(name, CONFIG_FILE)).parent
    config = read_table(directory / CONFIG_FILE, AGAIN)
    if (directory / INDEX_FILE).is_file():
        files = sorted(set(index_weight_map(directory / INDEX_FILE).values()))
    else:
        files = [SINGLE_FILE] if (directory / SINGLE_FILE).is_file() else []
    tensors = [tensor for file in files for tensor in read_header(directory / file).tensors.values()]
    sizes = [end - start for start, end in (tensor["data_offsets"] for tensor in tensors)]
    megabytes = sum(sizes) / 1e6 if files else None
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        packed = QtipConfig(**quantization)
        return Stored(packed.bits_per_weight, megabytes, frozenset(packed.layers))
    matrices = [(size, prod(tensor["shape"])) for size, tensor in zip(sizes, tensors, strict=True) if len(tensor["shape"]) > 1]
    if quantization or not matrices:
        return Stored(None, megabytes, None)
    return Stored(8 * sum(size for size, _ in matrices) / sum(weights for _, weights in matrices), megabytes, None)


def _note_other_layers(measured: Sequence[_Measured], watcher: Watcher) -> None:
    """Stored bits are an average over the packed layers: say where those are not the same in all models."""
    packed = [each for each in measured if each.stored.layers is not None]
    for each in packed[1:]:
        if each.stored.layers != packed[0].stored.layers:
            watcher.note(
                f"{each.name} packs {len(each.stored.layers)} layers and {packed[0].name} {len(packed[0].stored.layers)}, not "
                "the same ones: bits per weight count packed layers alone, so compare these two by size"
            )


def _rows(measured: Sequence[_Measured], against: str | None) -> list[dict[str, Any]]:
    """One row a model, fewest stored bits first; models without them last."""
    bits = [inf if each.stored.bits_per_weight is None else each.stored.bits_per_weight for each in measured]
    order = sorted(range(len(measured)), key=lambda index: (bits[index], measured[index].result.kl_mean))
    names = labels([each.name for each in measured])
    front = pareto_front([(bits[index], each.result.kl_mean) for index, each in enumerate(measured)])
    fixed = next((each for each in measured if each.name == against), None)
    rows = []
    for place, index in enumerate(order):
        each = measured[index]
        other = fixed or (measured[order[place - 1]] if place else None)
        other = None if other is each else other
        difference_WP = None if other is None else each.kl_WP - other.kl_WP
        figures = each.result.as_json()
        protocol = figures.pop("protocol")
        rows.append(
            {
                "model": each.name,
                "label": names[index],
                "bits_per_weight": figures.pop("bits_per_weight"),
                "size_MB": each.stored.megabytes,
                "dtype": protocol["dtype"],
                **{name: value for name, value in figures.items() if not name.startswith(("base_", "kl_noise"))},
                "pareto": None if bits[index] == inf else front[index],
                "compared_to": None if other is None else other.name,
                "kl_difference": None if difference_WP is None else float(difference_WP.mean()),
                "kl_difference_stderr": None if difference_WP is None else evaluate.standard_error(difference_WP),
            }
        )
    return rows


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, loss) whether no other point is as good in both and better in one of them."""
    on_front = [False] * len(points)
    best = (inf, inf)
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        loss = points[index][1]
        # All before cost as much or less: this one must lose less than any of them, or be the best of them again.
        if loss < best[1] or points[index] == best:
            on_front[index], best = True, points[index]
    return on_front


def labels(names: Sequence[str]) -> list[str]:
    """For each path or hub name its shortest ending, cut at slashes, that no other has; "." is called by its folder's name."""
    parts = [_parts(name) for name in names]
    found = []
    for index, own in enumerate(parts):
        others = [other for number, other in enumerate(parts) if number != index]
        length = next(
            (count for count in range(1, len(own)) if all(other[-count:] != own[-count:] for other in others)), len(own)
        )
        found.append(str(Path(*own[-length:])))
    return found


def _parts(name: str) -> tuple[str, ...]:
    path = Path(name)
    if not path.is_dir():
        return path.parts
    return (path.absolute() if path.name and ".." not in path.parts else path.resolve()).parts
