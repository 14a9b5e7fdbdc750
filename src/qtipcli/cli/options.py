"""Owns the options that several commands share, and how what was typed becomes settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from qtipcli.config import AllocationSettings, Preset, QuantizeSettings, is_average, load_preset, settings_from
from qtipcli.errors import SettingsError
from qtipcli_kernels.spec import offered_bits

Model = Annotated[str, typer.Argument(help="A local directory or a Hugging Face hub name.", show_default=False)]
Data = Annotated[
    str | None,
    typer.Option(help="Text: a .txt, .jsonl or .parquet file, wikitext2, c4, or a hub data set (owner/name[:config])."),
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows [256].", min=1)]
Context = Annotated[int | None, typer.Option(help="Tokens in each window \\[the model's own, at most 2048].", min=1)]
Seed = Annotated[int | None, typer.Option(help="Of the windows chosen and of the random signs [0].", min=0)]
Force = Annotated[bool, typer.Option("--force", help="Start again over what is there, and replace what is in the way.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and what it takes; write nothing.")]
LimitBlocks = Annotated[
    int | None, typer.Option(help="Work on the first N blocks only; the same command without it goes on.", min=1)
]
MaxMemory = Annotated[
    str | None, typer.Option(help="Of the process, such as 4GB: what cannot stay below is refused before it starts.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
PushTo = Annotated[str | None, typer.Option(metavar="USER/REPO", help="Push the packed model to the Hub when it is done.")]
PresetName = Annotated[str | None, typer.Option("--preset", help="A preset of configs/ by name, or a YAML file.")]


def given(**values: Any) -> dict[str, Any]:
    """Only what was typed: options left out are None."""
    return {name: value for name, value in values.items() if value is not None}


def words(typed: Sequence[str]) -> list[str]:
    """What a repeatable option of words was given, each of which may be several with commas between them."""
    return [word for text in typed for word in (part.strip() for part in text.split(",")) if word]


def whole_numbers(option: str, typed: Sequence[str], least: int) -> list[int]:
    """The same of numbers, each once, in the order typed. Raises SettingsError naming the option."""
    found: dict[int, None] = {}
    for word in words(typed):
        if not word.isdecimal() or int(word) < least:
            raise SettingsError(
                f"{option} {word!r} is no whole number from {least} on", f"as in {option} 2048, or {option} 2048,4096"
            )
        found[int(word)] = None
    return list(found)


def preset_of(name: str | None) -> Preset:
    """The preset asked for; the defaults where none was."""
    return load_preset(name or "default")


def quantize_settings(preset: Preset, layers: list[str], **asked: Any) -> QuantizeSettings:
    """The preset's settings with what was typed in their place. layers: "PATTERN=BITS" or "PATTERN=BITS:CODE" each."""
    values = preset.quantize.model_dump() | given(**asked)
    values["layers"] = {**dict(map(_layer, layers)), **values["layers"]}
    if not values["skip"]:
        values["skip"] = ()
    return settings_from(QuantizeSettings, values)


def allocation_settings(
    preset: Preset, code: str | None, bits: float | None, size: str | None, asked: bool, measuring: dict[str, Any]
) -> tuple[float | None, AllocationSettings | None]:
    """(the job's own rate, the allocation that was asked for or None).

    A rate that the code does not offer is an average, and the job's own rate is then the next one below it, which layers have
    that the allocation does not decide about. asked: --allocate. measuring: what was typed of AllocationSettings' other fields.
    """
    own_code = code or preset.quantize.code
    average = bits is not None and is_average(own_code, bits)
    if bits is not None and size is not None:
        raise SettingsError(f"--bits {bits:g} and --size {size} were both given", "give one of the two")
    if not (asked or average or size is not None or preset.allocate is not None):
        if measuring:
            raise SettingsError(
                f"held-out {' and '.join(measuring)} are for a measured allocation, and none was asked for",
                "say --allocate, --size, or an average such as --bits 2.4",
            )
        return bits, None
    values = (preset.allocate or AllocationSettings()).model_dump() | measuring
    if bits is not None or size is not None:
        values |= {"bits": bits, "size": size}
    own_bits = max(rate for rate in offered_bits(own_code) if rate < bits) if average and bits is not None else bits
    return own_bits, settings_from(AllocationSettings, values)


def rate_of(settings: QuantizeSettings, allocation: AllocationSettings | None, size: str | None) -> str:
    """What a result is called after: "2.4bit", or "1.2GiB". size: as typed."""
    if size is not None:
        return "".join(size.split())
    if allocation is not None and allocation.size is not None:
        return f"{allocation.size}B"
    return f"{settings.bits if allocation is None or allocation.bits is None else allocation.bits:g}bit"


def _layer(text: str) -> tuple[str, dict[str, Any]]:
    pattern, _, value = text.partition("=")
    bits, _, code = value.partition(":")
    try:
        if not value:
            raise ValueError(text)
        return pattern, given(bits=float(bits) if bits else None, code=code or None)
    except ValueError as error:
        raise SettingsError(
            f"--layer {text!r} is not PATTERN=BITS or PATTERN=BITS:CODE", "as in --layer '*.v_proj=4'"
        ) from error
