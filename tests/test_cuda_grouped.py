"""The CUDA products with a weight per expert, run on the host: bit for bit those of each expert alone."""

from __future__ import annotations

import ctypes
import itertools
import random
import subprocess

import pytest
import torch

from sliderquant_vllm import ops, references
from tests.cuda import OUT_DTYPES, ROOT, build_emulator, call, repack
from tests.native import check_close, random_weight, spread, stacked

# Tokens of each expert, and those behind them that meet none.
SPREADS = {
    "one token each": ((1, 1, 1, 1), 0),
    "empty experts": ((0, 3, 0, 0, 17, 0), 0),
    "one has all": ((0, 0, 70, 0), 0),
    "uneven": ((1, 41, 2, 0, 13, 8), 0),
    "some meet none": ((2, 0, 1, 6), 9),
    "all meet none": ((0, 0, 0), 20),
    "more experts than lanes": ((0,) * 31 + (2, 0, 9) + (0,) * 30 + (1,), 1),
}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    ops.load()
    library = build_emulator("emulate_grouped", tmp_path_factory.mktemp("emulator"))
    for name in ("emulate_wna16", "emulate_integer", "emulate_repack", "shares"):
        getattr(library, name).restype = ctypes.c_char_p
    library.slots.restype = ctypes.c_int64
    return library


def of(tensors, expert: int) -> list:
    return [None if tensor is None else tensor[expert] for tensor in tensors]


@pytest.mark.parametrize(("tokens", "splits"), [(8, 1), (8, 2), (32, 3), (64, 1)])
@pytest.mark.parametrize("name", SPREADS)
def test_wna16(emulator, name, tokens, splits):
    (offsets, m), seed = spread(*SPREADS[name]), random.randrange(2**32)
    experts, symmetric = len(offsets) - 1, splits == 2
    bits, (n, k, group_size) = (3, (40, 288, 32)) if tokens == 32 else (4, (150, 384, 128))
    dtype = torch.float16 if symmetric else torch.bfloat16
    weights = [random_weight(n, k, bits, group_size, symmetric, expert) for expert in range(min(experts, 6))]
    weights = [weights[expert % len(weights)] for expert in range(experts)]
    parts = [(repack(emulator, weight.packed, bits, True), weight.scale, weight.zero) for weight in weights]
    bias = torch.randn(experts, n) if symmetric else None
    operands = [*stacked(parts), bias]
    # Rows of x that 16-byte copies can take, and rows that they cannot.
    x = torch.randn(m, k + 5).to(dtype)[:, 3 : k + 3] if symmetric else torch.randn(m, k).to(dtype)

    def product(x, operands, y, offsets=None) -> torch.Tensor:
        sizes = (len(x), n, k, group_size, bits)
        rest = (offsets, experts if offsets is not None else 0, tokens, splits, seed)
        assert call(emulator.emulate_wna16, x, int(symmetric), x.stride(0), *operands, y, *sizes, *rest) == ""
        return y

    y = product(x, operands, torch.full((m, n), torch.nan, dtype=dtype), offsets)
    expected = torch.zeros(m, n, dtype=dtype)
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if begin == end:
            continue
        expected[begin:end] = product(x[begin:end], of(operands, expert), torch.empty(end - begin, n, dtype=dtype))
        dense = weights[expert].dense
        exact, magnitude = (one.double() @ other.T for one, other in ((x[begin:end], dense), (x.abs(), dense.abs())))
        if bias is not None:
            exact, magnitude = exact + bias[expert], magnitude + bias[expert].abs()
        check_close(y[begin:end], exact, magnitude[begin:end], dtype, (name, expert, seed))
    assert torch.equal(y, expected), (name, seed)


@pytest.mark.parametrize(("tokens", "splits"), [(8, 1), (8, 2), (32, 2), (128, 1)])
@pytest.mark.parametrize("name", SPREADS)
def test_w4a4(emulator, name, tokens, splits):
    (offsets, m), seed = spread(*SPREADS[name]), random.randrange(2**32)
    experts, symmetric = len(offsets) - 1, splits == 2
    bits, (n, k) = (3, (40, 288)) if tokens == 32 else (4, (150, 384))
    dtype = OUT_DTYPES[(tokens + splits) % 3]
    weights = [random_weight(n, k, bits, -1, symmetric, expert) for expert in range(min(experts, 6))]
    weights = [weights[expert % len(weights)] for expert in range(experts)]
    rest = [
        (weight.scale[0], None if symmetric else weight.zero[0], ops.column_sums(weight.packed, bits))
        for weight in weights
    ]
    bias = torch.randn(experts, n) if symmetric else None
    packed = torch.stack([repack(emulator, weight.packed, bits, False) for weight in weights])
    quantized = references.quantize_per_token(torch.randn(m, k), 8, False)
    y = torch.full((m, n), torch.nan, dtype=dtype)
    operands = (*quantized, packed, *stacked(rest), bias, y, OUT_DTYPES.index(dtype))
    sizes = (m, n, k, bits, offsets, experts, tokens, splits, seed)
    assert call(emulator.emulate_integer, *operands, *sizes) == ""
    expected = torch.zeros(m, n, dtype=dtype)
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if begin < end:
            own = (*(part[begin:end] for part in quantized), weights[expert].packed, *rest[expert])
            own_bias = None if bias is None else bias[expert]
            expected[begin:end] = references.w4a4_gemm(*own, own_bias, bits, dtype)
    assert torch.equal(y, expected), (name, seed)


