"""What the quantized prefix knows of a layer. Oracle: hooks on two whole models, the original and one that is changed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtipcli.errors import QtipError, StoppedError
from qtipcli.job.processes import Processes
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.stages import streams
from qtipcli.stages.prefix import Prefix
from qtipcli.stages.progress import Silent

BLOCK = "model.layers.1"
GROUPS = [
    [f"{BLOCK}.self_attn.{name}_proj" for name in "qkv"],
    [f"{BLOCK}.self_attn.o_proj"],
    [f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj"],
    [f"{BLOCK}.mlp.down_proj"],
]
TOKENS = torch.randint(1, 3072, (5, 24), generator=torch.Generator().manual_seed(3))


def changed(model: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    weights = {name: model.get_submodule(name).weight.data for name in names}
    return {name: weight + 0.05 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}


def at_second_block(model: Path, tmp_path: Path, first_block: dict[str, torch.Tensor], memory_gib: float = 1.0) -> Prefix:
    skeleton = Skeleton(ModelSource.open(model))
    both, calls = streams.start(skeleton, TOKENS.split(2), ("original", "quantized"), tmp_path, 1.0, Silent())
    prefix = Prefix(skeleton, *both, calls, TOKENS[:1], tmp_path, memory_gib)
    skeleton.materialize(0)
    prefix.advance(0, first_block)
    skeleton.release(0)
    skeleton.materialize(1)
    prefix.enter(1, GROUPS)
    return prefix


def seen(model: torch.nn.Module, name: str, what: str) -> torch.Tensor:
    """[N, features] of a module's input or output, of all tokens."""
    kept: list[torch.Tensor] = []
    module = model.get_submodule(name)
    if what == "input":
        handle = module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, args, output: kept.append(output))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    return kept[0].flatten(0, -2)


