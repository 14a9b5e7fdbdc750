"""Settings and presets: what is read, and how what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtipcli.config import (
    AllocationSettings,
    CalibrationSettings,
    LayerSettings,
    Preset,
    QuantizeSettings,
    is_average,
    load_preset,
    parse_size,
    preset_names,
    settings_from,
)
from qtipcli.errors import SettingsError

PRESETS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_every_preset_loads_by_name_and_by_path(file: Path) -> None:
    assert load_preset(file.stem) == load_preset(str(file))
    assert load_preset(file.stem).description
    assert file.stem in preset_names()


def test_the_presets_say_what_their_names_promise() -> None:
    assert load_preset("default").quantize == QuantizeSettings()
    paper = load_preset("paper").quantize
    assert (paper.scale, paper.damping, paper.refit, paper.search) == (0.9, 1e-2, False, False)
    assert load_preset("llama-3-70b").quantize.skip == ("model.layers.0.self_attn.v_proj",)


@pytest.mark.parametrize(
    ("kind", "values", "unknown", "meant"),
    [
        (QuantizeSettings, {"bit": 2}, "bit", "bits"),
        (QuantizeSettings, {"layers": {"*": {"bitz": 2}}}, "layers.*.bitz", "bits"),
        (CalibrationSettings, {"sample": 1}, "sample", "samples"),
        (Preset, {"description": "", "quantise": {}}, "quantise", "quantize"),
        (Preset, {"description": "", "quantize": {"transfrom": "full"}}, "quantize.transfrom", "transform"),
    ],
)
def test_an_unknown_field_is_named_with_the_one_that_was_meant(kind, values, unknown: str, meant: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_from(kind, values)
    assert repr(unknown) in caught.value.message
    assert caught.value.hint == f"did you mean {meant!r}?"


def test_an_unknown_field_like_no_other_is_answered_with_all() -> None:
    with pytest.raises(SettingsError, match="there is no setting 'zzz'") as caught:
        settings_from(CalibrationSettings, {"zzz": 1})
    assert caught.value.hint == "there are data, samples, context, seed, slices"


@pytest.mark.parametrize(
    ("values", "nearest"),
    [({"bits": 2.25}, "2 and 3"), ({"bits": 9}, ": 8"), ({"bits": 0}, ": 1"), ({"bits": 4.5, "code": "hyb"}, ": 4")],
)
def test_bits_that_no_code_offers_name_the_nearest(values: dict, nearest: str) -> None:
    for asked in (values, {"layers": {"*": values}}):
        with pytest.raises(SettingsError) as caught:
            settings_from(QuantizeSettings, asked)
        assert f"{values['bits']:g} bits per weight" in caught.value.message
        assert f": {caught.value.hint}".endswith(nearest)


@pytest.mark.parametrize(
    "values", [{"damping": -1}, {"scale": 0}, {"seed": -1}, {"refit": "maybe"}, {"state_bits": 17}, {"code": "2mad"}]
)
def test_a_value_out_of_range_is_named(values: dict) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_from(QuantizeSettings, values)
    assert str(next(iter(values.values()))) in caught.value.message
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_layers_own_settings_replace_only_what_they_name() -> None:
    settings = QuantizeSettings(bits=2, code="1mad", state_bits=10, layers={"*.v_proj": LayerSettings(bits=4)})
    spec = settings.spec(settings.layers["*.v_proj"])
    assert (spec.code, spec.bits, spec.state_bits) == ("1mad", 4, 10)
    assert settings.spec(LayerSettings(code="hyb")).code == "hyb"
    assert settings.spec() == settings.spec(None) == settings.spec(LayerSettings())


@pytest.mark.parametrize(
    ("content", "word"), [("- 1", "not a table"), ("a: [", "not YAML"), ("quantize: {}", "description"), ("\xff", "table")]
)
def test_a_preset_file_that_is_wrong_is_named(content: str, word: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=word):
        load_preset(str(file))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.2GiB", 1_288_490_188),
        ("1GB", 10**9),
        ("350 mb", 350_000_000),
        (".5KiB", 512),
        ("77", 77),
        ("8B", 8),
        ("0.1TB", 10**11),
    ],
)
def test_a_size_is_whole_bytes_rounded_down(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert settings_from(AllocationSettings, {"size": text}).size == size


@pytest.mark.parametrize("text", ["", "GiB", "1.2.3GB", "-1GB", "1 XB", "0GiB", "1e9"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_size(text)
    assert repr(text) in caught.value.message


def test_an_average_lies_between_the_rates_of_a_code() -> None:
    assert is_average("3inst", 2.5)
    assert is_average("hyb", 2.25)
    assert not any(is_average("3inst", bits) for bits in (2, 0.5, 8.5, float("nan")))
    assert not is_average("hyb", 2.5)
    assert not is_average("hyb", 4.5)
    assert not is_average("2mad", 2.5)


def test_an_allocation_has_one_target(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"2\.4 bits and a size of 5,000 bytes"):
        settings_from(AllocationSettings, {"bits": 2.4, "size": 5000})
    for bits in (0.5, 9, float("nan")):
        with pytest.raises(SettingsError, match="setting bits"):
            settings_from(AllocationSettings, {"bits": bits})
    file = tmp_path / "mine.yaml"
    file.write_text("description: mine\nallocate: {size: 1.5MiB, windows: 8, half_code: null}\n")
    allocation = load_preset(str(file)).allocate
    assert (allocation.size, allocation.windows, allocation.half_code) == (1_572_864, 8, None)
    assert allocation.sensitivity().model_dump().keys() == allocation.model_dump().keys() - {"bits", "size"}


def test_a_preset_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(SettingsError, match="papre") as caught:
        load_preset("papre")
    assert "paper" in caught.value.hint
