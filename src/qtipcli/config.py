"""Owns a job's settings: strict pydantic models, the presets they are read from, and what every default is. No torch here."""

from __future__ import annotations

import difflib
import re
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qtipcli.errors import QtipError, SettingsError
from qtipcli_kernels.spec import SpecError, TrellisSpec, offered_bits

PRESET_DIRECTORIES = (Path(__file__).parent / "configs", Path(__file__).parents[2] / "configs")
"""Where named presets lie: inside an installed wheel, or beside `src` in a checkout."""


Settings = TypeVar("Settings", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationSettings(_Strict):
    """What the proxy Hessians are made from.

    data: a .txt, .jsonl or .parquet file, or a hub data set; None is the default hub data set.
    samples: windows; context: tokens in each, None for the model's own up to 2,048. seed: chooses the windows.
    slices: that sums over the text are taken in, which as many processes can share; None is those of the Hessians that are
    there, else 8. One is how it was done before there were slices.
    """

    data: str | None = None
    samples: int = Field(256, ge=1)
    context: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    slices: int | None = Field(None, ge=1)


class TuningSettings(_Strict):
    """How scales, norms, biases and tables are trained; the walks never change.

    learning_rate: of scale_in and scale_out, norm_rate: of norms and biases, lut_rate: of the codes' tables; each a share of
    the parameter's own mean magnitude in one step of Adam, falling to nothing along a cosine. 0 leaves those as they are.
    epochs: passes over the training windows. batch: windows in a step. seed: of the order of the batches.
    """

    learning_rate: float = Field(2e-2, ge=0, lt=1)
    norm_rate: float = Field(2e-3, ge=0, lt=1)
    lut_rate: float = Field(2e-3, ge=0, lt=1)
    epochs: int = Field(2, ge=1)
    batch: int = Field(4, ge=1)
    seed: int = Field(0, ge=0)


class BlockTuning(TuningSettings):
    """Block after block: the quantized block, behind the quantized prefix, is taught the original block's output."""


class EndTuning(TuningSettings):
    """End to end: the quantized model is taught the original's predictions, KL(original || quantized).

    head_rate: learning rate of the head, and of the embedding that it is tied to, again relative to its size.
    autocast: bfloat16 products. gradient_checkpointing: keep only what enters each block, and compute the rest twice.
    checkpoint_every, judge_every: steps between saved states, and between measurements on the held-out windows; 0 is once
    an epoch.
    """

    learning_rate: float = Field(1e-2, ge=0, lt=1)
    epochs: int = Field(1, ge=1)
    head_rate: float = Field(0.0, ge=0, lt=1)
    autocast: bool = False
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(50, ge=1)
    judge_every: int = Field(0, ge=0)


class FinetuneSettings(_Strict):
    """What `qtip finetune` does, and the text that it does it on.

    blocks, end_to_end: None leaves that kind out. data, context, seed: as of CalibrationSettings.
    samples: training windows; more are better and slower. heldout: windows that are never trained on and
    decide which state is kept.
    """

    data: str | None = None
    samples: int = Field(1536, ge=1)
    heldout: int = Field(64, ge=1)
    context: int | None = Field(None, ge=2)
    seed: int = Field(0, ge=0)
    blocks: BlockTuning | None = None
    end_to_end: EndTuning | None = None


class LayerSettings(_Strict):
    """What one layer is given instead of the job's own: a field left out is the job's."""

    bits: float | None = None
    code: str | None = None


class QuantizeSettings(_Strict):
    """How a model is rounded.

    bits: payload bits per weight. code: see qtipcli_kernels.codes. state_bits: L of the trellis.
    transform: "full" or "block-N". damping: share of the Hessian's mean diagonal added to it.
    refit: closed-form row and column scales after rounding. scale: rms of the weights over rms of the code, None for the
    table's. search: refine that ratio for each matrix. fast: the encoder's shorter first pass.
    quantized_prefix: round each layer on what the layers before it give once quantized, and correct it for the difference.
    two_sided: weigh errors by what the loss makes of each layer's outputs, too.
    tune_blocks: tune each block as soon as it is rounded, on the calibration windows; the next block sees the tuned one.
    head_bits, embedding_bits: rates of the head and of the token embedding, in the same code; None leaves them as they are. A
    tied head and embedding are one matrix, which embedding_bits packs. Patterns do not reach them, and the Hessian of the
    head's input is the original model's even with a quantized prefix.
    seed: of the random signs. skip: patterns of layers left as they are. layers: pattern -> other settings, first match wins.
    Patterns are those of the shell (fnmatch), on full names such as "model.layers.0.self_attn.v_proj".
    """

    bits: float = 2.0
    code: str = "3inst"
    state_bits: int = 16
    transform: str = "full"
    damping: float = Field(1e-3, ge=0)
    refit: bool = True
    scale: float | None = Field(None, gt=0)
    search: bool = True
    fast: bool = False
    quantized_prefix: bool = True
    two_sided: bool = True
    tune_blocks: BlockTuning | None = None
    head_bits: float | None = None
    embedding_bits: float | None = None
    seed: int = Field(0, ge=0)
    skip: tuple[str, ...] = ()
    layers: dict[str, LayerSettings] = {}

    @field_validator("transform")
    @classmethod
    def _known_transform(cls, text: str) -> str:
        from qtipcli.quant.transform import Transform

        try:
            return str(Transform.parse(text))
        except QtipError as error:
            raise SettingsError(error.message, error.hint) from error

    def model_post_init(self, context: Any) -> None:
        self.spec()
        for override in self.layers.values():
            self.spec(override)
        for name in ("head_bits", "embedding_bits"):
            try:
                self.spec(LayerSettings(bits=getattr(self, name)))
            except SettingsError as error:
                raise SettingsError(f"setting {name}: {error.message}", error.hint) from error

    def spec(self, override: LayerSettings | None = None) -> TrellisSpec:
        """The trellis of a layer. Raises SettingsError naming the nearest rates where the code has none such."""
        code = override.code if override is not None and override.code is not None else self.code
        bits = override.bits if override is not None and override.bits is not None else self.bits
        try:
            return TrellisSpec.at_bits(code, bits, self.state_bits)
        except SpecError as error:
            fact, _, remedy = str(error).partition(": ")
            raise SettingsError(fact, remedy) from error


class SensitivitySettings(_Strict):
    """How it is measured what each layer's error does to the whole model.

    data: held-out text, as of CalibrationSettings; None is the calibration's own text, of which the windows that calibrated are
    left out. windows: held-out windows on which each layer's noise is measured. judge_windows: others, on which the finished
    models are compared. noise_bits: rate of the noise, one that the job's code offers.
    half_code: the code of rates that the job's code has not, such as 2.5; None is the job's code alone.
    """

    data: str | None = None
    windows: int = Field(16, ge=1)
    judge_windows: int = Field(64, ge=1)
    noise_bits: float = 2.0
    half_code: Literal["hyb", "hyb2"] | None = "hyb2"


class AllocationSettings(SensitivitySettings):
    """A measured allocation of bits: what it is to fit into, and how it is measured.

    bits: average payload rate, any number within the rates of the code: the bytes of a uniform model at that rate.
    size: bytes of everything that is stored, or a text such as "1.2GiB". At most one of the two; neither is the job's own bits.
    """

    bits: float | None = Field(None, ge=1, le=8)
    size: int | None = Field(None, ge=1)

    @field_validator("size", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_size(value) if isinstance(value, str) else value

    def model_post_init(self, context: Any) -> None:
        if self.bits is not None and self.size is not None:
            raise SettingsError(
                f"an average of {self.bits:g} bits and a size of {self.size:,} bytes were asked for", "give one of the two"
            )

    def sensitivity(self) -> SensitivitySettings:
        """The part that decides what is measured; the rest decides what is made of it."""
        return SensitivitySettings(**self.model_dump(exclude={"bits", "size"}))


SIZE_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """Whole bytes, rounded down, of a size such as "1.2GiB" or "350 MB". Raises SettingsError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not Fraction(match[1]):
        raise SettingsError(f"{text!r} is not a size", "as in 1.2GiB; units are B, KB, MB, GB, TB, KiB, MiB, GiB and TiB")
    return int(Fraction(match[1]) * unit)


def is_average(code: str, bits: float) -> bool:
    """Whether no layer can have this rate with `code`, but layers of different rates can have it together."""
    try:
        rates = offered_bits(code)
    except SpecError:
        return False
    return rates[0] < bits < rates[-1] and bits not in rates


class Preset(_Strict):
    """One file of configs/: a sentence, and the settings that differ from the defaults."""

    description: str
    calibrate: CalibrationSettings = CalibrationSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    allocate: AllocationSettings | None = None


def settings_from(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """`kind` from plain values. Raises SettingsError, one sentence, naming the first field that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _fields_beside(kind, first["loc"])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
            raise SettingsError(
                f"there is no setting {field!r}", f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            ) from error
        raise SettingsError(f"setting {field} is {first['input']!r}: {first['msg']}", "see qtip quantize --help") from error


def _fields_beside(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The fields of the settings in which an unknown one was found at `location`."""
    for part in location[:-1]:
        inner = kind.model_fields[str(part)].annotation if str(part) in kind.model_fields else None
        # The one table of settings by pattern is that of layers.
        kind = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else LayerSettings
    return list(kind.model_fields)


def preset_names() -> list[str]:
    """Every preset that can be asked for by name."""
    return sorted({file.stem for directory in PRESET_DIRECTORIES if directory.is_dir() for file in directory.glob("*.yaml")})


def load_preset(name_or_path: str) -> Preset:
    """A preset by name ("paper") or by path to a YAML file. Raises SettingsError, naming the file and what is wrong with it."""
    candidates = [directory / f"{name_or_path}.yaml" for directory in PRESET_DIRECTORIES] + [Path(name_or_path)]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise SettingsError(
            f"there is no preset {name_or_path!r}", f"choose one of {', '.join(preset_names())}, or give a YAML file"
        )
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is not YAML: {str(error).splitlines()[0]}", "see configs/ for examples") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{file} is not a table of settings", "see configs/ for examples")
    return settings_from(Preset, content)
