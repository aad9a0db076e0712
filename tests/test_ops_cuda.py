"""The native ops on a GPU, through torch.ops, against their references on the CPU."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from benchmarks.common import relative_error
from sliderquant_vllm import ops, references
from sliderquant_vllm.packing import pack_codes
from tests.native import Weight, random_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.fixture(scope="module", autouse=True)
def native():
    if not ops.is_native("cuda"):
        pytest.skip("this library was built without CUDA kernels")


@pytest.fixture(autouse=True)
def process():
    """A CUDA error stays with its process: of several test processes, a new one takes over."""
    yield
    if "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def on_gpu(*values):
    return [value.cuda() if isinstance(value, torch.Tensor) else value for value in values]


def takes_wgmma() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def on_this_gpu(*kernels: str) -> tuple[str, ...]:
    """Those that it can run."""
    return tuple(kernel for kernel in kernels if takes_wgmma() or not kernel.startswith("sm90"))


# Values of SLIDERQUANT_CUDA_WNA16; empty: what the dispatch chooses.
KERNELS = ("", "plain", "sm80:tokens=8", "sm80:tokens=16:splits=2", "sm80:tokens=32:splits=3", "sm80:tokens=64")
SM90_KERNELS = on_this_gpu("sm90:tokens=64", "sm90:tokens=128", "sm90:tokens=96:splits=3", "sm90:tokens=128:splits=2")
KERNELS += SM90_KERNELS
# N, K, group_size, M
ODD_SHAPES = (
    (1, 32, 32, 1),
    (17, 96, -1, 13),
    (40, 288, 32, 5),
    (130, 1088, 64, 3),
    (300, 640, 128, 9),
    (33, 2048, 128, 17),
    (130, 256, 32, 100),
)
REAL_SHAPES = (
    (28672, 4096, 128, 1),
    (4096, 14336, 128, 16),
    (6144, 4096, -1, 33),
    (4096, 4096, 32, 64),
    (7168, 8192, 64, 7),
    (5632, 2048, 128, 200),
    (28672, 4096, 128, 300),
    (4096, 14336, -1, 1000),
)


def check_wna16_gemm(bits: int, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    n, k, group_size, m = shape
    for symmetric in (False, True):
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
        scale = torch.rand(1 if group_size == -1 else k // group_size, n, device="cuda") * 0.02 + 0.001
        zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8, device="cuda")
        if symmetric:
            zero.fill_(2 ** (bits - 1))
        dense = Weight(codes, codes, scale, zero, bits, group_size).dense
        # Rows of x that 16-byte copies can take, and rows that they cannot.
        x = torch.randn(m, k + 8, device="cuda").to(dtype)
        x = x[:, 3 : k + 3] if symmetric else x[:, :k].contiguous()
        bias = torch.randn(n, device="cuda") if symmetric else None
        w_packed = ops.repack(pack_codes(codes, bits), bits)
        y = ops.wna16_gemm(x, w_packed, scale, None if symmetric else zero, bias, bits, group_size)
        exact = x.double() @ dense.T + (0 if bias is None else bias.double())
        # The rounding of the result, and sums on tensor cores, which have a few bits fewer than fp32. On sm_90a every
        # weight may be rounded too, where there are groups.
        half_ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        of_sums = 1e-5 + (1.02 * half_ulp if takes_wgmma() and group_size not in (-1, k) else 0)
        bound = half_ulp * exact.abs() + of_sums * (x.double().abs() @ dense.abs().T) + 2**-24
        assert y.dtype == dtype and torch.all((y - exact).abs() <= bound), (shape, symmetric)
        assert y.numel() < 500 or relative_error(y, exact) < 3e-3, (shape, symmetric, relative_error(y, exact))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_wna16_gemm_on_odd_shapes(monkeypatch, bits, dtype, kernel):
    monkeypatch.setenv("SLIDERQUANT_CUDA_WNA16", kernel)
    for shape in ODD_SHAPES:
        check_wna16_gemm(bits, dtype, shape)


@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_wna16_gemm_on_real_shapes(bits, shape):
    check_wna16_gemm(bits, torch.bfloat16, shape)


@pytest.mark.parametrize("kernel", on_this_gpu("sm80:tokens=16:splits=4", "sm90:tokens=64:splits=4"))
def test_wna16_gemm_repeats_bit_by_bit_and_from_a_graph(monkeypatch, kernel):
    monkeypatch.setenv("SLIDERQUANT_CUDA_WNA16", kernel)
    weight = random_weight(300, 2048, 4, 128, False)
    w_packed, scale, zero = on_gpu(ops.repack(weight.packed.cuda(), 4), weight.scale, weight.zero)
    x = torch.randn(9, 2048, device="cuda", dtype=torch.bfloat16)
    expected = ops.wna16_gemm(x, w_packed, scale, zero, None, 4, 128)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.wna16_gemm(x, w_packed, scale, zero, None, 4, 128)
    for _ in range(3):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)


def test_wna16_gemm_names_a_wrong_override(monkeypatch):
    monkeypatch.setenv("SLIDERQUANT_CUDA_WNA16", "sm80:tokens=7")
    with pytest.raises(RuntimeError, match="SLIDERQUANT_CUDA_WNA16: expected plain.*got sm80:tokens=7"):
        check_wna16_gemm(4, torch.bfloat16, ODD_SHAPES[0])


# M, K, block size: ragged and whole runs, every way in which a transform is shared out, rows longer than a block holds.
ROWS = (
    (0, 64, 1),
    (1, 5, 1),
    (33, 640, 128),
    (700, 1056, 32),
    (1, 4096, 1),
    (3, 4096, 4096),
    (2048, 4096, 256),
    (5, 14336, 2048),
    (3, 28672, 4096),
    (65536, 512, 512),
)


def assert_equal_on_cpu(found, expected, case) -> None:
    for name, one, two in zip(("codes", "scale", "zero", "row_sum"), found, expected, strict=False):
        assert torch.equal(one.cpu(), two), (name, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_quantizer_is_that_of_the_cpu_bit_for_bit(symmetric, dtype):
    for case, (m, k, block) in enumerate(ROWS):
        x = torch.randn(m, k + 8).to(dtype)
        # Rows that 16-byte reads can take, and others. Only the whole goes to the GPU as it is: slices become dense.
        here, there = (rows[:, :k].contiguous() if case % 2 else rows[:, 3 : k + 3] for rows in (x, x.cuda()))
        for bits in (4, 8):
            found = ops.quantize_per_token(there, bits, symmetric, block)
            assert_equal_on_cpu(found, ops.quantize_per_token(here, bits, symmetric, block), (m, k, block, bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_hadamard_is_that_of_the_cpu_bit_for_bit(dtype):
    for m, k, block in ROWS:
        x = torch.randn(m, k).to(dtype)
        assert torch.equal(ops.hadamard(x.cuda(), block).cpu(), ops.hadamard(x, block)), (m, k, block)


def assert_same_but_half_way(found, expected, case) -> None:
    """As in test_ops_fused.py: one value in thousands goes to the next 16-bit float."""
    found = [tensor.cpu() for tensor in found]
    same = ((found[1] / expected[1] - 1).abs() < 1e-5) & (found[2] == expected[2])
    assert (~same).sum() <= 1 + 0.05 * len(same) and ((found[1] / expected[1] - 1).abs() < 2**-6).all(), case
    away = (found[0][same].int() - expected[0][same].int()).abs()
    assert away.numel() == 0 or (away.max() <= 1 and (away > 0).float().mean() < 2e-3), case
    assert torch.equal(found[3], found[0].sum(1, dtype=torch.int32)), case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_quantizers_that_are_fused_with_a_layer(dtype):
    for case, (m, k, block) in enumerate(ROWS):
        x, residual = torch.randn(m, 2 * k).to(dtype), torch.randn(m, k).to(dtype) if case % 2 else None
        weight = (torch.rand(k) + 0.5).to(dtype)
        expected = ops.silu_mul_quantize(x, 4, False, block)
        assert_same_but_half_way(ops.silu_mul_quantize(x.cuda(), 4, False, block), expected, (m, k, block))
        # Half a row of what belongs to another matrix: its stride is not its width.
        *found, total = ops.rms_norm_quantize(x.cuda()[:, :k], *on_gpu(residual, weight), 1e-6, 4, False, block)
        *expected, expected_total = ops.rms_norm_quantize(x[:, :k], residual, weight, 1e-6, 4, False, block)
        assert torch.equal(total.cpu(), expected_total)
        assert_same_but_half_way(found, expected, (m, k, block))


def test_quantizers_repeat_bit_by_bit_and_from_a_graph():
    x, weight = torch.randn(9, 2 * 2048, device="cuda").bfloat16(), torch.ones(2048, device="cuda").bfloat16()

    def layers() -> list[torch.Tensor]:
        return [
            *ops.quantize_per_token(x, 4, False, 1024),
            *ops.rms_norm_quantize(x[:, :2048], x[:, 2048:], weight, 1e-6, 4, False),
            *ops.silu_mul_quantize(x, 4, False, 512),
            ops.hadamard(x, 4096),
        ]

    expected = layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layers()
    for _ in range(3):
        for tensor in found:
            tensor.zero_()
        graph.replay()
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_a_transform_that_no_format_has_is_refused():
    x = torch.randn(1, 8192, device="cuda").bfloat16()
    with pytest.raises(RuntimeError, match="block_size: expected at most 4096 on GPUs; got 8192"):
        ops.hadamard(x, 8192)


# Values of SLIDERQUANT_CUDA_INTEGER; empty: what the dispatch chooses.
INTEGER_KERNELS = ("", "plain", *(f"sm80:tokens={8 << i}:splits={splits}" for i, splits in enumerate((1, 2, 3, 1, 2))))
# Those of them that grouped products have.
GROUPED_INTEGER_KERNELS = ("", *INTEGER_KERNELS[2:])
INTEGER_KERNELS += SM90_KERNELS


def check_w4a4_gemm(bits: int, activation_bits: int, shape: tuple[int, int, int]) -> None:
    n, k, m = shape
    for symmetric in (False, True):
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
        packed, scale = pack_codes(codes, bits), torch.rand(n, device="cuda") * 0.02 + 0.001
        zw = None if symmetric else torch.randint(0, 2**bits, (n,), dtype=torch.uint8, device="cuda")
        bias = torch.randn(n, device="cuda") if symmetric else None
        rest = (scale, zw, codes.sum(1, dtype=torch.int32), bias, bits)
        quantized = references.quantize_per_token(torch.randn(m, k, device="cuda"), activation_bits, symmetric)
        w_packed = ops.repack(packed, bits, activation_bits=activation_bits)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            y = torch.ops.sliderquant.w4a4_gemm(*quantized, w_packed, *rest, dtype)
            expected = references.w4a4_gemm(*quantized, packed, *rest, dtype)
            assert torch.equal(y, expected), (shape, symmetric, dtype)


@pytest.mark.parametrize("kernel", INTEGER_KERNELS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_w4a4_gemm_on_odd_shapes(monkeypatch, bits, kernel):
    monkeypatch.setenv("SLIDERQUANT_CUDA_INTEGER", kernel)
    for case, (n, k, _, m) in enumerate((*ODD_SHAPES, (300, 1088, -1, 300))):
        check_w4a4_gemm(bits, (4, 8)[case % 2], (n, k, m))


@pytest.mark.parametrize("shape", [(28672, 4096, 1), (4096, 14336, 16), (6144, 4096, 65), (5632, 2048, 512)], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_w4a4_gemm_on_real_shapes(bits, shape):
    check_w4a4_gemm(bits, 4, shape)


@pytest.mark.parametrize("kernel", on_this_gpu("sm80:tokens=16:splits=4", "sm90:tokens=64:splits=4"))
def test_w4a4_gemm_from_a_graph(monkeypatch, kernel):
    monkeypatch.setenv("SLIDERQUANT_CUDA_INTEGER", kernel)
    weight = random_weight(300, 2048, 4, -1, False)
    w_packed = ops.repack(weight.packed.cuda(), 4, activation_bits=4)
    rest = on_gpu(w_packed, weight.scale[0], weight.zero[0], ops.column_sums(weight.packed, 4), None, 4)
    x = torch.randn(9, 2048, device="cuda", dtype=torch.bfloat16)

    def layer() -> torch.Tensor:
        return torch.ops.sliderquant.w4a4_gemm(*ops.quantize_per_token(x, 4, False), *rest, torch.bfloat16)

    expected = layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    for _ in range(3):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)


def test_w4a4_gemm_names_a_wrong_override_and_a_wrong_address(monkeypatch):
    codes = torch.zeros(2 * 64 + 1, dtype=torch.uint8, device="cuda")[1:].view(2, 64)
    w_packed = ops.repack(torch.zeros(16, 8, dtype=torch.int32, device="cuda"), 4, activation_bits=4)
    tokens = (torch.ones(2), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    rest = on_gpu(*tokens, w_packed, torch.ones(16), None, torch.zeros(16, dtype=torch.int32), None, 4)
    with pytest.raises(RuntimeError, match="codes: expected an address that is a multiple of 16; got 0x"):
        torch.ops.sliderquant.w4a4_gemm(codes, *rest, torch.float32)
    monkeypatch.setenv("SLIDERQUANT_CUDA_INTEGER", "sm80:tokens=7")
    with pytest.raises(RuntimeError, match="SLIDERQUANT_CUDA_INTEGER: expected plain.*got sm80:tokens=7"):
        torch.ops.sliderquant.w4a4_gemm(codes.clone(), *rest, torch.float32)


# Tokens of each expert, and those behind them that meet none.
SPREADS = (((1, 1, 1, 1), 0), ((0, 3, 0, 70, 0, 13), 0), ((0,) * 40 + (300, 2), 5), ((0, 0, 0), 9))


def offsets_of(loads: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor((0, *loads)).cumsum(0).to(torch.int32)


def stacked_on_gpu(parts) -> list:
    return on_gpu(*(None if part[0] is None else torch.stack(part) for part in zip(*parts, strict=True)))


@pytest.mark.parametrize("kernel", ["", "sm80:tokens=8:splits=3", "sm80:tokens=32", "sm80:tokens=64:splits=2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_wna16_gemm_grouped_on_odd_shapes(monkeypatch, bits, kernel):
    monkeypatch.setenv("SLIDERQUANT_CUDA_WNA16", kernel)
    for (loads, rest), (n, k) in itertools.product(SPREADS, ((130, 256), (768, 2048))):
        weights = [random_weight(n, k, bits, 64, symmetric=False, seed=seed) for seed in range(4)]
        weights = [weights[expert % 4] for expert in range(len(loads))]
        parts = [(ops.repack(weight.packed.cuda(), bits).cpu(), weight.scale, weight.zero) for weight in weights]
        operands, offsets, m = stacked_on_gpu(parts), offsets_of(loads), sum(loads) + rest
        x = torch.randn(m, k).bfloat16().cuda()
        y = ops.wna16_gemm_grouped(x, offsets.cuda(), *operands, None, bits, 64)
        assert not y[int(offsets[-1]) :].any()
        for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
            if begin == end:
                continue
            own = ops.wna16_gemm(x[begin:end], *(tensor[expert] for tensor in operands), None, bits, 64)
            exact = x[begin:end].double().cpu() @ weights[expert].dense.T
            assert relative_error(y[begin:end].cpu(), exact) < 3e-3, (loads, expert)
            assert not kernel or torch.equal(y[begin:end], own), (loads, expert)  # blocks are of the same size


@pytest.mark.parametrize("kernel", GROUPED_INTEGER_KERNELS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_w4a4_gemm_grouped_on_odd_shapes(monkeypatch, bits, kernel):
    monkeypatch.setenv("SLIDERQUANT_CUDA_INTEGER", kernel)
    for (loads, rest), (n, k) in itertools.product(SPREADS, ((130, 256), (768, 2048))):
        weights = [random_weight(n, k, bits, -1, symmetric=False, seed=seed) for seed in range(4)]
        weights = [weights[expert % 4] for expert in range(len(loads))]
        channels = [(weight.scale[0], weight.zero[0], ops.column_sums(weight.packed, bits)) for weight in weights]
        packed = [ops.repack(weight.packed.cuda(), bits, activation_bits=8) for weight in weights]
        quantized = ops.quantize_per_token(torch.randn(sum(loads) + rest, k).bfloat16(), 8, False)
        offsets, bias = offsets_of(loads), torch.randn(len(loads), n)
        operands = (*on_gpu(*quantized, offsets), torch.stack(packed), *stacked_on_gpu(channels), bias.cuda())
        y = ops.w4a4_gemm_grouped(*operands, bits, torch.float32)
        checkpoint = torch.stack([weight.packed for weight in weights])
        parts = [torch.stack(part) for part in zip(*channels, strict=True)]
        expected = torch.zeros(sum(loads) + rest, n)
        for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
            if begin < end:
                own = (*(part[begin:end] for part in quantized), checkpoint[expert], *(part[expert] for part in parts))
                expected[begin:end] = references.w4a4_gemm(*own, bias[expert], bits, torch.float32)
        assert torch.equal(y.cpu(), expected), loads


@pytest.mark.parametrize("splits", [1, 4])
def test_a_graph_of_grouped_products_serves_any_offsets(monkeypatch, splits):
    monkeypatch.setenv("SLIDERQUANT_CUDA_WNA16", f"sm80:tokens=8:splits={splits}")
    weights = [random_weight(130, 1024, 4, 64, symmetric=False, seed=seed) for seed in range(6)]
    operands = stacked_on_gpu([(ops.repack(w.packed.cuda(), 4).cpu(), w.scale, w.zero) for w in weights])
    x = torch.randn(86, 1024).bfloat16().cuda()
    offsets = offsets_of((86, 0, 0, 0, 0, 0)).cuda()
    ops.wna16_gemm_grouped(x, offsets, *operands, None, 4, 64)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.wna16_gemm_grouped(x, offsets, *operands, None, 4, 64)
    for loads in ((86, 0, 0, 0, 0, 0), (0, 3, 0, 70, 0, 13), (1, 1, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0)):
        offsets.copy_(offsets_of(loads))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, ops.wna16_gemm_grouped(x, offsets.clone(), *operands, None, 4, 64)), loads
