"""The model without weights: which blocks it has, and that what comes back is what transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qtipcli.errors import CorruptError, QtipError
from qtipcli.model.keys import KeyMap
from qtipcli.model.skeleton import Skeleton, find_blocks
from qtipcli.model.source import SINGLE_FILE, ModelSource

from .tiny_models import CONFIGS, build, linear_parameters, plain_model, save

Checkpoint = Callable[[str], Path]

FIRST_BLOCK = {
    "gemma3": "model.language_model.layers.0",
    "gpt_neox": "gpt_neox.layers.0",
    "gpt2": "transformer.h.0",
}


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = directory / SINGLE_FILE
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})


def real_parameters(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.is_meta}


@pytest.mark.parametrize("label", CONFIGS)
def test_blocks_come_back_as_transformers_loads_them(checkpoint: Checkpoint, label: str) -> None:
    plain = plain_model(checkpoint(label))  # the oracle; exact, since nothing is computed
    skeleton = Skeleton(ModelSource.open(checkpoint(label)))
    assert skeleton.blocks[0][0] == FIRST_BLOCK.get(label, "model.layers.0")
    assert len(skeleton.blocks) == plain.config.get_text_config().num_hidden_layers
    loaded = linear_parameters(plain)
    seen = set()
    for index, (name, _) in enumerate(skeleton.blocks):
        block = skeleton.materialize(index)
        for leaf, parameter in block.named_parameters():
            assert torch.equal(parameter, loaded[f"{name}.{leaf}"]), f"{name}.{leaf}"
            seen.add(f"{name}.{leaf}")
        assert real_parameters(skeleton.model) == {each for each in seen if each.startswith(f"{name}.")}
        skeleton.release(index)
        assert not real_parameters(skeleton.model)
    assert seen | set(skeleton.outer_names) == set(loaded)
    assert all(torch.equal(skeleton.read(name).float(), loaded[name]) for name in skeleton.outer_names)


@pytest.mark.parametrize("label", CONFIGS)
def test_buffers_are_those_of_the_loaded_model(checkpoint: Checkpoint, label: str) -> None:
    plain = dict(plain_model(checkpoint(label)).named_buffers())
    buffers = dict(Skeleton(ModelSource.open(checkpoint(label))).model.named_buffers())
    assert buffers.keys() == plain.keys()
    assert all(torch.equal(buffers[name], plain[name]) for name in plain)


def test_only_the_block_asked_for_is_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = Skeleton(ModelSource.open(checkpoint("llama")))
    read: list[str] = []
    original = ModelSource.read
    monkeypatch.setattr(ModelSource, "read", lambda source, name, *row: read.append(name) or original(source, name, *row))
    skeleton.materialize(1)
    assert len(read) == 9
    assert all(name.startswith("model.layers.1.") for name in read)
    assert not skeleton.notes


def test_the_head_and_the_blocks_stay_out_of_the_outer_part(checkpoint: Checkpoint) -> None:
    skeleton = Skeleton(ModelSource.open(checkpoint("qwen2")))
    skeleton.materialize_outer()
    assert real_parameters(skeleton.model) == {"model.embed_tokens.weight", "model.norm.weight"}
    skeleton.release_outer()
    assert not real_parameters(skeleton.model)


def test_weights_are_computed_with_in_the_dtype_asked_for(checkpoint: Checkpoint) -> None:
    plain = plain_model(checkpoint("qwen3"), torch.bfloat16)
    skeleton = Skeleton(ModelSource.open(checkpoint("qwen3")), torch.bfloat16)
    block = skeleton.materialize(0)
    for leaf, parameter in plain.model.layers[0].named_parameters():
        assert block.get_parameter(leaf).dtype == torch.bfloat16
        assert torch.equal(block.get_parameter(leaf), parameter)


def test_materializing_again_undoes_changes_and_never_reaches_the_file(checkpoint: Checkpoint) -> None:
    for label in ("llama", "mixtral", "gpt2"):
        skeleton = Skeleton(ModelSource.open(checkpoint(label)))
        before = [parameter.clone() for parameter in skeleton.materialize(0).parameters()]
        for parameter in skeleton.blocks[0][1].parameters():
            parameter.data.zero_()
        for parameter, kept in zip(skeleton.materialize(0).parameters(), before, strict=True):
            assert torch.equal(parameter, kept)


def test_a_sharded_checkpoint_is_the_same_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    whole = Skeleton(ModelSource.open(checkpoint("gemma3_text")))
    parts = Skeleton(ModelSource.open(save("gemma3_text", tmp_path, max_shard_size="15KB")))
    assert len(parts.source.shards) > 2
    assert not parts.notes
    for index in range(len(whole.blocks)):
        for one, other in zip(whole.materialize(index).parameters(), parts.materialize(index).parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_tied_head_is_known_and_readable(checkpoint: Checkpoint) -> None:
    skeleton = Skeleton(ModelSource.open(checkpoint("llama")))
    assert skeleton.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in skeleton.outer_names
    assert torch.equal(skeleton.read("lm_head.weight"), skeleton.read("model.embed_tokens.weight"))


def test_a_tied_head_that_differs_is_kept_apart_as_transformers_does(tmp_path: Path) -> None:
    directory = save("llama", tmp_path)
    rewrite(directory, lambda tensors: tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]})
    skeleton = Skeleton(ModelSource.open(directory))
    assert torch.equal(skeleton.read("lm_head.weight"), plain_model(directory).lm_head.weight)
    assert skeleton.tied == {}
    assert "lm_head.weight" in skeleton.outer_names
    assert "lm_head.weight" in skeleton.notes[0]


def test_a_base_model_saved_without_its_prefix_is_still_streamed(tmp_path: Path) -> None:
    build("llama").model.save_pretrained(tmp_path)
    skeleton = Skeleton(ModelSource.open(tmp_path))
    assert not skeleton.notes
    assert "layers.0.mlp.up_proj.weight" in skeleton.source.tensor_names
    block = skeleton.materialize(2)
    assert torch.equal(block.mlp.up_proj.weight, build("llama").model.layers[2].mlp.up_proj.weight)


@pytest.mark.parametrize("label", CONFIGS)
def test_no_note_where_nothing_is_odd(checkpoint: Checkpoint, label: str) -> None:
    assert Skeleton(ModelSource.open(checkpoint(label))).notes == []


def test_experts_are_read_one_by_one_also_where_transformers_fuses_them(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Mixtral each expert's matrices are tensors of their own, which transformers stacks; of gpt-oss parts of one."""
    sizes: list[int] = []
    original = ModelSource.read

    def read(source: ModelSource, name: str, *row: int) -> torch.Tensor:
        tensor = original(source, name, *row)
        sizes.append(tensor.numel())
        return tensor

    for label, parts in (("mixtral", [48 * 32, 48 * 32]), ("gpt_oss", [96 * 32])):
        skeleton = Skeleton(ModelSource.open(checkpoint(label)))
        monkeypatch.setattr(ModelSource, "read", read)
        sizes.clear()
        skeleton.read("model.layers.1.mlp.experts.2.gate_up_proj.weight")
        monkeypatch.setattr(ModelSource, "read", original)
        assert sizes == parts


