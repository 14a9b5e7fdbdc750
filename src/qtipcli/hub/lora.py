"""Owns LoRA on packed layers: the layer that PEFT puts around a TrellisLinear, and how a LoraConfig learns of it.

PEFT dispatches on torch.nn.Linear, which a packed layer is not; its mechanism for other layers is the config's table of custom
modules (`LoraConfig._register_custom_module`), which is not saved with an adapter, so that it is filled anew for loading one.
Imported by who uses it only: peft is no dependency of qtipcli.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners import lora

from qtipcli.errors import QtipError, SettingsError
from qtipcli.nn.linear import TrellisLinear

INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
"""Those of PEFT that do not read the layer's weight."""


LARGEST_RANK = 65_536
"""More than any matrix of a model has; an adapter from somewhere must not ask for all of the memory."""


def packed_lora(config: LoraConfig) -> LoraConfig:
    """The same config, which now covers packed layers too: give it to get_peft_model, or to PeftModel.from_pretrained.

    Raises SettingsError where it asks for what needs a dense weight: DoRA, or an initialization from the weight.
    """
    if config.use_dora:
        raise SettingsError("DoRA scales the columns of a dense weight, which packed layers have not", "set use_dora=False")
    if config.init_lora_weights not in INITIALIZATIONS:
        raise SettingsError(
            f"init_lora_weights {config.init_lora_weights!r} reads a dense weight, which packed layers have not",
            f"choose one of {', '.join(map(repr, INITIALIZATIONS))}",
        )
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if not all(type(rank) is int and 0 < rank <= LARGEST_RANK for rank in ranks):
        raise SettingsError(f"a LoRA of rank {max(ranks, key=str)!r}", f"choose whole numbers from 1 to {LARGEST_RANK:,}")
    config._register_custom_module({TrellisLinear: LoraTrellisLinear})
    return config


class LoraTrellisLinear(lora.Linear):
    """A packed layer and its adapters: y = layer(x) + scaling * B(A(x)). The packed layer stays as it is."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: what is packed cannot take a dense difference."""
        raise QtipError(
            "adapters cannot be merged into packed layers",
            "call dequantize() on the model that was loaded, put the adapter on that, and merge there",
        )

    def _get_in_out_features(self, module: TrellisLinear) -> tuple[int, int]:
        # PEFT's own looks for a type that it knows, and warns.
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA only: the others read the weight."""
        return {(): None}
