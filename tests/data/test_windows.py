"""Windows of tokens. Oracle: the tokens spelt out by hand with the alphabet of conftest, one token a character."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from qtipcli.data.text import Documents, load_documents
from qtipcli.data.windows import STREAM_CHOICE, calibration_windows, evaluation_windows
from qtipcli.errors import QtipError, SettingsError

from .conftest import ALPHABET, BOS, EOS, letters, make_tokenizer


def local(*texts: str) -> Documents:
    return Documents.of("test", *texts)


def in_order(windows) -> list[list[int]]:
    return sorted(windows.tokens.tolist())


# Calibration


def test_a_text_is_tokenized_once_with_its_bos_in_front(tokenizer):
    windows = calibration_windows(tokenizer, local("abcdefgh"), samples=3, context=3, seed=0)
    assert in_order(windows) == sorted([[BOS, *letters("ab")], letters("cde"), letters("fgh")])
    assert windows.tokens.dtype == torch.int64
    assert windows.special_tokens == "<s> once a document, </s> between documents"


def test_documents_are_joined_by_one_eos_and_blank_ones_left_out(tokenizer):
    windows = calibration_windows(tokenizer, local("ab", " \n", "c"), samples=1, context=6, seed=0)
    assert windows.tokens.tolist() == [[BOS, *letters("ab"), EOS, BOS, *letters("c")]]


def test_without_bos_and_eos_documents_just_follow_each_other():
    windows = calibration_windows(make_tokenizer(False, False), local("ab", "c"), samples=1, context=3, seed=0)
    assert windows.tokens.tolist() == [letters("abc")]
    assert windows.special_tokens == "none once a document, none between documents"


def test_a_rendered_chat_gets_no_second_bos_and_no_second_eos(tokenizer):
    windows = calibration_windows(tokenizer, local("<s>ab</s>", "<s>cd</s>"), samples=1, context=8, seed=0)
    assert windows.tokens.tolist() == [[BOS, *letters("ab"), EOS, BOS, *letters("cd"), EOS]]


class CountingTokenizer:
    """Any text is the numbers from 0 to 1119, so that every window of 140 tells its place: it starts at 140 times that."""

    bos_token = eos_token = eos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": list(range(1120)) if text else []}

    def convert_ids_to_tokens(self, ids):
        return ids


def chosen_places(samples: int, seed: int) -> list[int]:
    rows = calibration_windows(CountingTokenizer(), local("x"), samples, 140, seed).tokens
    assert torch.equal(rows, rows[:, :1] + torch.arange(140)) and not (rows[:, 0] % 140).any()
    return (rows[:, 0] // 140).tolist()


def test_a_seed_chooses_without_replacement_and_other_seeds_choose_otherwise():
    choices = [chosen_places(samples=5, seed=seed) for seed in range(20)]
    assert all(len(set(choice)) == 5 for choice in choices)
    assert choices == [chosen_places(samples=5, seed=seed) for seed in range(20)]
    assert len({tuple(choice) for choice in choices}) > 15


def test_more_samples_only_add_to_what_a_seed_chooses():
    assert chosen_places(samples=8, seed=1)[:3] == chosen_places(samples=3, seed=1)


def test_the_order_of_a_seed_never_changes():
    """Oracle: the first 8 outputs of PCG64 seeded with 42, sorted by hand; another order would change every job's result."""
    assert chosen_places(samples=8, seed=42) == [4, 1, 3, 6, 0, 7, 2, 5]


def test_every_window_is_chosen_equally_often():
    counts = np.bincount([place for seed in range(400) for place in chosen_places(samples=2, seed=seed)], minlength=8)
    # 400 choices of 2 out of 8: mean 100, standard deviation sqrt(400 * 1/4 * 3/4) = 8.7; within four of them
    assert abs(counts - 100).max() <= 35


def test_too_little_text_gives_all_windows_and_says_so(tokenizer):
    windows = calibration_windows(tokenizer, local("abcdefgh"), samples=5, context=2, seed=3)
    assert (windows.rows, windows.available, windows.requested, windows.context) == (4, 4, 5, 2)


def test_text_shorter_than_a_window_is_refused_with_both_counts(tokenizer):
    for make in (lambda d: calibration_windows(tokenizer, d, 1, 10, 0), lambda d: evaluation_windows(tokenizer, d, 10)):
        with pytest.raises(QtipError, match="test has 9 tokens, and one window needs 10"):
            make(local("abcdefgh"))


