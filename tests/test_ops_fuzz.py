"""Random shapes, strides, widths and groups against float64, on every instruction set of this machine."""

from __future__ import annotations

import random
import secrets

import pytest
import torch

from sliderquant_vllm import ops
from tests.native import check_close, error_of_weights, integer_weight, random_weight

pytestmark = pytest.mark.usefixtures("threads")

CASES = 1000  # of every instruction set, op and seed
GROUP_SIZES = (-1, 32, 64, 128)


def seeds() -> list[int]:
    return [20261122, secrets.randbits(32)]  # a failure names its own


@pytest.fixture(params=seeds(), ids=["fixed", "random"])
def choose(request):
    print(f"seed {request.param}")
    torch.manual_seed(request.param)
    return random.Random(request.param)


def random_shape(choose: random.Random, group_size: int) -> tuple[int, int, int]:
    """Tokens, output and input channels, most of them few."""
    m = choose.choice((choose.randint(1, 5), choose.randint(5, 40), choose.randint(250, 300)))
    most = 1500 if m < 40 else 300
    unit = 32 if group_size == -1 else group_size
    return m, choose.randint(1, 150), unit * choose.randint(1, most // unit)


def strided(choose: random.Random, m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """[m, k] within wider rows half of the time."""
    if choose.random() < 0.5:
        return torch.randn(m, k).to(dtype)
    before, behind = choose.randint(0, 9), choose.randint(0, 9)
    return torch.randn(m, before + k + behind).to(dtype)[:, before : before + k]


def test_wna16_gemm(isa, choose):
    for case in range(CASES):
        bits, group_size, symmetric = choose.choice((2, 3, 4, 8)), choose.choice(GROUP_SIZES), choose.random() < 0.5
        dtype = choose.choice((torch.bfloat16, torch.float16))
        m, n, k = random_shape(choose, group_size)
        weight = random_weight(n, k, bits, group_size, symmetric, case)
        weight.scale *= torch.exp2(torch.randint(-12, 12, weight.scale.shape) * float(choose.random() < 0.3))
        x, bias = strided(choose, m, k, dtype), torch.randn(n) if choose.random() < 0.5 else None
        y = ops.wna16_gemm(x, ops.repack(weight.packed, bits), weight.scale, weight.zero, bias, bits, group_size)
        exact, magnitude = x.double() @ weight.dense.T, x.double().abs() @ weight.dense.abs().T
        if bias is not None:
            exact, magnitude = exact + bias, magnitude + bias.abs()
        if dtype == torch.float16:  # what it cannot hold
            keep = exact.abs() < torch.finfo(dtype).max / 2
            y, exact, magnitude = y[keep], exact[keep], magnitude[keep]
        allowed = error_of_weights(x, group_size)
        check_close(y, exact, magnitude, dtype, (case, bits, group_size, symmetric, dtype, m, n, k), allowed)


def test_w4a4_gemm(isa, choose):
    for case in range(CASES):
        bits, activation_bits = choose.choice((2, 3, 4, 8)), choose.choice((4, 8))
        symmetric, dtype = choose.random() < 0.5, choose.choice((torch.bfloat16, torch.float16))
        m, n, k = random_shape(choose, -1)
        weight = random_weight(n, k, bits, -1, symmetric, case)
        x, bias = strided(choose, m, k, dtype), torch.randn(n) if choose.random() < 0.5 else None
        codes, sa, za, row_sum = ops.quantize_per_token(x, activation_bits, choose.random() < 0.5)
        y = ops.w4a4_gemm(codes, sa, za, row_sum, *integer_weight(weight), bias, bits, torch.float32)
        exact = (
            ((codes.double() - za.double()[:, None]) @ weight.centred.T) * sa.double()[:, None] * weight.scale.double()
        )
        if bias is not None:
            exact += bias
        tolerance = exact.abs() + (0 if bias is None else bias.abs())
        check_close(y, exact, tolerance, torch.float32, (case, bits, activation_bits, symmetric, m, n, k))
