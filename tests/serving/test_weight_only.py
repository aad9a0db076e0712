"""Weight-only checkpoints give the log-probabilities of the 16-bit model of the same numbers."""

from __future__ import annotations

import pytest
import torch

from sliderquant_vllm import ops
from sliderquant_vllm.format import Override, WeightScheme
from tests.helpers import TINY_LLAMA, write_compressed_tensors, write_dequantized, write_rtn_checkpoint
from tests.serving.engine import assert_same, has_op, score

# One layer after another takes the next group size, so that every linear is served with every one of them.
GROUP_SIZES = (-1, 32, 64, 128)


def mixed_groups(bits: int, symmetric: bool) -> tuple[Override, ...]:
    return tuple(
        Override(
            rf"re:model\.layers\.({'|'.join(map(str, range(first, 12, 4)))})\..*",
            WeightScheme(bits, group_size, symmetric),
        )
        for first, group_size in enumerate(GROUP_SIZES)
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_every_scheme(in_engine, tmp_path, bits, symmetric):
    quantized = write_rtn_checkpoint(
        TINY_LLAMA,
        tmp_path / "quantized",
        WeightScheme(bits, -1, symmetric),
        overrides=mixed_groups(bits, symmetric),
    )
    in_bf16 = in_engine(score, quantized, check_linears=True)
    assert len(in_bf16.errors) == 12 * 4
    # With tiles the kernels round the weights of groups for this many tokens.
    assert max(in_bf16.errors.values()) < (4e-3 if ops.host().isa() == "amx" else 5e-4), in_bf16.errors
    # In bf16, rounding alone (of the dequantized weights, or in another order of addition) moves the
    # log-probability of a token by 0.016 on average: whole models are compared in fp16.
    expected = write_dequantized(quantized, tmp_path / "16bit", torch.float16)
    in_fp16 = in_engine(score, quantized, dtype="float16")
    assert_same(in_fp16, in_engine(score, expected, dtype="float16"))
    assert in_bf16.perplexity == pytest.approx(in_fp16.perplexity, rel=1e-2)


def test_bf16_scales(in_engine, tmp_path):
    quantized = write_rtn_checkpoint(
        TINY_LLAMA, tmp_path / "quantized", WeightScheme(4, 64), scale_dtype=torch.bfloat16
    )
    expected = write_dequantized(quantized, tmp_path / "16bit", torch.float16)
    assert_same(in_engine(score, quantized, dtype="float16"), in_engine(score, expected, dtype="float16"))


@pytest.mark.parametrize("scheme", [WeightScheme(4, 32), WeightScheme(4, symmetric=True)], ids=str)
def test_stock_vllm_reads_the_same_files(in_engine, tmp_path, scheme):
    if not in_engine(has_op, "cpu_gemm_wna16"):
        pytest.skip("vLLM's library for this CPU has no product of 4-bit weights")
    quantized = write_rtn_checkpoint(TINY_LLAMA, tmp_path / "quantized", scheme, scale_dtype=torch.bfloat16)
    stock = write_compressed_tensors(quantized, tmp_path / "stock")
    assert_same(in_engine(score, quantized, dtype="float16"), in_engine(score, stock, dtype="float16"))
