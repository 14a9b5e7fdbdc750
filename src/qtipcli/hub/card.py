"""Owns the model card: its metadata and its text, from values alone.

Two sections stand between markers, HTML comments that no reader sees: how to run the model, which a push rewrites for the
repository it goes to, and the measured figures, which an evaluation rewrites. What a user writes elsewhere stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCardData

PAPER = "[QTIP](https://arxiv.org/abs/2406.11235) (NeurIPS 2024)"

INHERITED = ("license", "license_name", "license_link", "language")
"""Fields of the base's own metadata that hold for every quantized copy of it."""

USE, FIGURES = "use", "figures"
"""The sections that are rewritten."""

_FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(?P<yaml>.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
"""The Hub's own rule for the block at the head of a card (huggingface_hub.repocard.REGEX_YAML_BLOCK), as of version 2.4."""

LONGEST_METADATA = 200_000
"""Characters; the parser takes seconds for as many."""

LONGEST_LIST = 1000
"""Entries of a base's list of languages, and characters of each."""

LABELS = {
    "perplexity": "perplexity",
    "base_perplexity": "perplexity of the original",
    "perplexity_ratio": "ratio of the two",
    "kl_mean": "KL to the original, mean (nats)",
    "kl_median": "KL, median",
    "kl_p99": "KL, 99 %",
    "kl_p999": "KL, 99.9 %",
    "kl_max": "KL, largest",
    "kl_noise_floor": "KL of the original to itself in this dtype",
    "top1_agreement": "same most likely token",
    "tokens": "predictions",
}
"""An evaluation's figures in the order of the table; others follow under their own names."""

_NOT_SHOWN = ("bits_per_weight",)
_ERROR_SUFFIX = "_stderr"
_ERRORS = {"kl_mean": f"kl{_ERROR_SUFFIX}"}


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one kind that are packed alike: a row of the card's table.

    Attributes: kind: their names with * for numbers; bits: payload; stored_bits: with scales and tables, a weight;
        loss: mean relative proxy loss, None where none was recorded.
    """

    kind: str
    count: int
    code: str
    bits: float
    stored_bits: float
    loss: float | None


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        base_model: a hub name, or a folder's name.
        bits: mean payload bits of a packed weight; stored_bits: all that is stored of packed layers, a weight.
        parameters, size_bytes: of the whole model.
        groups: the packed layers; left: how many linears are as they were.
        settings: of the quantize job; calibration: data, samples, context, seed; None where nothing was recorded.
        tuning: settings and held-out figures of the fine-tuning, None where there was none.
        inherited: the INHERITED fields of the base's own card.
    """

    base_model: str
    bits: float
    stored_bits: float
    parameters: int | None
    size_bytes: int
    groups: Sequence[LayerGroup]
    left: int
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any] | None = None
    tuning: Mapping[str, Any] | None = None
    inherited: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> str:
        """The payload's rate as names and tags have it."""
        return f"{round(self.bits, 1):g}"

    @property
    def name(self) -> str:
        """What commands call the model's directory unless the user says otherwise; the same wherever it is packed."""
        return f"{self.base_model.split('/')[-1]}-qtip-{self.rate}bit" + ("" if self.tuning is None else "-tuned")


def front_matter(text: str) -> dict[str, Any]:
    """The metadata at the head of a card, every scalar as text (YAML takes the language code `no` for false).

    {} where there is none. Raises ValueError where it is no YAML table.
    """
    block = _FRONT_MATTER.match(text)
    if block is None:
        return {}
    if len(block["yaml"]) > LONGEST_METADATA:
        raise ValueError(f"its metadata is longer than {LONGEST_METADATA:,} characters")
    try:
        fields = yaml.load(block["yaml"], Loader=yaml.BaseLoader)  # strings, lists and tables only: as safe as safe_load
    # Beside its own errors also RecursionError, and what its scanner raises at the ends of a broken text.
    except (yaml.YAMLError, RecursionError, ValueError, IndexError, AttributeError) as error:
        raise ValueError("its metadata is not YAML") from error
    if not isinstance(fields, dict):
        raise ValueError("its metadata is not a table")
    return fields


