"""The CUDA quantizer and what is fused with it, run on the host: bit for bit what the CPU kernels make."""

from __future__ import annotations

import ctypes
import itertools
import random

import pytest
import torch

from sliderquant_vllm import ops, references
from sliderquant_vllm.format import HADAMARD_BLOCK_SIZES
from tests.cuda import build_emulator, call

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # in the order of numeric.h
CHOSEN = (0, 0)  # threads and runs as the launcher chooses them


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    ops.load()
    library = build_emulator("emulate_rows", tmp_path_factory.mktemp("emulator"))
    for name in ("quantize", "silu_mul", "rms_norm", "hadamard"):
        getattr(library, f"emulate_{name}").restype = ctypes.c_char_p
    library.coder_errors.restype = ctypes.c_int64
    return library


def outputs(m: int, k: int) -> tuple[torch.Tensor, ...]:
    integers = torch.full((2, m), -1, dtype=torch.int32)
    return torch.full((m, k), 77, dtype=torch.uint8), torch.full((m,), torch.nan), integers[0], integers[1]


def emulate(function, x, bits, symmetric, block, plan=CHOSEN, columns=None, rest=()) -> tuple[torch.Tensor, ...]:
    m, k = x.shape[0], columns or x.shape[1]
    found, seed = outputs(m, k), random.randrange(2**32)
    sizes = (m, k, bits, int(symmetric), block, *plan, seed)
    assert call(function, x, int(x.dtype == torch.float16), x.stride(0), *found, *sizes, *rest) == ""
    return found


def assert_equal(found, expected, case=None) -> None:
    for name, one, two in zip(("codes", "scale", "zero", "row_sum"), found, expected, strict=False):
        assert torch.equal(one, two), (name, case)


def rows(m: int, k: int, dtype: torch.dtype, aligned: bool = True) -> torch.Tensor:
    """Rows of sizes far apart, one of them of zeros; half of all cases are rows that 16-byte reads cannot take."""
    x = torch.randn(m, k + 8) * torch.logspace(-4, 3, m)[:, None] + torch.randn(m, 1)
    x[m // 2] = 0
    return x.to(dtype)[:, :k].contiguous() if aligned else x.to(dtype)[:, 3 : k + 3]


# K: less than a run, ragged runs, ragged warps, whole ones
SIZES = (1, 5, 8, 32, 100, 256, 544, 640, 1056)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["bf16", "fp16"])
def test_quantizer(emulator, dtype, symmetric, bits):
    for case, k in enumerate(SIZES):
        x = rows(3, k, dtype, aligned=case % 2 == 0)
        found = emulate(emulator.emulate_quantize, x, bits, symmetric, 1)
        assert_equal(found, references.quantize_per_token(x, bits, symmetric), k)


@pytest.mark.parametrize("plan", [(32, 1), (64, 2), (128, 4), (224, 1), (1024, 1), (512, 4)], ids=str)
def test_rows_longer_than_a_block_holds_and_shorter(emulator, plan):
    for k in (40, 1056, 4096):
        x = rows(2, k, torch.bfloat16)
        for block in (1, 8):
            found = emulate(emulator.emulate_quantize, x, 4, False, block, plan)
            assert_equal(found, ops.quantize_per_token(x, 4, False, block), (k, block))


@pytest.mark.parametrize("block", HADAMARD_BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["bf16", "fp16"])
def test_quantizer_transforms_as_on_cpus(emulator, dtype, block):
    for case, count in enumerate((1, 3)):
        x = rows(2, count * block, dtype, aligned=case == 0)
        found = emulate(emulator.emulate_quantize, x, 4, case == 0, block)
        assert_equal(found, ops.quantize_per_token(x, 4, case == 0, block), count)


