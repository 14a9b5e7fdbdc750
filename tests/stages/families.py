"""Owns a tiny random model of each family of transformers that qtip is tried on, its way through the pipeline, and the table.

`python -m stages.families [FAMILY ...] --out docs/families.md` takes families through and writes the table; without names all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import qtipcli  # noqa: F401, registers the format
from qtipcli.config import CalibrationSettings, QuantizeSettings
from qtipcli.errors import QtipError
from qtipcli.job.directory import RunDirectory
from qtipcli.model.linears import find_linears, left_exact, unsupported
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.stages import calibrate, pack, quantize
from qtipcli.stages.calibrate import block_key
from qtipcli.stages.stored_layers import packed_layers
from stages.tiny import DEMO_MODEL, VOCABULARY, logits_of, one_thread, save_text

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

TOLERANCE = 1e-4
"""Of the largest logit: the packed layers and their dense matrices differ by the order of float32 sums, 1e-6 a layer."""

_PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_NO_HEAD_DIM = {name: value for name, value in _PLAIN.items() if name != "head_dim"}
_EXPERTS = _PLAIN | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 48,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", _PLAIN | {"tie_word_embeddings": True}),
    "Mistral": ("mistral", _PLAIN),
    "Qwen2": ("qwen2", _PLAIN),
    "Qwen3": ("qwen3", _PLAIN),
    "Gemma": ("gemma", _PLAIN),
    "Gemma 2": ("gemma2", _PLAIN | _SLIDING),
    "Gemma 3": ("gemma3_text", _PLAIN | _SLIDING),
    "Phi": ("phi", _PLAIN | {"num_key_value_heads": 4}),
    "Phi-3": ("phi3", _PLAIN),
    "OLMo 2": ("olmo2", _PLAIN),
    "OLMo 3": ("olmo3", _PLAIN | _SLIDING),
    "GPT-NeoX": ("gpt_neox", _PLAIN),
    "GPT-2": ("gpt2", _GPT2 | _ENDS),
    "GPTBigCode": ("gpt_bigcode", _GPT2 | _ENDS),
    "GPT-J": ("gptj", _GPT2 | {"rotary_dim": 8} | _ENDS),
    "OPT": ("opt", _PLAIN | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "BLOOM": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4} | _ENDS),
    "MPT": ("mpt", {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64} | _ENDS),
    "Falcon": ("falcon", _NO_HEAD_DIM | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96}),
    "StableLM": ("stablelm", _PLAIN),
    "Starcoder2": ("starcoder2", _PLAIN),
    "Cohere": ("cohere", _PLAIN),
    "Cohere 2": ("cohere2", _PLAIN | _SLIDING),
    "Granite": ("granite", _PLAIN),
    "GLM-4": ("glm4", _PLAIN),
    "SmolLM3": ("smollm3", _PLAIN),
    "Nemotron": ("nemotron", _PLAIN),
    "Ernie 4.5": ("ernie4_5", _PLAIN),
    "Apertus": ("apertus", _PLAIN),
    "EXAONE 4": ("exaone4", _PLAIN | _SLIDING),
    "Seed-OSS": ("seed_oss", _PLAIN),
    "Mixtral": ("mixtral", _EXPERTS),
    "Qwen2-MoE": ("qwen2_moe", _EXPERTS | {"shared_expert_intermediate_size": 48}),
    "Qwen3-MoE": ("qwen3_moe", _EXPERTS),
    "Qwen3-Next": ("qwen3_next", _EXPERTS | _LINEAR_ATTENTION),
    "OLMoE": ("olmoe", _EXPERTS),
    "PhiMoE": ("phimoe", _EXPERTS),
    "Granite-MoE": ("granitemoe", _EXPERTS),
    "DeepSeek-V2": ("deepseek_v2", _EXPERTS | _SHARED | _LATENT),
    "DeepSeek-V3": ("deepseek_v3", _EXPERTS | _SHARED | _LATENT),
    "GLM-4-MoE": ("glm4_moe", _EXPERTS | _SHARED),
    "Ernie 4.5 MoE": ("ernie4_5_moe", _EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    "gpt-oss": ("gpt_oss", _EXPERTS | _SLIDING),
    "Llama 4": ("llama4_text", _EXPERTS | {"intermediate_size_mlp": 96}),
    "LFM2": ("lfm2", _PLAIN | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Jamba": ("jamba", _EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 16}),
    "DBRX": (
        "dbrx",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        }
        | _ENDS,
    ),
    "OLMo": ("olmo", _PLAIN),
    "Helium": ("helium", _PLAIN),
    "Arcee": ("arcee", _PLAIN),
    "Ministral": ("ministral", _PLAIN | _SLIDING),
    "GLM": ("glm", _PLAIN),
    "GPT-Neo": ("gpt_neo", _PLAIN | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "CodeGen": ("codegen", _GPT2 | {"rotary_dim": 8} | _ENDS),
    "Persimmon": ("persimmon", _PLAIN),
    "Hunyuan dense": ("hunyuan_v1_dense", _PLAIN),
    "MiniCPM3": ("minicpm3", _PLAIN | _LATENT),
    "Gemma 3n": ("gemma3n_text", _PLAIN | _SLIDING | {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 64}),
    "Gemma 4": ("gemma4_text", _PLAIN | _SLIDING | {"global_head_dim": 16, "hidden_size_per_layer_input": 0}),
    "Qwen3.5": ("qwen3_5_text", _PLAIN | _LINEAR_ATTENTION),
    "Dots 1": ("dots1", _EXPERTS | _SHARED),
    "MiniMax-M2": ("minimax_m2", _EXPERTS),
    "FlexOlmo": ("flex_olmo", _EXPERTS),
    "LFM2-MoE": ("lfm2_moe", _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "Hunyuan MoE": ("hunyuan_v1_moe", _EXPERTS | {"moe_topk": 2}),
    "AFMoE": ("afmoe", _EXPERTS | _SLIDING | {"num_dense_layers": 1}),
    "Solar Open": ("solar_open", _EXPERTS | _SHARED),
    "Nemotron-H": (
        "nemotron_h",
        _EXPERTS
        | _SHARED
        | {
            "hybrid_override_pattern": "*E",
            "layers_block_type": ["attention", "moe"],
            "moe_latent_size": None,
            "moe_shared_expert_intermediate_size": 48,
        },
    ),
    "Bamba": ("bamba", _PLAIN | {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}),
    "JetMoE": ("jetmoe", _EXPERTS | {"kv_channels": 16, "num_key_value_heads": 2}),
    "Kimi Linear": (
        "kimi_linear",
        _EXPERTS
        | _LATENT
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "linear_num_heads": 4,
            "linear_head_dim": 16,
        },
    ),
    "LongCat-Flash": (
        "longcat_flash",
        _EXPERTS
        | _LATENT
        | {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 48, "n_routed_experts": 4, "zero_expert_num": 1, "moe_topk": 2},
    ),
    "RecurrentGemma": ("recurrent_gemma", _PLAIN | {"lru_width": 64, "block_types": ["recurrent", "attention"]}),
    "Mamba": ("mamba", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4} | _ENDS),
}
"""Name -> model type, and a config of two small blocks of it. Settings that a type does not know do nothing."""


@dataclass(frozen=True)
class Row:
    """What became of a family.

    share: of the weights of its decoder blocks that are packed. layers: packed ones. left: why -> number of tensors that stay.
    difference: largest one between the loaded model's logits and the oracle's, over the largest logit. refused: why it was
    refused, before anything was calibrated; then all else is empty.
    """

    family: str
    kind: str
    share: float = 0.0
    layers: int = 0
    left: Mapping[str, int] | None = None
    difference: float = 0.0
    refused: str = ""


def save(family: str, directory: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The family's tiny model as transformers saves it, with a tokenizer; `changes` to its config. The same on every call."""
    kind, settings = FAMILIES[family]
    settings = {**settings, **(changes or {})}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Logarithms of decay rates and such stay as they were made.
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.normal_(0.0, 0.1)
            elif name.endswith(("norm.weight", "bias")):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_MODEL / file, directory / file)
    return directory


