"""A packed model through transformers: saved, reloaded in this and in fresh processes, generated with, dequantized.

The oracle is the model in memory before it was saved: the same weights on the same kernels give the same bits.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub import packed_llama
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from qtipcli.errors import CorruptError, QtipError
from qtipcli.hub.config import QtipConfig
from qtipcli.nn.swap import packed_layers

Q_PROJ = "model.layers.0.self_attn.q_proj"


def copied(directory: Path, target: Path) -> Path:
    """A copy of the saved model, to be spoiled."""
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def rewrite(directory: Path, change) -> None:
    """Apply `change` to the tensors of each shard of `directory`."""
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


def test_the_model_is_really_in_several_shards(saved):
    assert len(list(saved[0].glob("*.safetensors"))) > 1


@pytest.mark.parametrize("arguments", [{}, {"device_map": "cpu"}], ids=["plain", "device_map"])
def test_a_reloaded_model_gives_the_same_bits(saved, arguments):
    directory, before = saved
    model = AutoModelForCausalLM.from_pretrained(directory, **arguments)
    assert torch.equal(packed_llama.logits(model), before)
    assert len(packed_layers(model)) == 14
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_partly_offloaded_to_disk_gives_the_same_bits_and_saves(saved, tmp_path):
    directory, before = saved
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        directory, device_map=places | {"model.layers.1": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].mlp.up_proj.trellis.is_meta
    assert torch.equal(packed_llama.logits(model), before)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(packed_llama.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), before)


def test_packed_parameters_are_frozen_and_the_others_are_not(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    assert not any(parameter.requires_grad for layer in packed_layers(model).values() for parameter in layer.parameters())
    assert model.model.norm.weight.requires_grad


def test_a_second_save_and_reload_changes_nothing(saved, tmp_path):
    directory, before = saved
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path)
    assert torch.equal(packed_llama.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before)
    first, second = (json.loads((path / "config.json").read_text()) for path in (directory, tmp_path))
    assert first["quantization_config"] == second["quantization_config"]


@pytest.mark.parametrize("order", ["qtipcli first, then both from threads", "transformers first"])
def test_a_fresh_process_gives_the_same_bits_in_either_import_order(fresh, saved, order):
    status, output, file = fresh[order]
    assert status == 0, output
    assert torch.equal(load_file(file)["logits"], saved[1])


def test_a_process_without_qtipcli_fails_instead_of_running_on_random_weights(fresh):
    status, output, file = fresh["no qtipcli"]
    assert status != 0
    assert not file.exists()
    assert "ckpt: torch.Size([0])" in output  # the empty weight is what it trips over


def test_it_generates(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    prompt = torch.tensor([list(packed_llama.PROMPT)])
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    # Greedy decoding one token at a time through the cache must follow the argmax of the whole sequence at once.
    assert torch.equal(model(tokens).logits[0, len(prompt[0]) - 1 : -1].argmax(-1), tokens[0, len(prompt[0]) :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_gives_a_plain_model_that_saves_and_loads(saved, tmp_path, dtype):
    directory, before = saved
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model.save_pretrained(tmp_path / "packed")  # leaves the dtype in the config as text, which dequantize must bear
    model.dequantize()
    assert not packed_layers(model)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)
    # The weights are equal, summed in another order, and bf16 rounds each weight and activation to 8 bits once more;
    # errors are relative to the logits' size, through two blocks of about ten sums each.
    bound = {torch.float32: 2**-18, torch.bfloat16: 2**-4}[dtype] * before.abs().max()
    assert (packed_llama.logits(plain).float() - before).abs().max() < bound


def test_the_model_without_its_head_loads_and_what_it_saves_loads_with_one(saved, tmp_path):
    directory, before = saved
    headless = AutoModel.from_pretrained(directory)
    assert len(packed_layers(headless)) == 14
    headless.save_pretrained(tmp_path)
    # The head is tied to the embedding, so that nothing is lost.
    assert torch.equal(packed_llama.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before)


def test_a_missing_tensor_is_named(saved, tmp_path):
    directory = copied(saved[0], tmp_path / "copy")
    rewrite(directory, lambda tensors: tensors.pop(f"{Q_PROJ}.scale_in", None))
    with pytest.raises(CorruptError, match=f"{Q_PROJ} are incomplete: tensor scale_in"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_tensor_of_another_shape_is_named(saved, tmp_path):
    directory = copied(saved[0], tmp_path / "copy")

    def shorten(tensors):
        for name in tensors.keys() & {f"{Q_PROJ}.trellis"}:
            tensors[name] = tensors[name][:, :-1].contiguous()

    rewrite(directory, shorten)
    with pytest.raises(CorruptError, match=rf"{Q_PROJ}.trellis .* is I32 \[3, 35\], but by config.json it is I32 \[3, 36\]"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_tensor_of_another_dtype_is_named(saved, tmp_path):
    directory = copied(saved[0], tmp_path / "copy")
    rewrite(directory, lambda tensors: tensors.update({k: v.float() for k, v in tensors.items() if k == f"{Q_PROJ}.scale_out"}))
    with pytest.raises(CorruptError, match=rf"{Q_PROJ}.scale_out .* is F32"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_packed_layer_that_the_table_does_not_know_is_named(saved, tmp_path):
    directory = copied(saved[0], tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    quantization = QtipConfig.from_dict(config["quantization_config"])
    layouts = quantization.layouts()
    del layouts[Q_PROJ]
    config["quantization_config"] = QtipConfig.from_layouts(layouts, quantization.not_converted).to_dict()
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptError, match=f"{Q_PROJ}.trellis .* belongs to no layer"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_truncated_shard_is_named(saved, tmp_path):
    directory = copied(saved[0], tmp_path / "copy")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CorruptError, match=f"{shard.name} is damaged"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_tensor_parallelism_is_refused(saved):
    config = AutoConfig.from_pretrained(saved[0])
    # What from_pretrained(distributed_config=...) leaves there before the weights are loaded.
    config.distributed_config = SimpleNamespace(tp_size=2)
    with pytest.raises(QtipError, match="tensor parallelism"):
        AutoModelForCausalLM.from_pretrained(saved[0], config=config)


def test_a_packed_head_that_the_model_would_tie_is_refused(saved, tmp_path):
    directory = copied(saved[0], tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    quantization = QtipConfig.from_dict(config["quantization_config"])
    layouts = quantization.layouts()
    layouts["lm_head"] = layouts["model.layers.0.self_attn.o_proj"]
    config["quantization_config"] = QtipConfig.from_layouts(layouts, {}).to_dict()
    (directory / "config.json").write_text(json.dumps(config))
    rewrite(
        directory,
        lambda tensors: tensors.update(
            {
                k.replace("model.layers.0.self_attn.o_proj", "lm_head"): v.clone()
                for k, v in tensors.items()
                if ".0.self_attn.o_" in k
            }
        ),
    )
    with pytest.raises(QtipError, match="layer lm_head is packed, but the model ties"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_plain_model_is_not_quantized_on_the_fly(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    quantization = model.config.quantization_config
    model.dequantize()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
