"""Quantizers fused with the layer before them, on every instruction set: against the layer, then the quantizer."""

from __future__ import annotations

import itertools

import pytest
import torch

from sliderquant_vllm import ops, references

pytestmark = pytest.mark.usefixtures("threads")

DTYPES = (torch.bfloat16, torch.float16)
NAMES = ("codes", "scale", "zero", "row_sum")


def assert_equal(found, expected, case) -> None:
    for name, one, two in zip((*NAMES, "residual"), found, expected, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two), (name, case)


def assert_same_but_half_way(found, expected, case) -> None:
    """Sums in another order, or another exponential, move a value in thousands to the next 16-bit float.

    Its code goes to the next one at most, unless it is the value that the row's scale is made of.
    """
    scale, expected_scale = found[1], expected[1]
    assert ((scale / expected_scale - 1).abs() < 2**-6).all(), case
    same = ((scale / expected_scale - 1).abs() < 1e-5) & (found[2] == expected[2])
    assert (~same).float().mean() <= 0.02, case
    away = (found[0][same].int() - expected[0][same].int()).abs()
    assert away.numel() == 0 or (away.max() <= 1 and (away > 0).float().mean() < 1e-3), case
    assert torch.equal(found[3], found[0].sum(1, dtype=torch.int32)), case


def rms_norm(x, residual, weight, epsilon: float) -> torch.Tensor:
    """vLLM's layer."""
    wide = x.float() if residual is None else x.float() + residual.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight


def whole_numbers(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Their squares add up exactly in every order."""
    return torch.randint(-40, 41, (m, k)).to(dtype)


@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_rms_norm_is_exact_where_sums_are(isa, dtype, added):
    for k, (bits, symmetric) in itertools.product((1, 5, 33, 128, 1000), ((4, False), (8, True))):
        x = whole_numbers(9, k + 9, dtype)[:, 4 : k + 4]
        residual = whole_numbers(9, k + 3, dtype)[:, :k] if added else None
        weight = torch.randn(k).to(dtype)
        arguments = (x, residual, weight, 1e-5, bits, symmetric)
        assert_equal(ops.rms_norm_quantize(*arguments), references.rms_norm_quantize(*arguments), (k, bits))


@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_rms_norm(isa, dtype, added):
    for k, bits, block_size in ((4096, 4, 1), (640, 8, 1), (2048, 4, 256), (96, 4, 32)):
        x = (torch.randn(100, k) * torch.logspace(-3, 2, 100)[:, None]).to(dtype)
        residual = torch.randn(100, k).to(dtype) if added else None
        weight = (torch.rand(k) + 0.5).to(dtype)
        arguments = (x, residual, weight, 1e-6, bits, False)
        *found, total = ops.rms_norm_quantize(*arguments, block_size)
        *_, expected_total = references.rms_norm_quantize(*arguments)
        assert torch.equal(total, expected_total) and total.dtype == dtype, k
        expected = ops.quantize_per_token(rms_norm(x, residual, weight, 1e-6), bits, False, block_size)
        assert_same_but_half_way(found, expected, (k, bits))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_silu_mul(isa, dtype, symmetric):
    for k, bits, block_size in ((4096, 4, 1), (640, 8, 128), (6144, 4, 2048), (33, 4, 1), (5, 8, 1)):
        x = (torch.randn(100, 2 * k + 3) * torch.logspace(-3, 1.5, 100)[:, None]).to(dtype)[:, 2 : 2 * k + 2]
        found = ops.silu_mul_quantize(x, bits, symmetric, block_size)
        expected = ops.quantize_per_token(torch.nn.functional.silu(x[:, :k]) * x[:, k:], bits, symmetric, block_size)
        assert_same_but_half_way(found, expected, (k, bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_silu_of_every_gate(isa, dtype):
    """Every 16-bit gate with an up of 1, each a row beside the largest code's: 8 bits tell its value from others'."""
    gates = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    gates = gates[gates.isfinite()]
    x = torch.stack((gates, torch.zeros_like(gates), torch.ones_like(gates), torch.zeros_like(gates)), 1)
    found = ops.silu_mul_quantize(x, 8, False)
    expected = references.silu_mul_quantize(x, 8, False)
    differs = found[1] != expected[1]
    assert differs.float().mean() < 1e-3 and torch.equal(found[0][~differs], expected[0][~differs])
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    small = expected[1] < 2**-24 / 255  # where fp16 has fewer bits
    assert ((found[1] / expected[1] - 1).abs()[~small] <= 1.01 * step).all()


def test_instruction_sets_agree(isa):
    """What they add up, and the exponential, does not depend on the width of registers."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(50, 1032, generator=generator).to(torch.float16) for _ in range(2))
    weight = torch.rand(1032, generator=generator).to(torch.float16)
    found = [
        *ops.rms_norm_quantize(x, residual, weight, 1e-6, 8, False),
        *ops.silu_mul_quantize(torch.cat((x, residual), 1), 8, False),
    ]
    expected = test_instruction_sets_agree.__dict__.setdefault("found", found)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_values_that_are_not_finite(isa, dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[nan, 1, 2, 3], [inf, 1, 2, 3], [-inf, 1, 2, 3], [6e4, 6e4, 6e4, 6e4]]).to(dtype)
    found = ops.silu_mul_quantize(x, 4, False)
    assert found[0].max() <= 15 and torch.equal(found[3], found[0].sum(1, dtype=torch.int32))
    *found, _ = ops.rms_norm_quantize(x, None, torch.ones(4).to(dtype), 1e-6, 4, False)
    assert found[0].max() <= 15 and torch.equal(found[3], found[0].sum(1, dtype=torch.int32))


