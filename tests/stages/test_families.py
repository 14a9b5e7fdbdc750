"""Families of transformers, each taken through the whole pipeline. Oracle: transformers' own model with the packed values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stages.families import FAMILIES, PAGE, TOLERANCE, take_through

QUICK = {
    "GPT-2": "its linears are Conv1D, and its head is the embedding",
    "Falcon": "its linears are of a class of their own, attention and MLP run in parallel",
    "Gemma 3": "sliding windows; norms behind what is added",
    "Mixtral": "experts that transformers stacks while it loads",
    "gpt-oss": "experts in turned, interleaved tensors with biases, and sinks",
    "Qwen3-Next": "linear attention, a short convolution, a shared expert behind a gate",
    "DeepSeek-V3": "latent attention, and a router with groups in some blocks",
}
"""One of each kind."""

REFUSED = {
    "DBRX": "in DbrxExpertGLU, not a torch.nn.Linear",
    "JetMoE": "in JetMoeParallelExperts, not a torch.nn.Linear",
    "LongCat-Flash": "in LongcatFlashExperts, not a torch.nn.Linear",
    "Gemma 3n": "changes the hidden states between blocks 0 and 1",
}
"""Those that cannot be done yet -> what it says."""

LEAST_SHARE = 0.85
"""Of the block weights that is packed in every family: what is left in small models weighs more than in large ones."""


def check(family: str, directory: Path) -> None:
    row = take_through(family, directory)
    if family in REFUSED:
        assert REFUSED[family] in row.refused
        assert not list((directory / "hessians").rglob("block-*"))  # refused before anything is calibrated
        return
    assert not row.refused
    assert row.difference < TOLERANCE
    assert row.share > LEAST_SHARE


@pytest.mark.parametrize("family", QUICK)
def test_a_family_of_each_kind_loads_as_what_was_packed(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


@pytest.mark.parametrize("family", ["DBRX"])
def test_a_family_that_cannot_be_done_is_refused_before_anything_is_calculated(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - QUICK.keys() - {"DBRX"}))
def test_every_other_family_as_well(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


def test_the_page_has_a_row_for_every_family_and_refuses_those() -> None:
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+ \| [^|]+) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:])
    assert list(rows) == list(FAMILIES)
    assert [family for family, cells in rows.items() if cells.endswith("refused")] == [
        family for family in FAMILIES if family in REFUSED
    ]
