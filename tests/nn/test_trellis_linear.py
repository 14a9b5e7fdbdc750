"""TrellisLinear against its formula written out with dense matrices in float64."""

import pytest
import torch
from nn.random_layers import HYB_1_5, LUT_2, MUL1_3_SHORT, ODD, ONE_MAD_2, random_layer

from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear
from qtipcli.quant.transform import Transform
from qtipcli_kernels import codes, dispatch, packing

LAYOUTS = {
    "odd sizes, table, bias": ODD,
    "block on both sides": PackedLayout(256, 64, ONE_MAD_2, Transform("block"), Transform("block")),
    "full on both sides, not a power of two": PackedLayout(176, 48, MUL1_3_SHORT),
    "block of 32, one output": PackedLayout(64, 1, LUT_2, Transform("block", 32), Transform("block", 32)),
}
DTYPE_NAMES = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def transform_matrix(dimension: int, block: int) -> torch.Tensor:
    """H [dimension, dimension] in float64, with H x = dispatch.hadamard(x): one column for each unit vector."""
    return dispatch.hadamard(torch.eye(dimension), block).T.double()


def factors(layer: TrellisLinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """H_out, W~ and H_in of the padded layer, float64; W~ by unpacking and the codes' definition."""
    layout = layer.layout
    states = packing.unpack(packing.tile_words(layer.trellis, layout.spec), layout.spec)
    tiles = codes.values(states, layout.spec, layer.lut).reshape(len(states), -1)
    decoded = packing.matrix_from_tiles(tiles, layout.padded_out, layout.padded_in).double()
    return (
        transform_matrix(layout.padded_out, layout.block_out),
        decoded,
        transform_matrix(layout.padded_in, layout.block_in),
    )


def by_definition(layer: TrellisLinear, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The formula of docs/format.md, each product dense, in `dtype`."""
    layout = layer.layout
    h_out, decoded, h_in = (matrix.to(dtype) for matrix in factors(layer))
    padded = torch.zeros(*x.shape[:-1], layout.padded_in, dtype=dtype)
    padded[..., : layout.in_features] = x.to(dtype) * layer.scale_in.to(dtype)
    y = (padded @ h_in.T @ decoded.T @ h_out)[..., : layout.out_features] * layer.scale_out.to(dtype)
    return y if layer.bias is None else y + layer.bias.to(dtype)


def rms(error: torch.Tensor) -> float:
    return error.double().square().mean().sqrt().item()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_forward_is_the_formula(layout, rows):
    layer = random_layer(layout)
    x = torch.randn(rows, layout.in_features, generator=torch.Generator().manual_seed(1))
    exact = by_definition(layer, x, torch.float64)
    # Twice plain torch in the same dtype; the same four products in float32, which round in their own order.
    assert rms(layer(x) - exact) <= 2 * rms(by_definition(layer, x, torch.float32) - exact) + 1e-9
    assert layer(x).shape == (rows, layout.out_features)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_dense_weight_is_what_forward_multiplies_by(layout):
    layer = random_layer(layout)
    # The formula on unit vectors gives the matrix itself.
    bias = 0 if layer.bias is None else layer.bias.double()
    unit = torch.eye(layout.in_features)
    exact = (by_definition(layer, unit, torch.float64) - bias).T
    plain = (by_definition(layer, unit, torch.float32).double() - bias).T
    weight = layer.weight_dense()
    assert weight.shape == (layout.out_features, layout.in_features)
    assert weight.is_contiguous()
    assert rms(weight - exact) <= 2 * rms(plain - exact) + 1e-9
    assert torch.equal(layer.weight_dense(torch.bfloat16), weight.to(torch.bfloat16))


def test_leading_dimensions_are_kept_and_may_be_empty_or_absent():
    layer = random_layer(ODD)
    x = torch.randn(2, 3, 100)
    # Nothing is summed across rows: a row's result does not depend on the others beside it in the same call.
    assert layer(x).shape == (2, 3, 37)
    assert layer(torch.empty(0, 100)).shape == (0, 37)
    assert layer(x[0, 0]).shape == (37,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_input_is_computed_in_float32_and_rounded_once(dtype):
    layer = random_layer(ODD)
    x = torch.randn(3, 100).to(dtype)
    assert torch.equal(layer(x), layer(x.float()).to(dtype))


def test_gradients_reach_the_inputs_and_the_scales():
    layer = random_layer(ODD)
    x = torch.randn(4, 100, requires_grad=True)
    downstream = torch.randn(4, 37)
    layer.scale_in.requires_grad_(True)
    layer.scale_out.requires_grad_(True)
    layer(x).backward(downstream)
    h_out, decoded, h_in = factors(layer)
    inner = (h_out.T @ decoded @ h_in)[:37, :100]
    scale_in, scale_out = layer.scale_in.detach().double(), layer.scale_out.detach().double()
    weight = scale_out[:, None] * inner * scale_in
    gradient = downstream.double() @ weight
    torch.testing.assert_close(x.grad.double(), gradient, rtol=1e-4, atol=1e-5)  # sums of 100 and 37 float32 terms
    by_output = (downstream.double() * ((x.detach().double() * scale_in) @ inner.T)).sum(0)
    by_input = (x.detach().double() * ((downstream.double() * scale_out) @ inner)).sum(0)
    torch.testing.assert_close(
        layer.scale_out.grad.double(), by_output, rtol=2e-3, atol=2e-3
    )  # gradients are fp16, as the scales
    torch.testing.assert_close(layer.scale_in.grad.double(), by_input, rtol=2e-3, atol=2e-3)


def dense_gradients(layer: TrellisLinear, x: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype) -> dict:
    """Gradients of x and of every parameter by autograd through dense matrices in `dtype`."""
    layout = layer.layout
    h_out, decoded, h_in = (matrix.to(dtype) for matrix in factors(layer))
    leaves = {name: p.detach().to(dtype).requires_grad_() for name, p in layer.named_parameters() if p.is_floating_point()}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.numel()} | {"x": x.detach().to(dtype).requires_grad_()}
    if layer.lut is not None:
        # Each weight as plus or minus an entry of the table, looked up in `dtype`: the code's definition rounds to float32.
        number = torch.arange(1, layer.lut.numel() + 1, dtype=torch.float32).reshape(layer.lut.shape)
        states = packing.unpack(packing.tile_words(layer.trellis, layout.spec), layout.spec)
        tiles = codes.values(states, layout.spec, number).reshape(len(states), -1)
        signed = packing.matrix_from_tiles(tiles, layout.padded_out, layout.padded_in)
        decoded = leaves["lut"].reshape(-1)[signed.abs().long() - 1] * signed.sign().to(dtype)
    padded = torch.nn.functional.pad(leaves["x"] * leaves["scale_in"], (0, layout.padded_in - layout.in_features))
    y = (padded @ h_in.T @ decoded.T @ h_out)[..., : layout.out_features] * leaves["scale_out"]
    y = y + leaves["bias"] if "bias" in leaves else y
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream.to(dtype)), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("rows", [1, 70])
def test_gradients_of_every_parameter_are_the_dense_layers(layout, rows):
    """No worse than twice plain torch in the same dtype, as for the outputs."""
    layer = random_layer(layout)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, layout.in_features, generator=generator, requires_grad=True)
    upstream = torch.randn(rows, layout.out_features, generator=generator)
    leaves = {"x": x} | layer.unfreeze()
    if layer.bias is not None:
        leaves["bias"] = layer.bias.requires_grad_(True)
    layer(x).backward(upstream)
    exact = dense_gradients(layer, x, upstream, torch.float64)
    plain = dense_gradients(layer, x, upstream, torch.float32)
    assert set(exact) == set(leaves)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        size = exact[name].square().mean().sqrt()
        assert rms(leaf.grad - exact[name]) <= 2 * rms(plain[name] - exact[name]) + 1e-8 * size, name


def test_gradients_of_what_is_stored_are_those_of_float32_copies_rounded_to_fp16():
    x, upstream = torch.randn(4, 100), torch.randn(4, 37)
    stored, master = random_layer(ODD), random_layer(ODD)
    masters = master.unfreeze()
    for name in masters:
        getattr(stored, name).requires_grad_(True)
    for layer in (stored, master):
        layer(x).backward(upstream)
    for name, parameter in masters.items():
        assert getattr(stored, name).grad.dtype == torch.float16
        assert torch.equal(getattr(stored, name).grad, parameter.grad.to(torch.float16))


def test_unfrozen_parameters_are_trained_in_float32_whatever_the_model_is_cast_to():
    layer = random_layer(ODD)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x, expected = torch.randn(4, 100), layer(torch.ones(1, 100))
    masters = layer.unfreeze()
    assert list(masters) == ["scale_in", "scale_out", "lut"]
    assert {parameter.dtype for parameter in masters.values()} == {torch.float32}
    assert torch.equal(layer(torch.ones(1, 100)), expected)
    # Steps that fp16 would lose, one by one, and that casting the model must not round either.
    optimizer = torch.optim.SGD(masters.values(), lr=1e-7)
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
    moved = {name: parameter.detach().clone() for name, parameter in masters.items()}
    layer.to(torch.bfloat16)
    assert all(torch.equal(getattr(layer, name), parameter) for name, parameter in moved.items())
    assert not any(torch.equal(parameter, before[name].float()) for name, parameter in moved.items())


def test_a_computed_code_has_no_table_to_unfreeze_and_names_choose():
    layer = random_layer(PackedLayout(64, 32, ONE_MAD_2))
    assert list(layer.unfreeze()) == ["scale_in", "scale_out"]
    assert list(random_layer(ODD).unfreeze(["lut"])) == ["lut"]


def test_nothing_asks_for_a_gradient_by_itself():
    assert not any(parameter.requires_grad for parameter in random_layer(ODD).parameters())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_parameters_are_the_tensors_of_the_layout(layout):
    layer = random_layer(layout)
    stored = layout.tensors()
    state = layer.state_dict()
    assert set(state) == set(stored)
    for name, tensor in state.items():
        assert tuple(tensor.shape) == stored[name].shape
        assert DTYPE_NAMES[tensor.dtype] in stored[name].dtypes
    bits = 8 * sum(tensor.numel() * tensor.element_size() for name, tensor in state.items() if name != "bias")
    assert bits == layout.stored_bits


def test_the_weight_is_empty_and_of_the_models_dtype():
    layer = TrellisLinear(ODD, dtype=torch.bfloat16)
    assert layer.weight.shape == (0,)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_casting_the_model_does_not_round_what_is_stored(dtype):
    layer = random_layer(ODD)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(dtype)
    for name in ("trellis", "scale_in", "scale_out", "lut"):
        assert torch.equal(layer.state_dict()[name], before[name])
        assert layer.state_dict()[name].dtype == before[name].dtype
    assert layer.weight.dtype == layer.bias.dtype == dtype


def test_an_unfilled_layer_on_the_meta_device_costs_no_memory():
    with torch.device("meta"):
        layer = TrellisLinear(PackedLayout(1 << 15, 1 << 17, HYB_1_5))
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_the_layer_compiles_into_one_graph():
    layer = random_layer(ODD)
    x = torch.randn(3, 100)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
