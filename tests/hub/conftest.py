"""One packed model on disk, and what fresh processes make of it, for all tests of this folder."""

import socket

import pytest
from hub import forks, packed_llama

IMPORTS = {
    "transformers first": "import transformers.modeling_utils, qtipcli",
    "no qtipcli": "import transformers",
    "qtipcli first, then both from threads": """
import qtipcli, importlib, threading
names = ["transformers.quantizers.auto", "qtipcli.hub.quantizer"] * 4
def load(name):
    start.wait()
    importlib.import_module(name)
    imported.append(name)
start, imported = threading.Barrier(len(names)), []
threads = [threading.Thread(target=load, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(imported) == len(names)
""",
}

LOAD = """
from hub import packed_llama
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({directory!r})
save_file({{"logits": packed_llama.logits(model)}}, {output!r})
"""


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """(directory, logits before saving) of a packed model in several shards."""
    model, _ = packed_llama.make()
    directory = tmp_path_factory.mktemp("packed")
    model.save_pretrained(directory, max_shard_size="20KB")
    return directory, packed_llama.logits(model)


@pytest.fixture(scope="session")
def fresh(saved, tmp_path_factory):
    """Key of IMPORTS -> (exit status, output, where it may have saved the logits) of a fresh process each."""
    folder = tmp_path_factory.mktemp("fresh")
    files = {name: folder / f"{name}.safetensors" for name in IMPORTS}
    programs = {
        name: imports + LOAD.format(directory=str(saved[0]), output=str(files[name])) for name, imports in IMPORTS.items()
    }
    return {name: (*result, files[name]) for name, result in forks.run(programs).items()}


@pytest.fixture(scope="session")
def letters():
    """A tokenizer whose tokens are letters, for the 96 tokens of packed_llama."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0} | {chr(31 + token): token for token in range(1, 96)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>")


@pytest.fixture
def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
