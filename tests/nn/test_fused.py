"""Fused layers against the same layers one by one: equal bits whatever happens around them, and one product where it can be."""

import threading
import weakref

import pytest
import torch
from nn.attention import ALL_AT_ONCE, INPUTS, NAMES, ONE_BY_ONE, Attention, equal, pair, rows, share_input_side
from nn.random_layers import HYB_1_5, LUT_2, ONE_MAD_2, random_layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from qtipcli.nn import fused
from qtipcli.nn.fused import MISS_LIMIT, shared_inputs
from qtipcli.nn.layout import PackedLayout
from qtipcli.quant.transform import Transform

# --- which layers belong together ---


def test_layers_of_one_parent_with_one_input_side_are_found_in_the_models_order():
    model = nn.ModuleDict({"a": Attention(), "b": Attention()})
    assert shared_inputs(model) == [("a.q", "a.k", "a.v"), ("b.q", "b.k", "b.v")]


@pytest.mark.parametrize(
    "layout",
    [
        PackedLayout(INPUTS, 37, ONE_MAD_2, Transform("block"), bias=True),
        PackedLayout(INPUTS, 37, HYB_1_5, Transform(), bias=True),
        PackedLayout(112, 37, HYB_1_5, Transform("block"), bias=True),
    ],
    ids=["spec", "transform", "in_features"],
)
def test_a_layer_of_another_kind_stays_by_itself(layout):
    model = Attention()
    model.k = random_layer(layout)
    if layout.in_features == INPUTS and layout.spec == HYB_1_5:
        share_input_side(model.q, model.k)
    assert shared_inputs(model) == [("q", "v")]


@pytest.mark.parametrize("name", ["scale_in", "lut"])
def test_a_layer_that_differs_in_one_bit_stays_by_itself(name):
    model = Attention()
    with torch.no_grad():
        getattr(model.k, name).view(torch.int16).view(-1)[-1] += 1
    assert shared_inputs(model) == [("q", "v")]


def test_layers_that_are_not_in_memory_stay_by_themselves():
    assert shared_inputs(Attention().to("meta")) == []


# --- the same bits, by one product ---


@pytest.mark.parametrize("spec", [HYB_1_5, LUT_2, ONE_MAD_2], ids=lambda spec: spec.code)
@pytest.mark.parametrize("shape", [(1,), (5,), (70,), (2, 3), (0,), ()], ids=str)
@torch.no_grad()
def test_outputs_are_those_of_the_layers_one_by_one(spec, shape, products):
    model, plain = pair(spec)
    x = torch.randn(*shape, INPUTS)
    found = model(x)
    assert products == ALL_AT_ONCE
    assert equal(found, plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_outputs_have_the_dtype_of_x(dtype):
    model, plain = pair()
    found = model(rows().to(dtype))
    assert {y.dtype for y in found} == {dtype}
    assert equal(found, plain(rows().to(dtype)))


@torch.no_grad()
def test_any_member_may_come_first(products):
    model, plain = pair()
    x = rows()
    for names in (("v", "q", "k"), ("k", "v", "q")):
        found = {name: model.get_submodule(name)(x) for name in names}
        assert all(torch.equal(y, plain.get_submodule(name)(x)) for name, y in found.items())
    assert [total for total in products if total == sum(ONE_BY_ONE)] == 2 * ALL_AT_ONCE


@torch.no_grad()
def test_a_wrapper_around_a_member_changes_nothing(products):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.down = base, nn.Linear(INPUTS, base.out_features, bias=False)

        def forward(self, x):
            return self.base_layer(x) + self.down(x)

    model, plain = pair()
    model.k = Adapter(model.k)
    x = rows()
    found = model(x)
    assert products == ALL_AT_ONCE
    q, k, v = plain(x)
    assert equal(found, (q, k + model.k.down(2 * x), v))


# --- nothing is kept, nothing is stale ---


@torch.no_grad()
def test_nothing_is_kept_once_all_have_their_part():
    model, _ = pair()
    found = model(rows())
    refs = [weakref.ref(y) for y in found]
    del found
    assert not any(ref() is not None for ref in refs)
    assert not model.q.group._pending


@torch.no_grad()
def test_parts_that_nobody_takes_go_with_their_input():
    model, _ = pair()
    x = rows()
    model.q(x)
    left = [weakref.ref(part) for part in model.q.group._pending[threading.get_ident()].left.values()]
    assert len(left) == 2
    del x
    assert not any(ref() is not None for ref in left)


@torch.no_grad()
def test_an_input_that_is_written_into_is_computed_anew():
    model, plain = pair()
    x = rows()
    assert torch.equal(model.q(x), plain.q(x))
    x.mul_(3)
    assert torch.equal(model.k(x), plain.k(x))
    x[0, 0] = 7
    assert torch.equal(model.v(x), plain.v(x))


@torch.no_grad()
def test_another_tensor_is_another_input_and_a_second_call_computes_again():
    model, plain = pair()
    x, other = rows(), rows() + 1
    for name, tensor in (("q", x), ("k", other), ("k", x), ("q", x), ("q", x), ("v", x[:]), ("v", other), ("v", x)):
        assert torch.equal(model.get_submodule(name)(tensor), plain.get_submodule(name)(tensor))


@torch.no_grad()
def test_members_do_not_share_their_outputs_memory():
    model, plain = pair()
    x = rows()
    q = model.q(x)
    q.zero_()
    assert equal((model.k(x), model.v(x)), (plain.k(x), plain.v(x)))


@torch.no_grad()
def test_layers_that_turn_out_not_to_share_their_input_go_their_own_ways(products):
    model, plain = pair()
    for _ in range(MISS_LIMIT):
        for name in NAMES:
            tensor = rows()
            assert torch.equal(model.get_submodule(name)(tensor), plain.get_submodule(name)(tensor))
    assert model.q.group is None
    products.clear()
    model(rows())
    assert products == ONE_BY_ONE


@torch.no_grad()
def test_a_rare_miss_is_forgiven():
    model, _ = pair()
    for _ in range(3 * MISS_LIMIT):
        model.q(rows())
        model(rows())
    assert model.q.group is not None


@torch.no_grad()
def test_threads_do_not_see_each_others_parts(products):
    """They meet between any two calls, so that every part of one is pending while the other runs; also with one x for both."""
    model, plain = pair()
    shared = rows()
    barrier, wrong = threading.Barrier(2, timeout=60), []

    def run(seed):
        for step in range(20):
            x = shared if step % 2 else torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(seed * 100 + step))
            for name in NAMES:
                barrier.wait()
                with torch.no_grad():
                    if not torch.equal(model.get_submodule(name)(x), plain.get_submodule(name)(x)):
                        wrong.append((seed, step, name))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    # Neither lost a part to the other: one product for each thread and step.
    assert products.count(sum(ONE_BY_ONE)) == 2 * 20


