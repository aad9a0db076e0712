"""The boundary of the native ops: what they refuse, how they are declared, loaded and replaced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from sliderquant_vllm import ops
from tests.native import LIBRARY, PACKAGE, integer_weight, random_weight


def good_arguments() -> tuple[dict, dict]:
    weight = random_weight(64, 128, 4, 32, symmetric=False)
    channel = random_weight(64, 128, 4, -1, symmetric=False)
    x = torch.randn(3, 128).to(torch.bfloat16)
    weight_only = {
        "x": x,
        "w_packed": ops.repack(weight.packed, 4),
        "scale": weight.scale,
        "zero": weight.zero,
        "bias": torch.randn(64),
        "bits": 4,
        "group_size": 32,
    }
    codes, sa, za, row_sum = ops.quantize_per_token(x, 4, False)
    integer = {
        "codes": codes,
        "sa": sa,
        "za": za,
        "row_sum": row_sum,
        **dict(zip(("w_packed", "sw", "zw", "col_sum"), integer_weight(channel), strict=True)),
        "bias": torch.randn(64),
        "weight_bits": 4,
        "out_dtype": torch.bfloat16,
    }
    return weight_only, integer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 128)}, "x: expected bfloat16 or float16; got float32"),
        ({"x": torch.zeros(128).bfloat16()}, r"x: expected \[M, K\]; got bfloat16 \[128\] on cpu"),
        ({"x": torch.zeros(128, 3).bfloat16().T}, "x: expected unit stride along K; got stride 3"),
        ({"x": torch.zeros(3, 100).bfloat16()}, "K: expected a positive multiple of 32; got 100"),
        ({"bits": 5}, "bits: expected 2, 3, 4 or 8; got 5"),
        ({"group_size": 48}, "group_size: expected -1, 32, 64 or 128; got 48"),
        ({"x": torch.zeros(3, 96).bfloat16(), "group_size": 64}, "group_size: 64 does not divide K=96"),
        (
            {"group_size": 64},
            r"scale: expected float32 \[2, 64\] for bits=4, group_size=64, N=64, K=128 on the device of the "
            r"input; got float32 \[4, 64\] on cpu",
        ),
        ({"scale": torch.ones(4, 64).half()}, r"scale: expected float32 \[4, 64\].*got float16 \[4, 64\]"),
        ({"scale": torch.ones(64, 4).T}, "scale: expected a contiguous tensor"),
        ({"zero": torch.zeros(4, 64)}, r"zero: expected uint8 \[4, 64\].*got float32 \[4, 64\]"),
        ({"bias": torch.zeros(63)}, r"bias: expected float32 \[64\].*got float32 \[63\]"),
        (
            {"bits": 8},
            r"w_packed: expected int32 \[2, 32, 32\] for bits=8.*got int32 \[2, 16, 32\]",
        ),
        ({"w_packed": torch.zeros(2, 16, 128, dtype=torch.uint8)}, r"w_packed: expected int32 \[2, 16, 32\]"),
    ],
)
def test_wna16_gemm_names_what_is_wrong(change, message):
    arguments, _ = good_arguments()
    with pytest.raises(RuntimeError, match=message):
        ops.wna16_gemm(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(3, 128)}, r"codes: expected uint8 \[3, 128\].*got float32"),
        ({"sa": torch.zeros(4)}, r"sa: expected float32 \[3\] for weight_bits=4, M=3, N=64, K=128"),
        ({"za": torch.zeros(3)}, r"za: expected int32 \[3\].*got float32"),
        ({"row_sum": torch.zeros(3, 1, dtype=torch.int32)}, r"row_sum: expected int32 \[3\].*got int32 \[3, 1\]"),
        ({"col_sum": torch.zeros(63, dtype=torch.int32)}, r"col_sum: expected int32 \[64\]"),
        ({"zw": torch.zeros(64)}, r"zw: expected uint8 \[64\]"),
        ({"bias": torch.zeros(64).bfloat16()}, r"bias: expected float32 \[64\].*got bfloat16"),
        ({"weight_bits": 6}, "weight_bits: expected 2, 3, 4 or 8; got 6"),
        ({"out_dtype": torch.int32}, "out_dtype: expected bfloat16, float16 or float32; got int32"),
        (
            {"w_packed": torch.zeros(2, 16, 32, dtype=torch.int32)},
            r"w_packed: expected uint8 \[2, 16, 128\].*got int32",
        ),
        (
            {"codes": torch.zeros(3, 33056, dtype=torch.uint8), "weight_bits": 8},
            "K: at most 33025 input channels keep 8-bit sums within int32; got 33056",
        ),
    ],
)
def test_w4a4_gemm_names_what_is_wrong(change, message):
    _, arguments = good_arguments()
    with pytest.raises(RuntimeError, match=message):
        ops.w4a4_gemm(**(arguments | change))


def test_quantizer_names_what_is_wrong():
    with pytest.raises(RuntimeError, match="bits: expected 2 to 8; got 9"):
        ops.quantize_per_token(torch.zeros(1, 4).bfloat16(), 9, False)
    with pytest.raises(RuntimeError, match="x: expected bfloat16 or float16; got float32"):
        ops.quantize_per_token(torch.zeros(1, 4), 4, False)


@pytest.mark.parametrize("block_size", [0, -2, 48, 256])
def test_hadamard_names_what_is_wrong(block_size):
    ops.load()
    with pytest.raises(RuntimeError, match=rf"block_size: expected a power of 2 that divides K=96; got {block_size}"):
        ops.hadamard(torch.zeros(1, 96).bfloat16(), block_size)


def test_opcheck():
    weight_only, integer = good_arguments()
    torch.library.opcheck(torch.ops.sliderquant.wna16_gemm.default, tuple(weight_only.values()))
    torch.library.opcheck(torch.ops.sliderquant.quantize_per_token.default, (weight_only["x"], 4, False))
    torch.library.opcheck(torch.ops.sliderquant.hadamard.default, (weight_only["x"], 64))
    torch.library.opcheck(torch.ops.sliderquant.w4a4_gemm.default, tuple(integer.values()))


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_native_schema_is_the_declared_one(name):
    ops.load()
    found = getattr(torch.ops.sliderquant, name).default._schema
    assert str(found) == str(torch._C.parse_schema(f"sliderquant::{name}{ops.SCHEMAS[name]}"))


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | env,
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_importing_ops_loads_nothing_native():
    process = run_python(
        "import sys, torch\n"
        "import sliderquant_vllm.ops\n"
        "assert 'sliderquant_vllm._host' not in sys.modules\n"
        "assert not [name for name in torch._C._dispatch_get_all_op_names() if name.startswith('sliderquant::')]\n"
    )
    assert process.returncode == 0, process.stderr


FALLBACK = """
import torch
from sliderquant_vllm import ops, references
from tests.native import random_weight
weight = random_weight(64, 128, 4, 32, symmetric=False)
x = torch.randn(3, 128).to(torch.bfloat16)
for _ in range(2):
    w_packed = ops.repack(weight.packed, 4)
