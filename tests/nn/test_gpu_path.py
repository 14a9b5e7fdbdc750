"""A packed layer where Triton serves: on a GPU if there is one, else through the interpreter, which dispatch is told to use.

Oracle: the layer on the CPU. Tolerance: its input is rounded to fp16 on the way, as a dense fp16 layer's is.
"""

import pytest
import torch
from random_layers import ONE_MAD_2, random_layer

from qtipcli.nn import fused
from qtipcli.nn.layout import PackedLayout
from qtipcli_kernels import dispatch
from qtipcli_kernels.spec import TrellisSpec


@pytest.fixture
def device(monkeypatch) -> str:
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(dispatch, "implementation", lambda device: dispatch.TRITON)
    return "cpu"


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To fp16's precision over a whole row: 2^-11 of its norm, and as much again for the output's own rounding."""
    return bool(((found.cpu().float() - expected).norm(dim=-1) <= 2**-10 * expected.norm(dim=-1)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("spec", [TrellisSpec("mul1", 2), TrellisSpec("hyb", 4)], ids=lambda spec: spec.code)
def test_a_layer_is_what_it_is_on_the_cpu(spec, dtype, device, monkeypatch):
    layer = random_layer(PackedLayout(40, 72, spec, bias=True))
    x = torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "implementation", lambda device: dispatch.NUMBA)
        expected = layer(x.float())
    with torch.no_grad():
        found = layer.to(device)(x.to(device))
    assert found.dtype == dtype and found.shape == expected.shape
    assert close(found, expected)


def test_gradients_take_the_differentiable_way(device, monkeypatch):
    """The fused op has no backward: a layer that is trained, or whose input is, must not go there."""
    layer = random_layer(PackedLayout(32, 48, TrellisSpec("3inst", 3))).to(device)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    monkeypatch.setattr(dispatch, "packed_linear", None)
    layer(x).sum().backward()
    dense = layer.weight_dense()
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
    layer.scale_out.requires_grad_()
    layer(x.detach()).sum().backward()
    assert layer.scale_out.grad is not None


def test_layers_of_a_group_make_one_call(device, monkeypatch):
    calls = []
    original = dispatch.packed_linear
    monkeypatch.setattr(dispatch, "packed_linear", lambda *arguments: calls.append(arguments) or original(*arguments))
    parent = torch.nn.Module()
    parent.q, parent.k = (random_layer(PackedLayout(32, size, ONE_MAD_2), seed=size) for size in (48, 16))
    parent.k.scale_in.data.copy_(parent.q.scale_in)
    parent.to(device)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        alone = parent.q(x), parent.k(x)
        assert len(calls) == 2
        assert fused.fuse(parent) == [("q", "k")]
        together = parent.q(x), parent.k(x)
    assert len(calls) == 3
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_and_the_compiler_give_the_eager_layer():
    layer = random_layer(PackedLayout(512, 768, TrellisSpec("hyb", 4))).cuda()
    x = torch.randn(1, 512).cuda().half()
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True)(x)
        static = x.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(static)
        static.copy_(x * 2)
        graph.replay()
    assert torch.equal(compiled, expected)
    torch.testing.assert_close(out, expected * 2, rtol=1e-2, atol=1e-2)


def test_the_op_fulfils_torchs_contract(device):
    """Oracle: torch.library.opcheck: schema, fakes and tracing against the real op."""
    layer = random_layer(PackedLayout(32, 48, ONE_MAD_2)).to(device)
    x = torch.randn(2, 32).to(device)
    fields = (ONE_MAD_2.code, ONE_MAD_2.bits_per_step, ONE_MAD_2.state_bits, ONE_MAD_2.weights_per_step)
    torch.library.opcheck(
        torch.ops.qtip.packed_linear,
        (x, layer.scale_in, 32, layer.trellis, None, [48], [48], [layer.scale_out], [None], *fields),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
