"""Head and embedding, found in every architecture that the tests stream; what cannot be packed is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from model.tiny_models import build, plain_model, save, token_rows
from qtipcli.errors import QtipError
from qtipcli.model.inputs import AfterBlocks, capture_first_inputs, run_block
from qtipcli.model.linears import HessianRecorder, InputGroup
from qtipcli.model.outer import find_embedding, find_head, is_tied
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource


def skeleton_of(label: str, directory: Path) -> Skeleton:
    return Skeleton(ModelSource.open(save(label, directory)))


@pytest.mark.parametrize(
    ("label", "head", "embedding", "tied"),
    [
        ("llama", "lm_head", "model.embed_tokens", True),
        ("qwen2", "lm_head", "model.embed_tokens", False),
        ("gpt_neox", "lm_head", "gpt_neox.embed_in", False),
        ("gpt2", "lm_head", "transformer.wte", True),
    ],
)
def test_head_and_embedding_are_found(label: str, head: str, embedding: str, tied: bool, tmp_path: Path) -> None:
    skeleton = skeleton_of(label, tmp_path)
    assert find_head(skeleton) == (head, skeleton.model.get_submodule(head))
    assert find_embedding(skeleton) == (embedding, skeleton.model.get_submodule(embedding))
    assert is_tied(skeleton) == tied


def test_an_embedding_that_multiplies_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(QtipError, match=r"model.embed_tokens, is Gemma3TextScaledWordEmbedding"):
        find_embedding(skeleton_of("gemma3_text", tmp_path))


def test_an_embedding_that_renormalises_is_refused(tmp_path: Path) -> None:
    skeleton = skeleton_of("llama", tmp_path)
    skeleton.model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(QtipError, match="an Embedding with max_norm"):
        find_embedding(skeleton)


def test_a_head_that_is_no_linear_is_refused_by_name(tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        pass

    skeleton = skeleton_of("qwen2", tmp_path)
    skeleton.model.lm_head = Scaled(32, 61, device="meta")
    with pytest.raises(QtipError, match=r"lm_head, is Scaled, not a torch\.nn\.Linear"):
        find_head(skeleton)
    skeleton.model.lm_head = None
    with pytest.raises(QtipError, match="does not say which module is its head"):
        find_head(skeleton)


def test_a_matrix_that_a_third_module_shares_is_refused_by_name(tmp_path: Path) -> None:
    skeleton = skeleton_of("llama", tmp_path)
    skeleton.tied["model.other.weight"] = "model.embed_tokens.weight"
    with pytest.raises(QtipError, match=r"model\.embed_tokens\.weight of .* is also model\.other\.weight"):
        is_tied(skeleton)


@pytest.mark.parametrize("label", ["llama", "qwen2", "gpt_neox"])
def test_the_heads_input_is_that_of_the_whole_model(label: str, tmp_path: Path) -> None:
    """Oracle: the model as transformers runs it, its head's input written down; the Hessian in float64."""
    skeleton, rows = skeleton_of(label, tmp_path), token_rows()
    name, head = find_head(skeleton)
    seen: list[torch.Tensor] = []
    model = plain_model(tmp_path)
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(rows)
    (batch,) = capture_first_inputs(skeleton, rows)
    for index in range(len(skeleton.blocks)):
        skeleton.materialize(index)
        batch.hidden = run_block(skeleton, index, batch)
        skeleton.release(index)
    skeleton.materialize_outer()
    with HessianRecorder(skeleton.model, [InputGroup((name,), 32)], skeleton.device) as recorder:
        AfterBlocks(skeleton, rows[:1]).call_head(rows, batch.hidden, head)
    mean, tokens = recorder.hessians()[name]
    assert head.weight.is_meta or name == "lm_head"  # a tied one came with the embedding
    assert "forward" not in vars(head)
    x_NI = seen[0].reshape(-1, 32).double()
    assert tokens == len(x_NI) == rows.numel()
    exact = x_NI.T @ x_NI / tokens
    # Sums of 36 products in float32.
    assert float((mean - exact).norm() / exact.norm()) < 1e-6


def test_a_model_that_never_calls_its_head_is_refused(tmp_path: Path) -> None:
    skeleton, rows = skeleton_of("qwen2", tmp_path), token_rows()
    (batch,) = capture_first_inputs(skeleton, rows)
    skeleton.materialize_outer(head=True)
    after = AfterBlocks(skeleton, rows[:1])
    with pytest.raises(QtipError, match="never calls its head"):
        after.call_head(rows, batch.hidden, build("qwen2").lm_head)