@pytest.mark.parametrize(
    ("k", "block", "plan"),
    [
        (14336, 2048, CHOSEN),
        (3 * 512, 512, (64, 1)),
        (6 * 1024, 1024, (128, 2)),
        (7 * 2048, 2048, (128, 4)),
        (5 * 4096, 4096, (256, 2)),
        (2 * 4096, 4096, (512, 4)),
    ],
)
def test_transforms_of_many_parts(emulator, k, block, plan):
    x = rows(1, k, torch.bfloat16)
    x[0] = torch.randn(k)
    assert_equal(
        emulate(emulator.emulate_quantize, x, 4, False, block, plan), ops.quantize_per_token(x, 4, False, block)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("block", [1, *HADAMARD_BLOCK_SIZES])
def test_hadamard(emulator, block, dtype):
    for k in (3 * block, 33 * block) if block < 128 else (3 * block,):
        x, seed = torch.randn(2, k).to(dtype), random.randrange(2**32)
        y = torch.full_like(x, torch.nan)
        assert call(emulator.emulate_hadamard, x, y, DTYPES.index(dtype), 2, k, block, *CHOSEN, seed) == ""
        assert torch.equal(y, ops.hadamard(x, block)), k


@pytest.mark.parametrize("symmetric", [False, True])
def test_extremes_and_rows_that_are_not_finite(emulator, symmetric):
    inf, nan = float("inf"), float("nan")
    largest, smallest = torch.finfo(torch.bfloat16).max, 2.0**-133
    finite = [[largest, -largest, 1, 0], [largest, 0, 3, 9], [smallest, -smallest, 0, 0], [9 * smallest, 0, 0, 1]]
    odd = [[nan, 1, -1, 0], [inf, 1, -1, 0], [-inf, 1, 0, 0], [inf, -inf, nan, 1], [nan, nan, nan, nan]]
    for bits, values in itertools.product((4, 8), (finite, odd)):
        x = torch.tensor(values).bfloat16()
        assert_equal(
            emulate(emulator.emulate_quantize, x, bits, symmetric, 1), ops.quantize_per_token(x, bits, symmetric)
        )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_without_division_are_those_of_the_quotient(emulator, bits):
    """Values at, just below and just above every boundary between codes, and elsewhere."""
    steps = torch.cat([torch.arange(-257, 258) + 0.5, torch.arange(-257, 258).float(), torch.randn(10**4) * 2**bits])
    scale = torch.cat([torch.rand(60) + 0.5, torch.logspace(-38, 37, 76), torch.tensor([1e-44, 1.0, 1 / 3])])
    sizes = (steps, scale, len(steps), len(scale), bits)
    arguments = [ctypes.c_void_p(one.data_ptr()) if torch.is_tensor(one) else ctypes.c_int64(one) for one in sizes]
    assert emulator.coder_errors(*arguments) == 0


def test_plans(emulator):
    def plan(m: int, k: int, block: int = 1) -> tuple[int, int, int]:
        found = [ctypes.c_int64() for _ in range(3)]
        emulator.plan(*map(ctypes.c_int64, (m, k, block, 132)), *map(ctypes.byref, found))
        return tuple(value.value for value in found)

    assert plan(1, 4096) == (512, 1, 0) and plan(2048, 4096) == (256, 2, 0)
    assert plan(1, 14336) == (448, 4, 0) and plan(1, 14336, 2048) == (512, 4, 512 * 16 * 4)
    assert plan(1, 28672) == (512, 4, 0) and plan(65536, 32) == (32, 1, 0)
    for m, k, block in itertools.product((1, 5000), (32, 4096, 14336, 28672, 53248), (1, *HADAMARD_BLOCK_SIZES)):
        if k % block:
            continue
        threads, runs, exchanged = plan(m, k, block)
        held = threads * runs * 8
        assert threads % 32 == 0 and threads <= (1024 if runs == 1 else 512) and exchanged <= 40 << 10
        assert held >= k or threads == 512  # as much of a row as registers hold
        assert block <= 256 or threads * 8 * min(runs, 2) % block == 0, (m, k, block)
        assert block <= 256 or 8 * min(runs, 2) >= block // 256, (m, k, block)


def assert_same_but_half_way(found, expected, case) -> None:
    """As in test_ops_fused.py, of few rows: one value in thousands goes to the next 16-bit float."""
    same = ((found[1] / expected[1] - 1).abs() < 1e-5) & (found[2] == expected[2])
    assert ((found[1] / expected[1] - 1).abs() < 2**-6).all() and same.sum() >= len(same) - 1, case
    away = (found[0][same].int() - expected[0][same].int()).abs()
    assert away.max() <= 1 and (away > 0).float().mean() < 2e-3, case
    assert torch.equal(found[3], found[0].sum(1, dtype=torch.int32)), case


@pytest.mark.parametrize("plan", [CHOSEN, (64, 1), (64, 2), (128, 4)], ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["bf16", "fp16"])
def test_rms_norm(emulator, dtype, added, plan):
    """Whole numbers, whose squares add up exactly in every order, and others."""
    for case, (k, block) in enumerate(((5, 1), (640, 128), (1056, 1), (2048, 1), (2048, 256))):
        exact, aligned = case % 2 == 0, case != 2
        wide = [torch.randint(-40, 41, (3, k + 8)) if exact else torch.randn(3, k + 8) for _ in range(2)]
        x, residual = (one.to(dtype)[:, :k].contiguous() if aligned else one.to(dtype)[:, 1 : k + 1] for one in wide)
        residual = residual if added else None
        weight, epsilon = torch.randn(k).to(dtype), torch.tensor([1e-5])
        total = torch.full((3, k), torch.nan, dtype=dtype)
        rest = (residual, residual.stride(0) if added else 0, total, weight, epsilon)
        found = emulate(emulator.emulate_rms_norm, x, 4, False, block, plan, rest=rest)
        *expected, expected_total = ops.rms_norm_quantize(x, residual, weight, 1e-5, 4, False, block)
        assert not added or torch.equal(total, expected_total), (k, block)
        (assert_equal if exact else assert_same_but_half_way)(found, expected, (k, block))


@pytest.mark.parametrize("plan", [CHOSEN, (64, 1), (64, 2), (128, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["bf16", "fp16"])
def test_silu_mul(emulator, dtype, plan):
    for case, (k, block) in enumerate(((5, 1), (640, 128), (1056, 1), (2048, 512), (2048, 256))):
        if plan != CHOSEN and block == 512 and plan[0] * 8 * min(plan[1], 2) % block:
            continue
        x = (torch.randn(3, 2 * k + 8) * torch.tensor([[0.01], [1], [20]])).to(dtype)
        x = x[:, : 2 * k].contiguous() if case != 2 else x[:, 3 : 2 * k + 3]
        found = emulate(emulator.emulate_silu_mul, x, 8, case % 2 == 0, block, plan, columns=k)
        assert_same_but_half_way(found, ops.silu_mul_quantize(x, 8, case % 2 == 0, block), (k, block))