@pytest.mark.parametrize(
    ("names", "before", "place"),
    [
        (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], [], None),
        (["self_attn.o_proj"], ["self_attn.q_proj", "self_attn.v_proj"], ("post_attention_layernorm", "input")),
        (["mlp.gate_proj", "mlp.up_proj"], ["self_attn.o_proj"], None),
        (["mlp.down_proj"], ["self_attn.o_proj", "mlp.up_proj"], ("", "output")),
    ],
)
def test_moments_are_those_of_two_whole_models(
    tiny_model: Path, tmp_path: Path, names: list[str], before: list[str], place: tuple[str, str] | None
) -> None:
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval().requires_grad_(False)
    quantized = copy.deepcopy(original)
    first_block = changed(original, ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"])
    rounded = changed(original, [f"{BLOCK}.{name}" for name in before])
    for name, weight in (first_block | rounded).items():
        quantized.get_submodule(name).weight.data = weight
    full = [f"{BLOCK}.{name}" for name in names]
    moments = at_second_block(tiny_model, tmp_path, first_block).moments(1, full, rounded)
    x_NI = seen(quantized, full[0], "input")
    assert moments.tokens == len(x_NI) == TOKENS.numel()
    torch.testing.assert_close(moments.hessian_II, x_NI.T @ x_NI / len(x_NI), rtol=1e-4, atol=1e-5)
    assert sorted(moments.missing) == sorted(full)
    for name in full:
        where, what = (name, "output") if place is None else (f"{BLOCK}.{place[0]}".rstrip("."), place[1])
        missing = seen(original, where, what) - seen(quantized, where, what)
        seen_, heldout = moments.missing[name]
        last = slice(-TOKENS.shape[1], None)  # of five rows the last one is held out
        for evidence, part in ((seen_, slice(None)), (heldout, last)):
            assert evidence.tokens == len(x_NI[part])
            torch.testing.assert_close(evidence.missing_OI, missing[part].T @ x_NI[part], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(evidence.hessian_II, x_NI[part].T @ x_NI[part], rtol=1e-3, atol=1e-3)


def test_a_block_is_left_with_its_own_weights(tiny_model: Path, tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prefix = at_second_block(tiny_model, tmp_path, {})
    rounded = changed(original, [f"{BLOCK}.self_attn.q_proj"])
    prefix.moments(1, [f"{BLOCK}.self_attn.o_proj"], rounded)
    kept = prefix._skeleton.blocks[1][1].self_attn.q_proj.weight
    assert torch.equal(kept, original.get_submodule(f"{BLOCK}.self_attn.q_proj").weight)


def test_an_overflow_names_the_layer_and_the_remedy(tiny_model: Path, tmp_path: Path) -> None:
    prefix = at_second_block(tiny_model, tmp_path, {})
    prefix._quantized.write(0, prefix._quantized.read(0) * float("inf"))
    with pytest.raises(QtipError, match=r"layer model\.layers\.1\.self_attn\.q_proj is given NaN or infinite values"):
        prefix.moments(1, [f"{BLOCK}.self_attn.q_proj"], {})


def test_what_is_kept_in_files_is_what_is_kept_in_memory(tiny_model: Path, tmp_path: Path) -> None:
    in_memory, in_files = (at_second_block(tiny_model, tmp_path, {}, memory_gib) for memory_gib in (1.0, 0.0))
    assert [stream._path for stream in in_memory._kept.values()] == [None] * 4
    assert all(stream._path is not None for stream in in_files._kept.values())
    for names in GROUPS:
        one, other = (prefix.moments(1, names, {}) for prefix in (in_memory, in_files))
        assert torch.equal(one.hessian_II, other.hessian_II)
        for name in names:
            assert all(
                torch.equal(a.missing_OI, b.missing_OI) for a, b in zip(one.missing[name], other.missing[name], strict=True)
            )
    in_files.close()
    assert list(tmp_path.iterdir()) == []


def test_both_streams_advance_alike_whether_the_block_was_entered_or_not(tiny_model: Path, tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rounded = changed(original, [f"{BLOCK}.self_attn.q_proj"])
    entered, passed = (at_second_block(tiny_model, tmp_path, {}) for _ in range(2))
    passed._forget()
    for prefix in (entered, passed):
        prefix.advance(1, rounded)
    for batch in range(len(entered._original)):
        assert torch.equal(entered._original.read(batch), passed._original.read(batch))
        assert torch.equal(entered._quantized.read(batch), passed._quantized.read(batch))
    assert not torch.equal(entered._original.read(0), entered._quantized.read(0))


def test_layers_that_are_called_more_than_once_are_not_compared(tiny_model: Path, tmp_path: Path) -> None:
    """As experts are; here the whole MLP runs again on twice its input."""
    prefix = at_second_block(tiny_model, tmp_path, {})
    mlp = prefix._skeleton.blocks[1][1].mlp
    once = prefix.moments(1, GROUPS[2], {})
    mlp.register_forward_hook(lambda module, args, output: output + module.forward(2 * args[0]))
    prefix._found.clear()
    prefix.enter(1, GROUPS)
    twice = prefix.moments(1, GROUPS[2], {})
    assert (twice.tokens, twice.missing) == (2 * once.tokens, {})
    torch.testing.assert_close(twice.hessian_II, 2.5 * once.hessian_II, rtol=1e-5, atol=1e-6)  # (1 + 4) / 2
    assert prefix.moments(1, GROUPS[0], {}).missing.keys() == set(GROUPS[0])


def test_ctrl_c_waits_until_the_block_is_rounded(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a block's layers nothing asks whether to stop: what is rounded of it would be lost."""
    prefix = at_second_block(tiny_model, tmp_path, {})

    def stop(_: Processes) -> None:
        raise StoppedError("stopped")

    monkeypatch.setattr(Processes, "poll", stop)
    for names in GROUPS:
        assert prefix.moments(1, names, {}).tokens
    assert prefix._look_at_experts(1, GROUPS[1], GROUPS[1], {})  # as if it were an expert's
    with pytest.raises(StoppedError):
        prefix.enter(1, GROUPS)