def test_no_tokens():
    x, weight = torch.empty(0, 64).bfloat16(), torch.ones(64).bfloat16()
    for residual in (None, x):
        found = ops.rms_norm_quantize(x, residual, weight, 1e-6, 4, False)
        assert [tuple(tensor.shape) for tensor in found] == [(0, 64), (0,), (0,), (0,), (0, 64)]
    assert ops.silu_mul_quantize(x, 4, False)[0].shape == (0, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(63).bfloat16()}, r"weight: expected bfloat16 \[64\] for K=64.*got bfloat16 \[63\]"),
        ({"weight": torch.ones(64)}, r"weight: expected bfloat16 \[64\].*got float32 \[64\]"),
        ({"residual": torch.ones(3, 32).bfloat16()}, r"residual: expected bfloat16 \[3, 64\] .*got bfloat16 \[3, 32\]"),
        ({"residual": torch.ones(3, 64)}, r"residual: expected bfloat16 \[3, 64\].*got float32 \[3, 64\]"),
        ({"residual": torch.ones(64, 3).bfloat16().T}, "residual: expected .* with unit stride along K"),
        ({"x": torch.ones(3, 64)}, "x: expected bfloat16 or float16; got float32"),
        ({"bits": 9}, "bits: expected 2 to 8; got 9"),
        ({"block_size": 48}, "block_size: expected a power of 2 that divides K=64; got 48"),
    ],
)
def test_rms_norm_names_what_is_wrong(change, message):
    x = torch.ones(3, 64).bfloat16()
    arguments = {"x": x, "residual": x, "weight": x[0], "epsilon": 1e-6, "bits": 4, "symmetric": False}
    with pytest.raises(RuntimeError, match=f"rms_norm_quantize: {message}"):
        ops.rms_norm_quantize(**(arguments | change))


@pytest.mark.parametrize(
    ("columns", "message"),
    [(63, r"x: expected \[M, 2 \* K\]; got bfloat16 \[3, 63\]"), (0, "x: expected at least one column")],
)
def test_silu_mul_names_what_is_wrong(columns, message):
    with pytest.raises(RuntimeError, match=f"silu_mul_quantize: {message}"):
        ops.silu_mul_quantize(torch.ones(3, columns).bfloat16(), 4, False)


def test_opcheck():
    x, weight = torch.randn(3, 64).bfloat16(), torch.ones(64).bfloat16()
    for residual in (None, x):
        arguments = (x, residual, weight, 1e-6, 4, False)
        torch.library.opcheck(torch.ops.sliderquant.rms_norm_quantize.default, arguments)
    torch.library.opcheck(torch.ops.sliderquant.silu_mul_quantize.default, (x, 4, False, 32))
