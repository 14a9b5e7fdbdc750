"""Owns the options that several commands share, and how what was typed becomes settings."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qtipcli.config import Preset, QuantizeSettings, load_preset, settings_from
from qtipcli.errors import SettingsError

Model = Annotated[str, typer.Argument(help="A local directory or a Hugging Face hub name.", show_default=False)]
Data = Annotated[
    str | None, typer.Option(help="Text: a .txt, .jsonl or .parquet file, or a hub data set (owner/name[:config]).")
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows [256].", min=1)]
Context = Annotated[int | None, typer.Option(help="Tokens in each window \\[the model's own, at most 2048].", min=1)]
Seed = Annotated[int | None, typer.Option(help="Of the windows chosen and of the random signs [0].", min=0)]
Force = Annotated[bool, typer.Option("--force", help="Start again over what is there, and replace what is in the way.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
PresetName = Annotated[str | None, typer.Option("--preset", help="A preset of configs/ by name, or a YAML file.")]


def given(**values: Any) -> dict[str, Any]:
    """Only what was typed: options left out are None."""
    return {name: value for name, value in values.items() if value is not None}


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
