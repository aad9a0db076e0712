"""All that is known about the vLLM at hand; every other module takes these names from here.

Tested with vLLM 0.32; the names that 0.26 spells differently are mapped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from vllm import envs
from vllm.config import CUDAGraphMode, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported
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
from vllm.platforms import current_platform

from sliderquant_vllm import ops

try:
    from vllm.compilation.passes.inductor_pass import InductorPass
except ImportError:
    from vllm.compilation.inductor_pass import InductorPass

try:
    from vllm.model_executor.layers.fused_moe import MoEActivation, RoutedExperts, apply_moe_activation

    # Those that take all gates first, then all ups.
    GATED_ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)
except ImportError:
    from vllm.model_executor.layers.fused_moe import FusedMoE as RoutedExperts

    GATED_ACTIVATIONS = ()

__all__ = [
    "DRAFT_PREFIX",
    "SERVES_EXPERTS",
    "BasevLLMParameter",
    "ChannelQuantScaleParameter",
    "FusedMoEMethodBase",
    "FusedMoeWeightScaleSupported",
    "GroupQuantScaleParameter",
    "InductorPass",
    "LinearBase",
    "LinearMethodBase",
    "PackedColumnParameter",
    "PackedvLLMParameter",
    "ParallelLMHead",
    "RoutedExperts",
    "UnquantizedLinearMethod",
    "activate_experts",
    "add_graph_pass",
    "companions",
    "experts_problem",
    "register_weight_loader_v2_supported_method",
    "serving_options",
    "warn_of_batches",
    "weights_are_random",
]

logger = init_logger(f"vllm.{__name__}")  # one that vLLM shows

OPTIONS = {"int8_activations": False, "made_for_this_checkpoint": False}
# Methods of speculative decoding that do not read the hidden states of the model that is served.
OWN_STATES = ("ngram", "ngram_gpu", "suffix", "draft_model", "custom_class")
# Before the names of a draft model's modules, which its checkpoint has without.
DRAFT_PREFIX = "draft_model."
# Experts whose method has no kernels of vLLM's own exchange tokens in this way alone.
SERVED_ALL2ALL = "allgather_reducescatter"
# Experts of an older vLLM route within themselves, which ``moe`` does not.
SERVES_EXPERTS = bool(GATED_ACTIVATIONS)


def weights_are_random() -> bool:
    """Whether the model that is being built gets random weights, which no weight loader sees."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def warn_of_batches() -> None:
    """Say once, where VLLM_BATCH_INVARIANT=1 asks for it, that products of 16-bit activations are not so."""
    if envs.VLLM_BATCH_INVARIANT:
        logger.warning_once(
            "VLLM_BATCH_INVARIANT: expected linears whose results do not depend on the batch, found weight-only ones, "
            "whose kernels on CPUs and GPUs add up in another order for other numbers of tokens; serve a checkpoint "
            "with quantized activations, whose integer sums are exact"
        )


def add_graph_pass(graph_pass: InductorPass) -> None:
    """Let a pass run over the compiled graphs of the model that is being built, unless a user has one there.

    The place is that of ``--compilation-config '{"inductor_passes": {...}}'``, which vLLM reads once a model is built.
    """
    config = get_current_vllm_config_or_none()
    if config is not None:
        key = getattr(current_platform, "pass_key", "post_grad_custom_post_pass")
        config.compilation_config.inductor_compile_config.setdefault(key, graph_pass)


def companions() -> Iterator[tuple[str, bool]]:
    """(flag, whether it needs no more than the hidden states between blocks) of what is asked for beside the weights
    and depends on the meaning of their channels.
    """
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return
    if config.lora_config is not None:
        yield "--enable-lora", False
    if config.model_config.enable_prompt_embeds:
        yield "--enable-prompt-embeds", True
    if config.model_config.runner_type == "pooling":
        yield "--runner pooling", True
    if config.speculative_config is not None and config.speculative_config.method not in OWN_STATES:
        yield f"--speculative-config method {config.speculative_config.method}", True


def experts_problem(layer: RoutedExperts) -> str | None:
    """Why the routed experts of a layer cannot be served quantized, and what to do; None where they can."""
    moe, config = layer.moe_config, get_current_vllm_config_or_none()
    backend = moe.moe_parallel_config.all2all_backend
    exchanges = moe.moe_parallel_config.use_all2all_kernels or backend == "passthrough"
    if moe.moe_parallel_config.use_ep and exchanges and backend != SERVED_ALL2ALL:
        return f"expected --all2all-backend {SERVED_ALL2ALL}, found {backend}; serve with the one expected"
    targets = config.lora_config.target_modules if moe.is_lora_enabled else []
    if targets is None or "experts" in targets:
        return (
            "adapters of quantized experts are not served, found --enable-lora; serve without it, or name other "
            "modules in --lora-target-modules"
        )
    captures = config is not None and config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    if captures and current_platform.is_cuda() and not ops.is_native("cuda"):
        return (
            "without native CUDA kernels experts cannot be captured in CUDA graphs; serve with --enforce-eager, or "
            "build the kernels with 'pip install --no-build-isolation -e .' on a machine with nvcc"
        )
    problem = _architecture_problem(layer)
    return problem and f"{problem}; add 're:.*\\.experts\\..*' to 'ignore' and quantize the model again"


def _architecture_problem(layer: RoutedExperts) -> str | None:
    # Not yet run on a GPU: there is nothing in moe.py that asks for a device, and the ops have one schema for all.
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        return f"quantized experts are served on CPUs and CUDA GPUs, found {current_platform.device_name}"
    if layer.activation not in GATED_ACTIVATIONS or layer.swiglu_limit is not None:
        served = ", ".join(activation.value for activation in GATED_ACTIVATIONS)
        limit = "" if layer.swiglu_limit is None else f" with limit {layer.swiglu_limit}"
        return f"expected one of the activations {served}, found {layer.activation.value}{limit}"
    moe = layer.moe_config
    if moe.has_bias:
        return "expected an architecture whose experts have no bias, found one that has"
    if moe.hidden_dim != moe.hidden_dim_unpadded:
        width = f"{moe.hidden_dim_unpadded} channels padded to {moe.hidden_dim}"
        return f"expected experts as wide as the model, found {width}"
    if layer.apply_router_weight_on_input:
        return "expected router weights on the experts' output, found them on their input"
    return None


def activate_experts(layer: RoutedExperts, gate_up: torch.Tensor) -> torch.Tensor:
    """What the layer's down projection takes: [M, 2 * intermediate] -> [M, intermediate]."""
    output = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    return apply_moe_activation(layer.activation, output, gate_up)


def serving_options() -> dict[str, bool]:
    """What ``--additional-config '{"sliderquant": {...}}'`` asks for, or the defaults. Raises ValueError."""
    config = get_current_vllm_config_or_none()
    additional = config.additional_config if config is not None else {}
    asked = additional.get("sliderquant", {}) if isinstance(additional, dict) else {}
    if not isinstance(asked, dict) or not asked.keys() <= OPTIONS.keys() or set(map(type, asked.values())) - {bool}:
        raise ValueError(f"--additional-config sliderquant: expected {OPTIONS} or the like, found {asked!r}")
    return OPTIONS | asked
