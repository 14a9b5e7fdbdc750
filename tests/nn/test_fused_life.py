"""What may happen to fused layers: parameters changed, moved, copied, saved, loaded, compiled. Outputs stay right."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from nn.attention import ALL_AT_ONCE, NAMES, Attention, equal, pair, rows
from safetensors.torch import load_file, save_file
from torch import nn

from qtipcli.nn.fused import fuse, unfuse
from qtipcli.nn.swap import dequantize

# --- changed parameters ---


@pytest.mark.parametrize("name", ["scale_in", "lut"])
@torch.no_grad()
def test_what_the_layers_no_longer_share_they_read_for_themselves(name):
    model, plain = pair()
    x = rows()
    model.q(x)
    for own in (model, plain):
        getattr(own.k, name).mul_(2)
    assert equal((model.k(x), *model(x)), (plain.k(x), *plain(x)))


@pytest.mark.parametrize("name", ["trellis", "scale_in", "lut"])
@torch.no_grad()
def test_a_replaced_parameter_is_the_one_that_counts(name):
    model, plain = pair()
    for own in (model, plain):
        old = getattr(own.k, name)
        setattr(own.k, name, nn.Parameter(old.flip(0), requires_grad=False))
    assert equal(model(rows()), plain(rows()))


@torch.no_grad()
def test_a_trellis_whose_data_is_exchanged_is_the_one_that_counts():
    model, plain = pair()
    for own in (model, plain):
        own.k.trellis.data = own.k.trellis.data.flip(0)
    assert equal(model(rows()), plain(rows()))


@torch.no_grad()
def test_a_trellis_that_is_written_into_counts_for_both():
    model, plain = pair()
    for own in (model, plain):
        own.k.trellis.copy_(own.k.trellis.flip(0))
    assert equal(model(rows()), plain(rows()))
    assert model.k.group is not None


@torch.no_grad()
def test_state_is_saved_layer_by_layer_and_loaded_into_fused_layers(tmp_path):
    model, plain = pair()
    assert list(model.state_dict()) == list(plain.state_dict())
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in state.items())
    # Into a fused model, state whose layers do not share their input.
    other = Attention()
    other.k.scale_in.neg_()
    model.load_state_dict(other.state_dict())
    assert equal(model(rows()), other(rows()))


# --- moves and copies ---


def held(model: nn.Module) -> int:
    """Bytes of the memory behind the packed matrices, each piece counted once."""
    pieces = [layer.trellis.untyped_storage() for layer in model.children()]
    return sum({piece.data_ptr(): piece.nbytes() for piece in pieces}.values())


@torch.no_grad()
def test_no_weight_is_held_twice_and_unfuse_gives_each_layer_its_own():
    model, plain = pair()
    assert held(model) == held(plain)
    whole = weakref.ref(model.q.group.trellis)
    storage = model.q.trellis.untyped_storage().data_ptr()
    assert model.k.trellis.untyped_storage().data_ptr() == storage
    assert fuse(model) == [NAMES]
    unfuse(model)
    gc.collect()
    assert whole() is None
    assert held(model) == held(plain)
    assert model.k.trellis.untyped_storage().data_ptr() != model.q.trellis.untyped_storage().data_ptr()
    assert model.q.group is None
    assert equal(model(rows()), plain(rows()))


@torch.no_grad()
def test_fused_layers_stay_fused_when_they_move(products):
    """`_apply` is what `.to`, `.cuda` and their kin call; every parameter in memory of its own is what they leave."""
    model, plain = pair()
    model._apply(lambda tensor: tensor.clone())
    assert held(model) == held(plain)
    found = model(rows())
    assert products == ALL_AT_ONCE
    assert equal(found, plain(rows()))
    assert equal(model.to(torch.bfloat16)(rows()), plain.to(torch.bfloat16)(rows()))
    assert model.q.group is not None


@torch.no_grad()
def test_what_changed_before_a_move_counts_after_it():
    model, plain = pair()
    for own in (model, plain):
        own.k.scale_in.mul_(2)
        own._apply(lambda tensor: tensor.clone())
    assert equal(model(rows()), plain(rows()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@torch.no_grad()
def test_fused_layers_stay_fused_on_the_way_to_a_gpu_and_back():
    model, plain = pair()
    x = rows().cuda()
    found = model.cuda()(x)
    assert model.q.group is not None
    for y, expected in zip(found, plain.cuda()(x), strict=True):
        torch.testing.assert_close(y, expected)  # one product of another shape, which may sum in another order
    assert equal(model.cpu()(rows()), plain.cpu()(rows()))
    assert model.q.group is not None


@torch.no_grad()
def test_a_member_that_moves_alone_leaves_the_group():
    model, plain = pair()
    model.k._apply(lambda tensor: tensor.clone())
    assert equal(model(rows()), plain(rows()))
    model.v.to("meta")
    assert torch.equal(model.q(rows()), plain.q(rows()))
    assert model.to("meta").q.group is None


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", COPIES)
@torch.no_grad()
def test_a_copy_is_whole_and_can_be_fused_anew(kind):
    model, plain = pair()
    model.q(x := rows())  # a part is pending
    twin = COPIES[kind](model)
    del model
    assert twin.q.group is None
    assert held(twin) == held(plain)
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert equal(twin(x), plain(x))
    assert fuse(twin) == [NAMES]
    assert equal(twin(x), plain(x))


@torch.no_grad()
def test_a_copied_layer_takes_nothing_else_with_it():
    model, plain = pair()
    twin = copy.deepcopy(model.k)
    assert twin.trellis.untyped_storage().nbytes() == twin.trellis.nbytes
    assert torch.equal(twin(rows()), plain.k(rows()))


@torch.no_grad()
def test_a_replica_computes_with_its_own_parameters():
    """What nn.DataParallel makes: another module with the same attributes, parameters exchanged."""
    model, plain = pair()
    plain.k.trellis.copy_(plain.k.trellis.flip(0))
    replica = model.k._replicate_for_data_parallel()
    for name, parameter in plain.k.named_parameters():
        setattr(replica, name, parameter.detach())
    assert torch.equal(replica(rows()), plain.k(rows()))


def test_dequantized_layers_leave_nothing_behind():
    model, _ = pair()
    whole = weakref.ref(model.q.group.trellis)
    dequantize(model, torch.float32)
    assert whole() is None


# --- torch.compile ---


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
def test_compiled_it_is_one_graph_with_one_product(backend):
    model, plain = pair()
    counts = []

    def counting(graph, inputs):
        counts.append(sum("matvec" in str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for _ in range(3):
        # Inductor may contract the products of scales and inputs: one rounding of float32 in sums of 100 terms.
        torch.testing.assert_close(compiled(rows()), plain(rows()), rtol=1e-5, atol=1e-5)
    assert counts == [1]
    group = model.q.group
    assert group._traced_x is None
    assert not group._traced_parts
    assert equal(model(rows()), plain(rows()))


@pytest.mark.parametrize("kind", ["inputs of their own", "one called alone"])
@torch.no_grad()
def test_compiled_where_nothing_is_shared_each_soon_computes_for_itself(kind):
    model, plain = pair()

    def forward(own, x):
        return (own.q(x + 1), own.k(x * 2), own.v(x - 1)) if kind == "inputs of their own" else (own.q(x),)

    graphs = []

    def keeping(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(lambda x: forward(model, x), fullgraph=True, backend=keeping)
    for seed in range(4):
        assert equal(compiled(rows() + seed), forward(plain, rows() + seed))
    group = model.q.group
    assert group._traced_x is None
    assert not group._traced_parts
    assert "group_trellis" in graphs[0]
    assert "group_trellis" not in graphs[-1]
    assert len(graphs) <= 3
    assert equal(model(rows()), plain(rows()))


@torch.no_grad()
def test_compiled_after_state_was_loaded_the_state_is_what_counts():
    model, _ = pair()
    other = Attention()
    other.k.scale_in.neg_()
    model.load_state_dict(other.state_dict())
    torch.compiler.reset()
    assert equal(torch.compile(model, fullgraph=True, backend="eager")(rows()), other(rows()))


def test_compiled_graphs_need_not_copy_the_weights():
    """CUDA graphs copy an input at every replay unless it is marked as one that stays where it is."""
    assert torch._dynamo.utils.get_static_address_type(pair()[0].q.group.trellis)


def test_compiled_gradients_are_those_of_the_layers_one_by_one():
    grads = []
    for model in pair():
        torch.compiler.reset()
        x = rows().requires_grad_()
        outputs = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        sum((y * y).sum() for y in outputs).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
