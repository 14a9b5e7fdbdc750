"""The held-out loss against a loop that predicts one token at a time, and the pieces of the recipe that decide it."""

import math
from itertools import pairwise

import pytest
import torch

from qtipcli.demo.heldout import bits_per_byte, heldout_loss
from qtipcli.demo.tokenizer import END_OF_TEXT_ID, VOCABULARY
from qtipcli.demo.train import Recipe, batches, build_model, build_optimizers, schedule, token_stream, train_step

TINY = Recipe(minutes=0, hidden=32, intermediate=48, layers=1, heads=2, key_value_heads=1, context=8, batch=2)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 8 * 9, 8 * 9 + 3])
def test_every_token_is_scored_once_after_the_tokens_of_its_window(tokens):
    model = build_model(TINY).eval()
    token_N = torch.randint(1, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1))
    stream = torch.cat([torch.tensor([END_OF_TEXT_ID]), token_N])
    expected = 0.0
    for position in range(1, len(stream)):
        start = (position - 1) // TINY.context * TINY.context
        with torch.no_grad():
            logits_V = model(input_ids=stream[None, start:position], use_cache=False).logits[0, -1]
        expected -= torch.log_softmax(logits_V.double(), dim=-1)[stream[position]].item()
    # Float32 logits of about 0.1 and a loss of 8: 1e-6 is a dozen roundings.
    assert heldout_loss(model, token_N) == pytest.approx(expected / tokens, rel=1e-6)


def test_bits_per_byte_counts_bytes_and_not_characters():
    # 3 tokens of ln 4 nats are 6 bits; "né" is 3 bytes.
    assert bits_per_byte(math.log(4), 3, "né") == pytest.approx(2.0, rel=1e-15)


def test_an_epoch_visits_every_window_once_in_an_order_that_the_seed_fixes():
    token_N = torch.arange(8 * 20, dtype=torch.int32)
    first, again = batches(token_N, TINY), batches(token_N, TINY)
    # At most 7 of the 160 tokens are skipped by the offset, and a window takes one token more than it predicts: 19 windows.
    rows = torch.cat([next(first) for _ in range(10)])[:19]
    assert torch.equal(rows, torch.cat([next(again) for _ in range(10)])[:19])
    starts = sorted(rows[:, 0].tolist())
    assert [b - a for a, b in pairwise(starts)] == [8] * 18
    assert torch.equal(rows, rows[:, :1] + torch.arange(9))


def test_schedule_warms_up_by_steps_and_ends_at_zero_by_the_clock():
    assert schedule(0, 0.0, 60) == 1 / 60
    assert schedule(59, 0.0, 60) == 1.0
    assert schedule(1000, 0.25, 60) == 0.75
    assert schedule(1000, 1.0, 60) == 0.0


def test_every_parameter_but_the_tied_copy_is_trained_by_exactly_one_optimizer():
    model = build_model(TINY)
    trained = [p for o in build_optimizers(model, TINY) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, trained)) == sorted(map(id, model.parameters()))


def test_training_steps_learn_a_repeated_batch():
    model = build_model(TINY).train()
    optimizers = build_optimizers(model, TINY)
    batch_BT = next(batches(torch.arange(1, 100, dtype=torch.int32), TINY))
    losses = [train_step(model, optimizers, batch_BT, TINY, rate=1.0) for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.05)
    assert losses[-1] < 0.5 * losses[0]


def test_each_document_of_the_stream_ends_with_end_of_text(demo_tokenizer):
    stream = token_stream(demo_tokenizer, ["a = 1\n", "b"]).tolist()
    assert stream == [*demo_tokenizer.encode("a = 1\n"), END_OF_TEXT_ID, *demo_tokenizer.encode("b"), END_OF_TEXT_ID]
