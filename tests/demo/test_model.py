"""The shipped demo model: that it loads offline, has the shape the demo promises, and has learnt Python."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qtipcli.demo.heldout import bits_per_byte, heldout_loss
from qtipcli.demo.text import EVALUATION_MODULES, calibration_text, evaluation_text

# `--evaluate`'s protocol on the first 20 kB, Python 3.11.7, 2026-11-22.
RECORDED_BITS_PER_BYTE = 1.436


def test_directory_holds_safetensors_and_the_record_and_is_at_most_16_mb(demo_directory):
    names = {path.name for path in demo_directory.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(path.stat().st_size for path in demo_directory.iterdir()) <= 16e6


def test_architecture_is_a_small_llama_with_grouped_queries_and_a_tied_head(demo_model):
    config = demo_model.config
    assert config.model_type == "llama"
    assert config.dtype == torch.float32  # as loaded; what is stored is the next test's
    assert 3_000_000 <= demo_model.num_parameters() <= 8_000_000
    assert config.num_key_value_heads < config.num_attention_heads
    assert demo_model.lm_head.weight is demo_model.model.embed_tokens.weight
    assert config.intermediate_size & (config.intermediate_size - 1)  # no power of two


def test_stored_weights_are_bfloat16_and_finite(demo_directory):
    weights = load_file(demo_directory / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in weights.values())
    assert json.loads((demo_directory / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    if x:\n        return [\n            1,\n        ]\n\n\n",
        "\tdef tabbed(self):\r\n\t\treturn  self . x  \n",
        "  leading and trailing spaces  ",
        "'n't I'll  ,  .  !  ?",
        "é ü 日本語 🐍 \x00 \x7f \ufeff",
        "<s> </s> <unk> ▁ Ġ Ċ",
        "",
    ],
)
def test_tokenizer_is_lossless(demo_tokenizer, text):
    assert demo_tokenizer.decode(demo_tokenizer.encode(text)) == text


def test_tokenizer_is_lossless_on_the_demo_texts(demo_tokenizer):
    for text in (evaluation_text(), calibration_text()[:200_000]):
        assert demo_tokenizer.decode(demo_tokenizer(text, verbose=False)["input_ids"]) == text


def test_tokenizer_and_model_agree_on_end_of_text(demo_tokenizer, demo_model):
    assert demo_tokenizer.eos_token_id == demo_tokenizer.bos_token_id == demo_model.config.eos_token_id
    assert demo_tokenizer.encode(demo_tokenizer.eos_token) == [demo_tokenizer.eos_token_id]
    assert len(demo_tokenizer) == demo_model.config.vocab_size


def test_heldout_loss_is_the_recorded_one(demo_model, demo_tokenizer):
    # The margin is for the text, which differs a little from one version of Python to the next; a broken model, tokenizer
    # or rope costs far more than it.
    text = evaluation_text()[:20_000]
    token_N = torch.tensor(demo_tokenizer(text, verbose=False)["input_ids"])
    assert bits_per_byte(heldout_loss(demo_model, token_N), len(token_N), text) < RECORDED_BITS_PER_BYTE * 1.05


def test_most_generations_are_python(demo_model, demo_tokenizer):
    # Oracle: Python's own compiler. Greedy, 64 tokens, of which the last statement may be cut off: a generation counts if whole
    # lines beyond the prompt compile with it. Seven of the eight do; six, because a near-tie may fall otherwise on another CPU.
    prompts = [
        "def read_lines(filename):",
        "def main():",
        "def close(self):",
        "def parse(text):",
        "def encode(data):",
        "class Queue:",
        "for line in lines:",
        "try:\n    import threading\nexcept ImportError:",
    ]
    compiled = 0
    for prompt in prompts:
        inputs = demo_tokenizer(prompt, return_tensors="pt")
        output = demo_model.generate(**inputs, max_new_tokens=64, do_sample=False)
        lines = demo_tokenizer.decode(output[0]).splitlines()
        first_new = prompt.count("\n") + 2
        compiled += any(_compiles("\n".join(lines[:count])) for count in range(first_new, len(lines) + 1))
    assert compiled >= 6


def _compiles(source: str) -> bool:
    try:
        compile(source, "generated", "exec")
    except SyntaxError:
        return False
    return True


def test_record_tells_recipe_tokens_and_a_curve_that_falls(demo_directory):
    record = json.loads((demo_directory / "training.json").read_text())
    curve = record["curve"]
    assert curve[-1]["minutes"] >= record["recipe"]["minutes"]
    assert curve[-1]["tokens_seen"] > 0
    assert curve[-1]["bits_per_byte"] == min(point["bits_per_byte"] for point in curve)
    assert record["heldout"]["ratio"] <= 0.7
    assert record["heldout"]["evaluation_modules"] == list(EVALUATION_MODULES)
