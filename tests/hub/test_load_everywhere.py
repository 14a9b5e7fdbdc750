"""A packed model in what transformers offers around from_pretrained: device maps, pipeline, compile, tensor parallelism.

The oracle is the model in memory before it was saved, whose logits must come back bit for bit; no load leaves random weights.
"""

import json

import pytest
import torch
from hub import forks, packed_llama
from hub.conftest import LOAD
from hub.test_reload import Q_PROJ, copied, rewrite
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from qtipcli.errors import CorruptError
from qtipcli.hub import remote_code

NORM = "model.layers.1.post_attention_layernorm.weight"


def renamed(directory, target, old: str, new: str | None):
    """A copy of the saved model in which tensor `old` is called `new`, or is missing."""
    directory = copied(directory, target)

    def change(tensors):
        if (tensor := tensors.pop(old, None)) is not None and new is not None:
            tensors[new] = tensor

    rewrite(directory, change)
    index = directory / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    file = entries["weight_map"].pop(old)
    if new is not None:
        entries["weight_map"][new] = file
    index.write_text(json.dumps(entries))
    return directory


def test_device_map_auto_gives_the_same_bits(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0], device_map="auto")
    assert torch.equal(packed_llama.logits(model), saved[1])


def test_device_map_auto_spills_to_disk_where_memory_is_small_and_gives_the_same_bits(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        saved[0], device_map="auto", max_memory={"cpu": 45_000}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(packed_llama.logits(model), saved[1])


def test_the_pipeline_generates_what_the_model_does(saved, letters):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    generator = pipeline("text-generation", model=model, tokenizer=letters)
    how = {"max_new_tokens": 5, "do_sample": False}
    ids = letters("abcabc", return_tensors="pt")
    new = model.generate(**ids, **how)[0, 6:]
    assert generator("abcabc", **how, return_full_text=False)[0]["generated_text"] == letters.decode(new)


def test_the_pipeline_loads_a_directory_by_itself(saved, letters, tmp_path):
    directory = copied(saved[0], tmp_path / "whole")
    letters.save_pretrained(directory)
    generator = pipeline("text-generation", model=str(directory))
    assert torch.equal(packed_llama.logits(generator.model), saved[1])


def test_a_compiled_model_gives_equal_logits_in_one_graph(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    # The graph runs the same operators; only what is traced through into smaller steps may sum in another order.
    torch.testing.assert_close(packed_llama.logits(model), saved[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["missing", "misnamed"])
@pytest.mark.parametrize("tensor", [NORM, "model.embed_tokens.weight"])
def test_a_plain_tensor_that_is_not_there_is_an_error_and_no_random_numbers(saved, tmp_path, tensor, place):
    directory = renamed(saved[0], tmp_path / "copy", tensor, {"missing": None, "misnamed": f"x.{tensor}"}[place])
    with pytest.raises(CorruptError, match=f"tensor {tensor} is in none of the model's files"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_misnamed_packed_layer_is_an_error(saved, tmp_path):
    directory = renamed(saved[0], tmp_path / "copy", f"{Q_PROJ}.trellis", f"{Q_PROJ}x.trellis")
    with pytest.raises(CorruptError, match=f"{Q_PROJ}.trellis"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_tensor_of_another_shape_is_not_replaced_by_random_numbers_even_on_request(saved, tmp_path):
    directory = copied(saved[0], tmp_path / "copy")
    rewrite(directory, lambda tensors: tensors.update({k: v[:-1].contiguous() for k, v in tensors.items() if k == NORM}))
    with pytest.raises(CorruptError, match=NORM):
        AutoModelForCausalLM.from_pretrained(directory, ignore_mismatched_sizes=True)


def test_a_missing_tensor_of_an_offloaded_block_is_an_error(saved, tmp_path):
    directory = renamed(saved[0], tmp_path / "copy", NORM, None)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    with pytest.raises((CorruptError, KeyError, ValueError, RuntimeError), match=NORM):
        packed_llama.logits(
            AutoModelForCausalLM.from_pretrained(
                directory, device_map=places | {"model.layers.1": "disk"}, offload_folder=tmp_path / "offload"
            )
        )


def test_a_head_that_predicts_tokens_is_never_random(saved, tmp_path):
    """A model saved without its head, whose config then says that the head is its own."""
    AutoModel.from_pretrained(saved[0]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CorruptError, match=r"tensor lm_head.weight is in none"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_new_head_to_be_trained_is_left_to_transformers_warning(saved):
    model = AutoModelForSequenceClassification.from_pretrained(saved[0], num_labels=3)
    assert model.score.weight.shape == (3, 48)


PARALLEL = """
import os, sys
os.environ |= {{"RANK": "{rank}", "LOCAL_RANK": "{rank}", "WORLD_SIZE": "2"}}
os.environ |= {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}}
import qtipcli
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({directory!r}, tp_plan="auto")
"""


def test_two_processes_that_ask_for_tensor_parallelism_are_refused(saved, free_port):
    programs = {str(rank): PARALLEL.format(rank=rank, port=free_port, directory=str(saved[0])) for rank in range(2)}
    for status, output in forks.run(programs).values():
        assert status != 0
        assert "packed layers cannot be cut by transformers' tensor parallelism" in output
        assert "device_map" in output


@pytest.fixture(scope="module")
def with_code(saved, tmp_path_factory):
    """A copy of the packed model with the file that imports qtipcli."""
    directory = copied(saved[0], tmp_path_factory.mktemp("code") / "model")
    config = remote_code.add(directory, json.loads((directory / "config.json").read_text()))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


NOT_INSTALLED = """
import sys
class Nowhere:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "qtipcli":
            raise ModuleNotFoundError("No module named 'qtipcli'", name=name)
sys.meta_path.insert(0, Nowhere)
"""


def test_trust_remote_code_is_enough_where_qtipcli_is_installed_and_says_so_where_not(with_code, saved, tmp_path):
    trusting = LOAD.replace("({directory!r})", "({directory!r}, trust_remote_code=True)")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("installed", "absent")}
    programs = {
        name: f"import os; os.environ['HF_MODULES_CACHE'] = {str(tmp_path / 'modules' / name)!r}"
        + (NOT_INSTALLED if name == "absent" else "")
        + trusting.format(directory=str(with_code), output=str(file))
        for name, file in files.items()
    }
    done = forks.run(programs)
    assert done["installed"][0] == 0, done["installed"][1]
    assert torch.equal(load_file(files["installed"])["logits"], saved[1])
    assert done["absent"][0] != 0
    assert "pip install qtipcli" in done["absent"][1]
    assert not files["absent"].exists()


def test_without_trust_the_file_changes_nothing_and_is_not_named_in_what_is_saved(with_code, saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(with_code)
    assert torch.equal(packed_llama.logits(model), saved[1])
    model.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(packed_llama.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), saved[1])
