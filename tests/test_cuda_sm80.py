"""The CUDA kernels for sm_80 and the plain ones without a GPU: their bodies run on the host. And who chooses which."""

from __future__ import annotations

import ctypes
import functools
import itertools
import random

import numpy as np
import pytest
import torch

from sliderquant_vllm import ops, references
from sliderquant_vllm.packing import pack_codes
from tests.cuda import OUT_DTYPES, build_emulator, call, integer_operands, repack
from tests.native import Weight, check_close, random_weight

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    ops.load()
    library = build_emulator("emulate_cuda", tmp_path_factory.mktemp("emulator"))
    for function in (library.emulate_repack, library.emulate_sm80_wna16, library.emulate_sm80_integer):
        function.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "quads"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n_count", "k_count"), [(1, 32), (17, 128), (48, 288)])
def test_repack_kernel_matches_slow_model(emulator, bits, pairs, n_count, k_count):
    host = ops.host()
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n_count, k_count), dtype=torch.uint8, generator=generator)
    expected = np.zeros(host.gpu.packed_words(bits, n_count, k_count), dtype=np.uint32)
    for k in range(k_count):
        period, j = divmod(host.gpu.run_index(k), host.period_codes(bits))
        for b in range(bits):
            d, bit = divmod(host.kernel_bit(pairs, bits, j, b), 32)
            for n in range(n_count):
                place = host.gpu.owner(k), period * host.period_words(bits) + d
                word = host.gpu.word_index(bits, k_count, n, k // 128, *place)
                expected[word] |= np.uint32((int(codes[n, k]) >> b & 1) << bit)
    found = repack(emulator, pack_codes(codes, bits), bits, pairs)
    assert np.array_equal(found.numpy().view(np.uint32), expected)


SHAPES = ((1, 32), (48, 96), (130, 256))  # N, K
TOKENS = (1, 7, 33)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_wna16_body_on_the_host(emulator, bits, dtype):
    for (n, k), m, group_size, symmetric in itertools.product(SHAPES, TOKENS, (-1, 32, 128), (False, True)):
        if k % group_size:
            continue
        weight = random_weight(n, k, bits, group_size, symmetric)
        x = torch.randn(m, k + 3).to(dtype)[:, 1 : k + 1]
        bias = None if symmetric else torch.randn(n)
        y = torch.empty(m, n, dtype=dtype)
        group = k if group_size == -1 else group_size
        fp16 = int(dtype == torch.float16)
        w_packed = repack(emulator, weight.packed, bits, pairs=True)
        operands = (x, fp16, x.stride(0), w_packed, weight.scale, weight.zero, bias, y)
        call(emulator.emulate_wna16, *operands, m, n, k, group, bits)
        exact = x.double() @ weight.dense.T + (0 if bias is None else bias.double())
        check_close(y, exact, x.double().abs() @ weight.dense.abs().T, dtype, (n, k, m, group_size))


# N, K, group_size, M, splits of K: tails of every size, fewer and more stages than there are slots, several blocks.
SM80_CASES = (
    (1, 32, 32, 1, 1),
    (16, 128, -1, 8, 1),
    (17, 96, -1, 13, 1),
    (40, 288, 32, 5, 2),
    (130, 1088, 64, 3, 3),
    (300, 640, 128, 9, 1),
    (33, 2048, 128, 17, 4),
    (64, 2048, -1, 2, 5),
    (48, 96, 32, 70, 1),
)


def sm80_wna16(emulator, weight, x, bias, tokens: int, splits: int, seed: int) -> torch.Tensor:
    """What the tensor-core kernel makes of x on the host."""
    n, k = weight.codes.shape
    y = torch.full((len(x), n), torch.nan, dtype=x.dtype)
    w_packed = repack(emulator, weight.packed, weight.bits, pairs=True)
    operands = (x, int(x.dtype == torch.float16), x.stride(0), w_packed, weight.scale, weight.zero, bias, y)
    group = k if weight.group_size == -1 else weight.group_size
    sizes = (len(x), n, k, group, weight.bits, tokens // 8, splits)
    assert call(emulator.emulate_sm80_wna16, *operands, *sizes, seed) == ""
    return y


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sm80_wna16_body_on_the_host(emulator, bits, dtype, tokens):
    seed = random.randrange(2**32)  # of the order in which threads take turns
    for case, (n, k, group_size, m, splits) in enumerate(SM80_CASES):
        symmetric = (case + tokens // 8 + (dtype == torch.float16)) % 2 == 0
        weight = random_weight(n, k, bits, group_size, symmetric)
        # Rows of x that 16-byte copies can take, and rows that they cannot.
        x = torch.randn(m, k + 8).to(dtype)[:, 3 : k + 3] if symmetric else torch.randn(m, k).to(dtype)
        bias = torch.randn(n) if symmetric else None
        y = sm80_wna16(emulator, weight, x, bias, tokens, splits, seed)
        exact = x.double() @ weight.dense.T + (0 if bias is None else bias.double())
        magnitude = x.double().abs() @ weight.dense.abs().T + (0 if bias is None else bias.abs())
        check_close(y, exact, magnitude, dtype, (n, k, m, group_size, splits, seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sm80_wna16_removes_zero_points_exactly(emulator, bits, dtype):
    """Every code against every zero point, one channel after the other, as products with a row of one 1."""
    codes = (torch.arange(32) * max(1, 2**bits // 32) + bits) % 2**bits
    codes = codes.to(torch.uint8).expand(2**bits, 32).contiguous()
    zero = torch.arange(2**bits).to(torch.uint8)[None]
    weight = Weight(codes, pack_codes(codes, bits), torch.ones(1, 2**bits), zero, bits, -1)
    y = sm80_wna16(emulator, weight, torch.eye(32).to(dtype), None, 32, 1, 0)
    assert torch.equal(y.double(), weight.centred.T)


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize(("k", "splits"), [(256, 1), (1280, 2)])
def test_sm80_wna16_does_not_depend_on_the_order_of_threads(emulator, k, splits, tokens):
    """Every warp has work, and first and last stages use the room in which sums are exchanged."""
    weight = random_weight(128, k, 4, 128, False)
    x = torch.randn(tokens, k).to(torch.bfloat16)
    first = sm80_wna16(emulator, weight, x, None, tokens, splits, 0)
    check_close(first, x.double() @ weight.dense.T, x.double().abs() @ weight.dense.abs().T, x.dtype, (k, tokens))
    for seed in (random.randrange(2**32) for _ in range(8)):
        assert torch.equal(first, sm80_wna16(emulator, weight, x, None, tokens, splits, seed)), seed


# (M, N, K, bits) on an H200 -> kernel, tokens of a block, splits of K
PLANS = {
    (1, 28672, 4096, 4): ("sm80", 8, 1),
    (16, 28672, 4096, 4): ("sm80", 16, 1),
    (17, 28672, 4096, 4): ("sm80", 32, 1),
    (33, 28672, 4096, 2): ("sm90", 64, 1),
    (64, 28672, 4096, 4): ("sm90", 64, 1),
    (96, 28672, 4096, 4): ("sm90", 96, 1),
    (128, 28672, 4096, 4): ("sm90", 128, 1),
    (2048, 4096, 4096, 4): ("sm90", 128, 1),
    (1, 4096, 4096, 4): ("sm80", 8, 4),
    (1, 6144, 4096, 4): ("sm80", 8, 2),
    (64, 16, 32, 2): ("sm80", 64, 1),
    (1, 16, 32, 2): ("sm80", 8, 1),
}


@pytest.mark.parametrize("case", PLANS, ids=str)
def test_plan(case):
    plan = ops.host().gpu.plan_wna16(*case, 90, 132)
    assert (plan["kernel"], plan["tokens"], plan["splits"]) == PLANS[case]
    assert plan["shared_bytes"] <= (99 if plan["kernel"] == "sm80" else 227) * 1024 and plan["stages"] >= 2
    assert ops.host().gpu.plan_wna16(*case, 80, 132)["kernel"] == "sm80"  # and other architectures know no wgmma
    assert ops.host().gpu.plan_wna16(*case, 100, 132)["kernel"] == "sm80"


def test_plan_override():
    plan = functools.partial(ops.host().gpu.plan_wna16, 4, 4096, 4096, 4, 90, 132)
    assert plan("plain") == {"kernel": "plain"}
    assert ops.host().gpu.plan_wna16(4, 4096, 4096, 4, 75, 68) == {"kernel": "plain"}
    assert plan("sm80") == plan()
    found = plan("sm80:splits=3:tokens=32")
    assert (found["tokens"], found["splits"], found["blocks"]) == (32, 3, 3 * 16)
    assert plan("sm80:splits=64")["splits"] == 16  # no more than there are stages of K
    found = plan("sm90:splits=3")
    assert (found["kernel"], found["tokens"], found["splits"], found["blocks"]) == ("sm90", 64, 3, 3 * 16)
    with pytest.raises(RuntimeError, match="WNA16: sm90 takes a GPU of compute capability 9.0 and a build"):
        ops.host().gpu.plan_wna16(4, 4096, 4096, 4, 89, 132, "sm90")
    wrong = (
        "fast",
        "plain:splits=2",
        "sm80:tokens=24",
        "sm80:splits=0",
        "sm80:splits",
        "sm80:depth=2",
        "sm90:tokens=32",
    )
    for text in wrong:
        with pytest.raises(RuntimeError, match=f"SLIDERQUANT_CUDA_WNA16: expected plain, or sm80.*got {text}$"):
            plan(text)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_integer_gemm_body_on_the_host(emulator, bits, symmetric):
    for (n, k), m in itertools.product(SHAPES, TOKENS):
        operands, expecting = integer_operands(emulator, n, k, m, bits, 4, symmetric)
        for kind, dtype in enumerate(OUT_DTYPES):
            y = torch.full((m, n), torch.nan, dtype=dtype)
            call(emulator.emulate_integer_gemm, *operands, y, kind, m, n, k, bits)
            assert torch.equal(y, references.w4a4_gemm(*expecting, bits, dtype)), (n, k, m, dtype)


# N, K, M, splits of K: tails of every size, fewer and more stages than there are slots, several blocks.
INTEGER_CASES = (
    (1, 32, 1, 1),
    (16, 128, 8, 1),
    (17, 96, 13, 1),
    (40, 288, 5, 2),
    (130, 1088, 3, 3),
    (300, 640, 9, 1),
    (33, 2048, 17, 4),
    (64, 2048, 2, 5),
    (48, 96, 70, 1),
    (130, 416, 131, 2),
)


@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sm80_integer_body_on_the_host(emulator, bits, tokens):
    seed = random.randrange(2**32)  # of the order in which threads take turns
    for case, (n, k, m, splits) in enumerate(INTEGER_CASES):
        symmetric, activation_bits = (case + tokens // 8) % 2 == 0, (4, 8, 2)[case % 3]
        operands, expecting = integer_operands(emulator, n, k, m, bits, activation_bits, symmetric)
        kind = (case + bits) % len(OUT_DTYPES)
        y = torch.full((m, n), torch.nan, dtype=OUT_DTYPES[kind])
        found = call(emulator.emulate_sm80_integer, *operands, y, kind, m, n, k, bits, tokens, splits, seed)
        assert found == "", (case, tokens)
        assert torch.equal(y, references.w4a4_gemm(*expecting, bits, y.dtype)), (n, k, m, splits, seed)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sm80_integer_multiplies_every_code(emulator, bits):
    """Every code of weights against rows of one 255, and the largest sums that there are."""
    n, k = 2**bits, 128
    codes = ((torch.arange(n)[:, None] + torch.arange(k)) % 2**bits).to(torch.uint8)
    packed = repack(emulator, pack_codes(codes, bits), bits, pairs=False)
    tokens = torch.cat([torch.eye(k, dtype=torch.uint8) * 255, torch.full((1, k), 255, dtype=torch.uint8)])
    m, zeros, ones = k + 1, torch.zeros(n, dtype=torch.int32), torch.ones(n)
    nothing, y = torch.zeros(m, dtype=torch.int32), torch.empty(m, n)
    operands = (tokens, torch.ones(m), nothing, nothing, packed, ones, zeros.to(torch.uint8), zeros, None, y, 2)
    assert call(emulator.emulate_sm80_integer, *operands, m, n, k, bits, 128, 1, 0) == ""
    assert torch.equal(y.double(), tokens.double() @ codes.double().T)


@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 128])
@pytest.mark.parametrize(("k", "splits"), [(256, 1), (1280, 2)])
def test_sm80_integer_does_not_depend_on_the_order_of_threads(emulator, k, splits, tokens):
    """Every warp has work, and first and last stages use the room in which sums are exchanged."""
    operands, expecting = integer_operands(emulator, 256, k, tokens, 4, 4, False)
    expected = references.w4a4_gemm(*expecting, 4, torch.float32)
    for seed in (random.randrange(2**32) for _ in range(4)):
        y = torch.full((tokens, 256), torch.nan)
        sizes = (2, tokens, 256, k, 4, tokens, splits, seed)
        assert call(emulator.emulate_sm80_integer, *operands, y, *sizes) == "" and torch.equal(y, expected), seed


# (M, N, K, bits) on an H200 -> kernel, tokens of a block, splits of K
INTEGER_PLANS = {
    (1, 28672, 4096, 4): ("sm80", 8, 1),
    (16, 28672, 4096, 4): ("sm80", 16, 1),
    (33, 28672, 4096, 4): ("sm80", 64, 1),
    (128, 28672, 4096, 4): ("sm90", 128, 1),
    (2048, 28672, 4096, 4): ("sm90", 128, 1),
    (2048, 4096, 4096, 4): ("sm90", 128, 1),
    (1, 16, 32, 2): ("sm80", 8, 1),
}


@pytest.mark.parametrize("case", INTEGER_PLANS, ids=str)
def test_integer_plan(case):
    plan = ops.host().gpu.plan_integer(*case, 90, 132)
    assert (plan["kernel"], plan["tokens"], plan["splits"]) == INTEGER_PLANS[case]


@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integer_plan_override(bits, tokens):
    plan = functools.partial(ops.host().gpu.plan_integer, 4, 4096, 4096, bits, 90, 132)
    found = plan(f"sm80:splits=3:tokens={tokens}")
    assert (found["tokens"], found["splits"]) == (tokens, 3)
    assert found["shared_bytes"] <= 99 * 1024 and found["stages"] >= 2
    assert plan("plain") == {"kernel": "plain"}
    message = r"SLIDERQUANT_CUDA_INTEGER: expected plain, .*tokens=8\|16\|32\|64\|128 and .*got sm80:tokens=24$"
    with pytest.raises(RuntimeError, match=message):
        plan("sm80:tokens=24")


def test_integer_plan_names_sizes_beyond_its_own():
    message = "w4a4_gemm: expected at most 1073741824 tokens and output channels; got M=2147483648, N=16"
    with pytest.raises(RuntimeError, match=message):
        ops.host().gpu.plan_integer(2**31, 16, 32, 4, 90, 132)


def test_float_conversions_are_torchs(emulator):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    bf16, fp16 = torch.empty(2**16), torch.empty(2**16)
    call(emulator.widen, halves, bf16, fp16, 2**16)
    for found, dtype in ((bf16, torch.bfloat16), (fp16, torch.float16)):
        assert torch.equal(found.nan_to_num(1.25), halves.view(dtype).float().nan_to_num(1.25))
        assert torch.equal(found.isnan(), halves.view(dtype).isnan())
    # Every 16-bit value, its neighbours in fp32, and the midpoints on which rounding turns.
    values = torch.cat([bf16, fp16, fp16.nextafter(torch.tensor(torch.inf)), (fp16[1:] + fp16[:-1]) / 2])
    values = torch.cat([values, (bf16[1:] + bf16[:-1]) / 2, torch.randn(10**5) * 10])
    narrow = [torch.empty(len(values), dtype=torch.int16) for _ in range(2)]
    call(emulator.convert, values, *narrow, len(values))
    for found, dtype in zip(narrow, (torch.bfloat16, torch.float16), strict=True):
        assert torch.equal(found.view(dtype).isnan(), values.isnan())
        numbers = ~values.isnan()
        assert torch.equal(found.view(dtype)[numbers].float(), values[numbers].to(dtype).float())