def take_through(family: str, directory: Path) -> Row:
    """Calibrate, quantize, pack and load the family's tiny model in `directory`, and compare logits."""
    kind = FAMILIES[family][0]
    source = ModelSource.open(save(family, directory / "model"))
    text = save_text(directory / "text.txt")
    hessians, job, out = directory / "hessians", directory / "job", directory / "out"
    try:
        calibrate.run(source, CalibrationSettings(data=str(text), samples=6, context=32), hessians)
        quantize.run(source, QuantizeSettings(bits=2, state_bits=8, search=False, two_sided=False), hessians, job)
    except QtipError as error:
        return Row(family, kind, refused=str(error).replace(source.name, family))
    pack.run(source, job, out)
    loaded = logits_of(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval())
    expected = logits_of(dequantized(source, RunDirectory.load(job)))
    difference = float((loaded - expected).abs().max() / expected.abs().max())
    return _row(family, kind, source, RunDirectory.load(job), difference)


@torch.no_grad()
def dequantized(source: ModelSource, job: RunDirectory) -> torch.nn.Module:
    """The oracle: transformers' own model, each matrix of which that is packed has the values that were packed."""
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32).eval()
    for index in range(len(Skeleton(source).blocks)):
        report, tensors = job.report(block_key(index)), job.read(block_key(index))
        for name, layer in packed_layers(report["layers"], tensors).items():
            _put(model, name, layer.weight_dense())
    return model


