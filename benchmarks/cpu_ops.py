"""The matrix products that ``benchmarks.kernels`` compares on CPUs: ours and those that vLLM and torch serve."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sliderquant_vllm import ops
from sliderquant_vllm.packing import pack_codes

BASELINE = "bf16"  # what the name of the contender begins with that others are compared with
GROUP_SIZE = 128
BASE_ROWS = 1024  # weights repeat after so many output channels: preparing them stays fast, reading them costs the same


class Absent(Exception):
    """An op that this installation does not have; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One op with several copies of its weights, so that none is found in the cache of the last call."""

    name: str
    bytes: int  # weights, scales and zero points that one call reads
    dense: torch.Tensor  # [BASE_ROWS or N, K] float64: the weights that it stands for
    run: Callable[[int, torch.Tensor], torch.Tensor]  # (copy, x [M, K]) -> [M, N]
    copies: int

    @property
    def kind(self) -> str:
        """Of its multiplications, as its name says: of bf16, or of int8 where activations have 8 bits or fewer."""
        return "int8" if re.search(r"A[48]\b", self.name) else "bf16"


@dataclass(frozen=True)
class Problem:
    """A random weight [N, K] in bf16; ``cache_bytes`` is what the copies of a contender must exceed together."""

    n: int
    k: int
    cache_bytes: int

    @functools.cached_property
    def rows(self) -> int:
        return BASE_ROWS if self.n % BASE_ROWS == 0 else self.n

    @functools.cached_property
    def weight(self) -> torch.Tensor:
        return (torch.randn(self.rows, self.k, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def tile(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        repeats = [1] * tensor.dim()
        repeats[dim] = self.n // self.rows
        return tensor.repeat(repeats)

    def contender(self, name: str, dense: torch.Tensor, tensors: tuple, run: Callable, prepare=None) -> Contender:
        """``run(x, *tensors of a copy)``; ``prepare`` turns copied tensors into what run takes."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
        count = max(2, math.ceil(self.cache_bytes / size))
        copies = [tuple(tensor if tensor is None else tensor.clone() for tensor in tensors) for _ in range(count)]
        if prepare is not None:
            copies = [prepare(*copy) for copy in copies]
        return Contender(name, size, dense.double(), lambda copy, x: run(x, *copies[copy]), count)


