"""Linears that rotate their input: each of them, and the whole model against the one that nothing rotates."""

from __future__ import annotations

import pytest
import torch

from sliderquant_vllm.format import ActivationScheme, OnlineHadamard, WeightScheme
from tests.helpers import TINY_LLAMA, reference_logprobs, write_dequantized, write_rtn_checkpoint
from tests.serving.engine import Score, assert_same, score, windows

# tiny-llama's down_proj has 384 input channels, the others 128.
DOWN = (OnlineHadamard(r"re:.*down_proj", 128),)


@pytest.mark.parametrize("bits", [4, 8])
def test_with_quantized_activations(in_engine, tmp_path, bits):
    quantized = write_rtn_checkpoint(
        TINY_LLAMA, tmp_path / "quantized", WeightScheme(4), ActivationScheme(bits), online_hadamard=DOWN
    )
    found = in_engine(score, quantized, check_linears=True)
    assert len(found.errors) == 12 * 4
    # Sums in another order move a value here and there from one code to the next: of 4 bits, one such in 400 tokens is
    # an error of 1e-3.
    assert max(found.errors.values()) < (5e-4 if bits == 8 else 1e-3), found.errors
    # The bounds of test_integer.py.
    expected = Score(reference_logprobs(quantized, windows(TINY_LLAMA)))
    assert (found.logprobs - expected.logprobs).abs().mean() < (0.1 if bits == 8 else 0.6)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=0.01 if bits == 8 else 0.04)


@pytest.mark.parametrize("rotated", [DOWN, (*DOWN, OnlineHadamard("re:.*", 32))], ids=["down_proj", "every linear"])
def test_weight_only(in_engine, tmp_path, rotated):
    quantized = write_rtn_checkpoint(TINY_LLAMA, tmp_path / "quantized", WeightScheme(4, 64), online_hadamard=rotated)
    found = in_engine(score, quantized, check_linears=True, dtype="float16")
    assert len(found.errors) == 12 * 4
    assert max(found.errors.values()) < 5e-4, found.errors
    expected = write_dequantized(quantized, tmp_path / "16bit", torch.float16)
    assert_same(found, in_engine(score, expected, dtype="float16"))
