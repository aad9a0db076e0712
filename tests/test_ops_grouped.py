"""Products with a weight per expert: bit for bit those of each expert alone, however tokens and threads are spread."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common import relative_error
from sliderquant_vllm import ops, references
from tests.native import integer_weight, random_weight, spread, stacked

pytestmark = pytest.mark.usefixtures("threads")

# Tokens of each expert, and those behind them that meet none.
SPREADS = {
    "one token each": ((1, 1, 1, 1, 1, 1), 0),
    "empty experts": ((0, 3, 0, 0, 17, 0), 0),
    "one has all": ((0, 0, 300, 0, 0, 0), 0),
    "uneven": ((1, 270, 2, 0, 13, 5), 0),
    "some meet none": ((2, 0, 1, 0, 6, 0), 4),
    "all meet none": ((0, 0, 0, 0, 0, 0), 3),
    "no tokens": ((0, 0, 0, 0, 0, 0), 0),
}
EXPERTS = 6


def weight_only_experts(n: int, k: int, bits: int, group_size: int, symmetric: bool) -> tuple:
    """(w_packed, scale, zero) of all, and their weights [E, N, K] in float64."""
    weights = [random_weight(n, k, bits, group_size, symmetric, seed) for seed in range(EXPERTS)]
    arguments = stacked((ops.repack(weight.packed, bits), weight.scale, weight.zero) for weight in weights)
    return arguments, torch.stack([weight.dense for weight in weights])


def integer_experts(n: int, k: int, bits: int, symmetric: bool) -> tuple:
    """(w_packed, sw, zw, col_sum) of all, and their weights [E, N, K] in float64."""
    weights = [random_weight(n, k, bits, -1, symmetric, seed) for seed in range(EXPERTS)]
    return stacked(map(integer_weight, weights)), torch.stack([weight.dense for weight in weights])


def exact(x: torch.Tensor, offsets: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    rows = x.double().tensor_split(offsets[1:].tolist())
    met = [one @ weight.T for one, weight in zip(rows[:-1], dense, strict=True)]
    return torch.cat((*met, torch.zeros(len(rows[-1]), dense.shape[1], dtype=torch.float64)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", SPREADS)
def test_wna16_gemm(isa, threads, name, bits):
    offsets, m = spread(*SPREADS[name])
    for n, k, group_size, symmetric in ((100, 128, 32, False), (64, 640, 128, True), (33, 96, -1, False)):
        arguments, dense = weight_only_experts(n, k, bits, group_size, symmetric)
        for dtype, bias in ((torch.bfloat16, None), (torch.float16, torch.randn(EXPERTS, n))):
            x = torch.randn(m, k + 5).to(dtype)[:, 3 : k + 3]
            rest = (offsets, *arguments, bias, bits, group_size)
            expected = references.wna16_gemm_grouped(x, *rest)
            for count in (1, 2):
                threads(count)
                y = ops.wna16_gemm_grouped(x, *rest)
                assert y.dtype == dtype and torch.equal(y, expected), (n, dtype, count)
            if bias is None and offsets[-1] > 0:
                assert relative_error(y, exact(x, offsets, dense)) < 3e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", SPREADS)
def test_w4a4_gemm(isa, threads, name, bits):
    offsets, m = spread(*SPREADS[name])
    for n, k, symmetric in ((100, 128, False), (33, 1056, True)):
        arguments, dense = integer_experts(n, k, bits, symmetric)
        x = torch.randn(m, k).bfloat16()
        quantized = codes, sa, za, _ = ops.quantize_per_token(x, 8, False)
        for dtype, bias in ((torch.float32, None), (torch.bfloat16, torch.randn(EXPERTS, n))):
            rest = (*quantized, offsets, *arguments, bias, bits, dtype)
            expected = references.w4a4_gemm_grouped(*rest)
            for count in (1, 2):
                threads(count)
                y = ops.w4a4_gemm_grouped(*rest)
                assert y.dtype == dtype and torch.equal(y, expected), (n, dtype, count)
            if bias is None and offsets[-1] > 0:
                x_hat = (codes.double() - za.double()[:, None]) * sa.double()[:, None]
                assert relative_error(y, exact(x_hat, offsets, dense)) < 1e-6


def test_every_thread_gets_panels_of_few_tokens(isa, threads):
    """Sizes of a real decoding step: ranges of panels that end within an expert."""
    arguments, dense = weight_only_experts(1536, 2048, 4, 128, symmetric=False)
    offsets, m = spread(*SPREADS["one token each"])
    x = torch.randn(m, 2048).bfloat16()
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(ops.wna16_gemm_grouped(x, offsets, *arguments, None, 4, 128))
    assert relative_error(found[0], exact(x, offsets, dense)) < 3e-3
    assert all(torch.equal(found[0], y) for y in found)


def good_arguments() -> tuple[dict, dict]:
    offsets, m = spread(*SPREADS["empty experts"])
    x = torch.randn(m, 128).bfloat16()
    experts, _ = weight_only_experts(64, 128, 4, 32, symmetric=False)
    weight_only = {"x": x, "offsets": offsets, **dict(zip(("w_packed", "scale", "zero"), experts, strict=True))}
    weight_only |= {"bias": torch.randn(EXPERTS, 64), "bits": 4, "group_size": 32}
    quantized = dict(zip(("codes", "sa", "za", "row_sum"), ops.quantize_per_token(x, 4, False), strict=True))
    experts, _ = integer_experts(64, 128, 4, symmetric=False)
    integer = {**quantized, "offsets": offsets, **dict(zip(("w_packed", "sw", "zw", "col_sum"), experts, strict=True))}
    integer |= {"bias": torch.randn(EXPERTS, 64), "weight_bits": 4, "out_dtype": torch.bfloat16}
    return weight_only, integer


OFFSETS = [
    ([0, 3], r"offsets: expected int32 \[7\].*got int32 \[2\] on cpu"),
    ([1, 3, 3, 3, 4, 20, 20], "offsets: expected to rise from 0 to at most M=20; got 1 at 0 behind 0"),
    ([0, 3, 2, 3, 4, 20, 20], "offsets: expected to rise from 0 to at most M=20; got 2 at 2 behind 3"),
    ([0, 3, 3, 3, 4, 20, 21], "offsets: expected to rise from 0 to at most M=20; got 21 at 6 behind 20"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"offsets": torch.tensor(offsets, dtype=torch.int32)}, message) for offsets, message in OFFSETS),
        ({"offsets": torch.zeros(7, dtype=torch.int64)}, r"offsets: expected int32 \[7\].*got int64 \[7\] on cpu"),
        ({"scale": torch.ones(4, 64)}, r"scale: expected float32 \[E, G, N\]; got float32 \[4, 64\] on cpu"),
        ({"scale": torch.ones(6, 2, 64)}, r"scale: expected float32 \[6, 4, 64\] for bits=4, group_size=32"),
        ({"zero": torch.zeros(4, 64, dtype=torch.uint8)}, r"zero: expected uint8 \[6, 4, 64\].*got uint8 \[4, 64\]"),
        ({"bias": torch.zeros(64)}, r"bias: expected float32 \[6, 64\].*got float32 \[64\]"),
        ({"bits": 8}, r"w_packed: expected int32 \[6, 2, 32, 32\] for bits=8.*got int32 \[6, 2, 16, 32\]"),
    ],
)
def test_wna16_gemm_names_what_is_wrong(change, message):
    arguments, _ = good_arguments()
    with pytest.raises(RuntimeError, match=f"wna16_gemm_grouped: {message}"):
        ops.wna16_gemm_grouped(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"offsets": torch.tensor(offsets, dtype=torch.int32)}, message) for offsets, message in OFFSETS),
        ({"sw": torch.ones(64)}, r"sw: expected float32 \[E, N\]; got float32 \[64\] on cpu"),
        ({"zw": torch.zeros(64, dtype=torch.uint8)}, r"zw: expected uint8 \[6, 64\].*got uint8 \[64\]"),
        ({"col_sum": torch.zeros(64, dtype=torch.int32)}, r"col_sum: expected int32 \[6, 64\]"),
        ({"w_packed": torch.zeros(2, 16, 128, dtype=torch.uint8)}, r"w_packed: expected uint8 \[6, 2, 16, 128\]"),
    ],
)
def test_w4a4_gemm_names_what_is_wrong(change, message):
    _, arguments = good_arguments()
    with pytest.raises(RuntimeError, match=f"w4a4_gemm_grouped: {message}"):
        ops.w4a4_gemm_grouped(**(arguments | change))


def test_opcheck():
    weight_only, integer = good_arguments()
    torch.library.opcheck(torch.ops.sliderquant.wna16_gemm_grouped.default, tuple(weight_only.values()))
    torch.library.opcheck(torch.ops.sliderquant.w4a4_gemm_grouped.default, tuple(integer.values()))