@pytest.mark.parametrize("tokens", [8, 128])
def test_every_tile_has_one_slot_and_rows_that_meet_no_expert_another(emulator, tokens):
    choose = random.Random(tokens)
    for case in range(60):
        experts = choose.choice((1, 2, 8, 31, 32, 33, 128))
        loads = [choose.choice((0, 0, 1, 7, 8, 9, choose.randint(0, 300))) for _ in range(experts)]
        offsets = torch.tensor((0, *loads)).cumsum(0).to(torch.int32)
        m = int(offsets[-1]) + choose.choice((0, 1, 40))
        if m == 0:
            continue
        slots = emulator.slots(*map(ctypes.c_int64, (m, experts, tokens)))
        found = torch.full((slots, 4), -7, dtype=torch.int32)
        assert call(emulator.shares, offsets, experts, m, tokens, found) == ""
        tiles = [
            [expert, int(offsets[expert]), load, tile]
            for expert, load in enumerate(loads)
            for tile in range(-(-load // tokens))
        ]
        beyond = slots - len(tiles)
        assert beyond >= 1 and found[: len(tiles)].tolist() == tiles, case
        assert found[len(tiles) :].tolist() == [[0, int(offsets[-1]), 0, number] for number in range(beyond)], case


def test_offsets_that_are_none_touch_nothing_but_the_rows(emulator):
    """What a GPU's offsets say cannot be checked before the launch; the runner checks every access."""
    for wrong in ([0, 90, 3, 5], [-5, 2, 2, 400], [4, 3, 2, 1]):
        offsets, y = torch.tensor(wrong, dtype=torch.int32), torch.zeros(6, 32, dtype=torch.bfloat16)
        weights = [random_weight(32, 128, 4, 32, False, expert) for expert in range(3)]
        parts = [(repack(emulator, weight.packed, 4, True), weight.scale, weight.zero) for weight in weights]
        x = torch.randn(6, 128).bfloat16()
        for splits in (1, 2):
            sizes = (6, 32, 128, 32, 4, offsets, 3, 8, splits, 0)
            assert call(emulator.emulate_wna16, x, 0, 128, *stacked(parts), None, y, *sizes) == "", wrong


def test_plans(emulator):
    def plan(m: int, n: int, k: int, experts: int, integer: bool = False) -> tuple[int, int]:
        tokens, splits = ctypes.c_int64(), ctypes.c_int64()
        sizes = map(ctypes.c_int64, (m, n, k, 4, experts, int(integer)))
        emulator.plan(*sizes, ctypes.byref(tokens), ctypes.byref(splits))
        return tokens.value, splits.value

    # Qwen3-30B-A3B: 128 experts, eight of them per token.
    assert plan(8, 1536, 2048, 128) == (8, 1) and plan(8 * 256, 1536, 2048, 128) == (32, 1)
    assert plan(8 * 4096, 1536, 2048, 128) == (64, 1) and plan(8 * 4096, 1536, 2048, 128, True) == (128, 1)
    # Mixtral: 8 experts, two of them per token.
    assert plan(2, 28672, 4096, 8) == (8, 1) and plan(2, 4096, 14336, 8)[0] == 8
    assert plan(8 * 16, 1536, 2048, 16)[0] == 32 and plan(8 * 16, 1536, 2048, 16, True)[0] == 16
    assert plan(5, 64, 128, 0)[0] == 8


OVERRIDES = """
#include <cstdio>
#include <cstdlib>

#include "csrc/cuda/grouped_plan.h"

int main(int, char** texts) {
  const auto of_kind = std::atoi(texts[1]) ? sliderquant::cuda::plan_integer_grouped
                                           : sliderquant::cuda::plan_wna16_grouped;
  try {
    of_kind(8, 256, 256, 4, 4, {90, 132}, texts[2]);
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}
"""


def test_an_override_names_a_kernel_that_grouped_products_have(tmp_path):
    source, program = tmp_path / "overrides.cpp", tmp_path / "overrides"
    source.write_text(OVERRIDES)
    subprocess.run(["c++", "-std=c++20", "-I", str(ROOT), str(source), "-o", str(program)], check=True)

    def refused(op: str, override: str) -> str:
        command = [str(program), str(int(op == "w4a4_gemm_grouped")), override]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    for op in ("wna16_gemm_grouped", "w4a4_gemm_grouped"):
        assert refused(op, "") == refused(op, "sm80:tokens=8:splits=2") == ""
        assert refused(op, "sm90:tokens=64") == f"{op}: has no kernel for sm_90a of its own; ask for sm80"
        assert refused(op, "plain") == f"{op}: has no plain kernel, and needs a GPU of sm_80 or later"
