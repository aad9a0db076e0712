"""The native ops on a GPU, through torch.ops, against their references on the CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common import relative_error
from sliderquant_vllm import ops
from tests.native import check_close, random_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.fixture(scope="module", autouse=True)
def native():
    if not ops.is_native("cuda"):
        pytest.skip("this library was built without CUDA kernels")


def on_gpu(*values):
    return [value.cuda() if isinstance(value, torch.Tensor) else value for value in values]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_wna16_gemm(bits, dtype):
    weight = random_weight(130, 256, bits, 32, symmetric=False)
    x, bias = torch.randn(33, 256).to(dtype), torch.randn(130)
    w_packed = ops.repack(weight.packed.cuda(), bits)
    y = torch.ops.sliderquant.wna16_gemm(*on_gpu(x, w_packed, weight.scale, weight.zero, bias, bits, 32))
    exact = x.double() @ weight.dense.T + bias.double()
    check_close(y.cpu(), exact, x.double().abs() @ weight.dense.abs().T + bias.abs(), dtype, bits)


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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_w4a4_gemm(bits):
    weight = random_weight(130, 256, bits, -1, symmetric=False)
    quantized = ops.quantize_per_token_reference(torch.randn(33, 256), 4, False)
    sums = ops.column_sums(weight.packed, bits)
    rest = (weight.scale[0], weight.zero[0], sums, torch.randn(130), bits, torch.bfloat16)
    w_packed = ops.repack(weight.packed.cuda(), bits, activation_bits=4)
    y = torch.ops.sliderquant.w4a4_gemm(*on_gpu(*quantized, w_packed, *rest))
    expected = ops.w4a4_gemm_reference(*quantized, weight.packed, *rest)
    # Sums are exact; a rounding to bf16 may fall otherwise where fp32 ends in a tie.
    torch.testing.assert_close(y.cpu(), expected, rtol=2**-7, atol=1e-6)


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
