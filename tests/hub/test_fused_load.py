"""A model whose layers share inputs, as the quantizer makes it, through transformers: loaded fused, right in every way out."""

import pytest
import torch
from hub import packed_llama
from nn.random_layers import HYB_1_5, fill
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qtipcli.hub.config import QtipConfig
from qtipcli.nn.fused import unfuse
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.swap import packed_layers, swap

SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Layer -> the layer of the same parent whose input side it has."""

FUSED = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """(directory, logits one by one, state) of a packed model of two blocks."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    layouts = {
        name: PackedLayout(module.in_features, module.out_features, HYB_1_5)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    swap(model, layouts)
    layers = packed_layers(model)
    for seed, (name, layer) in enumerate(layers.items()):
        fill(layer, seed)
        parent, _, own = name.rpartition(".")
        if own in SHARED:
            first = layers[f"{parent}.{SHARED[own]}"]
            layer.scale_in.data.copy_(first.scale_in)
            layer.lut.data.copy_(first.lut)
    model.config.quantization_config = QtipConfig.from_layouts(layouts, {"lm_head": "left as it is"})
    directory = tmp_path_factory.mktemp("shared")
    model.save_pretrained(directory)
    return directory, packed_llama.logits(model), dict(model.state_dict())


def fused_names(model) -> set[str]:
    return {name.rpartition(".")[2] for name, layer in packed_layers(model).items() if layer.group is not None}


def test_it_is_loaded_fused_and_gives_the_same_bits(shared):
    directory, before, _ = shared
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert fused_names(model) == FUSED
    assert torch.equal(packed_llama.logits(model), before)
    unfuse(model)
    assert torch.equal(packed_llama.logits(model), before)


def test_what_it_saves_is_every_tensor_of_every_layer(shared, tmp_path):
    directory, before, state = shared
    model = AutoModelForCausalLM.from_pretrained(directory)
    packed_llama.logits(model)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert set(written) == set(state)
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
    assert fused_names(model) == FUSED
    assert torch.equal(packed_llama.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before)


def test_offloaded_layers_are_left_alone(shared, tmp_path):
    directory, before, _ = shared
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        directory, device_map=places | {"model.layers.1": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[0].mlp.up_proj.group is not None
    assert model.model.layers[1].mlp.up_proj.group is None
    for _ in range(2):
        assert torch.equal(packed_llama.logits(model), before)


def test_it_generates_what_it_generated_one_by_one(shared):
    model = AutoModelForCausalLM.from_pretrained(shared[0])
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    prompt = torch.tensor([list(packed_llama.PROMPT)])
    together = model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
    assert fused_names(model) == FUSED
    unfuse(model)
    assert torch.equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments), together)


def test_the_whole_model_compiles_into_one_graph(shared):
    directory, before, _ = shared
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.compiler.reset()
    counts = []

    def counting(graph, inputs):
        counts.append(sum("matvec" in str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model.forward = torch.compile(model.forward, fullgraph=True, backend=counting)
    # What is not packed is traced into smaller steps, which sum in another order.
    torch.testing.assert_close(packed_llama.logits(model), before, rtol=1e-4, atol=1e-4)
    assert counts == [8]  # in each of two blocks q/k/v, o, gate/up and down
