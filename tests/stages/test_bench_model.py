"""The benchmark of whole models: random ones of any size, what a row says, and that a wrong model gets no speed."""

import json
import mmap

import pytest
import torch

from qtipcli.errors import QtipError, SettingsError
from qtipcli.nn.swap import packed_layers
from qtipcli.quant.transform import Transform
from qtipcli.stages import bench_model, model_passes, random_model
from qtipcli.stages.bench_model import Asked
from qtipcli.stages.sizes import config_of
from qtipcli_kernels import dispatch
from qtipcli_kernels.spec import TrellisSpec

SPEC = TrellisSpec("3inst", 2, 8)
CPU = torch.device("cpu")
QUICK = Asked(prompts=(8, 24), tokens=3, seconds=0.0)
CONFIG = {
    "model_type": "qwen2",  # with biases
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def short_prompt(monkeypatch):
    monkeypatch.setattr(bench_model, "DECODE_PROMPT", 5)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def run(config, **asked):
    return bench_model.run(random=config, spec=SPEC, **{"device": "cpu", "dtype": "float32", "asked": QUICK} | asked)


def build(config, spec=SPEC, dtype=torch.float32):
    return random_model.build(config_of(config), CPU, dtype, spec, Transform("block"))


def test_a_random_model_is_measured_against_its_own_weights_decoded(config):
    report = run(config)
    rows = {row["measure"]: row for row in report["rows"]}
    assert list(rows) == ["prefill of 8", "prefill of 24", "decode", "weights", "peak memory"]
    for name in ("prefill of 8", "prefill of 24", "decode"):
        assert (rows[name]["unit"], rows[name]["how"]) == ("tokens/s", "eager")
        assert rows[name]["ratio"] == rows[name]["packed"] / rows[name]["original"]
    for name in ("weights", "peak memory"):
        assert rows[name]["ratio"] == rows[name]["original"] / rows[name]["packed"]
    assert (report["model"], report["original"], report["dtype"]) == (config, "its own weights, decoded to float32", "float32")
    assert (report["implementation"], report["notes"]) == (dispatch.implementation("cpu"), [])
    model = build(config)
    assert rows["weights"]["packed"] == bench_model.weight_bytes(model) / 1e6
    dense = sum(4 * layer.layout.weights for layer in packed_layers(model).values())
    assert dense / 1e6 < rows["weights"]["original"] < dense / 1e6 + rows["weights"]["packed"]
    assert report["bits_per_weight"] == pytest.approx(random_model.stored_bits(model))


def test_a_random_model_is_packed_fused_real_and_of_ordinary_size(config):
    model = build(config)
    packed = packed_layers(model)
    assert len(packed) == 14
    assert {layer.layout.spec for layer in packed.values()} == {SPEC}
    assert {str(layer.layout.transform_in) for layer in packed.values()} == {"block-128"}
    assert {len(layer.group.layers) for layer in packed.values() if layer.group} == {2, 3}
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        hidden = model.model(torch.arange(32)[None]).last_hidden_state
    assert 0.5 < hidden.square().mean() < 2
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    assert 0.5 < packed["model.layers.0.mlp.up_proj"](x).square().mean() < 2
    again = build(config)
    assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_without_a_spec_the_random_model_is_plain(config):
    model = build(config, spec=None)
    assert not packed_layers(model)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_decoding_gives_the_tokens_of_generate(config):
    model = build(config)
    with torch.no_grad():
        decoder = model_passes.Decoder(model, 5, 4, graphs=False)
        found = []
        for steps in (1, 2, 3, 4):
            decoder.tokens = steps
            decoder.run()  # starts behind the prompt again
            found.append(int(decoder._token))
        prompt = model_passes._random_prompt(model, 5)
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
        )
    assert found == expected[0, 6:].tolist()


def test_a_packed_directory_against_the_model_it_was_made_from(packed, tiny_model):
    report = bench_model.run(str(packed / "out"), str(tiny_model), device="cpu", asked=QUICK)
    assert (report["model"], report["original"], report["dtype"]) == (str(packed / "out"), str(tiny_model), "bfloat16")
    assert all(row["packed"] and row["original"] for row in report["rows"])


def test_the_plain_model_can_be_left_out(config):
    report = run(config, asked=Asked((8,), 2, 0.0, baseline=False))
    assert report["original"] is None
    assert all(row["original"] is None and row["ratio"] is None for row in report["rows"])


def test_a_plain_model_that_does_not_fit_is_noted(config, monkeypatch):
    monkeypatch.setattr(bench_model, "free_bytes", lambda device: 1000)
    report = run(config)
    assert report["original"] is None
    assert "the plain model needs" in report["notes"][0]
    assert "not measured" in report["notes"][0]


def test_memory_that_cannot_be_measured_is_noted(config, monkeypatch):
    monkeypatch.setattr(bench_model, "_reset_peak", lambda device: False)
    report = run(config)
    assert report["rows"][-1]["packed"] is None
    assert any("peak memory is not known" in note for note in report["notes"])


