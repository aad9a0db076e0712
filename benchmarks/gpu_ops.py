"""The matrix products that ``benchmarks.gpu_kernels`` compares on a GPU: ours and those that torch and vLLM serve."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sliderquant_vllm import ops
from sliderquant_vllm.packing import pack_codes

BASELINE = "torch bf16"


@dataclass(frozen=True)
class Contender:
    name: str
    bytes: int  # of the weights that one call reads, scales and zero points among them
    copies: int
    run: Callable[[int, torch.Tensor], torch.Tensor]  # (copy of the weights, x) -> y
    dense: torch.Tensor | None  # [N, K], what the weights stand for; None: not checked
    seen: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double  # x as the op sees it
    least_m: int = 1


class Absent(Exception):
    """A peer that this installation does not have."""


def op_name(bits: int, group_size: int) -> str:
    return f"sliderquant W{bits}A16 {'per channel' if group_size == -1 else f'g{group_size}'}"


def integer_name(bits_of_both: tuple[int, int]) -> str:
    return "sliderquant W{}A{} per channel".format(*bits_of_both)


Weights = tuple[torch.Tensor | None, ...]  # all that a product reads of a weight


def bytes_of(weight: Weights) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weight if tensor is not None)


def copies_of(weight: Weights, read: int, cold: int) -> list[Weights]:
    """As many that calls which read so many bytes of one each find none of them in L2."""
    count = max(2, -(-cold // read))
    return [tuple(None if tensor is None else tensor.clone() for tensor in weight) for _ in range(count)]


@contextmanager
def override(variable: str, kernel: str) -> Iterator[None]:
    """Which kernel makes the products within; empty: what the dispatch chooses."""
    before = os.environ.get(variable)
    os.environ[variable] = kernel
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def bf16_contender(n: int, k: int, cold: int) -> Contender:
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    size = bytes_of((weight,))
    weights = copies_of((weight,), size, cold)
    return Contender(
        BASELINE, size, len(weights), lambda copy, x: torch.nn.functional.linear(x, *weights[copy]), weight
    )


def int4_contender(n: int, k: int, cold: int) -> Contender:
    """The int4 product that torch itself has: bf16, asymmetric, groups of 128."""
    try:
        codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.randn(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        torch.ops.aten._weight_int4pack_mm(torch.ones(1, k, device="cuda").bfloat16(), packed, 128, scales)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise Absent(str(error).splitlines()[0]) from error
    size = bytes_of((packed, scales))
    weights = copies_of((packed, scales), size, cold)

    def run(copy: int, x: torch.Tensor) -> torch.Tensor:
        packed, scales = weights[copy]
        return torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)

    return Contender("torch int4", size, len(weights), run, None)


def int8_contender(n: int, k: int, cold: int, most: int) -> Contender:
    """The int8 product that torch itself has, of codes that are there already: no scales, sums in int32."""
    least_m = 17
    codes = torch.randint(-128, 128, (max(most, least_m), k), device="cuda", dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), device="cuda", dtype=torch.int8).t()
    size = bytes_of((weight,))
    weights = copies_of((weight,), size, cold)
    try:
        torch._int_mm(codes[:least_m], weight)
    except (RuntimeError, AttributeError) as error:
        raise Absent(str(error).splitlines()[0]) from error
    return Contender(
        "torch int8, product alone",
        size,
        len(weights),
        lambda copy, x: torch._int_mm(codes[: len(x)], *weights[copy]),
        None,
        least_m=least_m,
    )


def marlin_contender(n: int, k: int, cold: int) -> Contender:
    """What vLLM serves int4 with: bf16, symmetric, groups of 128."""
    try:
        from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
        from vllm.scalar_type import scalar_types

        kind = scalar_types.uint4b8
        weight = torch.randn(k, n, device="cuda", dtype=torch.bfloat16)
        dense, packed, scales = marlin_utils_test.marlin_quantize(weight, kind, 128)
        workspace = marlin_utils.marlin_make_workspace_new(packed.device)
        no_zeros = torch.empty(0, dtype=torch.int32, device="cuda")
        size = bytes_of((packed, scales))
        weights = copies_of((packed, scales), size, cold)

        def run(copy: int, x: torch.Tensor) -> torch.Tensor:
            return marlin_utils.apply_gptq_marlin_linear(x, *weights[copy], no_zeros, workspace, kind, n, k)

        run(0, torch.ones(1, k, device="cuda", dtype=torch.bfloat16))
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise Absent((str(error).splitlines() or [type(error).__name__])[0]) from error
    return Contender("vLLM Marlin W4A16 g128", size, len(weights), run, dense.T)


def own_contender(args: argparse.Namespace, n: int, k: int, bits: int, cold: int, kernel: str) -> Contender:
    if not ops.is_native("cuda"):
        raise Absent("this library was built without CUDA kernels")
    groups = 1 if args.group_size == -1 else k // args.group_size
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
    scale = torch.rand(groups, n, device="cuda") * 0.02 + 0.001
    zero = torch.randint(0, 2**bits, (groups, n), dtype=torch.uint8, device="cuda")
    if args.symmetric:
        zero.fill_(2 ** (bits - 1))
    dense = codes.float().unflatten(1, (groups, -1)) - zero.T.float()[..., None]
    dense = (dense * scale.T[..., None]).flatten(1)
    weight = (ops.repack(pack_codes(codes, bits), bits), scale, None if args.symmetric else zero)
    size = bytes_of(weight)
    weights = copies_of(weight, size, cold)

    def run(copy: int, x: torch.Tensor) -> torch.Tensor:
        with override("SLIDERQUANT_CUDA_WNA16", kernel):
            return ops.wna16_gemm(x, *weights[copy], None, bits, args.group_size)

    return Contender(op_name(bits, args.group_size), size, len(weights), run, dense)


def integer_contender(
    args: argparse.Namespace, n: int, k: int, both: tuple[int, int], cold: int, kernel: str
) -> Contender:
    if not ops.is_native("cuda"):
        raise Absent("this library was built without CUDA kernels")
    bits, activation_bits = both
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
    scale = torch.rand(n, device="cuda") * 0.02 + 0.001
    zero = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, device="cuda")
    if args.symmetric:
        zero.fill_(2 ** (bits - 1))
    dense = (codes.float() - zero.float()[:, None]) * scale[:, None]
    packed = ops.repack(pack_codes(codes, bits), bits, activation_bits)
    weight = (packed, scale, None if args.symmetric else zero, codes.sum(1, dtype=torch.int32))
    size = bytes_of(weight)
    weights = copies_of(weight, size, cold)

    def run(copy: int, x: torch.Tensor) -> torch.Tensor:
        tokens = ops.quantize_per_token(x, activation_bits, args.symmetric)
        with override("SLIDERQUANT_CUDA_INTEGER", kernel):
            return ops.w4a4_gemm(*tokens, *weights[copy], None, bits, x.dtype)

    def seen(x: torch.Tensor) -> torch.Tensor:
        codes, scale, zero, _ = ops.quantize_per_token(x, activation_bits, args.symmetric)
        return (codes.double() - zero[:, None]) * scale[:, None].double()

    return Contender(integer_name(both), size, len(weights), run, dense, seen)


def grouped_contender(
    args: argparse.Namespace, experts: int, n: int, k: int, both: tuple[int, int], cold: int, offsets: torch.Tensor
) -> Contender:
    """Random weights of all experts, of which those are read that have tokens."""
    if not ops.is_native("cuda"):
        raise Absent("this library was built without CUDA kernels")
    bits, activation_bits = both
    groups = 1 if activation_bits < 16 or args.group_size == -1 else k // args.group_size
    packed = torch.randint(0, 256, (experts * n, k * bits // 8), device="cuda", dtype=torch.uint8).view(torch.int32)
    packed = ops.repack(packed, bits, activation_bits).unflatten(0, (experts, -1))
    scale = torch.rand(experts, groups, n, device="cuda") * 0.02
    zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8, device="cuda")
    if activation_bits == 16:
        weight = (packed, scale, zero)
    else:
        col_sum = torch.zeros(experts, n, dtype=torch.int32, device="cuda")
        weight = (packed, scale[:, 0].contiguous(), zero[:, 0].contiguous(), col_sum)
    size = bytes_of(weight) * int((offsets.diff() > 0).sum()) // experts
    weights = copies_of(weight, size, cold)

    def run(copy: int, x: torch.Tensor) -> torch.Tensor:
        if activation_bits == 16:
            return ops.wna16_gemm_grouped(x, offsets, *weights[copy], None, bits, args.group_size)
        tokens = ops.quantize_per_token(x, activation_bits, args.symmetric)
        return ops.w4a4_gemm_grouped(*tokens, offsets, *weights[copy], None, bits, x.dtype)

    return Contender(op_name(bits, args.group_size), size, len(weights), run, None)
