"""The vLLM plugin against a stub of vLLM's interface (vllm_stub.py); no vLLM has run it yet.

The oracle is each part as a TrellisLinear of its own: the same tensors on the same kernels give the same bits.
"""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub import forks, vllm_stub
from nn.random_layers import HYB_1_5, MUL1_3_SHORT, ONE_MAD_2, random_layer

from qtipcli.errors import CorruptError, QtipError
from qtipcli.hub.config import QtipConfig
from qtipcli.hub.vllm_plugin import register
from qtipcli.nn.layout import PackedLayout
from qtipcli.quant.transform import Transform

BLOCK = "model.layers.0"
INPUTS = 48
SIZES = {"self_attn.q_proj": 48, "self_attn.k_proj": 24, "self_attn.v_proj": 24, "mlp.gate_proj": 100, "mlp.up_proj": 100}
MERGED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def packed(specs, bias=False, share=True):
    """Name -> layer of one block; those of one parent have the first's input side where `share` and their specs are equal."""
    layers, first = {}, {}
    for seed, (name, outputs) in enumerate(SIZES.items()):
        spec = specs[seed % len(specs)]
        layer = random_layer(PackedLayout(INPUTS, outputs, spec, Transform(), Transform("block", 16), bias=bias), seed)
        one = first.setdefault((name.split(".")[0], spec), layer)
        if share:
            layer.scale_in.data.copy_(one.scale_in)
            if layer.lut is not None:
                layer.lut.data.copy_(one.lut)
        layers[f"{BLOCK}.{name}"] = layer
    return layers


def tensors_of(layers):
    """As on disk."""
    return {f"{name}.{part}": own.detach() for name, layer in layers.items() for part, own in layer.named_parameters()}


def config_of(layers):
    """What vLLM makes of config.json."""
    fields = QtipConfig.from_layouts({name: layer.layout for name, layer in layers.items()}, {}).to_dict()
    return vllm_stub.REGISTERED["qtip"].from_config(fields)


def merged(layers, bias=False, **how):
    """vLLM's layers for these, filled."""
    config = config_of(layers)
    built = {}
    for name, parts in MERGED.items():
        sizes = [SIZES[f"{name.split('.')[0]}.{part}"] for part in parts]
        built[f"{BLOCK}.{name}"] = vllm_stub.LinearBase(INPUTS, sizes, config, f"{BLOCK}.{name}", bias, **how)
    return built


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """The stub, and the plugin registered with it."""
    vllm_stub.install(monkeypatch)
    register()
    return import_module("qtipcli.hub.vllm_linear")


@pytest.fixture
def x():
    return torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("specs", [(HYB_1_5,), (HYB_1_5, ONE_MAD_2, MUL1_3_SHORT)], ids=["one rate", "rates of their own"])
@torch.no_grad()
def test_merged_layers_give_what_their_parts_do(x, specs, bias):
    layers = packed(specs, bias)
    built = merged(layers, bias)
    vllm_stub.load(built, tensors_of(layers))
    for name, parts in MERGED.items():
        parent = f"{BLOCK}.{name}".rpartition(".")[0]
        expected = torch.cat([layers[f"{parent}.{part}"](x) for part in parts], dim=-1)
        assert torch.equal(built[f"{BLOCK}.{name}"](x), expected)


@pytest.mark.parametrize(("specs", "share", "products_taken"), [((HYB_1_5,), True, 2), ((HYB_1_5,), False, 5)])
@torch.no_grad()
def test_what_shares_its_input_is_one_product(x, monkeypatch, specs, share, products_taken):
    from qtipcli.nn import linear

    layers = packed(specs, share=share)
    built = merged(layers)
    vllm_stub.load(built, tensors_of(layers))
    taken, matvec = [], linear.dispatch.matvec
    monkeypatch.setattr(linear.dispatch, "matvec", lambda *arguments: taken.append(0) or matvec(*arguments))
    for layer in built.values():
        layer(x)
    assert len(taken) == products_taken


@torch.no_grad()
def test_nothing_is_held_twice_and_a_moved_layer_is_one_set_of_parameters():
    layers = packed((HYB_1_5,))
    built = merged(layers)
    vllm_stub.load(built, tensors_of(layers))
    for layer in built.values():
        assert {name for name, _ in layer.named_parameters()} == {"trellis", "scale_in", "scale_out", "lut", "weight"}
        own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters() if parameter.numel()}
        for group in layer.qtip_groups:
            views = [group.trellis, *(p for part in group.parts for p in part.parameters() if p.numel())]
            assert {view.untyped_storage().data_ptr() for view in views} <= own


