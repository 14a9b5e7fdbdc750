"""The known models: their sizes against the published numbers of parameters and against what transformers builds."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtipcli.errors import QtipError, SettingsError
from qtipcli.stages.sizes import MODELS, Matrix, config_of, sizes_of

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}
"""Parameters of each, tied heads once, as their safetensors indices and cards have them."""


def of_blocks(name, blocks):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(replace(MODELS[name], blocks=blocks).config())


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_published_model(name):
    one, two = of_blocks(name, 1), of_blocks(name, 2)
    counts = [sum({id(each): each.numel() for each in model.parameters()}.values()) for model in (one, two)]
    assert counts[0] + (MODELS[name].blocks - 1) * (counts[1] - counts[0]) == PUBLISHED[name]
    linears = {
        path.rpartition(".")[2]: (module.out_features, module.in_features)
        for path, module in one.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    listed = MODELS[name].matrices()
    single = {layer: (m.outputs, m.inputs) for m in listed if len(m.parts) == 1 for layer in m.layer.split(", ")}
    assert single == linears
    fused = {m.layer: (m.parts, m.inputs) for m in listed if len(m.parts) > 1}
    assert fused == {
        "q+k+v": (tuple(linears[each][0] for each in ("q_proj", "k_proj", "v_proj")), linears["q_proj"][1]),
        "gate+up": ((linears["gate_proj"][0],) * 2, linears["gate_proj"][1]),
    }


def test_a_shape_that_several_layers_have_is_one_entry():
    names = [matrix.layer for matrix in sizes_of("Llama-2-7B").matrices()]
    assert names == ["q_proj, k_proj, v_proj, o_proj", "gate_proj, up_proj", "down_proj", "q+k+v", "gate+up"]


def test_an_unknown_model_is_refused_with_the_names_there_are():
    with pytest.raises(
        SettingsError, match=r"'lama-3\.1-8b'.*did you mean llama-3\.1-8b\? known are llama-2-7b, .*smollm2-135m"
    ):
        sizes_of("lama-3.1-8b")
    with pytest.raises(SettingsError, match="known are"):
        config_of("no/such/path")


def test_a_config_file_is_taken_without_its_quantization(packed):
    for path in (packed / "out", packed / "out" / "config.json"):
        config = config_of(path)
        assert config.hidden_size == 64
        assert not hasattr(config, "quantization_config")


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(QtipError, match="no config that transformers knows"):
        config_of(tmp_path)


@pytest.mark.parametrize(("parts", "inputs"), [((), 16), ((0,), 16), ((16,), 0), ((16, -1), 16)])
def test_a_matrix_without_a_size_is_refused(parts, inputs):
    with pytest.raises(SettingsError, match="both sizes must be positive"):
        Matrix(parts, inputs)


def test_each_part_of_a_fused_matrix_is_padded_for_itself():
    assert Matrix((17, 16), 30).padded == (48, 32)
