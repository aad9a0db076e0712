"""Mixtures of experts: every block's experts against the reference, whole models against the 16-bit ones."""

from __future__ import annotations

import os

import pytest
import torch

from sliderquant_vllm.format import ActivationScheme, OnlineHadamard, Override, WeightScheme
from tests.helpers import write_dequantized, write_random_model, write_rtn_checkpoint
from tests.serving.engine import Score, score

CORES = sorted(os.sched_getaffinity(0))
# Routers stay in 16 bits, as `calibrate` leaves them.
IGNORE = ("lm_head", r"re:.*\.gate", r"re:.*\.shared_expert_gate")
DOWN = r"re:.*\.experts\.\d+\.(down_proj|w2)"


def quantize(directory, family: str, weights: WeightScheme, activations=None, **fields):
    parent = write_random_model(directory / "parent", family)
    return write_rtn_checkpoint(parent, directory / "quantized", weights, activations, ignore=IGNORE, **fields)


def assert_same_but_for_routing(found: Score, expected: Score) -> None:
    """``assert_same``, but for the few tokens that take another expert where the router's 16 bits end in a tie."""
    difference = (found.logprobs - expected.logprobs).abs()
    assert difference.median() <= 0.005
    assert difference.quantile(0.98) <= 0.15
    assert abs(found.perplexity / expected.perplexity - 1) <= 5e-3


def assert_experts_like_the_reference(found: Score, limit: float = 1e-4) -> None:
    experts = {name: error for name, error in found.errors.items() if name.endswith(".experts")}
    assert len(experts) == 3
    assert max(experts.values()) < limit, experts
    others = {name: error for name, error in found.errors.items() if name not in experts}
    assert max(others.values()) < 5e-4, others


WEIGHT_ONLY = [
    ("qwen3_moe", {"weights": WeightScheme(4, 32)}),
    ("qwen3_moe", {"weights": WeightScheme(2, 64), "overrides": (Override(DOWN, WeightScheme(8)),)}),
    ("mixtral", {"weights": WeightScheme(3)}),
    ("mixtral", {"weights": WeightScheme(4, 64), "online_hadamard": (OnlineHadamard(DOWN, 64),)}),
    ("qwen2_moe", {"weights": WeightScheme(4, symmetric=True)}),
    ("qwen2_moe", {"weights": WeightScheme(3, 32)}),
]


@pytest.mark.parametrize(("family", "fields"), WEIGHT_ONLY)
def test_weight_only(in_engine, tmp_path, family, fields):
    quantized = quantize(tmp_path, family, **fields)
    found = in_engine(score, quantized, check_linears=True, dtype="float16")
    assert_experts_like_the_reference(found)
    expected = write_dequantized(quantized, tmp_path / "16bit", torch.float16)
    assert_same_but_for_routing(found, in_engine(score, expected, dtype="float16"))


INTEGER = [
    ("qwen3_moe", {"weights": WeightScheme(4), "activations": ActivationScheme(4)}),
    ("mixtral", {"weights": WeightScheme(8), "activations": ActivationScheme(8)}),
    (
        "mixtral",
        {
            "weights": WeightScheme(4),
            "activations": ActivationScheme(4),
            "online_hadamard": (OnlineHadamard(DOWN, 128),),
        },
    ),
    (
        "qwen2_moe",
        {"weights": WeightScheme(3, symmetric=True), "activations": ActivationScheme(8, symmetric=True)},
    ),
]


@pytest.mark.parametrize(("family", "fields"), INTEGER)
def test_quantized_activations(in_engine, tmp_path, family, fields):
    found = in_engine(score, quantize(tmp_path, family, **fields), check_linears=True)
    # A rotation that adds up in another order moves a value here and there from one code to the next.
    assert_experts_like_the_reference(found, limit=2e-3 if "online_hadamard" in fields else 1e-4)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Groups that two ranks can share."""
    return quantize(tmp_path_factory.mktemp("grouped"), "qwen3_moe", WeightScheme(4, 32))


@pytest.fixture(scope="module")
def expected(in_engine, grouped) -> Score:
    return in_engine(score, grouped, dtype="float16")


def test_compiled(fresh_engine, grouped, expected):
    assert_same_but_for_routing(fresh_engine(grouped, dtype="float16", enforce_eager=False), expected)


def test_token_by_token(in_engine, grouped, expected):
    """As in decoding, where an expert meets one token or none."""
    single = in_engine(score, grouped, dtype="float16", max_num_batched_tokens=1, max_num_seqs=1)
    assert_same_but_for_routing(single, expected)


@pytest.mark.skipif(len(CORES) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tensor", "expert"])
def test_two_ranks(fresh_engine, grouped, expected, expert_parallel):
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, CORES[:2]))}
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": expert_parallel, "dtype": "float16"}
    assert_same_but_for_routing(fresh_engine(grouped, cores, **options), expected)


def test_weight_only_served_with_int8_activations(in_engine, tmp_path):
    quantized = quantize(tmp_path / "integer", "mixtral", WeightScheme(4), ActivationScheme(8))
    weight_only = quantize(tmp_path / "weight-only", "mixtral", WeightScheme(4))
    options = {"sliderquant": {"int8_activations": True}}
    found = in_engine(score, weight_only, additional_config=options)
    assert found.logprobs.equal(in_engine(score, quantized).logprobs)
