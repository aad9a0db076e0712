"""The benchmark of the CUDA kernels where there is no GPU: the model, and the table that says what was not measured."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu_kernels, gpu_model

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="measures where there is a GPU")


@without_gpu
def test_prints_the_model_alone(tmp_path, capsys):
    target = tmp_path / "times.json"
    sizes = ["--shapes", "4096x4096", "--m", "1", "64", "--bits", "4", "--integer", "4x8", "--experts", "8x2x512x256"]
    gpu_kernels.main([*sizes, "--json", str(target)])
    text = capsys.readouterr().out
    assert "nothing is measured" in text and "model, not measured" in text
    found = json.loads(target.read_text())
    # Two tokens of two products, of two with a weight per expert, and of the quantizers
    assert found["gpu"] is None and len(found["rows"]) == 4 + 4 + 2 * len(gpu_kernels.QUANTIZERS)
    assert "2 of 8 experts | 512 x 256" in text and "rms_norm_quantize, residual | - x 4096" in text
    assert all(row["us"] is None and row["model_us"] > 0 for row in found["rows"])


@pytest.mark.parametrize(
    ("arguments", "instructions"),
    [
        # expansion + products + reads of shared memory + offsets + scaling of groups, beside the overhead
        ((4, True, 1, 1, False), (128 + 16) + 16 + 8 + 0 + 16),
        ((4, False, 1, 1, False), (128 + 48) + 16 + 8 + 0 + 16),
        ((2, True, 2, 1, True), (128 + 8) + 32 + 10 + 21 + 28),
        ((3, False, 1, 4, True), (128 + 24 + 20) + 16 + 7 + 52 + 64),
        ((8, False, 1, 1, False), 320 + 16 + 12 + 0 + 16),
    ],
)
def test_instructions_of_the_model(arguments, instructions):
    assert gpu_model.chunk_instructions(*arguments) == instructions + gpu_model.OVERHEAD


@pytest.mark.parametrize(
    ("arguments", "instructions"),
    [
        # expansion + reads of weights, per panel; products; reads of tokens
        ((4, 2, 1), 2 * (24 + 2) + 8 + 4),
        ((2, 4, 8), 4 * (28 + 1) + 128 + 32),
        ((3, 2, 8), 2 * (54 + 3) + 64 + 32),
        ((8, 4, 8), 4 * 4 + 128 + 32),
    ],
)
def test_instructions_of_the_integer_model(arguments, instructions):
    assert gpu_model.quad_instructions(*arguments) == instructions + gpu_model.INTEGER_OVERHEAD


def test_widths_of_an_integer_product():
    assert gpu_kernels.widths("3x8") == (3, 8)
    for text in ("4", "4x9", "5x4"):
        with pytest.raises(gpu_kernels.argparse.ArgumentTypeError, match=text):
            gpu_kernels.widths(text)


def test_sizes_of_experts():
    assert gpu_kernels.experts_shape("128x8x1536x2048") == (128, 8, 1536, 2048)
    for text in ("128x8", "8x9x64x128", "8x2x64x100"):
        with pytest.raises(gpu_kernels.argparse.ArgumentTypeError, match=text):
            gpu_kernels.experts_shape(text)


def test_the_model_of_quantizers():
    cost = gpu_model.row_cost
    alone = cost(gpu_model.H200, 2048, 14336, "quantize")
    assert alone > 2048 * 14336 * 3 / gpu_model.H200.memory
    assert cost(gpu_model.H200, 1, 4096, "quantize") < 1.2 * gpu_model.QUANTIZE_LAUNCH
    assert cost(gpu_model.H200, 2048, 14336, "silu_mul", 128) > alone
    assert gpu_model.active_experts(1, 128, 8) == pytest.approx(8)
    assert gpu_model.active_experts(10**4, 8, 2) == pytest.approx(8)


def test_the_model_is_no_faster_than_memory():
    cost = gpu_model.wna16_cost(gpu_model.H200, 1, 28672, 4096, 4, 128, True)
    assert cost.total >= 28672 * 4096 / 2 / gpu_model.H200.memory
    assert cost.total < gpu_model.bf16_cost(gpu_model.H200, 1, 28672, 4096)
    integer = gpu_model.integer_cost(gpu_model.H200, 2048, 28672, 4096, 4, True)
    assert integer.limit == "l2" and integer.total > integer.tensor


@pytest.mark.parametrize(
    ("arguments", "instructions"),
    [
        ((4, False), 128 + 48),
        ((4, True), 128 + 16),
        ((3, False), 128 + 24 + 20),
        ((8, False), 320),
        ((2, True), 128 + 8),
    ],
)
def test_instructions_of_the_expansion(arguments, instructions):
    assert gpu_model.expand_instructions(*arguments) == instructions


def test_the_model_of_sm90_counts_no_more_products_than_the_tensor_cores_make():
    """112 shares of 256 x 64 on 132 SMs: the busiest one has one."""
    cost = gpu_model.wna16_cost(gpu_model.H200, 64, 28672, 4096, 4, -1, False)
    assert (cost.blocks, cost.splits, cost.blocks_per_processor) == (112, 1, 1)
    cycles = 256 * 64 * 4096 / 2048
    assert cycles < cost.tensor * gpu_model.H200.clock < 1.05 * cycles
    # As many bytes as products in twice as many multiplications.
    integer = gpu_model.integer_cost(gpu_model.H200, 128, 28672, 4096, 4, True)
    assert cycles < integer.tensor * gpu_model.H200.clock < 1.1 * cycles
