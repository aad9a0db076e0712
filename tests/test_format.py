"""The format: round trips, which scheme a linear has, and every config error."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from sliderquant_vllm.format import (
    ActivationScheme,
    FormatError,
    LinearScheme,
    OnlineHadamard,
    Override,
    QuantizationConfig,
    WeightScheme,
)
from tests.helpers import assert_one_line_with

PATTERN_FIELDS = ("ignore", "overrides", "online_hadamard", "added_bias")


def config_fields() -> dict:
    return {
        "quant_method": "sliderquant",
        "format_version": 1,
        "weights": {"bits": 4, "group_size": -1, "symmetric": False},
        "activations": {"bits": 4, "symmetric": False, "dynamic": True, "granularity": "token"},
        "online_hadamard": [{"match": r"re:.*down_proj", "block_size": 128}],
        "added_bias": [r"re:.*up_proj", "model.layers.0.mlp.gate_proj"],
        "ignore": ["lm_head"],
        "overrides": [
            {
                "match": r"re:.*down_proj",
                "weights": {"bits": 3, "group_size": 128, "symmetric": True},
                "activations": None,
            }
        ],
        "calibration": {"seed": 1},
    }


def test_config_survives_a_round_trip():
    config = QuantizationConfig.from_dict(config_fields())
    assert config.to_dict() == config_fields()
    assert QuantizationConfig.from_dict(config.to_dict()) == config
    assert config.activations == ActivationScheme(4)
    assert config.overrides == (Override(r"re:.*down_proj", WeightScheme(3, 128, True), None),)
    assert config.online_hadamard == (OnlineHadamard(r"re:.*down_proj", 128),)
    assert config.added_bias == (r"re:.*up_proj", "model.layers.0.mlp.gate_proj")


def test_fields_that_may_be_left_out():
    fields = config_fields()
    for name in ("online_hadamard", "added_bias", "ignore", "overrides", "calibration"):
        del fields[name]
    config = QuantizationConfig.from_dict(fields)
    assert config.scheme_for("a.down_proj") == LinearScheme(WeightScheme(4), ActivationScheme(4))


def test_an_override_without_activations_keeps_those_of_the_model():
    fields = config_fields()
    fields["overrides"] = [{"match": "a.b", "weights": {"bits": 8, "group_size": -1, "symmetric": True}}]
    config = QuantizationConfig.from_dict(fields)
    assert config.scheme_for("a.b") == LinearScheme(WeightScheme(8, -1, True), ActivationScheme(4))


class MISSING:
    """Removes the field."""


# Field path, bad value, words that the message must hold.
CONFIG_ERRORS = [
    ("quant_method", "gptq", ["quant_method", "sliderquant", "gptq"]),
    ("quant_method", MISSING, ["quant_method", "None"]),
    ("format_version", 2, ["format_version", "reads 1", "2", "install"]),
    ("format_version", True, ["format_version", "True"]),
    ("format_version", MISSING, ["format_version", "None"]),
    ("weights", MISSING, ["missing", "weights"]),
    ("weights", None, ["weights", "object", "None"]),
    ("weights", [4], ["weights", "object", "[4]"]),
    ("weights.bits", 5, ["weights.bits", "[2, 3, 4, 8]", "5"]),
    ("weights.bits", "4", ["weights.bits", "'4'"]),
    ("weights.bits", 4.0, ["weights.bits", "4.0"]),
    ("weights.bits", MISSING, ["weights", "missing", "bits"]),
    ("weights.group_size", 0, ["weights.group_size", "[-1, 32, 64, 128]", "0"]),
    ("weights.group_size", None, ["weights.group_size", "None"]),
    ("weights.group_size", 128, ["weights.group_size", "per channel", "128"]),
    ("weights.symmetric", 1, ["weights.symmetric", "1"]),
    ("weights.strategy", "channel", ["weights", "unknown", "strategy"]),
    ("activations", MISSING, ["missing", "activations"]),
    ("activations", 4, ["activations", "object", "4"]),
    ("activations.bits", 2, ["activations.bits", "[4, 8]", "2"]),
    ("activations.symmetric", "no", ["activations.symmetric", "'no'"]),
    ("activations.dynamic", False, ["activations.dynamic", "True", "False"]),
    ("activations.granularity", "tensor", ["activations.granularity", "token", "tensor"]),
    ("activations.scale", 1.0, ["activations", "unknown", "scale"]),
    ("online_hadamard", "none", ["online_hadamard", "list", "'none'"]),
    ("online_hadamard", [128], ["online_hadamard[0]", "object", "128"]),
    ("online_hadamard", [{"match": "a", "block": 64}], ["online_hadamard[0]", "missing", "block_size"]),
    ("online_hadamard.0.scale", 2, ["online_hadamard[0]", "unknown", "scale"]),
    ("online_hadamard.0.block_size", 96, ["online_hadamard[0].block_size", "[2, 4, 8,", "4096]", "found 96"]),
    ("online_hadamard.0.block_size", 8192, ["online_hadamard[0].block_size", "4096]", "found 8192"]),
    ("online_hadamard.0.block_size", 1, ["online_hadamard[0].block_size", "found 1"]),
    ("online_hadamard.0.block_size", "64", ["online_hadamard[0].block_size", "'64'"]),
    ("online_hadamard.0.match", None, ["online_hadamard", "pattern", "None"]),
    ("online_hadamard.0.match", "re:[", ["online_hadamard", "re:[", "pattern"]),
    ("added_bias", "up_proj", ["added_bias", "list", "'up_proj'"]),
    ("added_bias", [{}], ["added_bias", "name", "{}"]),
    ("added_bias", ["re:*"], ["added_bias", "re:*", "pattern"]),
    ("ignore", "lm_head", ["ignore", "list", "'lm_head'"]),
    ("ignore", None, ["ignore", "list", "None"]),
    ("ignore", [3], ["ignore", "3"]),
    ("ignore", ["re:("], ["re:(", "pattern"]),
    ("overrides", {}, ["overrides", "list", "{}"]),
    ("overrides", [3], ["overrides[0]", "object", "3"]),
    ("overrides", [{"match": "a"}], ["overrides[0]", "missing", "weights"]),
    ("overrides.0.match", 7, ["7"]),
    ("overrides.0.match", "re:*", ["re:*", "pattern"]),
    ("overrides.0.extra", 7, ["overrides[0]", "unknown", "extra"]),
    ("overrides.0.weights.bits", 6, ["overrides[0].weights.bits", "6"]),
    ("overrides.0.activations", {"bits": 4}, ["overrides[0].activations", "missing"]),
    (
        "overrides.0.activations",
        {"bits": 8, "symmetric": True, "dynamic": True, "granularity": "token"},
        ["overrides[0].weights.group_size", "128"],
    ),
    ("calibration", "yes", ["calibration", "object", "'yes'"]),
    ("kv_cache", {}, ["unknown", "kv_cache"]),
]


@pytest.mark.parametrize("path, value, words", CONFIG_ERRORS, ids=lambda value: str(value)[:30])
def test_config_errors(path, value, words):
    fields = copy.deepcopy(config_fields())
    *parents, leaf = path.split(".")
    place = fields
    for parent in parents:
        place = place[int(parent)] if parent.isdigit() else place[parent]
    if value is MISSING:
        del place[leaf]
    else:
        place[leaf] = value
    with pytest.raises(FormatError) as caught:
        QuantizationConfig.from_dict(fields)
    assert_one_line_with(caught, ["quantization_config", *words])


@pytest.mark.parametrize("fields", [None, [], "sliderquant"])
def test_a_config_that_is_no_object(fields):
    with pytest.raises(FormatError) as caught:
        QuantizationConfig.from_dict(fields)
    assert_one_line_with(caught, ["quantization_config", "object", repr(fields)])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("lm_head", None),
        ("model.lm_head", "W4"),
        ("model.layers.0.mlp.gate", None),
        ("model.layers.0.mlp.gate_proj", "W4"),
        ("model.layers.3.mlp.down_proj", "W3"),
        ("model.layers.4.mlp.down_proj", "W8"),
        ("model.layers.4.self_attn.o_proj", "W4"),
    ],
)
def test_the_first_match_wins_and_patterns_match_whole_names(name, expected):
    config = QuantizationConfig(
        WeightScheme(4),
        ignore=("lm_head", r"re:.*\.gate"),
        overrides=(
            Override("model.layers.3.mlp.down_proj", WeightScheme(3)),
            Override(r"re:.*down_proj", WeightScheme(8)),
            Override(r"re:.*layers\.4\..*down_proj", WeightScheme(2)),
        ),
    )
    scheme = config.scheme_for(name)
    assert (scheme and f"W{scheme.weights.bits}") == expected


def test_rotated_inputs_and_added_biases_go_with_any_scheme():
    config = QuantizationConfig(
        WeightScheme(4),
        ActivationScheme(4),
        online_hadamard=(OnlineHadamard("a.0.down_proj", 64), OnlineHadamard(r"re:.*down_proj", 128)),
        added_bias=(r"re:.*\.(up|gate)_proj", r"re:.*0\.down_proj"),
        ignore=(r"re:b\..*",),
        overrides=(Override(r"re:.*1\.down_proj", WeightScheme(3, 32)),),
    )
    integer = LinearScheme(WeightScheme(4), ActivationScheme(4))
    assert config.scheme_for("a.0.down_proj") == replace(integer, hadamard_block_size=64, added_bias=True)
    assert config.scheme_for("a.1.down_proj") == LinearScheme(WeightScheme(3, 32), hadamard_block_size=128)
    assert config.scheme_for_fused("a.1.gate_up_proj") == replace(integer, added_bias=True)
    assert config.scheme_for("a.1.o_proj") == integer
    assert config.scheme_for("b.0.down_proj") is None
    assert str(config.scheme_for("a.0.down_proj")) == "W4A4 asymmetric, Hadamard 64, added bias"


@pytest.mark.parametrize(
    "fields",
    [
        {"ignore": ("re:.*k_proj",)},
        {"ignore": ("a.self_attn.q_proj",)},
        {"overrides": (Override("re:.*v_proj", WeightScheme(8)),)},
        {"online_hadamard": (OnlineHadamard("re:.*v_proj", 32),)},
        {"online_hadamard": (OnlineHadamard("re:.*v_proj", 32), OnlineHadamard("re:.*[qk]_proj", 64))},
        {"added_bias": ("re:.*q_proj",)},
    ],
)
def test_fused_parts_that_disagree(fields):
    config = QuantizationConfig(WeightScheme(4), **fields)
    with pytest.raises(FormatError) as caught:
        config.scheme_for_fused("a.self_attn.qkv_proj")
    assert_one_line_with(caught, ["a.self_attn.qkv_proj", "k_proj", "W4A16", *PATTERN_FIELDS])
    assert config.scheme_for_fused("a.self_attn.o_proj") == LinearScheme(WeightScheme(4))


@pytest.mark.parametrize(
    "scheme, shape, words",
    [
        (WeightScheme(4), (32, 64), None),
        (WeightScheme(4, 128), (32, 64), ["128", "64"]),
        (WeightScheme(3), (32, 48), ["48", "multiple of 32"]),
        (WeightScheme(4), (32, 48), ["48", "multiple of 32"]),
        (WeightScheme(8, symmetric=True), (32, 4), ["4", "multiple of 32"]),
        (WeightScheme(3), (48, 32), ["48", "zero points"]),
        (WeightScheme(3, symmetric=True), (48, 32), None),
    ],
)
def test_shapes_that_cannot_be_stored(scheme, shape, words):
    problem = scheme.shape_problem(*shape)
    assert (problem is None) == (words is None)
    assert all(word in problem for word in words or ())
    assert LinearScheme(scheme).shape_problem(*shape) == problem


def test_hadamard_blocks_fill_the_input():
    scheme = LinearScheme(WeightScheme(4), hadamard_block_size=128)
    assert scheme.shape_problem(32, 384) is None
    assert scheme.shape_problem(32, 192) == "block_size 128 of 'online_hadamard' does not divide its 192 input channels"


def test_integer_sums_stay_within_int32():
    weights = WeightScheme(8)
    integer = LinearScheme(weights, ActivationScheme(4))
    assert integer.shape_problem(32, 33024) is None
    assert "more than the 33025 of which 8-bit" in integer.shape_problem(32, 33056)
    assert LinearScheme(weights).shape_problem(32, 33056) is None
    assert "multiple of 32" in integer.shape_problem(32, 48)