def test_senseless_sizes_are_refused(tokenizer):
    with pytest.raises(SettingsError):
        calibration_windows(tokenizer, local("abc"), samples=0, context=2, seed=0)
    with pytest.raises(SettingsError):
        evaluation_windows(tokenizer, local("abc"), context=1)
    with pytest.raises(SettingsError):
        evaluation_windows(tokenizer, local("abc"), context=2, windows=0)


def test_a_stream_is_read_no_further_than_the_choice_needs_and_a_local_source_to_its_end(tokenizer):
    read = []

    def endless():
        while True:
            read.append(1)
            yield "abcd"  # with BOS and EOS six tokens; the first has no EOS before it

    documents = Documents("stream", streamed=True, read=endless)
    windows = calibration_windows(tokenizer, documents, samples=3, context=5, seed=0)
    assert windows.rows == 3
    assert len(read) == -(-STREAM_CHOICE * 15 // 5)  # five tokens of its own each
    finite = calibration_windows(tokenizer, local(*["abcd"] * 100), samples=3, context=5, seed=0)
    assert finite.available == (100 * 5 + 99) // 5


def test_the_hash_tells_text_tokens_seed_and_order_apart(tokenizer):
    def hash_of(texts, samples=2, context=3, seed=0):
        return calibration_windows(tokenizer, local(*texts), samples, context, seed).content_hash

    long = "abcdefghijkl" * 10
    same = hash_of([long])
    assert same == hash_of([long]) and len(same) == 64
    others = [hash_of([long + "z"]), hash_of([long], context=4), hash_of([long], samples=3), hash_of([long], seed=1)]
    assert len({same, *others}) == 5
    # the same two windows of the same tokens, cut differently into documents
    plain = make_tokenizer(False, False)
    halves = [calibration_windows(plain, local(*texts), 2, 3, 0) for texts in (["abcdef"], ["abc", "def"])]
    assert torch.equal(halves[0].tokens, halves[1].tokens) and halves[0].content_hash != halves[1].content_hash


def test_windows_are_frozen(tokenizer):
    with pytest.raises(dataclasses.FrozenInstanceError):
        evaluation_windows(tokenizer, local("abcdef"), 2).source = "other"


# Evaluation


def test_evaluation_takes_the_first_windows_in_order_with_one_bos(tokenizer):
    windows = evaluation_windows(tokenizer, local("abcdefgh"), context=3, windows=2)
    assert windows.tokens.tolist() == [[BOS, *letters("ab")], letters("cde")]
    assert (windows.available, windows.requested) == (3, 2)
    assert windows.special_tokens == "<s> once, at the text's start"
    assert evaluation_windows(tokenizer, local("abcdefgh"), context=3).rows == 3


def test_evaluation_joins_documents_by_blank_lines_blank_documents_included():
    windows = evaluation_windows(make_tokenizer(adds_bos=False), local("ab", "", "c"), context=7)
    assert windows.tokens.tolist() == [letters("ab\n\n\n\nc")]
    assert windows.special_tokens == "none once, at the text's start"


class SparseTokenizer(CountingTokenizer):
    """A token for each 20 characters, so that the first guess of 8 characters a token is too short."""

    calls = 0

    def __call__(self, text, **options):
        self.calls += 1
        return {"input_ids": list(range((len(text) + 2) // 20))}


def test_evaluation_reads_a_stream_until_it_has_its_windows():
    read = []

    def endless():
        while True:
            read.append(1)
            yield "x" * 18

    sparse = SparseTokenizer()
    windows = evaluation_windows(sparse, Documents("stream", True, endless), context=10, windows=3)
    assert windows.rows == 3
    assert windows.tokens.flatten().tolist() == list(range(30))
    assert 30 <= len(read) <= 60  # at most twice what was needed
    assert sparse.calls <= 5  # after 8, 16 and 32 characters a token, in the end, and for the special tokens' names


def test_a_file_and_its_text_in_memory_give_the_same_windows(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij")
    from_file = evaluation_windows(tokenizer, load_documents(str(tmp_path / "a.txt")), 2)
    in_memory = evaluation_windows(tokenizer, local("abcdefghij"), 2)
    assert torch.equal(from_file.tokens, in_memory.tokens) and from_file.content_hash == in_memory.content_hash


def test_a_text_longer_than_the_models_context_is_no_warning(tokenizer, caplog, capfd):
    evaluation_windows(tokenizer, local(ALPHABET * 3), 4)
    assert "longer than the specified maximum" not in caplog.text + capfd.readouterr().err