def inherited(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What of a base's metadata its quantized copy takes over: texts, and lists of them; anything else is no licence."""
    return {name: fields[name] for name in INHERITED if fields.get(name) and _is_texts(fields[name])}


def _is_texts(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return len(parts) <= LONGEST_LIST and all(isinstance(part, str) and len(part) <= LONGEST_LIST for part in parts)


def metadata(facts: CardFacts) -> dict[str, Any]:
    """The card's metadata, as the Hub names its fields."""
    tags = ["qtip", "quantized", "trellis", f"{facts.rate}-bit"]
    if facts.tuning is not None:
        tags.append("fine-tuned")
    return {
        "base_model": facts.base_model,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **facts.inherited,
        "tags": tags,
    }


def text(facts: CardFacts, results: Sequence[Mapping[str, Any]] = ()) -> str:
    """The whole card. results: evaluations, as `figures` takes them."""
    sections = [
        f"---\n{ModelCardData(**metadata(facts)).to_yaml()}\n---",
        f"# {facts.name}",
        _summary(facts),
        "## How to run it",
        _marked(USE, use(facts.name)),
        "## Measured figures",
        _marked(FIGURES, figures(results, facts.base_model)),
        "## What is packed",
        _table(facts),
        "## How it was made",
        _making(facts),
    ]
    return "\n\n".join(sections) + "\n"


def use(name: str, revision: str | None = None) -> str:
    """How to run the model `name`, a directory or hub name, at a branch."""
    at = f', revision="{revision}"' if revision else ""
    fetch = f"hf download {name} --revision {revision} --local-dir model\n" if revision else ""
    where = "model" if revision else name
    return f"""With the Python package `qtipcli` installed:
```python
import qtipcli  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{at})
model = AutoModelForCausalLM.from_pretrained("{name}"{at})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
or in a shell:
```
{fetch}qtip generate {where} --prompt "Once upon a time"
```"""


def figures(results: Sequence[Mapping[str, Any]], base_model: str) -> str:
    """Evaluations as one table, a column each, with the protocol of each below. A result is what `qtip eval --json` prints."""
    if not results:
        return f"Not measured yet: `qtip eval DIR --base {base_model}`"
    known = [name for name in LABELS if any(_is_figure(result.get(name)) for result in results)]
    others = sorted(
        {name for result in results for name, value in result.items() if _is_figure(value)}
        - {*LABELS, *_NOT_SHOWN}
        - {name for result in results for name in result if name.endswith(_ERROR_SUFFIX)}
    )
    lines = ["| |" + "".join(f" ({number}) |" for number in range(1, len(results) + 1)), "|---|" + "---|" * len(results)]
    for name in (*known, *others):
        cells = (_figure(result.get(name), result.get(_ERRORS.get(name, f"{name}{_ERROR_SUFFIX}"))) for result in results)
        lines.append(f"| {LABELS.get(name, name.replace('_', ' '))} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"({number}) {_protocol(result)}\n" for number, result in enumerate(results, start=1)]
    return "\n".join([*lines, "±: one standard error over windows."])


def with_section(card: str, name: str, content: str) -> str | None:
    """The card with its section `name` (USE or FIGURES) replaced; None where its markers are not there, in this order, once."""
    begin, end = _markers(name)
    if card.count(begin) != 1 or card.count(end) != 1 or card.index(begin) > card.index(end):
        return None
    return card[: card.index(begin)] + _marked(name, content) + card[card.index(end) + len(end) :]


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- qtip:{name}: rewritten by qtip, up to the end mark -->", f"<!-- qtip:{name}: end -->"


def _marked(name: str, content: str) -> str:
    begin, end = _markers(name)
    return f"{begin}\n{content}\n{end}"


def _linked(model: str) -> str:
    return f"[{model}](https://huggingface.co/{model})" if "/" in model else f"`{model}`"


def _summary(facts: CardFacts) -> str:
    size = f"{facts.size_bytes / 1e9:.2f} GB" if facts.size_bytes >= 1e9 else f"{facts.size_bytes / 1e6:.1f} MB"
    tuned = ", then fine-tuned towards the original's predictions" if facts.tuning is not None else ""
    count = f" of {facts.parameters:,} parameters" if facts.parameters else ""
    licence = (
        "The base's licence holds for this model too; licence files are those of the base."
        if "license" in facts.inherited
        else "The base's card states no licence; whatever terms it comes with hold for this model too."
    )
    return (
        f"{_linked(facts.base_model)}{count} in {size}: its linear layers are trellis-coded by {PAPER} to {facts.bits:.3g} "
        f"bits a weight, {facts.stored_bits:.3f} with everything that is stored with them{tuned}.\n\n{licence}"
    )


def _table(facts: CardFacts) -> str:
    lines = [
        "| layers | number | code | bits | as stored | mean relative proxy loss |",
        "|---|---|---|---|---|---|",
    ]
    for group in facts.groups:
        loss = "" if group.loss is None else f"{group.loss:.4g}"
        lines.append(f"| `{group.kind}` | {group.count} | {group.code} | {group.bits:g} | {group.stored_bits:.3f} | {loss} |")
    rest = {0: "", 1: " One linear is as it was."}.get(facts.left, f" {facts.left} linears are as they were.")
    return "\n".join([*lines, "", f"`qtip.json` has every layer for itself, and the sha256 of each file.{rest}"])


def _making(facts: CardFacts) -> str:
    lines = []
    if (data := facts.calibration) is not None:
        lines.append(
            f"- Calibration: {data['data']}; {data['samples']} windows of {data['context']} tokens, seed {data['seed']}"
        )
    else:
        lines.append("- Calibration: not recorded")
    if facts.settings:
        lines.append("- Settings: " + ", ".join(f"{name} {_setting(value)}" for name, value in facts.settings.items()))
    if facts.tuning is not None:
        lines.append(f"- Fine-tuning: {_tuning(facts.tuning)}")
    return "\n".join(lines)


def _setting(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "chosen"}[value]
    if isinstance(value, dict):
        is_flat = not any(isinstance(item, dict) for item in value.values())
        return f"({', '.join(f'{name} {_setting(item)}' for name, item in value.items())})" if is_flat else f"for {len(value)}"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _tuning(tuning: Mapping[str, Any]) -> str:
    kinds = [words for kind, words in (("blocks", "block after block"), ("end_to_end", "end to end")) if tuning.get(kind)]
    how = f"scales and norms, {' and '.join(kinds)}" if kinds else "scales and norms"
    text = f"{how}, on {tuning.get('data')}; windows of {tuning.get('context')} tokens, seed {tuning.get('seed')}"
    if "heldout_before" in tuning:
        text += f"; KL to the original on held-out windows {tuning['heldout_before']:.4g} -> {tuning['heldout_after']:.4g} nats"
    return text


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figure(value: Any, error: Any) -> str:
    """A table cell: four digits, or as many decimals as the second digit of its error has."""
    if not _is_figure(value):
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if not _is_figure(error) or not 0 < error < math.inf:
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _protocol(result: Mapping[str, Any]) -> str:
    protocol = result.get("protocol")
    protocol = protocol if isinstance(protocol, dict) else {}
    shown = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in protocol.items()
        if value is not None and not isinstance(value, dict | list)
    )
    against = f"; against {result['base']}" if result.get("base") else ""
    return f"{shown}{against}; qtip {result['qtip']}" if result.get("qtip") else f"{shown}{against}"
