"""The vLLM method for routed experts: one grouped product for all gates and ups, one for all downs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch

from sliderquant_vllm import ops
from sliderquant_vllm.compat import (
    FusedMoEMethodBase,
    FusedMoeWeightScaleSupported,
    activate_experts,
    experts_problem,
    weights_are_random,
)
from sliderquant_vllm.format import FormatError, LinearScheme
from sliderquant_vllm.linear import REMEDY, kernel_tensors
from sliderquant_vllm.packing import expected_tensors

# Parameter -> the matrices of an expert that it holds, by the names that vLLM's loader has for gate, down and up.
SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}
NEEDED = ("weight_packed", "weight_scale", "weight_zero_point")


def names_of(layer: torch.nn.Module) -> dict[str, str]:
    """vLLM's names of the matrices of an expert -> those in the checkpoint."""
    return {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}


def recording(loader: MethodType, prefix: str) -> MethodType:
    """The weight loader of a layer, which checks shapes and adds to ``param.loaded_parts`` what it loaded.

    vLLM's own takes tensors that are too small for padded ones. All else as in ``linear.recording``.
    """
    load = loader.__func__

    @functools.wraps(load)
    def load_and_record(layer, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
        found = tuple(loaded_weight.shape)
        if found != param.expected_shape:
            raise FormatError(
                f"{prefix}.{expert_id}.{names_of(layer)[shard_id]}.{param.suffix}: config.json describes "
                f"{list(param.expected_shape)}, the checkpoint holds {list(found)}; put the config.json beside it that "
                "it came with"
            )
        success = load(layer, param, loaded_weight, weight_name, shard_id, expert_id, return_success=True)
        if success and not param.is_meta:
            param.loaded_parts |= {(expert_id, shard_id)}
        return success if return_success else None

    return MethodType(load_and_record, loader.__self__)


class SliderQuantMoEMethod(FusedMoEMethodBase):
    """The routed experts of a block.

    Args:
        moe: vLLM's description of them.
        schemes: "w13" -> that of all gates and ups, "w2" -> that of all downs.
        prefix: module name in the served model.

    Raises:
        FormatError: the experts have an added bias.
    """

    def __init__(self, moe: Any, schemes: Mapping[str, LinearScheme], prefix: str):
        super().__init__(moe)
        self.schemes = schemes
        self.prefix = prefix
        if any(scheme.added_bias for scheme in schemes.values()):
            raise FormatError(
                f"{prefix}: expected experts without an added bias, found 'added_bias' patterns that match them; "
                "quantize the model again without"
            )

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters in checkpoint layout, which vLLM fills with this rank's part of its experts' tensors.

        Raises:
            FormatError: the parts of this rank do not end at word, group or Hadamard block boundaries; the
                architecture, the device, or what the server is asked for is not served.
        """
        ops.load()
        if problem := experts_problem(layer):
            raise FormatError(f"{self.prefix}: {problem}")
        loader = recording(extra_weight_attrs["weight_loader"], self.prefix)
        whole, split = layer.moe_config.intermediate_size, intermediate_size_per_partition
        sizes = {
            "w13": ((whole, hidden_size), (split, hidden_size)),
            "w2": ((hidden_size, whole), (hidden_size, split)),
        }
        self.starts_random = weights_are_random()
        for matrix, (in_checkpoint, of_rank) in sizes.items():
            scheme = self.schemes[matrix]
            if problem := scheme.shape_problem(*of_rank):
                names = " and ".join(names_of(layer)[shard] for shard in SHARDS[matrix])
                raise FormatError(
                    f"{self.prefix}: its {names} {list(in_checkpoint)} ({scheme}) cannot be split over "
                    f"tensor_parallel_size {layer.moe_config.tp_size}: that of a rank is {list(of_rank)}, and "
                    f"{problem}; serve with a smaller tensor_parallel_size, or with --enable-expert-parallel"
                )
            parts, per_group = len(SHARDS[matrix]), scheme.weights.group_size != -1
            expected = expected_tensors(scheme.weights, *in_checkpoint)
            for suffix, ((*shape,), dtypes) in expected_tensors(scheme.weights, *of_rank).items():
                if suffix != "weight_shape":  # vLLM keeps one of an expert, which is the same for gate and up
                    shape[0] *= parts
                parameter = torch.nn.Parameter(torch.zeros(num_experts, *shape, dtype=dtypes[-1]), requires_grad=False)
                parameter.weight_loader = loader
                parameter.suffix = suffix
                parameter.expected_shape = expected[suffix][0]
                parameter.loaded_parts = frozenset()
                # Scales per channel go whole to every rank that has a part of the channel's inputs.
                supported = FusedMoeWeightScaleSupported
                parameter.quant_method = (supported.GROUP if per_group else supported.CHANNEL).value
                if suffix == "weight_shape":
                    # vLLM, when it loads anew, processes a layer as soon as so many elements have come.
                    parameter.weight_loader_numel = 2 * num_experts * parts
                layer.register_parameter(f"{matrix}_{suffix}", parameter)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the checkpoint tensors of the layer by what the kernels take, those of all experts stacked.

        Raises:
            FormatError: a tensor of an expert was not in the checkpoint, or has scales that are not finite.
        """
        for matrix, scheme in self.schemes.items():
            held = [getattr(layer, f"{matrix}_{suffix}", None) for suffix in NEEDED]
            for parameter in held:
                if parameter is not None and not self.starts_random:  # symmetric schemes have no zero points
                    self._check_loaded(layer, matrix, parameter)
            stacked: dict[str, torch.Tensor | None] = {}
            for expert in range(layer.local_num_experts):
                own = (None if parameter is None else parameter.data[expert] for parameter in held)
                for name, tensor in kernel_tensors(scheme, *own).items():
                    if expert == 0:
                        stacked[name] = None if tensor is None else tensor.new_empty(len(held[0]), *tensor.shape)
                    if tensor is not None:
                        stacked[name][expert] = tensor
            for suffix in (*NEEDED, "weight_shape"):
                if hasattr(layer, f"{matrix}_{suffix}"):
                    delattr(layer, f"{matrix}_{suffix}")
            for name, tensor in stacked.items():
                parameter = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
                layer.register_parameter(f"{matrix}_{name}", parameter)
        self.starts_random = False  # what is loaded anew is not

    def _check_loaded(self, layer: torch.nn.Module, matrix: str, parameter: torch.nn.Parameter) -> None:
        """vLLM does not ask whether all experts got their tensors."""
        numbers, names = range(layer.global_num_experts), names_of(layer)
        if layer.expert_map is not None:
            numbers = [number for number in numbers if layer.expert_map[number] >= 0]
        expected = [(number, shard) for number in numbers for shard in SHARDS[matrix]]
        missing = [part for part in expected if part not in parameter.loaded_parts]
        if missing:
            number, shard = missing[0]
            raise FormatError(
                f"{self.prefix}.{number}.{names[shard]}.{parameter.suffix}: expected a tensor in the checkpoint, found "
                f"none, nor {len(missing) - 1} others like it; {REMEDY}"
            )
        if parameter.suffix == "weight_scale" and not torch.isfinite(parameter).all():
            slot = int((~torch.isfinite(parameter)).flatten(1).any(1).nonzero()[0])
            raise FormatError(
                f"{self.prefix}.{numbers[slot]}: expected finite numbers as {parameter.suffix} of "
                f"{' and '.join(names[shard] for shard in SHARDS[matrix])}, found others; {REMEDY}"
            )

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """None: vLLM's own kernels, which it would describe, do not run."""

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: torch.nn.Module | None = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum of what the experts of each token give. vLLM itself runs and adds shared experts.

        Args:
            x: [M, hidden].
            topk_weights: fp32 [M, k].
            topk_ids: [M, k], experts of the whole model.

        Returns:
            [M, hidden] in the dtype of ``x``, without what the experts of other ranks give.
        """
        experts, count = topk_ids.flatten(), layer.local_num_experts
        if layer.expert_map is not None:
            experts = layer.expert_map[experts]
            experts = torch.where(experts < 0, count, experts)  # behind all others
        experts, order = experts.sort(stable=True)
        offsets = torch.searchsorted(
            experts, torch.arange(count + 1, dtype=experts.dtype, device=x.device), out_int32=True
        )
        gate_up = self._product(layer, "w13", x, offsets, order // topk_ids.shape[1])
        down = self._product(layer, "w2", activate_experts(layer, gate_up), offsets)
        routed = torch.empty_like(down).index_copy_(0, order, down).unflatten(0, topk_ids.shape)
        return (routed * topk_weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def _product(
        self,
        layer: torch.nn.Module,
        matrix: str,
        x: torch.Tensor,
        offsets: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[M, K] -> [M, N], or [R, N] where ``rows`` [R] says which row of x each is made of.

        A token is rotated and quantized once for all its experts.
        """
        weights, activations = self.schemes[matrix].weights, self.schemes[matrix].activations
        block_size = self.schemes[matrix].hadamard_block_size or 1
        if activations is None:
            tokens = (x if block_size == 1 else ops.hadamard(x, block_size),)
        else:
            tokens = ops.quantize_per_token(x, activations.bits, activations.symmetric, block_size)
        if rows is not None:
            tokens = [tensor[rows] for tensor in tokens]
        packed, scale, zero_point = (
            getattr(layer, f"{matrix}_weight_{name}") for name in ("packed", "scale", "zero_point")
        )
        if activations is None:
            return ops.wna16_gemm_grouped(
                *tokens, offsets, packed, scale, zero_point, None, weights.bits, weights.group_size
            )
        col_sum = getattr(layer, f"{matrix}_col_sum")
        return ops.w4a4_gemm_grouped(*tokens, offsets, packed, scale, zero_point, col_sum, None, weights.bits, x.dtype)