def test_a_fused_checkpoint_is_the_same_model_as_one_of_separate_tensors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = build("mixtral")
    plain.save_pretrained(tmp_path, save_original_format=False)
    fused, separate = (Skeleton(ModelSource.open(path)) for path in (tmp_path, checkpoint("mixtral")))
    assert "model.layers.0.mlp.experts.gate_up_proj" in fused.source.tensor_names
    assert "model.layers.0.mlp.experts.gate_up_proj" not in separate.source.tensor_names
    for one, other in zip(fused.materialize(1).parameters(), separate.materialize(1).parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    directory = save("mixtral", tmp_path)
    gone = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    rewrite(directory, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != gone})
    skeleton = Skeleton(ModelSource.open(directory))
    skeleton.materialize(0)
    with pytest.raises(CorruptError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        skeleton.materialize(1)


def test_what_cannot_be_read_one_by_one_is_loaded_whole_and_it_is_said(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = Skeleton(ModelSource.open(checkpoint("mixtral"))).materialize(1)
    monkeypatch.setattr("qtipcli.model.skeleton.map_keys", lambda *_: KeyMap({}, {}, "for once"))
    skeleton = Skeleton(ModelSource.open(checkpoint("mixtral")))
    assert skeleton.notes == ["the whole model was loaded into memory, not streamed: for once"]
    for one, other in zip(skeleton.materialize(1).parameters(), streamed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_without_some_weights_names_them(tmp_path: Path) -> None:
    directory = save("llama", tmp_path)
    gone = "model.layers.1.mlp.up_proj.weight"
    rewrite(directory, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != gone})
    with pytest.raises(CorruptError, match=gone):
        Skeleton(ModelSource.open(directory))


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    directory = save("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(directory, lambda tensors: tensors | {name: tensors[name][:-1].clone()})
    with pytest.raises(QtipError, match="transformers cannot load"):
        Skeleton(ModelSource.open(directory))


def test_a_weight_that_is_not_a_number_names_its_layer(tmp_path: Path) -> None:
    directory = save("llama", tmp_path)
    name = "model.layers.1.self_attn.k_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][2, :3] = float("nan")
        return tensors

    rewrite(directory, spoil)
    skeleton = Skeleton(ModelSource.open(directory))
    skeleton.materialize(0)
    with pytest.raises(CorruptError, match=rf"{name} holds 3 values"):
        skeleton.materialize(1)


def test_experts_in_a_list_are_not_blocks() -> None:
    block = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(9))})
    other = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(9))})
    model = nn.ModuleDict({"norms": nn.ModuleList(nn.LayerNorm(4) for _ in range(5)), "layers": nn.ModuleList([block, other])})
    assert [name for name, _ in find_blocks(model)] == ["layers.0", "layers.1"]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(QtipError, match="no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))
