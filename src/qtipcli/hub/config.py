"""Owns QtipConfig: the `quantization_config` of config.json, its defaults and overrides, and how strictly it is read.

docs/format.md is the specification. A reader refuses by name what it does not know: a version, a field, a value.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from qtipcli.errors import QtipError
from qtipcli.nn.layout import PackedLayout
from qtipcli.quant.transform import Transform
from qtipcli.registration import METHOD
from qtipcli.untrusted import is_deep
from qtipcli_kernels.packing import FORMAT_VERSION
from qtipcli_kernels.spec import SpecError, TrellisSpec

ARRANGEMENT = {"tile_order": "mma-m16n8k16-a", "window": "start", "bit_order": "msb-first"}
"""How walks lie in tiles and states in words; the values that this reader knows (qtipcli_kernels.packing defines them)."""

SPEC_FIELDS = ("code", "bits_per_step", "weights_per_step", "state_bits")
TRANSFORM_FIELDS = ("transform_in", "transform_out")
LAYER_FIELDS = ("shape", "bias", "embedding", *SPEC_FIELDS, *TRANSFORM_FIELDS)
REQUIRED = ("format_version", *ARRANGEMENT, *SPEC_FIELDS, *TRANSFORM_FIELDS, "bits_per_weight", "layers", "not_converted")
OPTIONAL = ("provenance",)

BITS_TOLERANCE = 5e-5
"""`bits_per_weight` is written with four decimals."""

DECIMALS = 4

LARGEST_SIDE = 2**31 - 1
"""Of a matrix: what a kernel's 32-bit index reaches."""


