"""What the tests of the native ops share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import relative_error
from sliderquant_vllm import ops
from sliderquant_vllm.packing import pack_codes

PACKAGE = Path(ops.__file__).parent
LIBRARY = PACKAGE / "_C.abi3.so"


@dataclass
class Weight:
    """A random quantized weight, as the ops take it and in float64."""

    codes: torch.Tensor  # [N, K]
    packed: torch.Tensor  # checkpoint packing
    scale: torch.Tensor  # [G, N]
    zero: torch.Tensor | None  # [G, N]
    bits: int
    group_size: int

    @property
    def centred(self) -> torch.Tensor:
        groups = self.scale.shape[0]
        zero = torch.full((groups, 1), 2 ** (self.bits - 1)) if self.zero is None else self.zero
        return (self.codes.double().unflatten(1, (groups, -1)) - zero.T.double()[..., None]).flatten(1)

    @property
    def dense(self) -> torch.Tensor:
        groups = self.scale.shape[0]
        return (self.centred.unflatten(1, (groups, -1)) * self.scale.T.double()[..., None]).flatten(1)


def random_weight(n: int, k: int, bits: int, group_size: int, symmetric: bool, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else k // group_size
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(groups, n, generator=generator) * 0.02 + 0.001
    zero = torch.randint(0, 2**bits, (groups, n), generator=generator, dtype=torch.uint8)
    return Weight(codes, pack_codes(codes, bits), scale, None if symmetric else zero, bits, group_size)


def integer_weight(weight: Weight) -> tuple:
    """(w_packed, sw, zw, col_sum) of a per-channel weight, for ``w4a4_gemm``."""
    zw = None if weight.zero is None else weight.zero[0]
    col_sum = ops.column_sums(weight.packed, weight.bits)
    return ops.repack(weight.packed, weight.bits, activation_bits=8), weight.scale[0], zw, col_sum


def spread(tokens: Iterable[int], rest: int) -> tuple[torch.Tensor, int]:
    """(offsets, M) of so many tokens of each expert, and behind them those that meet none."""
    offsets = torch.tensor((0, *tokens)).cumsum(0).to(torch.int32)
    return offsets, int(offsets[-1]) + rest


def stacked(parts: Iterable[tuple]) -> tuple:
    """What each expert has, or None where none has it, as one tensor of all."""
    return tuple(None if part[0] is None else torch.stack(part) for part in zip(*parts, strict=True))


def error_of_weights(x: torch.Tensor, group_size: int) -> float:
    """The largest relative one with which the CPU kernels that are selected dequantize weights for these tokens."""
    rounds = ops.host().isa() == "amx" and x.dtype == torch.bfloat16 and len(x) > 64 and group_size != -1
    return 1.4 * 2**-8 if rounds else 0.0


def check_close(
    y: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, dtype: torch.dtype, case, of_weights: float = 0.0
):
    """Nothing but the rounding of the result, and fp32 sums of terms that add up to ``magnitude``; and the error that
    dequantized weights are allowed.
    """
    half_ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}[dtype]
    bound = half_ulp * exact.abs() + (1e-6 + of_weights) * magnitude + 2**-24
    assert y.dtype == dtype and y.shape == exact.shape, case
    assert torch.all((y.double() - exact).abs() <= bound), (case, relative_error(y, exact))
    # Together no worse than rounding the exact results once, fp32 sums having moved them a little before. A fixed
    # figure would not do: where one result outweighs all others, its own rounding is the whole error.
    rounded = relative_error(exact.to(dtype), exact)
    if of_weights:
        rounded = max(3e-3, math.hypot(rounded, 2e-3))
    cancelled = float(torch.linalg.vector_norm(magnitude) / torch.linalg.vector_norm(exact).clamp_min(1e-300))
    assert relative_error(y, exact) <= rounded + 2e-6 * cancelled, case
