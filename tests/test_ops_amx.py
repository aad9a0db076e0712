"""What is particular to the AMX kernels: tiles of tokens, steps of k, who takes few tokens, the state of a thread."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sliderquant_vllm import ops
from sliderquant_vllm.packing import pack_codes
from tests.conftest import select_isa
from tests.native import PACKAGE, check_close, error_of_weights, integer_weight, random_weight

pytestmark = pytest.mark.usefixtures("amx", "threads")

# Around one tile and two, four tiles that leave a block of one, and the most tokens of a call of the kernels.
TOKENS = (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 65, 80, 255, 256, 257, 259)
# Half a step, steps and a half one, chunks and half a step.
IN_FEATURES = (32, 96, 256, 544, 1056)


@pytest.fixture
def amx():
    if not select_isa("amx"):
        pytest.skip("this machine cannot run the amx kernels")
    yield
    assert select_isa(os.environ.get("SLIDERQUANT_ISA", ""))


@pytest.mark.parametrize("k", IN_FEATURES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integer_sums_are_exact_in_every_shape_of_tiles(bits, k):
    weight = random_weight(70, k, bits, -1, symmetric=False)
    weight.scale.fill_(1)
    codes = torch.randint(0, 256, (max(TOKENS), k), dtype=torch.uint8)
    za = torch.randint(0, 256, (max(TOKENS),), dtype=torch.int32)
    exact = (codes.double() - za.double()[:, None]) @ weight.centred.T
    prepared = integer_weight(weight)
    for m in TOKENS:
        quantized = (codes[:m], torch.ones(m), za[:m], codes[:m].sum(1, dtype=torch.int32))
        y = ops.w4a4_gemm(*quantized, *prepared, None, bits, torch.float32)
        assert torch.equal(y, exact[:m].float()), m


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("k", "group_size"), [*((k, -1) for k in IN_FEATURES), (96, 32), (320, 64), (640, 128)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_only_products_in_every_shape_of_tiles(bits, k, group_size, dtype):
    weight = random_weight(70, k, bits, group_size, symmetric=False)
    x = torch.randn(max(TOKENS), k).to(dtype)
    w_packed = ops.repack(weight.packed, bits)
    exact, magnitude = x.double() @ weight.dense.T, x.double().abs() @ weight.dense.abs().T
    for m in TOKENS:
        y = ops.wna16_gemm(x[:m], w_packed, weight.scale, weight.zero, None, bits, group_size)
        check_close(y, exact[:m], magnitude[:m], dtype, m, error_of_weights(x[:m], group_size))


def test_integer_results_are_those_of_avx512():
    weight = random_weight(200, 1056, 4, -1, symmetric=False)
    prepared, bias = integer_weight(weight), torch.randn(200)
    quantized = ops.quantize_per_token(torch.randn(77, 1056).bfloat16(), 4, False)
    found = []
    for isa in ("amx", "avx512"):
        assert select_isa(isa)
        found.append([ops.w4a4_gemm(*quantized, *prepared, bias, 4, d) for d in (torch.float32, torch.bfloat16)])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "scale",
    [
        lambda k: torch.exp2(-(torch.arange(k) % 14).float()),  # as far apart as fixed point holds exactly
        lambda k: torch.where(torch.arange(k) % 97 == 3, 1e3, 1.0),
        lambda k: torch.where(torch.arange(k) < 200, 0.0, 1e30),
        lambda k: torch.full((k,), 2.0**-110),
    ],
    ids=["apart", "outliers", "zeros and huge", "tiny"],
)
def test_fixed_point_holds_activations_of_any_size(bits, scale):
    weight = random_weight(64, 512, bits, 128, symmetric=False)
    w_packed = ops.repack(weight.packed, bits)
    x = (torch.randn(4, 512) * scale(512)).bfloat16()
    exact, magnitude = x.double() @ weight.dense.T, x.double().abs() @ weight.dense.abs().T
    for m in (1, 2, 3, 4):
        y = ops.wna16_gemm(x[:m], w_packed, weight.scale, weight.zero, None, bits, 128)
        check_close(y, exact[:m], magnitude[:m], torch.bfloat16, m)


def test_values_far_below_the_largest_of_their_block_are_rounded_to_its_steps():
    """The one difference to floating point: an output that misses the largest value by a weight of zero."""
    weight = random_weight(64, 128, 4, 128, symmetric=True)
    weight.codes[:, 0] = 8
    dense = (weight.codes.double() - 8) * weight.scale[0].double()[:, None]
    x = torch.randn(1, 128).bfloat16()
    for ratio in (2.0**10, 2.0**14, 2.0**18):
        x[0, 0] = ratio
        packed = ops.repack(pack_codes(weight.codes, 4), 4)
        y = ops.wna16_gemm(x, packed, weight.scale, None, None, 4, 128).double()
        allowed = 2.0**-22 * ratio * dense.abs().sum(1) + 2.0**-8 * (x.double() @ dense.T).abs() + 1e-4
        assert torch.all((y - x.double() @ dense.T).abs() <= allowed), ratio


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_number_stays_none(value):
    weight = random_weight(64, 256, 4, 128, symmetric=False)
    x = torch.randn(2, 256).bfloat16()
    x[1, 77] = value
    y = ops.wna16_gemm(x, ops.repack(weight.packed, 4), weight.scale, weight.zero, None, 4, 128)
    assert torch.isfinite(y[0]).all() and not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("count", [1, 2])
def test_other_libraries_find_the_tiles_as_they_left_them(threads, count):
    """oneDNN multiplies in tiles too, on the same threads."""
    threads(count)
    weight = random_weight(256, 512, 4, 128, symmetric=False)
    w_packed, prepared = ops.repack(weight.packed, 4), integer_weight(random_weight(256, 512, 4, -1, False))
    x, other = torch.randn(100, 512).bfloat16(), torch.randn(512, 300).bfloat16()
    quantized = ops.quantize_per_token(x, 4, False)

    def ours(m: int):
        part = [tensor[:m] for tensor in quantized]
        args = (w_packed, weight.scale, weight.zero, None, 4, 128)
        return ops.wna16_gemm(x[:m], *args), ops.w4a4_gemm(*part, *prepared, None, 4, torch.float32)

    assert (x @ other - (x.double() @ other.double())).norm() < 0.01 * (x.double() @ other.double()).norm()
    tokens = (1, 7, 16, 40, 100)
    expected, theirs = [ours(m) for m in tokens], [x[:m] @ other for m in tokens]
    for _ in range(3):
        for m, before, product in zip(tokens, expected, theirs, strict=True):
            assert torch.equal(x[:m] @ other, product)
            assert all(torch.equal(one, two) for one, two in zip(ours(m), before, strict=True))


DENIED = """
import ctypes, mmap
class Stack(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, 4096)  # too small for what a signal would save of tiles
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
from sliderquant_vllm import ops
from sliderquant_vllm.packing import pack_codes
ops.load()
features = ops.host().cpu_features()
assert features["amx-tile"] and not features["amx-permitted"]
print(ops.host().isa())
"""


def test_without_permission_there_is_no_amx():
    environment = {name: value for name, value in os.environ.items() if name != "SLIDERQUANT_ISA"}
    process = subprocess.run(
        [sys.executable, "-c", DENIED], cwd=PACKAGE.parent, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0 and process.stdout.strip() == "avx512", process.stderr
