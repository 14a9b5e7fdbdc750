"""Experts that saw few tokens, and their Hessians in a quantized prefix. Oracle: the formula, and hooks on whole models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qtipcli.config import CalibrationSettings, QuantizeSettings
from qtipcli.job.directory import RunDirectory
from qtipcli.model.inputs import capture_first_inputs
from qtipcli.model.linears import input_groups
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.stages import calibrate, quantize, streams
from qtipcli.stages.calibrate import block_key
from qtipcli.stages.few_tokens import FEW_TOKENS, Moments, Shared, StoredMoments
from qtipcli.stages.prefix import Prefix
from qtipcli.stages.progress import Silent
from stages.families import save
from stages.tiny import save_text

FEATURES = 64
TOKENS = torch.randint(1, 3072, (5, 24), generator=torch.Generator().manual_seed(3))
EXPERTS = "model.layers.1.mlp.experts"


def hessian(seed: int) -> torch.Tensor:
    x = torch.randn(100, FEATURES, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [(0, 1.0), (1, 64 / 65), (64, 0.5), (FEW_TOKENS * 64 - 1, 64 / (9 * 64 - 1)), (FEW_TOKENS * 64, 0.0)],
)
def test_the_shared_hessian_counts_as_so_many_tokens_as_there_are_inputs(tokens: int, share: float) -> None:
    own, shared = hessian(1), hessian(2)
    moments = Moments(own.clone(), tokens, shared=Shared(shared, 1000), is_mean=True)
    assert moments.share == pytest.approx(share)
    torch.testing.assert_close(moments.mixed(), (1 - share) * own + share * shared)
    assert moments.seen


def test_layers_outside_of_experts_keep_their_own_hessian_to_the_bit() -> None:
    own = hessian(1)
    assert Moments(own, 3, is_mean=True).mixed() is own
    assert not Moments(own, 0).seen
    assert not Moments(own, 0, shared=Shared(own, 0)).seen


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of six experts, two for a token, whose router never chooses the last of its second block; read only."""
    directory = save("Qwen3-MoE", tmp_path_factory.mktemp("mixture"), {"num_experts": 6, "num_local_experts": 6})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    gate = model.get_submodule("model.layers.1.mlp.gate").weight.data
    # Of five directions that lie evenly in a plane two at least have a positive product with anything: more than the last's 0.
    angles = torch.arange(5) * 2 * torch.pi / 5
    gate.copy_(torch.cat([torch.stack([angles.cos(), angles.sin()], 1) @ gate[:2], torch.zeros(1, FEATURES)]))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def done(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Skeleton, RunDirectory, RunDirectory, list[str]]:
    """(skeleton, its Hessians, a job made with them, what the job noted); read only."""
    where = tmp_path_factory.mktemp("jobs")
    source, notes = ModelSource.open(mixture), Notes()
    text = save_text(where / "text.txt")
    calibrate.run(source, CalibrationSettings(data=str(text), samples=2, context=16), where / "hessians", two_sided=True)
    settings = QuantizeSettings(bits=2, state_bits=8, search=False, quantized_prefix=False, two_sided=True)
    quantize.run(source, settings, where / "hessians", where / "job", watcher=notes)
    return Skeleton(source), RunDirectory.load(where / "hessians"), RunDirectory.load(where / "job"), notes.texts


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def counted(hessians: RunDirectory, index: int) -> dict[str, int]:
    return {group["names"][0]: group["tokens"] for group in hessians.report(block_key(index))["groups"]}


def test_an_expert_without_tokens_is_rounded_under_the_mean_of_the_others(done: Any) -> None:
    skeleton, hessians, job, _ = done
    tokens = {name: count for name, count in counted(hessians, 1).items() if name.endswith("gate_up_proj")}
    assert min(tokens.values()) == 0, tokens
    idle = min(tokens, key=tokens.__getitem__)
    report = job.report(block_key(1))
    assert report["layers"][idle]["shared_hessian"] == 1.0
    assert report["left"] == {}
    found = StoredMoments(hessians, 1, *skeleton.blocks[1]).of([idle], torch.device("cpu"))
    stored = hessians.read(block_key(1))
    expected = sum(stored[name] * count for name, count in tokens.items()) / sum(tokens.values())
    torch.testing.assert_close(found.mixed(), expected)


def test_it_is_said_how_few_tokens_there_were_and_only_of_experts(done: Any) -> None:
    _, hessians, job, notes = done
    (note,) = [note for note in notes if note.startswith("model.layers.1:")]
    assert re.search(r"12 layers of experts saw fewer than 8 tokens .* only 0: ", note)
    for index in range(2):
        for name, report in job.report(block_key(index))["layers"].items():
            assert ("shared_hessian" in report) == (".experts." in name)
            if ".experts." in name:
                assert report["tokens"] == counted(hessians, index)[name]


def test_the_quantized_prefix_sees_each_experts_own_tokens(mixture: Path, tmp_path: Path) -> None:
    """Also where there is room for one expert's Hessian at a time."""
    first = {"model.layers.0.self_attn.o_proj": 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(4))}
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval()
    for name, weight in first.items():
        model.get_submodule(name).weight.data = weight
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts = model.get_submodule(EXPERTS)
    experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    with torch.no_grad():
        model(TOKENS)
    hidden, chosen = seen[0]
    for number, memory_gib in enumerate((1.0, 1e-6)):
        skeleton = Skeleton(ModelSource.open(mixture))
        where = tmp_path / str(number)
        where.mkdir()
        both, calls = streams.start(skeleton, TOKENS.split(2), ("original", "quantized"), where, 1.0, Silent())
        prefix = Prefix(skeleton, *both, calls, TOKENS[:1], where, memory_gib)
        skeleton.materialize(0)
        prefix.advance(0, first)
        skeleton.materialize(1)
        names = [[f"{EXPERTS}.{expert}.gate_up_proj"] for expert in range(6)]
        prefix.enter(1, names)
        total = hidden[:, None].expand(-1, chosen.shape[1], -1).reshape(-1, FEATURES)
        for expert, (name,) in enumerate(names):
            found = prefix.moments(1, [name], {})
            x = hidden[(chosen == expert).any(-1)]
            assert found.tokens == len(x)
            torch.testing.assert_close(found.hessian_II, x.T @ x / max(len(x), 1), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.shared.hessian_II, total.T @ total / len(total), rtol=1e-4, atol=1e-4)
        prefix.close()


def test_the_quantized_prefix_runs_a_block_once_for_all_experts_at_a_place(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = Skeleton(ModelSource.open(mixture))
    both, calls = streams.start(skeleton, [TOKENS], ("original", "quantized"), tmp_path, 1.0, Silent())
    prefix = Prefix(skeleton, *both, calls, TOKENS[:1], tmp_path)
    (one_input,) = capture_first_inputs(skeleton, TOKENS)
    block = skeleton.materialize(0)
    groups = [[f"model.layers.0.{name}" for name in group.names] for group in input_groups(skeleton, 0, one_input)]
    prefix.enter(0, groups)
    runs: list[nn.Module] = []
    block.get_submodule("mlp.gate").register_forward_hook(lambda module, *_: runs.append(module))
    for names in groups:
        if ".experts." in names[0]:
            prefix.moments(0, names, {})
    prefix.close()
    assert len(runs) == 2
