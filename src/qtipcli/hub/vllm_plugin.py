"""Owns what vLLM calls when it starts (entry point `vllm.general_plugins`): it registers the format. Experimental: see below.

Written against vLLM's documented plugin interface and read against its sources; **it has not run under vLLM yet**. vLLM calls
it in each of its processes, possibly more than once. This module imports neither vllm nor torch: hub.vllm_linear does.
"""

from __future__ import annotations

from qtipcli.registration import METHOD


def register() -> None:
    """Make vLLM know the qtip format. Calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if METHOD in QUANTIZATION_METHODS:
        return
    from qtipcli.hub.vllm_linear import QtipVllmConfig

    register_quantization_config(METHOD)(QtipVllmConfig)
