"""Settings and presets: what is read, and how what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtipcli.config import (
    CalibrationSettings,
    LayerSettings,
    Preset,
    QuantizeSettings,
    load_preset,
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
    assert caught.value.hint == "there are data, samples, context, seed"


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


def test_a_preset_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(SettingsError, match="papre") as caught:
        load_preset("papre")
    assert "paper" in caught.value.hint
