"""The figures of an evaluation. Oracles: a plain loop in float64 over the tokens, and distributions worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qtipcli.data.text import load_documents
from qtipcli.data.windows import Windows, evaluation_windows
from qtipcli.errors import QtipError, SettingsError
from qtipcli.stages import evaluate
from qtipcli.stages.histogram import histogram_of

MATERIALS = Path(__file__).parents[3] / "shared" / "materials"
VOCABULARY, ROWS, CONTEXT = 37, 5, 12
ISSUE_KEYS = {
    "perplexity",
    "base_perplexity",
    "perplexity_ratio",
    "kl_mean",
    "kl_median",
    "kl_p99",
    "kl_max",
    "top1_agreement",
    "tokens",
    "protocol",
    "bits_per_weight",
}


def windows_of(tokens: torch.Tensor) -> Windows:
    return Windows(tokens, "test", len(tokens), None, "none", "0" * 64)


def tiny_llama(seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        attention_dropout=0.5,  # of no effect in eval mode
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)  # far from uniform predictions
    return model


class FakeModel:
    """Gives the logits it was made with, [T, V], whatever the tokens."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, logits_TV) -> None:
        self.logits_TV = torch.as_tensor(logits_TV)
        self.config = LlamaConfig(vocab_size=self.logits_TV.shape[1], max_position_embeddings=len(self.logits_TV))

    def eval(self) -> None: ...

    def __call__(self, input_ids, use_cache):
        assert input_ids.shape == (1, len(self.logits_TV)) and use_cache is False
        return SimpleNamespace(logits=self.logits_TV[None])


@pytest.fixture
def windows() -> Windows:
    return windows_of(torch.randint(VOCABULARY, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(0)))


