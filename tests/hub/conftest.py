"""One packed model on disk, and what fresh processes make of it, for all tests of this folder."""

import pytest
from hub import forks, packed_llama

LOAD = """
import importlib
for name in {order}:
    importlib.import_module(name)
from hub import packed_llama
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({directory!r})
save_file({{"logits": packed_llama.logits(model)}}, {output!r})
"""

THREADS = """
import qtipcli, importlib, threading
names = ["transformers.quantizers.auto", "qtipcli.hub.quantizer"] * 4
failures = []
def load(name):
    start.wait()
    try:
        importlib.import_module(name)
    except BaseException as error:
        failures.append(repr(error))
start = threading.Barrier(len(names))
threads = [threading.Thread(target=load, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
from transformers.quantizers import auto
print(failures, type(auto.AUTO_QUANTIZER_MAPPING["qtip"]).__name__)
"""

ORDERS = {
    "qtipcli first": ("qtipcli", "transformers.modeling_utils"),
    "transformers first": ("transformers.modeling_utils", "qtipcli"),
    "no qtipcli": ("transformers",),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """(directory, logits before saving) of a packed model in several shards."""
    model, _ = packed_llama.make()
    directory = tmp_path_factory.mktemp("packed")
    model.save_pretrained(directory, max_shard_size="20KB")
    return directory, packed_llama.logits(model)


@pytest.fixture(scope="session")
def fresh(saved, tmp_path_factory):
    """Program -> (exit status, output, file it may have written) of a fresh process each: the ORDERS, and "threads"."""
    folder = tmp_path_factory.mktemp("fresh")
    files = {name: folder / f"{name}.safetensors" for name in ORDERS}
    programs = {
        name: LOAD.format(order=order, directory=str(saved[0]), output=str(files[name])) for name, order in ORDERS.items()
    }
    results = forks.run(programs | {"threads": THREADS})
    return {name: (*result, files.get(name)) for name, result in results.items()}