def _put(model: torch.nn.Module, name: str, weight_OI: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner, _, expert = path.rpartition(".")
    fused = model.get_submodule(owner) if expert.isdigit() else None
    if isinstance(getattr(fused, leaf, None), torch.nn.Parameter):
        turned = getattr(fused, "is_transposed", "Llama4" in type(fused).__name__)
        getattr(fused, leaf)[int(expert)] = weight_OI.T if turned else weight_OI
        return
    module = model.get_submodule(name)
    module.weight.copy_(weight_OI.T if type(module).__name__ == "Conv1D" else weight_OI)


def _row(family: str, kind: str, source: ModelSource, job: RunDirectory, difference: float) -> Row:
    skeleton = Skeleton(source)
    total = packed = layers = 0
    left: Counter[str] = Counter()
    for index, (_, block) in enumerate(skeleton.blocks):
        report = job.report(block_key(index))
        total += sum(parameter.numel() for parameter in block.parameters() if parameter.ndim > 1)
        packed += sum(layer["shape"][0] * layer["shape"][1] for layer in report["layers"].values())
        layers += len(report["layers"])
        exact, known = left_exact(block), find_linears(block)
        left.update(_reason(why) for why in (*report["left"].values(), *exact.values()))
        left.update(_reason(why) for _, why in unsupported(block))
        assert len(report["layers"]) + len(report["left"]) == len(known)
    return Row(family, kind, packed / total, layers, dict(left), difference)


def _reason(why: str) -> str:
    return why.partition(" in ")[2].partition(",")[0] if why.startswith("[") else why.partition(":")[0]


def page(rows: list[Row]) -> str:
    """docs/families.md."""
    head = [
        "# Families",
        "",
        "Made by `python -m stages.families --out docs/families.md` with PYTHONPATH=src:kernels:tests, from a tiny random",
        f"model of each family of transformers {transformers.__version__}: calibrated, quantized to 2 bits, packed,",
        "loaded, and compared",
        "with transformers' own model that has the packed values in its matrices. Nothing in qtip knows a family by",
        "name. What is left is named by its module's class, or by why it is: a matrix smaller than a tile has fewer",
        "than 16 inputs or outputs.",
        "",
        "Checkpoints in FP8 with `weight_scale_inv` (or `weight_scale`) and in gpt-oss's MXFP4 are read as the bfloat16",
        "weights that they stand for (tests/stages/test_quantized_sources.py); those of other methods are refused.",
        "",
        "| family | model_type | block weights packed | layers | left exact, and why | largest difference of logits |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(_line, rows), ""])


def _line(row: Row) -> str:
    if row.refused:
        return f"| {row.family} | {row.kind} | refused | | {row.refused.replace('|', '/')} | |"
    left = ", ".join(f"{count} {why}" for why, count in sorted((row.left or {}).items())) or "nothing"
    return f"| {row.family} | {row.kind} | {100 * row.share:.1f} % | {row.layers} | {left} | {row.difference:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as directory, one_thread():
            rows.append(take_through(family, Path(directory)))
        print(json.dumps(vars(rows[-1])), flush=True)
    if arguments.out:
        arguments.out.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