def test_the_weights_of_the_other_model_are_not_counted(config, monkeypatch):
    model = build(config)
    peak = 10**9
    monkeypatch.setattr(bench_model, "_peak_bytes", lambda device: peak)
    report = run(config)
    row = report["rows"][-1]
    assert row["packed"] == peak / 1e6
    assert row["original"] == (peak - bench_model.weight_bytes(model)) / 1e6


def test_peak_memory_is_that_since_it_was_set_back():
    # Mapped by hand: what the C library frees it may keep, as it does where the heap has a hole of that size.
    held = _filled_pages(1 << 26)
    assert bench_model._reset_peak(CPU)
    before = bench_model._peak_bytes(CPU)
    held.close()
    assert bench_model._reset_peak(CPU)
    after = bench_model._peak_bytes(CPU)
    more = _filled_pages(1 << 27)
    assert before - after > 0.9 * (1 << 26)
    assert bench_model._peak_bytes(CPU) - after > 0.9 * (1 << 27)
    more.close()


def _filled_pages(size: int) -> mmap.mmap:
    """`size` bytes of the process's own, every page in use."""
    pages = mmap.mmap(-1, size)
    for start in range(0, size, mmap.PAGESIZE):
        pages[start] = 1
    return pages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_layer_gets_no_speed(config, monkeypatch, dtype):
    right = dispatch.matvec
    error = 2**-18 if dtype == "float32" else 2**-4
    monkeypatch.setattr(dispatch, "matvec", lambda *arguments: right(*arguments) * (1 + error))
    with pytest.raises(QtipError, match=r"layer model\.layers\.\d\.\S+ is wrong by .* no speed is given"):
        run(config, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_right_layers_have_about_the_error_of_torch(config, dtype):
    kind = getattr(torch, dtype)
    model = build(config, dtype=kind)
    errors = [bench_model.layer_error(layer, kind) for layer in packed_layers(model).values()]
    assert 0 < max(errors) <= bench_model.LARGEST_ERROR


def test_a_model_that_gives_no_numbers_gets_no_speed(config, monkeypatch):
    monkeypatch.setattr(random_model, "random_signs", lambda length, seed, name: torch.full((length,), torch.inf))
    with pytest.raises(QtipError, match=r"NaN or infinite logits: no speed is given"):
        run(config)


def test_what_cannot_be_captured_is_run_eagerly_and_says_so(config, monkeypatch):
    monkeypatch.setattr(model_passes, "captured", lambda call: (call, "RuntimeError: not permitted"))
    with torch.no_grad():
        model = build(config)
        passes = model_passes.Prefill(model, 8, graphs=True), model_passes.Decoder(model, 5, 3, graphs=True)
    assert [each.how for each in passes] == ["eager: no graph, RuntimeError: not permitted"] * 2


def test_a_graph_is_named(config, monkeypatch):
    monkeypatch.setattr(model_passes, "captured", lambda call: (call, ""))
    with torch.no_grad():
        model = build(config)
        passes = model_passes.Prefill(model, 8, graphs=True), model_passes.Decoder(model, 5, 3, graphs=True)
    assert [each.how for each in passes] == ["CUDA graph"] * 2


@pytest.mark.parametrize("kind", [lambda m: model_passes.Prefill(m, 8, True), lambda m: model_passes.Decoder(m, 5, 3, True)])
def test_a_graph_that_computes_something_else_gets_no_speed(config, monkeypatch, kind):
    def wrong(call):
        def replay():
            call()
            owner = call.__self__
            owner.logits = owner.logits * 1.05

        return replay, ""

    monkeypatch.setattr(model_passes, "captured", wrong)
    with torch.no_grad(), pytest.raises(QtipError, match=r"differ by 0\.05 .* no speed is given"):
        kind(build(config))


@pytest.mark.parametrize(
    ("asked", "fact"),
    [
        ({}, "one model is measured at a time"),
        ({"directory": "a", "random": "qwen3-8b"}, "one model is measured at a time"),
        ({"random": "qwen3-8b", "against": "a"}, "no original on disk"),
        ({"random": "qwen9-8b"}, r"'qwen9-8b'.*did you mean qwen3-8b\? known are llama-2-7b"),
        ({"random": "qwen3-8b", "dtype": "int8"}, "no dtype 'int8'"),
        ({"random": "qwen3-8b", "device": "cuda:99"}, "no device cuda:99"),
        ({"directory": "no-such"}, "no-such does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused(asked, fact):
    with pytest.raises(QtipError, match=fact):
        bench_model.run(**asked)


def test_a_plain_model_in_the_place_of_a_packed_one_is_refused(tiny_model):
    with pytest.raises(QtipError, match="is not a qtip model"):
        bench_model.run(str(tiny_model), device="cpu")


@pytest.mark.parametrize("asked", [{"prompts": ()}, {"prompts": (0,)}, {"tokens": 0}])
def test_no_tokens_are_nothing_to_measure(asked):
    with pytest.raises(SettingsError, match="no tokens"):
        Asked(**asked)
