"""What config.json says, and what a reader refuses."""

import json
import re

import pytest

from qtipcli.errors import QtipError
from qtipcli.hub.config import QtipConfig
from qtipcli.nn.layout import PackedLayout
from qtipcli.quant.transform import Transform
from qtipcli_kernels.spec import TrellisSpec

LAYOUTS = {
    "a": PackedLayout(64, 48, TrellisSpec("hyb", 3)),
    "b": PackedLayout(64, 48, TrellisSpec("hyb", 3), bias=True),
    "c": PackedLayout(64, 48, TrellisSpec("1mad", 2, 14), Transform("block"), Transform("block", 64)),
}
TOKENS = PackedLayout(64, 48, TrellisSpec("hyb", 3), Transform(), Transform("block", 16), embedding=True)


def config() -> dict:
    """The config of LAYOUTS as a reader finds it on disk."""
    return json.loads(QtipConfig.from_layouts(LAYOUTS, {"lm_head": "tied"}, {"seed": 1}).to_json_string())


def test_layouts_survive_json():
    read = QtipConfig.from_dict(config())
    assert read.layouts() == LAYOUTS
    assert read.not_converted == {"lm_head": "tied"}
    assert read.provenance == {"seed": 1}
    assert read.to_dict() == config()


def test_common_settings_stand_at_the_top_and_layers_state_only_what_differs():
    written = config()
    assert (written["code"], written["bits_per_step"], written["weights_per_step"]) == ("hyb", 3, 2)
    assert (written["transform_in"], written["transform_out"]) == ("full", "full")
    assert written["layers"]["a"] == {"shape": [48, 64]}
    assert written["layers"]["b"] == {"shape": [48, 64], "bias": True}
    assert written["layers"]["c"] == {
        "shape": [48, 64],
        "code": "1mad",
        "bits_per_step": 2,
        "weights_per_step": 1,
        "state_bits": 14,
        "transform_in": "block-128",
        "transform_out": "block-64",
    }


def test_a_rate_of_one_and_a_half_bits_is_an_exact_fraction():
    assert QtipConfig.from_dict(config()).layouts()["a"].spec.bits == 1.5


def test_bits_per_weight_counts_everything_that_is_stored():
    # By hand: 12 tiles each of 384, 384 and 512 bits, 3 x 112 scales and two tables of 512 x 2, fp16.
    stored = 12 * (384 + 384 + 512) + 16 * (3 * 112 + 2 * 1024)
    assert config()["bits_per_weight"] == pytest.approx(stored / (3 * 64 * 48), abs=5e-5)  # four decimals


def test_a_model_without_packed_layers_has_a_config_too():
    empty = QtipConfig.from_layouts({}, {"a": "kept"})
    assert QtipConfig.from_dict(empty.to_dict()).layouts() == {}


def test_reading_does_not_change_what_the_caller_passed():
    given = config()
    QtipConfig.from_dict(given).layers["a"]["bias"] = True
    assert given == config()


def test_an_embedding_says_that_it_is_one_and_nothing_else_does():
    written = QtipConfig.from_layouts({**LAYOUTS, "tokens": TOKENS}, {})
    assert written.layers["tokens"] == {"shape": [48, 64], "embedding": True, "transform_out": "block-16"}
    assert QtipConfig.from_dict(json.loads(written.to_json_string())).layouts()["tokens"] == TOKENS
    # Files from before there were packed embeddings have no such field, and are read as they were.
    assert "embedding" not in json.dumps(config())
    assert not any(layout.embedding for layout in QtipConfig.from_dict(config()).layouts().values())


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"format_version": 2}, "version 2 "),
        ({"format_version": 1.0}, "version 1.0"),
        ({"format_version": True}, "version True"),
        ({"format_version": None}, "version None"),
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"rotation": "fast"}, "unknown field 'rotation'"),
        ({"tile_order": "mma-m16n8k16-b"}, "tile_order 'mma-m16n8k16-b'"),
        ({"window": "end"}, "window 'end'"),
        ({"bit_order": "lsb-first"}, "bit_order 'lsb-first'"),
        ({"code": "4mad"}, "'4mad'"),
        ({"bits_per_step": 1.5}, "bits_per_step 1.5"),
        ({"bits_per_step": 3.0}, "bits_per_step 3.0"),
        ({"bits_per_step": "3"}, "bits_per_step '3'"),
        ({"bits_per_step": 1}, "bits_per_step is 1"),
        ({"state_bits": 17}, "state_bits is 17"),
        ({"transform_in": "dct"}, "'dct'"),
        ({"bits_per_weight": 2.0}, "2.0 bits_per_weight"),
        ({"bits_per_weight": float("nan")}, "nan bits_per_weight"),
        ({"bits_per_weight": "2"}, "2 bits_per_weight"),
        ({"layers": []}, "layers []"),
        ({"layers": {"a": [48, 64]}}, "layer a "),
        ({"layers": {"a": {"shape": [48, 64], "group": 4}}}, "layer a .*unknown field 'group'"),
        ({"layers": {"a": {}}}, "layer a .*shape None"),
        ({"layers": {"a": {"shape": [48, 0]}}}, r"layer a .*shape \[48, 0\]"),
        ({"layers": {"a": {"shape": [48, 64.5]}}}, r"layer a .*shape \[48, 64.5\]"),
        ({"layers": {"a": {"shape": [48, 64, 1]}}}, r"layer a .*shape"),
        ({"layers": {"a": {"shape": [48, 64], "bias": 1}}}, "layer a .*bias 1"),
        ({"layers": {"a": {"shape": [48, 64], "code": "lut", "weights_per_step": 3}}}, "layer a .*weights per step"),
        ({"layers": {"a": {"shape": [48, 64], "embedding": "yes"}}}, "layer a .*embedding 'yes'"),
        ({"layers": {"a": {"shape": [48, 64], "embedding": True, "bias": True}}}, "layer a .*embedding with a bias"),
        ({"not_converted": ["lm_head"]}, "not_converted"),
        ({"provenance": "me"}, "provenance"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change, names):
    pattern = names if "." in names and "*" in names else re.escape(names)
    with pytest.raises(QtipError, match=pattern):
        QtipConfig.from_dict(config() | change)


@pytest.mark.parametrize("field", sorted(set(config()) - {"quant_method", "provenance"}))
def test_a_missing_field_is_refused_by_name(field):
    given = config()
    del given[field]
    with pytest.raises(QtipError, match="version" if field == "format_version" else f"no field '{field}'"):
        QtipConfig.from_dict(given)
