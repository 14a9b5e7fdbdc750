"""Owns the tiny random models of the tests of qtipcli.model: their configs, and saving one as a checkpoint.

Every weight is random, norms and biases included, so that a parameter loaded to the wrong place changes the result.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 61
ROWS = 3
CONTEXT = 12

_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", _LLAMA_LIKE),
    "gemma3_text": ("gemma3_text", _LLAMA_LIKE | _SLIDING),
    # a wrapper whose vision tower has more blocks than the language model
    "gemma3": ("gemma3", {"text_config": _LLAMA_LIKE | _SLIDING, "vision_config": _VISION, "mm_tokens_per_image": 4}),
    "phi3": ("phi3", _LLAMA_LIKE),
    "gpt_neox": ("gpt_neox", _LLAMA_LIKE),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "mixtral": ("mixtral", _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # its model asks the embedding for its device before using it
    "llama4_text": ("llama4_text", _LLAMA_LIKE | {"num_local_experts": 2, "intermediate_size_mlp": 48}),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
CONFIGS |= {
    "qwen3_moe": ("qwen3_moe", _LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "gpt_oss": ("gpt_oss", _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2} | _SLIDING),
}
FUSED = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text")
"""Those with experts in fused tensors. The skeleton sums in another order there."""


def build(label: str) -> PreTrainedModel:
    """The model in float32 and eval mode, the same on every call."""
    kind, settings = CONFIGS[label]
    config: PreTrainedConfig = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    return model


def save(label: str, directory: Path, **how: object) -> Path:
    """Saves the model as transformers does; `how` goes to save_pretrained."""
    build(label).save_pretrained(directory, **how)
    return directory


def linear_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every parameter under the name that it has where experts and Conv1D are linears; cut and turned by hand: the oracle."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if ".experts." not in name:
            turned = type(model.get_submodule(path)).__name__ == "Conv1D" and parameter.ndim == 2
            found[name] = parameter.T if turned else parameter
            continue
        part = "bias" if leaf.endswith("_bias") else "weight"
        lies_turned = model.config.model_type in ("gpt_oss", "llama4_text") and part == "weight"
        for expert, tensor in enumerate(parameter):
            found[f"{path}.{expert}.{leaf.removesuffix('_bias')}.{part}"] = tensor.T if lies_turned else tensor
    return found


def token_rows(rows: int = ROWS, context: int = CONTEXT) -> torch.Tensor:
    """Token ids, int64 [rows, context], none of them special, the same on every call."""
    return torch.randint(3, VOCABULARY, (rows, context), generator=torch.Generator().manual_seed(1))


def plain_model(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The oracle: the checkpoint as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
