"""Owns which cases are tried: hypothesis draws breaks that fit the files of a directory, from one to three at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from fuzz import documents

NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    9,
    15,
    16,
    17,
    31,
    32,
    40,
    255,
    4096,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    10**15,
    10**400,
)
RAW_VALUES = ("NaN", "Infinity", "-Infinity", "1e999", "-0", "-0.0", "1" * 5000, "[" * 100_000, "{", "", "nul", '"\\ud800"')
RAW_VALUES += ('{"a": 1, "a": 2}', "[" * 900 + "]" * 900, '{"a":' * 100_000)
TEXTS = ("", " ", "\0", "\n", "..", "../..", "/etc/passwd", "\ud800", "\u202e", "\x1b[31mred", "[/red]", "[bold]", "é" * 300)
TEXTS += ("__class__", "__dict__", "model", "model.layers", "base_model.layers.0.mlp.up_proj", "lm_head", "model.embed_tokens")
TEXTS += ("model.layers.0.mlp.up_proj", "model.layers.-1.mlp.up_proj", "model.norm", ".*", "(a+)+$", "model.*", "{0.__class__}")
TEXTS += ("hyb", "hyb2", "lut", "1mad", "full", "block-16", "block-0", "block-17", "block-1" + "0" * 5000, "F16", "I32", "F64")
TEXTS += ("F8_E4M3", "F4", "BOOL", "gptq", "qtip", "llama", "gpt2", "x" * 100_000, "model.safetensors", "../model.safetensors")
TARGETS_OF_LINKS = (
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "$HERE",
    "$HERE/config.json",
    "nowhere",
    "../secret.txt",
    "../blobs/x",
)
FILE_NAMES = (
    "pytorch_model.bin",
    "adapter_model.bin",
    "model-00001-of-00002.safetensors",
    "consolidated.safetensors",
    "notes.txt",
)

scalars = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.sampled_from([None, True, False, 0.5, -1.5, 1e308]),
    st.integers(-20, 300), st.text(max_size=8),
)  # fmt: skip
values = st.one_of(
    scalars,
    scalars,
    st.sampled_from([{documents.RAW: text} for text in RAW_VALUES]),
    st.lists(scalars, max_size=4),
    st.dictionaries(st.one_of(st.sampled_from(TEXTS), st.text(max_size=4)), scalars, max_size=3),
)


def cases(kind: str, content: Mapping[str, bytes]) -> st.SearchStrategy[dict[str, Any]]:
    """Cases for a valid directory of this kind with this content."""
    names = sorted(content)
    written = {name: documents.taken_apart(name, content[name]) for name in names if not name.startswith("tokenizer")}
    breaks = [_in_document(name, document) for name, document in written.items() if document is not None]
    tensors = [name for name in names if name.endswith(".safetensors") and len(written[name]) > 1]
    breaks += [_in_tensors(name, written[name]) for name in tensors]
    pipes = [name for name in names if kind != "adapter" and name not in ("config.json", "model.safetensors.index.json")]
    pipes = [name for name in pipes if name in ("qtip.json", "README.md") or kind == "job" or name.endswith(".safetensors")]
    anything = st.one_of(*breaks, *breaks, _in_file(names, pipes or ["notes.txt"]))
    return st.fixed_dictionaries(
        {
            "kind": st.just(kind),
            "breaks": st.one_of(
                st.lists(anything, min_size=1, max_size=1),
                st.lists(anything, min_size=2, max_size=3),
                *([_planted_code] if "config.json" in content else []),
            ),
            "sealed": st.sampled_from([True, True, False]),
        }
    )


def _in_document(name: str, document: Any) -> st.SearchStrategy[dict[str, Any]]:
    every = documents.places(document)
    # The part that is ours as often as all of transformers' together.
    ours = [place for place in every if "quantization_config" in place or place[:1] in (("layers",), ("weight_map",))]
    place = st.sampled_from([list(each) for each in every]) | st.sampled_from([list(each) for each in ours or every])
    numbers = [list(each) for each in every if type(documents.at(document, each)) in (int, float)]
    file = st.just(name)
    kinds = [
        st.fixed_dictionaries({"file": file, "do": st.just("set"), "at": place, "value": values}),
        st.fixed_dictionaries({"file": file, "do": st.just("delete"), "at": place}),
        st.fixed_dictionaries({"file": file, "do": st.just("copy"), "at": place, "source": place}),
        st.fixed_dictionaries({"file": file, "do": st.just("rename"), "at": place, "to": st.sampled_from(TEXTS)}),
        st.fixed_dictionaries({"file": file, "do": st.just("twice"), "at": place, "value": values}),
    ]
    if numbers:
        step = {"do": st.just("step"), "at": st.sampled_from(numbers), "by": st.sampled_from([-1, 1, 16, -16, 10**15, 0.5])}
        kinds.append(st.fixed_dictionaries({"file": file, **step}))
        kinds.append(st.fixed_dictionaries({"file": file, "do": st.just("set"), "at": step["at"], "value": values}))
    return st.one_of(*kinds)


def _in_tensors(name: str, header: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    tensors = st.sampled_from([each for each in header if each != "__metadata__"])
    words = st.one_of(
        st.sampled_from(["007e", "007c", "00fc", "0000", "ffff", "0080", "ff7b"]),
        st.binary(min_size=2, max_size=64).map(bytes.hex),
    )
    file = st.just(name)
    return st.one_of(
        st.fixed_dictionaries({"file": file, "do": st.just("fill"), "tensor": tensors, "hex": words}),
        st.fixed_dictionaries(
            {"file": file, "do": st.just("length"), "value": st.sampled_from(NUMBERS) | st.integers(0, 20000)}
        ),
    )


def _in_file(names: list[str], pipes: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """pipes: files that may become one. Those that transformers and peft open before qtip is asked make them wait for ever."""
    file = st.sampled_from(names)
    text = st.sampled_from(
        ["", "[]", "{}", "null", "1", '"a"', "\ufeff{}", "version https://git-lfs.github.com/spec/v1\n", "---\na: [\n---\n"]
    )
    long = st.sampled_from(["[", "- ", "&a [*a, ", "---\n", "a: &a {b: ", "{"])
    return st.one_of(
        st.fixed_dictionaries(
            {"file": file, "do": st.just("flip"), "place": st.integers(0, 2**20), "mask": st.integers(1, 255)}
        ),
        st.fixed_dictionaries({"file": file, "do": st.just("cut"), "place": st.integers(0, 2**20)}),
        st.fixed_dictionaries(
            {"file": file, "do": st.just("append"), "hex": st.binary(min_size=1, max_size=32).map(bytes.hex)}
        ),
        st.fixed_dictionaries({"file": file, "do": st.just("replace"), "text": text | st.text(max_size=40)}),
        st.fixed_dictionaries({"file": file, "do": st.just("repeat"), "text": long, "times": st.sampled_from([2000, 200_000])}),
        st.fixed_dictionaries({"file": file, "do": st.just("remove")}),
        st.fixed_dictionaries(
            {"file": file, "do": st.just("move"), "to": st.sampled_from(FILE_NAMES) | file, "keep": st.booleans()}
        ),
        st.fixed_dictionaries(
            {"file": file | st.sampled_from(FILE_NAMES), "do": st.just("link"), "to": st.sampled_from(TARGETS_OF_LINKS)}
        ),
        st.fixed_dictionaries({"file": file, "do": st.just("odd"), "kind": st.just("directory")}),
        st.fixed_dictionaries({"file": st.sampled_from(pipes), "do": st.just("odd"), "kind": st.just("fifo")}),
    )


_EVIL = 'raise SystemExit(open(__import__("os").environ["QTIP_FUZZ_CANARY"], "w").close())\n'
_planted_code = st.sampled_from(["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"]).map(
    lambda auto: [
        {"file": "config.json", "do": "move", "to": "evil.py", "keep": True},
        {"file": "evil.py", "do": "replace", "text": _EVIL},
        {"file": "config.json", "do": "set", "at": ["auto_map"], "value": {auto: "evil.Evil"}},
    ]
)
"""Python beside the model that says so in config.json: it must not run, as nobody said --trust-remote-code."""
