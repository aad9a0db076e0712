"""Biases that quantization adds where the architecture has none: vLLM's loaders would drop them without a word."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from sliderquant_vllm.checkpoint import validate_checkpoint
from sliderquant_vllm.format import ActivationScheme, WeightScheme
from tests.helpers import (
    TINY_LLAMA,
    edit_config,
    reference_logprobs,
    write_dequantized,
    write_random_model,
    write_rtn_checkpoint,
)
from tests.serving.engine import Score, assert_same, score, start_error, windows

GATE_UP = (r"re:.*\.gate_proj", r"re:.*\.up_proj")


def mean_difference(one: Score, two: Score) -> float:
    return float((one.logprobs - two.logprobs).abs().mean())


def test_as_in_an_architecture_that_has_biases(in_engine, tmp_path):
    quantized = write_rtn_checkpoint(
        TINY_LLAMA, tmp_path / "quantized", WeightScheme(4, 64), added_bias=(*GATE_UP, r"re:.*\.down_proj")
    )
    found = in_engine(score, quantized, dtype="float16")
    expected = write_dequantized(quantized, tmp_path / "16bit", torch.float16, mlp_bias=True)
    assert_same(found, in_engine(score, expected, dtype="float16"))
    unbiased = write_rtn_checkpoint(TINY_LLAMA, tmp_path / "unbiased", WeightScheme(4, 64))
    assert mean_difference(in_engine(score, unbiased, dtype="float16"), found) > 0.1


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family(in_engine, tmp_path, family):
    parent = write_random_model(tmp_path / "parent", family)
    quantized = write_rtn_checkpoint(parent, tmp_path / "quantized", WeightScheme(4, 64), added_bias=GATE_UP)
    found = in_engine(score, quantized, check_linears=True, dtype="float16")
    assert len(found.errors) == 3 * 4
    assert max(found.errors.values()) < 5e-4, found.errors
    assert_same(found, Score(reference_logprobs(quantized, windows(parent), torch.float32)))
    unbiased = write_rtn_checkpoint(parent, tmp_path / "unbiased", WeightScheme(4, 64))
    assert mean_difference(Score(reference_logprobs(unbiased, windows(parent), torch.float32)), found) > 0.1


def test_with_quantized_activations(in_engine, tmp_path):
    quantized = write_rtn_checkpoint(
        TINY_LLAMA, tmp_path / "quantized", WeightScheme(4), ActivationScheme(4), added_bias=("re:.*",)
    )
    found = in_engine(score, quantized, check_linears=True)
    assert len(found.errors) == 12 * 4
    assert max(found.errors.values()) < 1e-4, found.errors


def test_a_bias_that_would_be_dropped_is_refused(in_engine, tmp_path):
    quantized = write_rtn_checkpoint(TINY_LLAMA, tmp_path / "quantized", WeightScheme(4), added_bias=GATE_UP)
    edit_config(quantized, added_bias=[])
    for path in quantized.glob("*.safetensors*"):
        if path.suffix == ".json":
            path.write_text(path.read_text().replace("added_bias", "bias"))
        else:
            tensors = {name.replace("added_bias", "bias"): tensor for name, tensor in load_file(path).items()}
            save_file(tensors, path)
    validate_checkpoint(quantized)
    message = in_engine(start_error, quantized)
    assert "gate_proj.bias: this architecture has no bias here, found one" in message
