"""Native ops against float64, on every instruction set of this machine."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.common import relative_error
from sliderquant_vllm import ops, references
from sliderquant_vllm.format import HADAMARD_BLOCK_SIZES
from sliderquant_vllm.packing import pack_codes
from tests.native import check_close, error_of_weights, integer_weight, random_weight

pytestmark = pytest.mark.usefixtures("threads")

BITS = (2, 3, 4, 8)
TOKENS = (0, 1, 2, 3, 7, 16, 17, 33, 64, 100)
# (N, K, group_size): ragged N, one group and many, fewer input channels than a chunk and more.
SHAPES = (
    (1, 64, 64),
    (48, 32, 32),
    (100, 96, -1),
    (130, 160, 32),
    (33, 512, 128),
    (130, 320, 64),
    (100, 640, 128),
    (64, 1056, -1),
    (96, 1056, 32),
    (32, 4096, 128),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_wna16_gemm_against_float64(isa, bits, symmetric, dtype):
    for seed, (n, k, group_size) in enumerate(SHAPES):
        weight = random_weight(n, k, bits, group_size, symmetric, seed)
        w_packed, dense = ops.repack(weight.packed, bits), weight.dense
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(max(TOKENS), k, generator=generator).to(dtype)
        bias = torch.randn(n, generator=generator) if seed % 2 else None
        exact = rows.double() @ dense.T + (0 if bias is None else bias.double())
        magnitude = rows.double().abs() @ dense.abs().T
        for m in TOKENS:
            y = ops.wna16_gemm(rows[:m], w_packed, weight.scale, weight.zero, bias, bits, group_size)
            allowed = error_of_weights(rows[:m], group_size)
            check_close(y, exact[:m], magnitude[:m], dtype, (n, k, group_size, m), allowed)


@pytest.mark.parametrize("m", [1, 4, 17, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_wna16_gemm_reads_strided_rows(isa, dtype, m):
    weight = random_weight(64, 160, 4, 32, symmetric=False)
    storage = torch.randn(m, 160 + 13).to(dtype)
    x = storage[:, 5 : 5 + 160]
    assert not x.is_contiguous() or m == 1
    w_packed = ops.repack(weight.packed, 4)
    args = (w_packed, weight.scale, weight.zero, None, 4, 32)
    assert torch.equal(ops.wna16_gemm(x, *args), ops.wna16_gemm(x.contiguous(), *args))
    exact = x.double() @ weight.dense.T
    magnitude = x.double().abs() @ weight.dense.abs().T
    check_close(ops.wna16_gemm(x, *args), exact, magnitude, dtype, m, error_of_weights(x, 32))


# Llama-3-8B's k_proj and q_proj and a slice of its down_proj, Qwen2.5-1.5B's down_proj
@pytest.mark.parametrize(
    ("n", "k", "bits", "group_size"),
    [(1024, 4096, 4, 128), (4096, 4096, 4, -1), (512, 14336, 3, 128), (1536, 8960, 2, 64)],
)
def test_wna16_gemm_real_shapes(n, k, bits, group_size):
    weight = random_weight(n, k, bits, group_size, symmetric=False)
    w_packed, dense = ops.repack(weight.packed, bits), weight.dense.float()
    for m in (1, 5, 270):
        x = torch.randn(m, k).to(torch.bfloat16)
        y = ops.wna16_gemm(x, w_packed, weight.scale, weight.zero, None, bits, group_size)
        assert relative_error(y, x.float() @ dense.T) < (3e-3 if error_of_weights(x, group_size) else 2e-3), m


def test_wna16_gemm_keeps_fp16_overflow_infinite(isa):
    weight = random_weight(32, 64, 4, -1, symmetric=True)
    weight.codes.fill_(15)
    x = torch.zeros(8, 64, dtype=torch.float16)
    x[:, 3] = float("inf")
    packed = ops.repack(pack_codes(weight.codes, 4), 4)
    for m in (1, 8):
        y = ops.wna16_gemm(x[:m], packed, weight.scale, None, None, 4, -1)
        assert torch.all(y == float("inf"))


APART = (0, 15, 15, -15, 3, -37, -126, 0, 30, 0, -2, 60) * 2


@pytest.mark.parametrize("m", [1, 5, 30])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("exponents", [APART, range(108, -108, -9), range(-108, 108, 9)], ids=["apart", "down", "up"])
def test_wna16_gemm_with_scales_far_apart(isa, exponents, symmetric, m):
    weight = random_weight(40, 768, 4, 32, symmetric)
    weight.scale *= torch.exp2(torch.tensor([*exponents]).float())[:, None]
    if exponents is APART:
        weight.scale[4, ::3] = 0
        weight.scale[9] = 0
    x = torch.randn(m, 768).bfloat16()
    y = ops.wna16_gemm(x, ops.repack(weight.packed, 4), weight.scale, weight.zero, None, 4, 32)
    exact, magnitude = x.double() @ weight.dense.T, x.double().abs() @ weight.dense.abs().T
    check_close(y, exact, magnitude, torch.bfloat16, m)


@pytest.mark.parametrize("m", [1, 33, 300])
def test_results_do_not_depend_on_threads(isa, threads, m):
    # A single token keeps a second thread busy only where there are many output channels.
    n = 4480 if m == 1 else 200
    weight = random_weight(n, 256, 4, 64, symmetric=False)
    channel = random_weight(n, 256, 4, -1, symmetric=False)
    x = torch.randn(m, 256).to(torch.float16)
    found = []
    for count in (1, 2):
        threads(count)
        y = ops.wna16_gemm(x, ops.repack(weight.packed, 4), weight.scale, weight.zero, None, 4, 64)
        quantized = ops.quantize_per_token(x, 4, False)
        z = ops.w4a4_gemm(*quantized, *integer_weight(channel), None, 4, torch.float32)
        found.append((y, *quantized, z))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("bits", BITS)
def test_w4a4_bracket_is_exact(isa, bits, activation_bits):
    generator = torch.Generator().manual_seed(bits)
    for seed, ((n, k, _), symmetric) in enumerate(itertools.product(SHAPES, (False, True))):
        weight = random_weight(n, k, bits, -1, symmetric, seed)
        weight.scale.fill_(1)
        m_max = max(TOKENS)
        codes = torch.randint(0, 2**activation_bits, (m_max, k), generator=generator, dtype=torch.uint8)
        za = torch.randint(0, 2**activation_bits, (m_max,), generator=generator, dtype=torch.int32)
        exact = (codes.double() - za.double()[:, None]) @ weight.centred.T
        prepared = integer_weight(weight)
        for m in TOKENS:
            quantized = (codes[:m], torch.ones(m), za[:m], codes[:m].sum(1, dtype=torch.int32))
            y = ops.w4a4_gemm(*quantized, *prepared, None, bits, torch.float32)
            assert torch.equal(y, exact[:m].float()), (n, k, symmetric, m)


@pytest.mark.parametrize("m", [5, 40])
@pytest.mark.parametrize("bits", BITS)
def test_w4a4_extreme_codes_fit_int32(isa, bits, m):
    k = min(2**31 // (255 * (2**bits - 1)) // 32 * 32, 131072)
    codes = torch.full((m, k), 255, dtype=torch.uint8)
    weight = random_weight(32, k, bits, -1, symmetric=False)
    weight.codes.fill_(2**bits - 1)
    weight.packed = pack_codes(weight.codes, bits)
    weight.scale.fill_(1)
    for zero, za in ((0, 0), (2**bits - 1, 0), (0, 255)):
        weight.zero.fill_(zero)
        prepared = integer_weight(weight)
        quantized = (
            codes,
            torch.ones(m),
            torch.full((m,), za, dtype=torch.int32),
            codes.sum(1, dtype=torch.int32),
        )
        y = ops.w4a4_gemm(*quantized, *prepared, None, bits, torch.float32)
        assert torch.all(y == torch.tensor(float(k * (255 - za) * (2**bits - 1 - zero)))), (zero, za)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 4), (3, 4), (2, 4), (4, 8), (8, 8)])
def test_w4a4_gemm_against_float64(isa, bits, activation_bits, symmetric, out_dtype):
    for m, (n, k) in itertools.product((1, 4, 7, 33), ((100, 1056), (64, 128))):
        weight = random_weight(n, k, bits, -1, symmetric)
        x = torch.randn(m, k).to(torch.bfloat16)
        bias = torch.randn(n)
        codes, sa, za, row_sum = ops.quantize_per_token(x, activation_bits, symmetric)
        y = ops.w4a4_gemm(codes, sa, za, row_sum, *integer_weight(weight), bias, bits, out_dtype)
        x_hat = (codes.double() - za.double()[:, None]) * sa.double()[:, None]
        exact = x_hat @ weight.dense.T + bias.double()
        check_close(y, exact, x_hat.abs() @ weight.dense.abs().T + bias.abs(), out_dtype, (m, n, k))


def assert_quantized_like_reference(x: torch.Tensor, bits: int, symmetric: bool) -> None:
    found = ops.quantize_per_token(x, bits, symmetric)
    expected = references.quantize_per_token(x, bits, symmetric)
    for name, one, two in zip(("codes", "scale", "zero", "row_sum"), found, expected, strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two), (name, bits, symmetric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_quantizer_equals_reference_bit_for_bit(isa, symmetric, dtype):
    for bits, k in itertools.product(range(2, 9), (1, 5, 16, 33, 100, 4096)):
        x = torch.randn(9, k) * torch.logspace(-6, 4, 9)[:, None] + torch.randn(9, 1)
        x[0], x[1], x[2], x[3] = 0, 1.5, -2.5, x[3].abs()
        x[4] = -x[4].abs()
        assert_quantized_like_reference(x.to(dtype), bits, symmetric)
    assert_quantized_like_reference(torch.randn(7, 70).to(dtype)[:, 3:67], 4, symmetric)
    assert_quantized_like_reference(torch.empty(0, 64, dtype=dtype), 4, symmetric)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_quantizer_extremes(isa, bits, symmetric):
    largest, smallest = torch.finfo(torch.bfloat16).max, 2.0**-133
    rows = [[largest, -largest], [largest, 0], [smallest, -smallest], [9 * smallest, -30 * smallest], [0.0, -0.0]]
    assert_quantized_like_reference(torch.tensor(rows).to(torch.bfloat16), bits, symmetric)


@settings(max_examples=200, deadline=None)
@given(
    row=st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    bf16=st.booleans(),
)
def test_quantizer_equals_reference_on_generated_rows(row, bits, symmetric, bf16):
    x = torch.tensor([row]).to(torch.bfloat16 if bf16 else torch.float16)
    assert_quantized_like_reference(x, bits, symmetric)


def sylvester_in_float64(size: int) -> torch.Tensor:
    """Entry (i, j) is -1 to the number of ones that i and j have in common in binary."""
    bits = torch.arange(size)[:, None] >> torch.arange(size.bit_length()) & 1
    return (1 - 2 * (bits.double() @ bits.double().T % 2)) / size**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("block_size", HADAMARD_BLOCK_SIZES)
def test_hadamard_against_float64(isa, block_size, dtype):
    x = torch.randn(7, 3 * block_size).to(dtype)
    exact = (x.double().unflatten(-1, (3, block_size)) @ sylvester_in_float64(block_size)).flatten(-2)
    y = ops.hadamard(x, block_size)
    magnitude = x.double().unflatten(-1, (3, block_size)).abs().sum(-1, keepdim=True) / block_size**0.5
    check_close(y, exact, magnitude.expand(7, 3, block_size).flatten(-2), dtype, block_size)
    limit = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 5e-7}[dtype]
    assert relative_error(y, exact) < limit and relative_error(ops.hadamard(y, block_size), x) < 2 * limit
    assert torch.equal(ops.hadamard(x[:0], block_size), x[:0])
    for rows, expected in ((x[:, :block_size], exact[:, :block_size]), (x[None], exact[None])):
        assert relative_error(ops.hadamard(rows, block_size), expected) < limit


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize(("block_size", "k"), [(2, 6), (8, 40), (64, 192), (2048, 6144), (4096, 4096)])
def test_quantizer_transforms_before_without_rounding_in_between(isa, block_size, k, symmetric):
    x = torch.randn(9, k) * torch.logspace(-6, 4, 9)[:, None]
    x[0] = 0
    for dtype, bits in itertools.product((torch.bfloat16, torch.float16), (4, 8)):
        rows = x.to(dtype)
        exact = (rows.double().unflatten(-1, (-1, block_size)) @ sylvester_in_float64(block_size)).flatten(-2)
        expected = references.quantize_per_token(exact.float(), bits, symmetric)
        codes, scale, zero, row_sum = ops.quantize_per_token(rows, bits, symmetric, block_size)
        assert relative_error(scale, expected[1]) < 1e-6 and (zero - expected[2]).abs().max() <= 1
        assert torch.equal(codes.sum(1, dtype=torch.int32), row_sum)
        away = (codes.int() - zero[:, None] - expected[0].int() + expected[2][:, None]).abs()
        steps = exact / expected[1].double()[:, None]
        half_way = ((steps - steps.floor() - 0.5).abs() < 1e-3) | (zero != expected[2])[:, None]
        assert away.max() <= 1 and half_way[away > 0].all()


@pytest.mark.parametrize("block_size", [8, 128])
def test_hadamard_has_gradients_where_inference_came_first(block_size):
    references.sylvester_matrix.cache_clear()
    x = torch.randn(2, 2 * block_size, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        references.hadamard(x, block_size)
    assert torch.autograd.gradcheck(references.hadamard, (x, block_size))


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantizer_survives_non_finite_rows(isa, symmetric):
    inf, nan = float("inf"), float("nan")
    rows = [[nan, 1, -1, 0], [inf, 1, -1, 0], [-inf, 1, 0, 0], [inf, -inf, nan, 1], [nan, nan, nan, nan]]
    codes, scale, zero, row_sum = ops.quantize_per_token(torch.tensor(rows).bfloat16(), 4, symmetric)
    assert int(codes.max()) <= 15 and torch.equal(codes.sum(1, dtype=torch.int32), row_sum)
    assert torch.all(scale > 0) and torch.all((zero >= 0) & (zero <= 15))
    assert scale[0] == scale.new_tensor(1 / 7 if symmetric else 2 / 15)  # a NaN does not widen the range
