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
    "weights_are_random",
]


def weights_are_random() -> bool:
    """Whether the model that is being built gets random weights, which no weight loader sees."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"