y = ops.wna16_gemm(x, w_packed, weight.scale, weight.zero, None, 4, 32)
exact = x.double() @ weight.dense.T
assert ((y.double() - exact).norm() / exact.norm()) < 2e-3
offsets = torch.tensor([0, 2, 2], dtype=torch.int32)
stacked = [torch.stack((tensor, tensor)) for tensor in (w_packed, weight.scale, weight.zero)]
grouped = ops.wna16_gemm_grouped(x, offsets, *stacked, None, 4, 32)
assert torch.equal(grouped[:2], y[:2]) and not grouped[2].any()
assert not ops.is_native("cpu")
assert torch.equal(ops.hadamard(x, 128), references.hadamard(x, 128))
"""


def test_reference_serves_without_native_kernels_and_warns_once():
    process = run_python(FALLBACK, SLIDERQUANT_NATIVE="0")
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("no native CPU kernels in this installation") == 1


def test_a_library_without_some_op_is_refused():
    code = "from sliderquant_vllm import ops; ops._has_kernel = lambda name, key: name != 'hadamard'; ops.load()"
    process = run_python(code)
    assert process.returncode != 0
    assert "found none of hadamard; it is older than the Python code: build it again" in process.stderr


def test_forced_isa_is_checked():
    code = "import torch; from sliderquant_vllm import ops; ops.load(); print(ops.host().isa())"
    forced = run_python(code, SLIDERQUANT_ISA="portable")
    assert forced.returncode == 0 and forced.stdout.strip() == "portable"
    unknown = run_python(code, SLIDERQUANT_ISA="avx1024")
    assert unknown.returncode != 0
    assert "SLIDERQUANT_ISA: this machine and build run one of [" in unknown.stderr
    assert "found 'avx1024'" in unknown.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_wide_instructions_stay_in_their_own_kernels():
    """An inline function compiled in two files is kept once: never the copy that needs AVX512, or even AVX."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-C", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    function, wide, outside = "", False, set()
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line
            wide = "::avx512" in function or "::amx" in function
        elif ("%zmm" in line and not wide) or ("\tv" in line and not (wide or "::avx" in function)):
            outside.add(function)
    assert not outside
