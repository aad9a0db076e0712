"""The vLLM linear method: loads checkpoint tensors, turns them into kernel layout, calls the kernels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType, MethodType
from typing import Any

import torch

from sliderquant_vllm import ops
from sliderquant_vllm.compat import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    LinearMethodBase,
    PackedColumnParameter,
    PackedvLLMParameter,
    register_weight_loader_v2_supported_method,
    weights_are_random,
)
from sliderquant_vllm.format import FormatError, LinearScheme
from sliderquant_vllm.packing import unpack_codes

CHECKPOINT_TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "added_bias")
REMEDY = "check the checkpoint with 'python -m sliderquant_vllm DIR'"
QKV = ("q", "k", "v")
ALL_PARTS = None  # how vLLM's loaders name a tensor that is not one part of a fused module


def recording(loader: MethodType) -> MethodType:
    """The weight loader of a layer, which checks sizes and adds to ``param.loaded_parts`` what it was called for.

    Not where a parameter has no memory: vLLM keeps such ones from load to load. A method as before: vLLM takes the
    layer out of its parameters' methods where it must not keep it alive.
    """
    load = loader.__func__

    @functools.wraps(load)
    def load_and_record(layer, param, loaded_weight, *args, **kwargs):
        part = next(iter((*args, *kwargs.values())), ALL_PARTS)
        if param is layer.weight_packed:
            layer.quant_method.check_packed(layer, loaded_weight, part)
        result = load(layer, param, loaded_weight, *args, **kwargs)
        if not param.is_meta:
            param.loaded_parts |= set(part if isinstance(part, tuple) else (part,))
        return result

    return MethodType(load_and_record, loader.__self__)


def check_sizes(prefix: str, described: tuple[int, int], found: tuple[int, int]) -> None:
    """Raises FormatError where a checkpoint holds other [out_features, in_features] than config.json describes."""
    if found != described:
        raise FormatError(
            f"{prefix}: config.json describes {list(described)}, the checkpoint holds {list(found)}; put the "
            "config.json beside it that it came with"
        )


def kernel_tensors(
    scheme: LinearScheme,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
) -> dict[str, torch.Tensor | None]:
    """The tensors of a weight in checkpoint layout as the kernels take them, under the same names, and its column sums.

    Those of a scheme that has none are None.
    """
    weights, activations = scheme.weights, scheme.activations
    tensors = {
        "weight_packed": ops.repack(weight_packed, weights.bits, activations.bits if activations else 16),
        "weight_scale": weight_scale.T.contiguous(),
        "weight_zero_point": None,
        "col_sum": None,
    }
    if weight_zero_point is not None:
        tensors["weight_zero_point"] = unpack_codes(weight_zero_point.T, weights.bits)
    if activations is not None:
        tensors["col_sum"] = ops.column_sums(weight_packed, weights.bits)
        # One scale per channel: [1, N] here, [N] for the integer kernels.
        for name in ("weight_scale", "weight_zero_point"):
            tensors[name] = None if tensors[name] is None else tensors[name][0]
    return tensors


@register_weight_loader_v2_supported_method
class SliderQuantLinearMethod(LinearMethodBase):
    """One linear or fused module under one scheme: weight-only, or integer with quantized activations.

    Args:
        prefix: module name in the served model.
        biases: part of the module -> whether the checkpoint holds a bias for it; empty where that is not known.
    """

    def __init__(self, scheme: LinearScheme, prefix: str, biases: Mapping[str, bool] = MappingProxyType({})):
        self.scheme = scheme
        self.prefix = prefix
        self.biases = biases

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters in checkpoint layout, which vLLM fills with this rank's part of each part's tensors.

        Raises:
            FormatError: the parts of this rank do not end at word, group or Hadamard block boundaries.
        """
        ops.load()
        weights = self.scheme.weights
        inputs_are_split = input_size_per_partition != input_size
        for part, size in enumerate(output_partition_sizes):
            if problem := self.scheme.shape_problem(size, input_size_per_partition):
                tp_size = getattr(layer, "tp_size", 1)
                working = self._row_splits(size, input_size) if inputs_are_split else ""
                raise FormatError(
                    f"{self.prefix}: its weight [{output_size}, {input_size}] ({self.scheme}) cannot be "
                    f"split over tensor_parallel_size {tp_size}: part {part} of a rank is "
                    f"[{size}, {input_size_per_partition}], and {problem}; "
                    f"serve with {f'tensor_parallel_size {working}' if working else 'a smaller tensor_parallel_size'}"
                )
        out_features = sum(output_partition_sizes)
        groups = weights.groups(input_size_per_partition)
        layer.logical_widths = output_partition_sizes
        loader = recording(extra_weight_attrs["weight_loader"])
        packed_factor = Fraction(32, weights.bits)

        layer.register_parameter(
            "weight_packed",
            PackedvLLMParameter(
                data=torch.zeros(out_features, input_size_per_partition * weights.bits // 32, dtype=torch.int32),
                input_dim=1,
                output_dim=0,
                packed_dim=1,
                packed_factor=packed_factor,
                weight_loader=loader,
            ),
        )
        scale = torch.zeros(out_features, groups, dtype=torch.float32)
        zero_point = torch.zeros(out_features * weights.bits // 32, groups, dtype=torch.int32)
        packed = {"packed_dim": 0, "packed_factor": packed_factor}
        if weights.group_size == -1:
            # One scale per output channel goes whole to every rank that has a part of the channel's inputs.
            scale = ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=loader)
            zero_point = PackedColumnParameter(data=zero_point, output_dim=0, weight_loader=loader, **packed)
        else:
            dims = {"input_dim": 1, "output_dim": 0}
            scale = GroupQuantScaleParameter(data=scale, weight_loader=loader, **dims)
            zero_point = PackedvLLMParameter(data=zero_point, weight_loader=loader, **dims, **packed)
        layer.register_parameter("weight_scale", scale)
        if not weights.symmetric:
            layer.register_parameter("weight_zero_point", zero_point)
        if self.scheme.added_bias:
            # Split as scales per channel are: by output, and whole on every rank that has a part of the inputs.
            added_bias = torch.zeros(out_features, dtype=torch.float32)
            added_bias = ChannelQuantScaleParameter(data=added_bias, output_dim=0, weight_loader=loader)
            layer.register_parameter("added_bias", added_bias)
            # The ranks' results are summed, so only one of them adds it.
            layer.adds_bias = not inputs_are_split or layer.tp_rank == 0
        shape = BasevLLMParameter(data=torch.zeros(2, dtype=torch.int64), weight_loader=loader)
        # Every part brings one: vLLM, when it loads anew, processes a layer as soon as so many elements have come.
        shape.weight_loader_numel = 2 * len(output_partition_sizes)
        layer.register_parameter("weight_shape", shape)
        # Immutable, because vLLM keeps shallow copies of parameters, from which it loads anew.
        for name in CHECKPOINT_TENSORS:
            if hasattr(layer, name):
                getattr(layer, name).loaded_parts = frozenset()
        self.starts_random = weights_are_random()

    def check_packed(self, layer: torch.nn.Module, packed: torch.Tensor, part: Any) -> None:
        """vLLM's loaders take the first channels of a part that has too many. Raises FormatError."""
        name, rows = f"{self.prefix}, part {part}", layer.output_size
        if part is ALL_PARTS:
            name = self.prefix
        elif part in QKV:
            # Every rank has a key and a value head, which several may share.
            rows = layer.output_sizes[QKV.index(part)] // (1 if part == "q" else layer.num_kv_head_replicas)
        else:
            rows = sum(layer.output_sizes[each] for each in (part if isinstance(part, tuple) else (part,)))
        found = packed.shape[0], packed.shape[-1] * 32 // self.scheme.weights.bits
        check_sizes(name, (rows, layer.input_size), found)

    def _row_splits(self, out_features: int, input_size: int) -> str:
        """The numbers of ranks over which the input channels can be split; empty where there is none."""
        sizes = (size for size in range(1, input_size + 1) if input_size % size == 0)
        fitting = (size for size in sizes if not self.scheme.shape_problem(out_features, input_size // size))
        return " or ".join(map(str, fitting))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the checkpoint tensors of the layer by what the kernels take, under the same names.

        The names are those by which vLLM finds the device of a quantized layer.

        Raises:
            FormatError: a tensor of the layer was not in the checkpoint, or has scales that are not finite; the
                checkpoint and the architecture disagree about biases.
        """
        if not self.starts_random:
            self._check_loaded(layer)
        self.starts_random = False  # what is loaded anew is not
        self._check_biases(layer)
        zero_point = None if self.scheme.weights.symmetric else layer.weight_zero_point.data
        tensors = kernel_tensors(self.scheme, layer.weight_packed.data, layer.weight_scale.data, zero_point)
        if self.scheme.added_bias:
            tensors["added_bias"] = layer.added_bias.data
        for name in CHECKPOINT_TENSORS:
            if hasattr(layer, name):
                delattr(layer, name)
        for name, tensor in tensors.items():
            parameter = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, parameter)
        # A bias that vLLM adds itself, elsewhere, keeps the dtype of the model.
        if getattr(layer, "bias", None) is not None and not layer.skip_bias_add:
            layer.bias.data = layer.bias.data.float()  # the same parameter: vLLM loads anew by its attributes

    def _check_loaded(self, layer: torch.nn.Module) -> None:
        """vLLM does not ask whether a quantized layer got all its tensors."""
        parts = len(layer.logical_widths)
        for name in ("weight_packed", "weight_scale", "weight_zero_point", "added_bias"):
            if getattr(layer, name, None) is None:  # the scheme has none
                continue
            found = getattr(layer, name).loaded_parts
            if ALL_PARTS not in found and len(found) < parts:
                expected = f"the tensors of {parts} parts" if parts > 1 else "a tensor"
                held = f"only {', '.join(sorted(map(str, found)))}" if found else "none"
                raise FormatError(
                    f"{self.prefix}.{name}: expected {expected} in the checkpoint, found {held}; {REMEDY}"
                )
        for name in ("weight_scale", "added_bias"):
            if hasattr(layer, name) and not torch.isfinite(getattr(layer, name)).all():
                raise FormatError(f"{self.prefix}.{name}: expected finite numbers, found others; {REMEDY}")

    def _check_biases(self, layer: torch.nn.Module) -> None:
        """vLLM drops a bias that its architecture has none of, and leaves one unset that the checkpoint lacks."""
        served = getattr(layer, "bias", None) is not None
        if served and self.scheme.added_bias:
            raise FormatError(
                f"{self.prefix}.added_bias: expected only where the architecture has no bias, found one; "
                "add it to the tensors named 'bias' and quantize the model again"
            )
        for part, held in self.biases.items():
            if held != served:
                raise FormatError(
                    f"{part}.bias: this architecture has {'a' if served else 'no'} bias here, found "
                    f"{'one' if held else 'none'} in the checkpoint; put the config.json beside it that it came with, "
                    "or store a bias that quantization adds as 'added_bias'"
                )

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., K] -> [..., N] in the dtype of ``x``."""
        weights, activations = self.scheme.weights, self.scheme.activations
        rows, block_size = x.reshape(-1, x.shape[-1]), self.scheme.hadamard_block_size or 1
        if self.scheme.added_bias and layer.adds_bias:
            bias = layer.added_bias
        if activations is None:
            if block_size > 1:
                rows = ops.hadamard(rows, block_size)
            y = ops.wna16_gemm(
                rows,
                layer.weight_packed,
                layer.weight_scale,
                layer.weight_zero_point,
                bias,
                weights.bits,
                weights.group_size,
            )
        else:
            quantized = ops.quantize_per_token(rows, activations.bits, activations.symmetric, block_size)
            y = ops.w4a4_gemm(
                *quantized,
                layer.weight_packed,
                layer.weight_scale,
                layer.weight_zero_point,
                layer.col_sum,
                bias,
                weights.bits,
                x.dtype,
            )
        return y.view(*x.shape[:-1], y.shape[-1])