class QtipConfig(QuantizationConfigMixin):
    """What it takes to decode a packed model without looking at its tensors. Its attributes are the fields on disk.

    Built by `from_layouts` to write, by transformers (`from_dict`) to read. Raises QtipError naming the version, field or
    layer that is unknown, missing or inconsistent.
    """

    def __init__(self, /, **fields: Any) -> None:
        if is_deep(fields):
            raise QtipError("quantization_config is nested too deeply", "take the original config.json")
        method = fields.pop("quant_method", METHOD)
        if method != METHOD:
            raise QtipError(f"the quantization config is of method {method!r}, not {METHOD!r}", "load it with its own library")
        version = fields.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise QtipError(
                f"the model is in version {version!r} of the qtip format; this qtipcli reads version {FORMAT_VERSION}",
                "update qtipcli: pip install --upgrade qtipcli",
            )
        _refuse_unknown(fields, (*REQUIRED, *OPTIONAL), "quantization_config")
        for field in REQUIRED:
            if field not in fields:
                raise QtipError(f"quantization_config has no field {field!r}", "the model was not written completely")
        for field, known in ARRANGEMENT.items():
            if fields[field] != known:
                raise QtipError(
                    f"quantization_config has {field} {fields[field]!r}; this qtipcli reads {known!r}", "update qtipcli"
                )
        self.quant_method = METHOD
        for field in (*REQUIRED, *OPTIONAL):
            setattr(self, field, copy.deepcopy(fields.get(field, {})))
        self._check_mapping("not_converted", "module -> reason")
        self._check_mapping("provenance", "anything")
        average = average_bits(self.layouts())
        recorded = self.bits_per_weight
        # Written so that NaN does not pass; compared before it is subtracted, as a whole number may be too large for a float.
        in_range = type(recorded) in (int, float) and 0 <= recorded <= average + 1
        if not in_range or not abs(recorded - average) <= BITS_TOLERANCE:
            raise QtipError(
                f"quantization_config records {recorded} bits_per_weight, but its layers come to {average:.4f}",
                "the table was changed after it was written: quantize again, or take the original config.json",
            )

    @classmethod
    def from_layouts(
        cls,
        layouts: Mapping[str, PackedLayout],
        not_converted: Mapping[str, str],
        provenance: Mapping[str, Any] | None = None,
    ) -> QtipConfig:
        """The config of a model whose linears and embeddings `layouts` are packed.

        layouts: module name -> layout; settings that most layers share become the defaults at the top.
        not_converted: name of each linear that has no tensors of its own here, or is left as it was -> why, in a few words.
        provenance: a record of how the model was made, in JSON types; readers ignore it.
        """
        stated = {name: _layer_fields(layout) for name, layout in layouts.items()}
        specs = Counter(tuple(fields[key] for key in SPEC_FIELDS) for fields in stated.values())
        defaults: dict[str, Any] = dict(zip(SPEC_FIELDS, specs.most_common(1)[0][0], strict=True)) if specs else _no_layer()
        for side in TRANSFORM_FIELDS:
            kinds = Counter(fields[side] for fields in stated.values())
            defaults[side] = kinds.most_common(1)[0][0] if kinds else "full"
        layers = {
            name: {key: value for key, value in fields.items() if value != defaults.get(key, False)}
            for name, fields in stated.items()
        }
        return cls(
            format_version=FORMAT_VERSION,
            **ARRANGEMENT,
            **defaults,
            bits_per_weight=round(average_bits(layouts), DECIMALS),
            layers=layers,
            not_converted=dict(not_converted),
            provenance=dict(provenance or {}),
        )

    def layouts(self) -> dict[str, PackedLayout]:
        """Module name -> layout of every packed layer, defaults filled in. Raises QtipError naming the layer and the field."""
        self._check_mapping("layers", "module -> its settings")
        return {name: self._layout(name, entry) for name, entry in self.layers.items()}

    def renamed(self, names: Mapping[str, str]) -> QtipConfig:
        """The same config for a model that holds only the layers in `names` (name here -> name there)."""
        kept = {there: layout for here, layout in self.layouts().items() if (there := names.get(here))}
        return QtipConfig.from_layouts(kept, self.not_converted, self.provenance)

    def to_dict(self) -> dict[str, Any]:
        """Every field as it goes into config.json."""
        fields = {field: copy.deepcopy(getattr(self, field)) for field in ("quant_method", *REQUIRED, *OPTIONAL)}
        return fields if fields["provenance"] else {key: value for key, value in fields.items() if key != "provenance"}

    def _layout(self, name: str, entry: Any) -> PackedLayout:
        where = f"layer {name} in quantization_config"
        if not isinstance(entry, dict):
            raise QtipError(f"{where} is {entry!r}, not a table of settings", "take the original config.json")
        _refuse_unknown(entry, LAYER_FIELDS, where)
        settings = {key: entry.get(key, getattr(self, key)) for key in (*SPEC_FIELDS, *TRANSFORM_FIELDS)}
        out_features, in_features = _shape(where, entry.get("shape"))
        marks = {mark: entry.get(mark, False) for mark in ("bias", "embedding")}
        for mark, value in marks.items():
            if type(value) is not bool:
                raise QtipError(f"{where} has {mark} {value!r}", "it must be true or false")
        if all(marks.values()):
            raise QtipError(f"{where} is an embedding with a bias", "only linears have one")
        if type(settings["code"]) is not str:
            raise QtipError(f"{where} has code {settings['code']!r}", "it must be a name")
        for key in SPEC_FIELDS[1:]:
            if type(settings[key]) is not int:
                raise QtipError(
                    f"{where} has {key} {settings[key]!r}",
                    "it must be a whole number: a rate is bits_per_step / weights_per_step",
                )
        try:
            spec = TrellisSpec(**{key: settings[key] for key in SPEC_FIELDS})
            transforms = {side: Transform.parse(settings[side]) for side in TRANSFORM_FIELDS}
        except (SpecError, QtipError) as error:
            raise QtipError(f"{where}: {error}", "update qtipcli, or take the original config.json") from error
        return PackedLayout(in_features, out_features, spec, **transforms, **marks)

    def _check_mapping(self, field: str, meaning: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, dict):
            raise QtipError(f"quantization_config has {field} {value!r}", f"it must be a table: {meaning}")


def average_bits(layouts: Mapping[str, PackedLayout]) -> float:
    """Bits per weight as stored over all packed layers: trellis with padding, scales and tables; 0 where there is none."""
    weights = sum(layout.weights for layout in layouts.values())
    return sum(layout.stored_bits for layout in layouts.values()) / weights if weights else 0.0


def _layer_fields(layout: PackedLayout) -> dict[str, Any]:
    fields: dict[str, Any] = {"shape": [layout.out_features, layout.in_features], "bias": layout.bias}
    fields["embedding"] = layout.embedding
    fields |= {key: getattr(layout.spec, key) for key in SPEC_FIELDS}
    return fields | {side: str(getattr(layout, side)) for side in TRANSFORM_FIELDS}


def _no_layer() -> dict[str, Any]:
    # A model with no packed layer still states defaults, so that every field is always there.
    spec = TrellisSpec("hyb", 4)
    return {key: getattr(spec, key) for key in SPEC_FIELDS}


def _refuse_unknown(fields: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for field in fields:
        if field not in known:
            raise QtipError(
                f"{where} has an unknown field {field!r}", "update qtipcli: the model may be newer than this reader"
            )


def _shape(where: str, value: Any) -> tuple[int, int]:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if not is_pair or any(type(size) is not int or not 1 <= size <= LARGEST_SIDE for size in value):
        hint = f"it must be [out_features, in_features], two positive whole numbers, at most {LARGEST_SIDE:,}"
        raise QtipError(f"{where} has shape {value!r}", hint)
    return value[0], value[1]