@torch.no_grad()
def test_another_stream_does_not_get_what_this_one_has_not_finished(monkeypatch, products):
    model, plain = pair()
    x = rows()
    model.q(x)
    monkeypatch.setattr(fused, "_state", lambda x: (x._version, 1))
    assert torch.equal(model.k(x), plain.k(x))
    assert products[:2] == 2 * ALL_AT_ONCE


def test_inference_mode_counts_no_versions_so_each_computes_for_itself(products):
    model, plain = pair()
    with torch.inference_mode():
        x = rows()
        q = model.q(x)
        assert products == [64]
        x.mul_(3)
        assert torch.equal(model.k(x), plain.k(x))
        assert not torch.equal(q, plain.q(x))
    with torch.no_grad():
        assert equal((model.q(x), model.k(x)), (plain.q(x), plain.k(x)))


# --- gradients ---


@pytest.mark.parametrize("wrap", ["plain", "checkpoint", "reentrant checkpoint"])
def test_gradients_are_those_of_the_layers_one_by_one(wrap):
    grads = []
    for model in pair():
        for parameter in (model.q.scale_in, model.k.scale_in, model.k.scale_out, model.v.lut):
            parameter.requires_grad_(True)
        x = rows().requires_grad_()
        outputs = model(x) if wrap == "plain" else checkpoint(model, x, use_reentrant=wrap.startswith("re"))
        sum((y * y).sum() for y in outputs).backward()
        grads.append([x.grad, model.q.scale_in.grad, model.k.scale_in.grad, model.k.scale_out.grad, model.v.lut.grad])
    assert all(torch.isfinite(grad).all() for grad in grads[0])
    assert equal(*grads)


def test_with_gradients_enabled_each_computes_for_itself(products):
    model, plain = pair()
    assert equal(model(rows()), plain(rows()))
    assert products == 2 * ONE_BY_ONE
    assert not model.q.group._pending


def test_parts_computed_without_gradients_do_not_reach_a_call_with_them():
    model, plain = pair()
    x = rows().requires_grad_()
    with torch.no_grad():
        model.q(x)
    model.k(x).sum().backward()
    found, x.grad = x.grad, None
    plain.k(x).sum().backward()
    assert torch.equal(found, x.grad)
    with torch.no_grad():
        assert torch.equal(model.v(x), plain.v(x))


def test_a_trained_input_scale_is_each_layers_own():
    model, plain = pair()
    for own in (model, plain):
        own.k.scale_in.requires_grad_(True)
    x = rows()
    for own in (model, plain):
        sum(y.sum() for y in own(x)).backward()
    assert torch.equal(model.k.scale_in.grad, plain.k.scale_in.grad)
    assert model.q.scale_in.grad is None