def by_definition(model, base_model, tokens_NT) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Surprisal of both models, KL and agreement of each prediction: sums over the vocabulary in Python floats."""
    own, base, kl, agrees = [], [], [], []
    for row in tokens_NT:
        with torch.no_grad():
            q_logits, p_logits = (candidate.eval()(row[None]).logits[0].tolist() for candidate in (model, base_model))
        for position in range(len(row) - 1):
            p, q = ([math.exp(value) for value in logits[position]] for logits in (p_logits, q_logits))
            p, q = ([value / math.fsum(weights) for value in weights] for weights in (p, q))
            following = int(row[position + 1])
            own.append(-math.log(q[following]))
            base.append(-math.log(p[following]))
            kl.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            agrees.append(p.index(max(p)) == q.index(max(q)))
    return np.array(own), np.array(base), np.array(kl), np.array(agrees)


# float64 throughout and a few dozen terms: rounding leaves twelve digits
CLOSE = {"rel": 1e-12, "abs": 1e-14}


def test_every_figure_is_its_definition(windows):
    model, base_model = tiny_llama(1), tiny_llama(2)
    result = evaluate.run(model, base_model, windows, bits_per_weight=2.25)
    own, base, kl, agrees = by_definition(model, base_model, windows.tokens)
    assert result.tokens == ROWS * (CONTEXT - 1) == len(kl)
    assert result.perplexity == pytest.approx(math.exp(own.mean()), **CLOSE)
    assert result.base_perplexity == pytest.approx(math.exp(base.mean()), **CLOSE)
    assert result.perplexity_ratio == pytest.approx(math.exp(own.mean()) / math.exp(base.mean()), **CLOSE)
    assert result.kl_mean == pytest.approx(kl.mean(), **CLOSE)
    assert result.kl_median == pytest.approx(np.sort(kl)[len(kl) // 2], **CLOSE)  # an odd number of predictions
    assert result.kl_p99 == pytest.approx(np.percentile(kl, 99), **CLOSE)
    assert result.kl_p999 == pytest.approx(np.percentile(kl, 99.9), **CLOSE)
    assert result.kl_max == pytest.approx(kl.max(), **CLOSE)
    assert result.top1_agreement == agrees.mean()
    assert result.kl_histogram == histogram_of(kl)
    assert result.bits_per_weight == 2.25
    assert kl.mean() > 0.1 and 0 < agrees.mean() < 1  # the two models differ enough for this to mean anything


def test_standard_errors_take_windows_as_the_independent_observations(windows):
    model, base_model = tiny_llama(1), tiny_llama(2)
    result = evaluate.run(model, base_model, windows)
    own, base, kl, agrees = (values.reshape(ROWS, -1).mean(1) for values in by_definition(model, base_model, windows.tokens))
    stderr = lambda means: means.std(ddof=1) / math.sqrt(ROWS)  # noqa: E731
    assert result.kl_stderr == pytest.approx(stderr(kl), **CLOSE)
    assert result.top1_stderr == pytest.approx(stderr(agrees), **CLOSE)
    assert result.perplexity_stderr == pytest.approx(result.perplexity * stderr(own), **CLOSE)
    assert result.perplexity_ratio_stderr == pytest.approx(result.perplexity_ratio * stderr(own - base), **CLOSE)
    assert evaluate.run(model, base_model, windows_of(windows.tokens[:1])).kl_stderr is None


def test_a_model_against_itself_is_exactly_zero(windows):
    model = tiny_llama(1)
    result = evaluate.run(model, model, windows, noise_model=model)
    assert (
        result.kl_mean == result.kl_median == result.kl_p99 == result.kl_max == result.kl_stderr == result.kl_noise_floor == 0
    )
    assert result.top1_agreement == result.perplexity_ratio == 1
    assert result.perplexity == result.base_perplexity


def test_known_distributions_give_what_was_worked_out_by_hand():
    log = torch.log
    p = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 3, 1 / 3, 1 / 3], [1, 1, 1]], dtype=torch.float64)
    q = torch.tensor([[1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 4, 1 / 4], [1, 1, 1]], dtype=torch.float64)
    tokens = torch.tensor([[2, 1, 0]])  # the last row of each is the position that predicts no token of the window
    result = evaluate.run(FakeModel(log(q) + 5), FakeModel(log(p) - 7), windows_of(tokens))
    first = 1 / 2 * math.log(2) - 1 / 4 * math.log(2)
    second = (math.log(2 / 3) + 2 * math.log(4 / 3)) / 3
    assert result.tokens == 2
    assert result.kl_mean == pytest.approx((first + second) / 2, **CLOSE)
    assert result.kl_max == pytest.approx(first, **CLOSE)
    assert result.perplexity == pytest.approx(math.sqrt(2 * 2), **CLOSE)  # q gave the tokens 1/2 and 1/2
    assert result.base_perplexity == pytest.approx(math.sqrt(4 * 3), **CLOSE)
    assert result.top1_agreement == 1 / 2  # 0 against 1, then a tie whose first is 0 against 0


def test_a_token_masked_in_both_models_adds_nothing():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]])
    result = evaluate.run(FakeModel(logits), FakeModel(logits), windows_of(torch.tensor([[0, 1]])))
    assert result.kl_mean == 0 and result.perplexity == pytest.approx(2, **CLOSE)


def test_without_the_original_there_is_the_perplexity_alone(windows):
    result = evaluate.run(tiny_llama(1), None, windows)
    assert result.perplexity == evaluate.run(tiny_llama(1), tiny_llama(2), windows).perplexity
    for name in ISSUE_KEYS - {"perplexity", "tokens", "protocol"}:
        assert getattr(result, name) is None
    assert result.protocol.base_dtype is None


def test_json_has_the_keys_of_the_issue_and_the_protocol(windows):
    row = json.loads(json.dumps(evaluate.run(tiny_llama(1), tiny_llama(2).bfloat16(), windows).as_json(), allow_nan=False))
    assert row.keys() >= ISSUE_KEYS
    protocol = row["protocol"]
    assert (protocol["data"], protocol["windows"], protocol["context"]) == ("test", ROWS, CONTEXT)
    assert (protocol["special_tokens"], protocol["dtype"], protocol["base_dtype"]) == ("none", "float32", "bfloat16")
    assert (protocol["device"], protocol["placement"]) == ("cpu", "whole model in memory")
    assert "qtipcli " in protocol["software"] and f"torch {'.'.join(torch.__version__.split('.')[:2])}" in protocol["software"]
    assert "0 to context - 2" in protocol["positions"] and "KL(original || evaluated)" in protocol["arithmetic"]


def test_chunks_of_positions_change_nothing(windows, monkeypatch):
    model, base_model = tiny_llama(1), tiny_llama(2)
    whole = evaluate.run(model, base_model, windows)
    monkeypatch.setattr(evaluate, "CHUNK_LOGITS", 3 * VOCABULARY)  # 11 predictions: three chunks of 3, one of 2
    assert evaluate.run(model, base_model, windows) == whole
    monkeypatch.setattr(evaluate, "CHUNK_LOGITS", 1)  # less than one position: a position at a time
    assert evaluate.run(model, base_model, windows) == whole


def test_the_noise_floor_is_the_kl_of_the_original_to_itself_in_the_narrow_dtype(windows):
    base_model, narrow = tiny_llama(2), tiny_llama(2).bfloat16()
    result = evaluate.run(tiny_llama(1), base_model, windows, noise_model=narrow)
    assert result.kl_noise_floor == evaluate.run(narrow, base_model, windows).kl_mean > 0


def test_dropout_is_off_and_progress_is_told_after_each_window(windows):
    model = tiny_llama(1).train()
    seen = []
    first = evaluate.run(model, None, windows, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, ROWS) for number in range(1, ROWS + 1)]
    assert evaluate.run(model, None, windows) == first


# What is refused


def test_windows_longer_than_the_models_positions_are_refused():
    with pytest.raises(SettingsError, match=f"13 tokens are longer than the {CONTEXT} positions.*--context {CONTEXT}"):
        evaluate.run(tiny_llama(1), None, windows_of(torch.zeros(1, CONTEXT + 1, dtype=torch.long)))


def test_a_token_outside_of_the_vocabulary_is_refused():
    with pytest.raises(QtipError, match=f"token {VOCABULARY}, and the model's vocabulary ends at {VOCABULARY - 1}"):
        evaluate.run(tiny_llama(1), None, windows_of(torch.full((1, 4), VOCABULARY)))


def test_an_original_of_another_vocabulary_is_refused(windows):
    with pytest.raises(QtipError, match=f"the original predicts 40 tokens and the evaluated model {VOCABULARY}"):
        evaluate.run(tiny_llama(1), tiny_llama(2, vocabulary=40), windows)


def test_a_noise_floor_without_the_original_is_refused(windows):
    with pytest.raises(SettingsError, match="needs the original"):
        evaluate.run(tiny_llama(1), None, windows, noise_model=tiny_llama(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("broken", "fact"), [(0, "the model's logits are"), (1, "the original's logits are")])
def test_logits_that_are_not_finite_are_refused_by_window(windows, bad, broken, fact):
    models = [tiny_llama(1), tiny_llama(2)]
    token = int(windows.tokens[1, 3])
    tokens = windows.tokens.clone()
    tokens[0][tokens[0] == token] = (token + 1) % VOCABULARY  # so that the broken row is met in the second window first
    with torch.no_grad():
        models[broken].model.embed_tokens.weight[token] = bad
    with pytest.raises(QtipError, match=f"{fact} not finite in window 2 of {ROWS}"):
        evaluate.run(models[0], models[1], windows_of(tokens))


def test_a_perplexity_beyond_floating_point_is_refused():
    logits = torch.tensor([[2000.0, 0.0], [0.0, 0.0]])
    with pytest.raises(QtipError, match=r"exp\(2000\), is too large"):
        evaluate.run(FakeModel(logits), None, windows_of(torch.tensor([[0, 1]])))


# Real models: the protocol of ../shared/materials/README.md


@pytest.mark.slow
@pytest.mark.skipif(not MATERIALS.is_dir(), reason="../shared/materials is absent")
@pytest.mark.parametrize(("name", "perplexity"), [("tinystories-llama-1m", 2.041), ("tinystories-llama-15m", 7.555)])
def test_the_protocol_gives_the_published_perplexity_of_the_materials(name, perplexity):
    tokenizer = AutoTokenizer.from_pretrained(MATERIALS / name)
    model = AutoModelForCausalLM.from_pretrained(MATERIALS / name, dtype=torch.float32)
    windows = evaluation_windows(tokenizer, load_documents(str(MATERIALS / "tinystories-heldout.txt")), 256, windows=64)
    result = evaluate.run(model, model, windows)
    assert round(result.perplexity, 3) == perplexity  # as many digits as the README has
    assert result.kl_max == 0 and result.tokens == 64 * 255