def quantize(weight: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to nearest over the range of each group: codes [N, K], scale and zero point [N, G]."""
    groups = weight.float().unflatten(1, (-1, weight.shape[1] if group_size == -1 else group_size))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).bfloat16().float()
    zero = torch.round(-low / scale).clamp(0, 2**bits - 1)
    codes = (torch.round(groups / scale[..., None]) + zero[..., None]).clamp(0, 2**bits - 1)
    return codes.flatten(1).to(torch.uint8), scale, zero


def dequantized(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    groups = codes.double().unflatten(1, (scale.shape[1], -1))
    return ((groups - zero.double()[..., None]) * scale.double()[..., None]).flatten(1)


def ours_weight_only(problem: Problem, bits: int) -> Contender:
    codes, scale, zero = quantize(problem.weight, bits, GROUP_SIZE)
    tensors = (
        ops.repack(problem.tile(pack_codes(codes, bits)), bits),
        problem.tile(scale.T.contiguous(), 1),
        problem.tile(zero.T.to(torch.uint8).contiguous(), 1),
    )

    def run(x, w_packed, scale, zero):
        return ops.wna16_gemm(x, w_packed, scale, zero, None, bits, GROUP_SIZE)

    dense = dequantized(codes, scale, zero)
    return problem.contender(f"sliderquant W{bits}A16 g{GROUP_SIZE}", dense, tensors, run)


def ours_integer(problem: Problem, bits: int, activation_bits: int) -> Contender:
    codes, scale, zero = quantize(problem.weight, bits, -1)
    packed = pack_codes(codes, bits)
    tensors = (
        ops.repack(problem.tile(packed), bits, activation_bits),
        problem.tile(scale[:, 0]),
        problem.tile(zero[:, 0].to(torch.uint8)),
        problem.tile(ops.column_sums(packed, bits)),
    )

    def run(x, w_packed, sw, zw, col_sum):
        quantized = ops.quantize_per_token(x, activation_bits, False)
        return ops.w4a4_gemm(*quantized, w_packed, sw, zw, col_sum, None, bits, x.dtype)

    return problem.contender(f"sliderquant W{bits}A{activation_bits}", dequantized(codes, scale, zero), tensors, run)


@functools.cache
def vllm_ops(needed: str):
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import _custom_ops
    except ImportError as error:
        raise Absent(f"vLLM is not installed: {error}") from None
    if not hasattr(torch.ops._C, needed):
        raise Absent(f"this vLLM has no torch.ops._C.{needed}")
    return _custom_ops


def vllm_bf16(problem: Problem) -> Contender:
    """As vLLM serves it: by oneDNN, or by torch on CPUs for which oneDNN has no product of bf16."""
    vllm = vllm_ops("onednn_mm")

    def prepare(weight):
        return (vllm.create_onednn_mm(weight.t(), 32),)

    def run(x, handler):
        return vllm.onednn_mm(handler, x, None)

    try:
        prepare(problem.weight)
    except RuntimeError:
        return torch_linear(problem, torch.bfloat16)
    tensors = (problem.tile(problem.weight),)
    return problem.contender(f"{BASELINE} onednn_mm (vLLM)", problem.weight, tensors, run, prepare)


def torch_linear(problem: Problem, dtype: torch.dtype) -> Contender:
    name = BASELINE if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")

    def run(x, weight):
        return torch.nn.functional.linear(x.to(dtype), weight)

    tensors = (problem.tile(problem.weight.to(dtype)),)
    return problem.contender(f"{name} linear (torch)", problem.weight, tensors, run)


def torch_fp32(problem: Problem) -> Contender:
    if torch.cpu._is_avx512_bf16_supported():
        raise Absent("this CPU multiplies bf16, which is faster")
    return torch_linear(problem, torch.float32)


def vllm_w4a16(problem: Problem) -> Contender:
    vllm = vllm_ops("cpu_gemm_wna16")
    codes, scale, zero = quantize(problem.weight, 4, GROUP_SIZE)
    # Packed along N, then 16 output channels (two words) as one block that runs along K.
    packed = pack_codes(codes.T.contiguous(), 4).view(problem.k, -1, 2).permute(1, 0, 2).flatten(1).contiguous()
    tensors = (
        problem.tile(packed),
        problem.tile(scale.T.bfloat16().contiguous(), 1),
        problem.tile(pack_codes(zero.T.contiguous().to(torch.uint8), 4), 1),
    )

    def run(x, w_packed, scale, zero):
        return vllm.cpu_gemm_wna16(x, w_packed, scale, zero, None, 8, "vec")

    dense = dequantized(codes, scale, zero)
    return problem.contender(f"W4A16 g{GROUP_SIZE} cpu_gemm_wna16 (vLLM)", dense, tensors, run)


def vllm_w4a8(problem: Problem) -> Contender:
    vllm = vllm_ops("int4_scaled_mm_cpu")
    codes, scale, zero = quantize(problem.weight, 4, GROUP_SIZE)

    def pack(values: torch.Tensor) -> torch.Tensor:
        """[.., N] -> AWQ's order of eight channels within a word."""
        values = problem.tile(values.T.to(torch.uint8), 1).unflatten(1, (-1, 8))
        return pack_codes(values[..., (0, 2, 4, 6, 1, 3, 5, 7)].flatten(1), 4)

    tensors = vllm.convert_weight_packed_scale_zp(
        pack(codes), pack(zero), problem.tile(scale.T.bfloat16().contiguous(), 1), vllm.CPUQuantAlgo.AWQ
    )

    def run(x, w, scale, zero):
        return vllm.int4_scaled_mm_cpu(x, w, zero, scale, None)

    w, zeros, scales = tensors
    dense = dequantized(codes, scale, zero)
    return problem.contender(f"W4A8 g{GROUP_SIZE} int4_scaled_mm_cpu (vLLM)", dense, (w, scales, zeros), run)


def vllm_w8a8(problem: Problem) -> Contender:
    vllm = vllm_ops("onednn_scaled_mm")
    scale = problem.weight.float().abs().amax(1, keepdim=True) / 127
    codes = torch.round(problem.weight.float() / scale).to(torch.int8)

    def prepare(weight, scale):
        # The handler packs the weight but only points to the scales: they must stay alive beside it.
        return vllm.create_onednn_scaled_mm(weight.t(), scale, torch.bfloat16, True, False, 32), scale

    def run(x, handler, _):
        x_codes, x_scale, _ = vllm.onednn_scaled_int8_quant(x, None, None, True)
        out = torch.empty(x.shape[0], problem.n, dtype=x.dtype)
        return vllm.onednn_scaled_mm(handler, x_codes, out, x_scale, None, None, None)

    tensors = (problem.tile(codes), problem.tile(scale))
    return problem.contender("W8A8 onednn_scaled_mm (vLLM)", codes.double() * scale, tensors, run, prepare)


def torch_w4a16(problem: Problem) -> Contender:
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise Absent("this torch has no aten::_weight_int4pack_mm_for_cpu")
    codes, scale, zero = quantize(problem.weight, 4, GROUP_SIZE)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(problem.tile(codes).int(), 2)
    offset = ((8 - zero) * scale).bfloat16()  # its formula: (code - 8) * scale + offset
    scales = torch.stack([scale.bfloat16(), offset], 2).transpose(0, 1).contiguous()

    def run(x, packed, scales):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scales)

    groups = codes.double().unflatten(1, (scale.shape[1], -1)) - 8
    dense = (groups * scale.double()[..., None] + offset.double()[..., None]).flatten(1)
    tensors = (packed, problem.tile(scales, 1))
    return problem.contender(f"W4A16 g{GROUP_SIZE} _weight_int4pack_mm (torch)", dense, tensors, run)


BUILDERS: dict[str, Callable[[Problem], Contender]] = {
    BASELINE: vllm_bf16,
    "float32": torch_fp32,
    "cpu_gemm_wna16": vllm_w4a16,
    "int4_scaled_mm_cpu": vllm_w4a8,
    "onednn_scaled_mm": vllm_w8a8,
    "_weight_int4pack_mm_for_cpu": torch_w4a16,
    **{f"W{bits}A16": functools.partial(ours_weight_only, bits=bits) for bits in (4, 3, 2, 8)},
    **{
        f"W{bits}A{activation}": functools.partial(ours_integer, bits=bits, activation_bits=activation)
        for bits, activation in ((4, 4), (3, 4), (2, 4), (4, 8), (8, 8))
    },
}
