"""The CUDA kernels for sm_90a without a GPU: their bodies run on the host, products and copies in any order that the
device may choose."""

from __future__ import annotations

import ctypes
import itertools
import random

import pytest
import torch

from benchmarks.common import relative_error
from sliderquant_vllm import ops, references
from sliderquant_vllm.packing import pack_codes
from tests.cuda import OUT_DTYPES, build_emulator, call, integer_operands, repack
from tests.native import Weight, check_close, random_weight

pytestmark = pytest.mark.usefixtures("threads")

TOKENS = (64, 96, 128)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    ops.load()
    library = build_emulator("emulate_sm90", tmp_path_factory.mktemp("emulator"))
    for name in ("emulate_repack", "emulate_sm90_wna16", "emulate_sm90_integer", "emulate_image", "emulate_magnitudes"):
        getattr(library, name).restype = ctypes.c_char_p
    library.image_bytes.restype = ctypes.c_int64
    return library


def place_in_image(size: int, m_count: int, m: int, k: int) -> int:
    """The byte at which element k of token m begins: the permutation, the columns and the swizzle, by their words."""
    block, within = divmod(k * size, 32 * size)
    word, byte = divmod(within, 4)
    if size == 2:
        # Lane t owns eight neighbouring k, four words: word q of it belongs to half of a product, lane after lane.
        t, q = divmod(word, 4)
        word = 4 * q + t
    else:
        t, half = divmod(word, 2)
        word = 4 * half + t
    at = block * 32 * size + 4 * word + byte
    column, at = divmod(at, 128)
    unit, byte = divmod(at, 16)
    return (column * (-(-m_count // 8) * 8) + m) * 128 + 16 * (unit ^ m % 8) + byte


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("m_count", "k_count", "offset"), [(1, 32, 0), (9, 96, 0), (16, 160, 0), (7, 288, 1)])
def test_image_of_tokens(emulator, size, m_count, k_count, offset):
    dtype = {1: torch.uint8, 2: torch.int16}[size]
    padded = torch.randint(0, 250, (m_count, k_count + (16 if offset else 0)), dtype=dtype)
    x = padded[:, offset : offset + k_count]
    length = emulator.image_bytes(size, m_count, k_count)
    assert length == -(-m_count // 8) * 8 * -(-k_count // 128) * 128 * size
    image = torch.full((length,), 255, dtype=torch.uint8)
    assert call(emulator.emulate_image, x, x.stride(0), m_count, k_count, size, image, 0) == ""
    expected = torch.zeros(length // size, dtype=dtype)
    for m, k in itertools.product(range(m_count), range(k_count)):
        expected[place_in_image(size, m_count, m, k) // size] = x[m, k]
    assert torch.equal(image.view(dtype), expected)


@pytest.mark.parametrize("groups", [1, 7, 40])
def test_magnitudes_are_powers_of_two_that_no_scale_exceeds(emulator, groups):
    n = 35
    scale = torch.rand(groups, n) * 10.0 ** torch.randint(-9, 5, (1, n))
    scale[:, 3] = 0
    found = torch.full((n,), torch.nan)
    assert call(emulator.emulate_magnitudes, scale, groups, n, found, 0) == ""
    largest = scale.amax(0)
    present = largest > 0
    assert torch.all(found >= largest) and torch.all(found[present] <= 2 * largest[present])
    assert torch.all(torch.frexp(found)[0] == 0.5) and found[3] == 2.0**-126


@pytest.mark.parametrize(("m", "n", "k", "splits"), [(1, 16, 32, 1), (1000, 700, 640, 3), (128 * 25, 300, 128, 1)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_work_is_shared_out_once(emulator, m, n, k, splits, tokens):
    found = (ctypes.c_int64 * 5)()
    channels = range(0, -(-n // 512) * 512, 256)  # the second block of a cluster may have none
    count = -(-m // tokens) * len(channels) * splits
    seen = set()
    for index, rank in itertools.product(range(count // 2), range(2)):
        emulator.work(*map(ctypes.c_int64, (tokens, m, n, k, splits, index, rank)), found)
        m0, n0, _, chunk0, chunks = found
        seen |= {(m0, n0, chunk) for chunk in range(chunk0, chunk0 + chunks)}
        assert chunks > 0
    assert seen == set(itertools.product(range(0, m, tokens), channels, range(-(-k // 128))))
    assert len(seen) == count // splits * -(-k // 128)


# N, K, group_size, M, splits of K, clusters: tails of every size, fewer and more stages than slots, one cluster for
# several shares and several clusters.
WNA16_CASES = (
    (1, 32, -1, 1, 1, 1),
    (17, 96, 32, 13, 1, 1),
    (300, 160, -1, 70, 1, 3),
    (40, 288, 32, 5, 2, 1),
    (130, 1088, 64, 64, 1, 2),
    (33, 1280, 128, 130, 2, 3),
    (258, 640, -1, 66, 3, 2),
)


def sm90_wna16(emulator, weight: Weight, x, bias, tokens: int, splits: int, grid: int, seed: int) -> torch.Tensor:
    n, k = weight.codes.shape
    y = torch.full((len(x), n), torch.nan, dtype=x.dtype)
    w_packed = repack(emulator, weight.packed, weight.bits, pairs=True)
    operands = (x, int(x.dtype == torch.float16), x.stride(0), w_packed, weight.scale, weight.zero, bias, y)
    group = k if weight.group_size == -1 else weight.group_size
    sizes = (len(x), n, k, group, weight.bits, tokens, splits, grid)
    assert call(emulator.emulate_sm90_wna16, *operands, *sizes, seed) == ""
    return y


def check_wna16(y, weight: Weight, x, bias, case) -> None:
    """Per channel as exact as fp32 sums; with groups every weight may be rounded once."""
    exact = x.double() @ weight.dense.T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.dense.abs().T + (0 if bias is None else bias.abs())
    if weight.group_size in (-1, weight.codes.shape[1]):
        check_close(y, exact, magnitude, x.dtype, case)
        return
    half_ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[x.dtype]
    bound = half_ulp * exact.abs() + 1.02 * half_ulp * magnitude + 2**-24
    assert torch.all((y.double() - exact).abs() <= bound), (case, relative_error(y, exact))
    assert relative_error(y, exact) < (3e-3 if x.dtype == torch.bfloat16 else 4e-4), (case, relative_error(y, exact))


@pytest.mark.parametrize("tokens", TOKENS)
@BITS
@DTYPES
def test_wna16_body_on_the_host(emulator, bits, dtype, tokens):
    seed = random.randrange(2**32)  # of the order in which everything happens
    for case, (n, k, group_size, m, splits, grid) in enumerate(WNA16_CASES):
        symmetric = (case + tokens // 32 + (dtype == torch.float16)) % 2 == 0
        weight = random_weight(n, k, bits, group_size, symmetric)
        # Rows of x that 16-byte loads can take, and rows that they cannot.
        x = torch.randn(m, k + 8).to(dtype)[:, 3 : k + 3] if symmetric else torch.randn(m, k).to(dtype)
        bias = torch.randn(n) if symmetric else None
        y = sm90_wna16(emulator, weight, x, bias, tokens, splits, grid, seed)
        check_wna16(y, weight, x, bias, (n, k, m, group_size, splits, seed))


@BITS
@DTYPES
def test_wna16_removes_zero_points_exactly(emulator, bits, dtype):
    """Every code against every zero point, one channel after the other, as products with a row of one 1."""
    codes = (torch.arange(32) * max(1, 2**bits // 32) + bits) % 2**bits
    codes = codes.to(torch.uint8).expand(2**bits, 32).contiguous()
    zero = torch.arange(2**bits).to(torch.uint8)[None]
    weight = Weight(codes, pack_codes(codes, bits), torch.ones(1, 2**bits), zero, bits, -1)
    y = sm90_wna16(emulator, weight, torch.eye(32).to(dtype), None, 64, 1, 1, 0)
    assert torch.equal(y.double(), weight.centred.T)


@DTYPES
def test_wna16_takes_scales_of_any_size(emulator, dtype):
    """Groups whose scales lie far apart within a channel, and far from what 16-bit floats hold."""
    weight = random_weight(32, 256, 4, 32, False)
    weight.scale *= 10.0 ** torch.randint(-4, 4, weight.scale.shape) * 10.0 ** torch.randint(-12, 1, (1, 32))
    x = (torch.randn(9, 256) * 1e-2).to(dtype)
    exact = x.double() @ weight.dense.T
    within = exact.abs() < 6e4
    y = sm90_wna16(emulator, weight, x, None, 64, 1, 1, 1)
    half_ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    bound = 2.1 * half_ulp * (x.double().abs() @ weight.dense.abs().T) + 2**-24
    assert torch.all(((y.double() - exact).abs() <= bound)[within]) and within.sum() > 100


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("k", "splits", "group_size"), [(1280, 1, -1), (1280, 2, 32)])
def test_wna16_does_not_depend_on_the_order_of_events(emulator, k, splits, group_size, tokens):
    weight = random_weight(256, k, 4, group_size, False)
    x = torch.randn(tokens, k).to(torch.bfloat16)
    first = sm90_wna16(emulator, weight, x, None, tokens, splits, 1, 0)
    check_wna16(first, weight, x, None, (k, tokens))
    for seed in (random.randrange(2**32) for _ in range(3)):
        assert torch.equal(first, sm90_wna16(emulator, weight, x, None, tokens, splits, 1, seed)), seed


@pytest.mark.parametrize(("k", "stages"), [(256, 2), (1280, 4)])
def test_weights_fill_the_ring_before_the_image_is_made(emulator, k, stages):
    weight, x = random_weight(512, k, 4, -1, False), torch.randn(128, k).to(torch.bfloat16)
    found = ctypes.c_int64.in_dll(emulator, "bytes_ahead_of_grid")
    found.value = 0
    for seed in range(4):
        sm90_wna16(emulator, weight, x, None, 128, 1, 1, seed)
    assert found.value == stages * 512 * 128 * 4 // 8


# N, K, M, splits of K, clusters
INTEGER_CASES = (
    (1, 32, 1, 1, 1),
    (17, 96, 13, 1, 1),
    (300, 160, 70, 1, 3),
    (40, 288, 5, 2, 1),
    (130, 1088, 64, 1, 2),
    (33, 1280, 130, 2, 3),
    (258, 640, 66, 3, 2),
)


@pytest.mark.parametrize("tokens", TOKENS)
@BITS
def test_integer_body_on_the_host(emulator, bits, tokens):
    seed = random.randrange(2**32)
    for case, (n, k, m, splits, grid) in enumerate(INTEGER_CASES):
        symmetric, activation_bits = (case + tokens // 32) % 2 == 0, (4, 8, 2)[case % 3]
        operands, expecting = integer_operands(emulator, n, k, m, bits, activation_bits, symmetric)
        kind = (case + bits) % len(OUT_DTYPES)
        y = torch.full((m, n), torch.nan, dtype=OUT_DTYPES[kind])
        found = call(emulator.emulate_sm90_integer, *operands, y, kind, m, n, k, bits, tokens, splits, grid, seed)
        assert found == "", (case, tokens)
        assert torch.equal(y, references.w4a4_gemm(*expecting, bits, y.dtype)), (n, k, m, splits, seed)


@BITS
def test_integer_multiplies_every_code(emulator, bits):
    """Every code of weights against rows of one 255, and the largest sums that there are."""
    n, k = 2**bits, 128
    codes = ((torch.arange(n)[:, None] + torch.arange(k)) % 2**bits).to(torch.uint8)
    packed = repack(emulator, pack_codes(codes, bits), bits, pairs=False)
    tokens = torch.cat([torch.eye(k, dtype=torch.uint8) * 255, torch.full((1, k), 255, dtype=torch.uint8)])
    m, zeros, ones = k + 1, torch.zeros(n, dtype=torch.int32), torch.ones(n)
    nothing, y = torch.zeros(m, dtype=torch.int32), torch.empty(m, n)
    operands = (tokens, torch.ones(m), nothing, nothing, packed, ones, zeros.to(torch.uint8), zeros, None, y, 2)
    assert call(emulator.emulate_sm90_integer, *operands, m, n, k, bits, 128, 1, 1, 0) == ""
    assert torch.equal(y.double(), tokens.double() @ codes.double().T)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("k", "splits"), [(1408, 1), (1280, 2)])
def test_integer_does_not_depend_on_the_order_of_events(emulator, k, splits, tokens):
    operands, expecting = integer_operands(emulator, 256, k, tokens, 4, 4, False)
    expected = references.w4a4_gemm(*expecting, 4, torch.float32)
    for seed in (random.randrange(2**32) for _ in range(3)):
        y = torch.full((tokens, 256), torch.nan)
        sizes = (2, tokens, 256, k, 4, tokens, splits, 1, seed)
        assert call(emulator.emulate_sm90_integer, *operands, y, *sizes) == "" and torch.equal(y, expected), seed
