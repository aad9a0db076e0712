"""The native ops on a GPU, through torch.ops, against their references on the CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common import relative_error
from sliderquant_vllm import ops
from sliderquant_vllm.packing import pack_codes
from tests.native import Weight, random_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.fixture(scope="module", autouse=True)
def native():
    if not ops.is_native("cuda"):
        pytest.skip("this library was built without CUDA kernels")


def on_gpu(*values):
    return [value.cuda() if isinstance(value, torch.Tensor) else value for value in values]


def takes_wgmma() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


def choose(monkeypatch, variable: str, kernel: str) -> None:
    if kernel.startswith("sm90") and not takes_wgmma():
        pytest.skip("sm90 kernels take a GPU of compute capability 9.0")
    monkeypatch.setenv(variable, kernel)


# Values of SLIDERQUANT_CUDA_WNA16; empty: what the dispatch chooses.
KERNELS = ("", "plain", "sm80:tokens=8", "sm80:tokens=16:splits=2", "sm80:tokens=32:splits=3", "sm80:tokens=64")
KERNELS += ("sm90:tokens=64", "sm90:tokens=128", "sm90:tokens=96:splits=3", "sm90:tokens=128:splits=2")
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
    choose(monkeypatch, "SLIDERQUANT_CUDA_WNA16", kernel)
    for shape in ODD_SHAPES:
        check_wna16_gemm(bits, dtype, shape)


@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_wna16_gemm_on_real_shapes(bits, shape):
    check_wna16_gemm(bits, torch.bfloat16, shape)


@pytest.mark.parametrize("kernel", ["sm80:tokens=16:splits=4", "sm90:tokens=64:splits=4"])
def test_wna16_gemm_repeats_bit_by_bit_and_from_a_graph(monkeypatch, kernel):
    choose(monkeypatch, "SLIDERQUANT_CUDA_WNA16", kernel)
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


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_quantize_per_token(symmetric):
    x = torch.randn(33, 640).to(torch.bfloat16)
    found = torch.ops.sliderquant.quantize_per_token(x.cuda(), 4, symmetric)
    expected = ops.quantize_per_token_reference(x, 4, symmetric)
    assert all(torch.equal(one.cpu(), two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("block_size", [32, 128, 512])
def test_hadamard(block_size):
    x = torch.randn(33, 1024).to(torch.bfloat16)
    y = torch.ops.sliderquant.hadamard(x.cuda(), block_size)
    assert relative_error(y.cpu(), ops.hadamard_reference(x.double(), block_size)) < 4e-3


# Values of SLIDERQUANT_CUDA_INTEGER; empty: what the dispatch chooses.
INTEGER_KERNELS = ("", "plain", *(f"sm80:tokens={8 << i}:splits={splits}" for i, splits in enumerate((1, 2, 3, 1, 2))))
INTEGER_KERNELS += ("sm90:tokens=64", "sm90:tokens=128", "sm90:tokens=96:splits=3", "sm90:tokens=128:splits=2")


def check_w4a4_gemm(bits: int, activation_bits: int, shape: tuple[int, int, int]) -> None:
    n, k, m = shape
    for symmetric in (False, True):
        weight = random_weight(n, k, bits, -1, symmetric)
        quantized = ops.quantize_per_token_reference(torch.randn(m, k), activation_bits, symmetric)
        zw, bias = (None, torch.randn(n)) if symmetric else (weight.zero[0], None)
        rest = (weight.scale[0], zw, ops.column_sums(weight.packed, bits), bias, bits)
        w_packed = ops.repack(weight.packed.cuda(), bits, activation_bits=activation_bits)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            y = torch.ops.sliderquant.w4a4_gemm(*on_gpu(*quantized, w_packed, *rest), dtype)
            expected = ops.w4a4_gemm_reference(*quantized, weight.packed, *rest, dtype)
            assert torch.equal(y.cpu(), expected), (shape, symmetric, dtype)


@pytest.mark.parametrize("kernel", INTEGER_KERNELS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_w4a4_gemm_on_odd_shapes(monkeypatch, bits, kernel):
    choose(monkeypatch, "SLIDERQUANT_CUDA_INTEGER", kernel)
    for case, (n, k, _, m) in enumerate((*ODD_SHAPES, (300, 1088, -1, 300))):
        check_w4a4_gemm(bits, (4, 8)[case % 2], (n, k, m))


@pytest.mark.parametrize("shape", [(28672, 4096, 1), (4096, 14336, 16), (6144, 4096, 65), (5632, 2048, 512)], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_w4a4_gemm_on_real_shapes(bits, shape):
    check_w4a4_gemm(bits, 4, shape)


@pytest.mark.parametrize("kernel", ["sm80:tokens=16:splits=4", "sm90:tokens=64:splits=4"])
def test_w4a4_gemm_from_a_graph(monkeypatch, kernel):
    choose(monkeypatch, "SLIDERQUANT_CUDA_INTEGER", kernel)
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


def test_grouped_products_are_those_of_each_expert():
    weights = [random_weight(130, 256, 4, 32, symmetric=False, seed=seed) for seed in range(3)]
    parts = [on_gpu(ops.repack(weight.packed.cuda(), 4), weight.scale, weight.zero) for weight in weights]
    offsets = torch.tensor([0, 5, 5, 9], dtype=torch.int32).cuda()
    x = torch.randn(11, 256).bfloat16().cuda()
    stacked = [torch.stack(part) for part in zip(*parts, strict=True)]
    y = torch.ops.sliderquant.wna16_gemm_grouped(x, offsets, *stacked, None, 4, 32)
    for (begin, end), part in zip(((0, 5), (5, 9)), (parts[0], parts[2]), strict=True):
        assert torch.equal(y[begin:end], torch.ops.sliderquant.wna16_gemm(x[begin:end], *part, None, 4, 32))
    assert not y[9:].any()
