"""All that is known about the vLLM at hand; every other module takes these names from here.

Tested with vLLM 0.32; the names that 0.26 spells differently are mapped.
"""

from __future__ import annotations

from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

try:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
except ImportError:
    from vllm.model_executor.layers.fused_moe import FusedMoE as RoutedExperts

__all__ = [
    "BasevLLMParameter",
    "ChannelQuantScaleParameter",
    "GroupQuantScaleParameter",
    "LinearBase",
    "LinearMethodBase",
    "PackedColumnParameter",
    "PackedvLLMParameter",
    "ParallelLMHead",
    "RoutedExperts",
    "UnquantizedLinearMethod",
    "register_weight_loader_v2_supported_method",
    "serving_options",
    "weights_are_random",
]

OPTIONS = {"int8_activations": False}


def weights_are_random() -> bool:
    """Whether the model that is being built gets random weights, which no weight loader sees."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def serving_options() -> dict[str, bool]:
    """What ``--additional-config '{"sliderquant": {...}}'`` asks for, or the defaults. Raises ValueError."""
    config = get_current_vllm_config_or_none()
    additional = config.additional_config if config is not None else {}
    asked = additional.get("sliderquant", {}) if isinstance(additional, dict) else {}
    if not isinstance(asked, dict) or not asked.keys() <= OPTIONS.keys() or set(map(type, asked.values())) - {bool}:
        raise ValueError(f"--additional-config sliderquant: expected {OPTIONS} or the like, found {asked!r}")
    return OPTIONS | asked