@torch.no_grad()
def test_it_compiles_without_a_break(x):
    layers = packed((HYB_1_5, ONE_MAD_2))
    layer = merged(layers)[f"{BLOCK}.self_attn.qkv_proj"]
    vllm_stub.load({f"{BLOCK}.self_attn.qkv_proj": layer}, {n: t for n, t in tensors_of(layers).items() if "self_attn" in n})
    torch.compiler.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_a_tensor_that_does_not_come_is_an_error():
    layers = packed((HYB_1_5,))
    tensors = tensors_of(layers)
    del tensors[f"{BLOCK}.self_attn.k_proj.scale_out"]
    with pytest.raises(CorruptError, match=r"scale_out of part 1 of .*qkv_proj was not loaded"):
        vllm_stub.load(merged(layers), tensors)


def test_a_tensor_of_another_shape_is_an_error():
    layers = packed((HYB_1_5,))
    tensors = tensors_of(layers)
    name = f"{BLOCK}.mlp.up_proj.trellis"
    tensors[name] = tensors[name][:, 1:]
    with pytest.raises(CorruptError, match=r"trellis of part 1 of .*gate_up_proj"):
        vllm_stub.load(merged(layers), tensors)


@pytest.mark.parametrize("cut_inputs", [False, True], ids=["columns", "rows"])
def test_tensor_parallelism_is_refused(cut_inputs):
    with pytest.raises(QtipError, match="tensor-parallel-size 1"):
        merged(packed((HYB_1_5,)), tp_size=2, cut_inputs=cut_inputs)


def test_a_merged_layer_that_is_packed_in_part_is_refused():
    layers = packed((HYB_1_5,))
    del layers[f"{BLOCK}.self_attn.v_proj"]
    with pytest.raises(QtipError, match=r"self_attn.v_proj is not packed"):
        merged(layers)


def test_a_layer_of_another_size_is_refused():
    with pytest.raises(QtipError, match="check that they belong together"):
        vllm_stub.LinearBase(INPUTS, [100, 90], config_of(packed((HYB_1_5,))), f"{BLOCK}.mlp.gate_up_proj")


def test_what_is_not_packed_is_left_to_vllm(vllm):
    config = config_of(packed((HYB_1_5,)))
    unpacked = vllm_stub.LinearBase(48, [48], config, f"{BLOCK}.self_attn.o_proj")
    assert isinstance(unpacked.quant_method, vllm_stub.UnquantizedLinearMethod)
    assert config.get_quant_method(vllm_stub.VocabParallelEmbedding(), "model.embed_tokens") is None


def test_a_packed_embedding_is_refused(vllm):
    layout = PackedLayout(48, 90, ONE_MAD_2, Transform(), Transform("block", 16), embedding=True)
    config = vllm.QtipVllmConfig({"model.embed_tokens": layout})
    with pytest.raises(QtipError, match="embedding-bits"):
        config.get_quant_method(vllm_stub.VocabParallelEmbedding(), "model.embed_tokens")


def test_names_follow_the_model_that_vllm_builds(x):
    layers = packed((HYB_1_5,))
    config = config_of(layers)
    config.apply_vllm_mapper(SimpleNamespace(apply_dict=lambda table: {f"language_{name}": own for name, own in table.items()}))
    config.packed_modules_mapping = {"wqkv": ["q_proj", "k_proj", "v_proj"]}
    layer = vllm_stub.LinearBase(INPUTS, [48, 24, 24], config, f"language_{BLOCK}.self_attn.wqkv")
    assert len(layer.quant_method.layouts) == 3


def test_a_config_of_another_version_is_refused_by_name():
    fields = QtipConfig.from_layouts({}, {}).to_dict()
    with pytest.raises(QtipError, match="version 99"):
        vllm_stub.REGISTERED["qtip"].from_config(fields | {"format_version": 99})


def test_registering_again_changes_nothing():
    register()
    assert vllm_stub.METHODS == ["qtip"]


def test_the_entry_point_is_what_vllm_looks_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["qtip"].partition(":")
    assert getattr(import_module(module), function) is register


def test_the_plugin_is_importable_without_vllm_and_loads_nothing_heavy():
    program = "import sys, qtipcli.hub.vllm_plugin; print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], env=forks.environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
