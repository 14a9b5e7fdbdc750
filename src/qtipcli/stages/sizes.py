"""Owns the sizes of well-known models: the matrices that a benchmark multiplies, and the configs of random models of real size.

From the config.json that each model is published with. What changes no speed, such as the rotary base, is left to transformers.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qtipcli.errors import QtipError, SettingsError
from qtipcli.quant.transform import padded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix that a product is measured with, or several that share an input, on top of each other.

    parts: output features of each; inputs: their common input features. Any positive integers: what is packed is padded.
    layer: what the table calls it.
    """

    parts: tuple[int, ...]
    inputs: int
    layer: str = ""

    def __post_init__(self) -> None:
        if not self.parts or min(*self.parts, self.inputs) < 1:
            raise SettingsError(f"a matrix of {self.outputs}x{self.inputs}", "both sizes must be positive")

    @property
    def outputs(self) -> int:
        """Output features of all parts."""
        return sum(self.parts)

    @property
    def padded(self) -> tuple[int, int]:
        """(outputs, inputs) of the packed matrix: whole tiles, each part's outputs for itself."""
        return sum(padded(part) for part in self.parts), padded(self.inputs)

    @property
    def shape(self) -> str:
        """OUTPUTSxINPUTS, without padding."""
        return f"{self.outputs}x{self.inputs}"


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of one decoder-only model.

    kind: transformers' model_type. hidden, intermediate: widths of a block and of its feed-forward part. heads,
    key_value_heads, head_size: of the attention. blocks, vocabulary: numbers of. tied: whether the head is the embedding.
    """

    kind: str
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    blocks: int
    vocabulary: int
    head_size: int = 128
    tied: bool = False

    def matrices(self) -> tuple[Matrix, ...]:
        """The linears of a block, one entry for each distinct shape, then those that share an input as one."""
        query, key = self.heads * self.head_size, self.key_value_heads * self.head_size
        linears = {
            "q_proj": (query, self.hidden),
            "k_proj": (key, self.hidden),
            "v_proj": (key, self.hidden),
            "o_proj": (self.hidden, query),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
        by_shape: dict[tuple[int, int], list[str]] = {}
        for name, shape in linears.items():
            by_shape.setdefault(shape, []).append(name)
        single = [Matrix((outputs,), inputs, ", ".join(names)) for (outputs, inputs), names in by_shape.items()]
        fused = [
            Matrix((query, key, key), self.hidden, "q+k+v"),
            Matrix((self.intermediate, self.intermediate), self.hidden, "gate+up"),
        ]
        return (*single, *fused)

    def config(self) -> PreTrainedConfig:
        """A transformers config of these sizes."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.kind,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            num_hidden_layers=self.blocks,
            vocab_size=self.vocabulary,
            head_dim=self.head_size,
            tie_word_embeddings=self.tied,
            max_position_embeddings=LONGEST_CONTEXT,
        )


LONGEST_CONTEXT = 32_768
"""Positions of a random model: more than any benchmark here uses."""

MODELS = {
    "llama-2-7b": ModelSizes("llama", 4096, 11008, 32, 32, 32, 32_000),
    "llama-2-13b": ModelSizes("llama", 5120, 13824, 40, 40, 40, 32_000),
    "llama-2-70b": ModelSizes("llama", 8192, 28672, 64, 8, 80, 32_000),
    "llama-3.1-8b": ModelSizes("llama", 4096, 14336, 32, 8, 32, 128_256),
    "llama-3.1-70b": ModelSizes("llama", 8192, 28672, 64, 8, 80, 128_256),
    "llama-3.2-1b": ModelSizes("llama", 2048, 8192, 32, 8, 16, 128_256, head_size=64, tied=True),
    "llama-3.2-3b": ModelSizes("llama", 3072, 8192, 24, 8, 28, 128_256, tied=True),
    "mistral-7b": ModelSizes("mistral", 4096, 14336, 32, 8, 32, 32_000),
    "qwen2.5-0.5b": ModelSizes("qwen2", 896, 4864, 14, 2, 24, 151_936, head_size=64, tied=True),
    "qwen2.5-1.5b": ModelSizes("qwen2", 1536, 8960, 12, 2, 28, 151_936, tied=True),
    "qwen2.5-7b": ModelSizes("qwen2", 3584, 18944, 28, 4, 28, 152_064),
    "qwen2.5-72b": ModelSizes("qwen2", 8192, 29568, 64, 8, 80, 152_064),
    "qwen3-0.6b": ModelSizes("qwen3", 1024, 3072, 16, 8, 28, 151_936, tied=True),
    "qwen3-8b": ModelSizes("qwen3", 4096, 12288, 32, 8, 36, 151_936),
    "smollm2-135m": ModelSizes("llama", 576, 1536, 9, 3, 30, 49_152, head_size=64, tied=True),
}
"""By the lower-case name that a command is given."""


def sizes_of(name: str) -> ModelSizes:
    """The sizes of a named model, in any case. Raises SettingsError that lists the names."""
    found = MODELS.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]}? " if near else ""
        raise SettingsError(f"no sizes are known of a model {name!r}", f"{meant}known are {', '.join(MODELS)}")
    return found


def config_of(name: str | Path) -> PreTrainedConfig:
    """The config of a named model, or of a config.json or the directory that holds one; a quantization in it is left out."""
    path = Path(name)
    if not path.exists():
        return sizes_of(str(name)).config()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        fact = str(error).strip().split("\n")[0].rstrip(".")
        raise QtipError(
            f"{path} is no config that transformers knows: {fact}", "give a config.json or a named model"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
