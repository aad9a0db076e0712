"""The format: packing against compressed-tensors and bytes written by hand, and every config error."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_vllm.format import (
    ActivationScheme,
    FormatError,
    LinearScheme,
    Override,
    QuantizationConfig,
    WeightScheme,
    dequantize,
    expected_tensors,
    pack_codes,
    pack_linear,
    unpack_codes,
    unpack_linear,
)

BITS = (2, 3, 4, 8)


def random_codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)


def config_fields() -> dict:
    return {
        "quant_method": "sliderquant",
        "format_version": 1,
        "weights": {"bits": 4, "group_size": -1, "symmetric": False},
        "activations": {"bits": 4, "symmetric": False, "dynamic": True, "granularity": "token"},
        "online_hadamard": [],
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


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_packed_as_compressed_tensors_packs_them(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(bits, 24, 96)
    signed = codes.to(torch.int16).sub(2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_codes(codes, bits), helpers.pack_to_int32(signed, bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_zero_points_are_packed_as_compressed_tensors_packs_them(bits, groups):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    zero_point = random_codes(bits, 64, groups)
    scheme = WeightScheme(bits, -1 if groups == 1 else 32)
    packed = pack_linear(random_codes(bits, 64, 96), torch.ones(64, groups), zero_point, scheme)
    signed = zero_point.to(torch.int16).sub(2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(packed["weight_zero_point"], helpers.pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize(
    "bits, codes, expected",
    [
        (2, [0, 1, 2, 3] * 4, "e4e4e4e4"),
        (4, list(range(8)), "10325476"),
        (8, [0, 1, 254, 255], "0001feff"),
        # Code 10 crosses the first word boundary, code 21 the second: 0b101 at bit 30 and at bit 63.
        (3, [0] * 10 + [5] + [0] * 21, "000000400100000000000000"),
        (3, [0] * 21 + [5] + [0] * 10, "000000000000008002000000"),
        # 0..7 is the 24-bit number 0o76543210, lowest byte first.
        (3, list(range(8)) * 4, "88c6fa" * 4),
    ],
)
def test_golden_bytes(bits, codes, expected):
    packed = pack_codes(torch.tensor([codes]), bits)
    assert packed.dtype == torch.int32
    assert packed.numpy().tobytes().hex() == expected
    assert unpack_codes(packed, bits).tolist() == [codes]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 5),
    periods=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_codes_survive_packing(bits, rows, periods, seed):
    codes = random_codes(bits, rows, 32 * periods, seed=seed)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, periods * bits)
    assert torch.equal(unpack_codes(packed, bits), codes)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from((-1, 32, 64, 128)),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_linears_survive_packing(bits, group_size, symmetric, seed):
    scheme = WeightScheme(bits, group_size, symmetric)
    out_features, in_features = 32, 256
    groups = scheme.groups(in_features)
    codes = random_codes(bits, out_features, in_features, seed=seed)
    zero_point = None if symmetric else random_codes(bits, out_features, groups, seed=seed + 1)
    scale = torch.rand(out_features, groups) + 0.1
    packed = pack_linear(codes, scale, zero_point, scheme)

    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()}
    expected = expected_tensors(scheme, out_features, in_features)
    assert set(found) == set(expected)
    for name, (shape, dtypes) in expected.items():
        assert found[name][0] == shape
        assert found[name][1] in dtypes
        assert packed[name].is_contiguous()

    codes_again, scale_again, zero_again = unpack_linear(packed, scheme)
    assert torch.equal(codes_again, codes)
    assert torch.equal(scale_again, scale)
    assert symmetric or torch.equal(zero_again, zero_point)
    assert packed["weight_shape"].tolist() == [out_features, in_features]


def test_dequantize_is_the_formula():
    scheme = WeightScheme(3, 32)
    codes, zero_point, scale = random_codes(3, 4, 64), random_codes(3, 4, 2, seed=1), torch.rand(4, 2)
    weight = dequantize(codes, scale, zero_point, scheme)
    symmetric = dequantize(codes, scale, None, WeightScheme(3, 32, symmetric=True))
    for n in range(4):
        for k in range(64):
            code, g = int(codes[n, k]), k // 32
            torch.testing.assert_close(weight[n, k], (code - int(zero_point[n, g])) * scale[n, g])
            torch.testing.assert_close(symmetric[n, k], (code - 4) * scale[n, g])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: pack_codes(torch.zeros(2, 33, dtype=torch.int64), 4), ["33 codes", "4 bits"]),
        (lambda: pack_codes(torch.full((2, 32), 4), 2), ["[0, 3]", "[4, 4]"]),
        (lambda: pack_codes(torch.full((2, 32), -1), 2), ["[0, 3]", "[-1, -1]"]),
        (lambda: pack_codes(torch.zeros(2, 32), 5), ["[2, 3, 4, 8]", "5"]),
        (lambda: unpack_codes(torch.zeros(2, 4, dtype=torch.int32), 3), ["4 words", "3-bit"]),
        (
            lambda: pack_linear(random_codes(4, 8, 32), torch.ones(8, 1), None, WeightScheme(4)),
            ["zero_point", "symmetric=False"],
        ),
    ],
)
def test_packing_errors(call, words):
    with pytest.raises(FormatError) as caught:
        call()
    assert_one_line_with(caught, words)


def test_config_survives_a_round_trip():
    config = QuantizationConfig.from_dict(config_fields())
    assert config.to_dict() == config_fields()
    assert QuantizationConfig.from_dict(config.to_dict()) == config
    assert config.activations == ActivationScheme(4)
    assert config.overrides == (Override(r"re:.*down_proj", WeightScheme(3, 128, True), None),)


def test_an_override_without_activations_keeps_those_of_the_model():
    fields = config_fields()
    fields["overrides"] = [{"match": "a.b", "weights": {"bits": 8, "group_size": -1, "symmetric": True}}]
    config = QuantizationConfig.from_dict(fields)
    assert config.scheme_for("a.b") == LinearScheme(WeightScheme(8, -1, True), ActivationScheme(4))


# Field path, bad value, words that the message must hold. MISSING removes the field.
MISSING = object()
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
    ("online_hadamard", [{"match": "a", "block": 64}], ["online_hadamard", "[]", "install"]),
    ("online_hadamard", "none", ["online_hadamard", "list", "'none'"]),
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


@pytest.mark.parametrize(
    "ignore, override",
    [(("re:.*k_proj",), None), ((), "re:.*v_proj"), (("a.self_attn.q_proj",), None)],
)
def test_fused_parts_that_disagree(ignore, override):
    overrides = (Override(override, WeightScheme(8)),) if override else ()
    config = QuantizationConfig(WeightScheme(4), ignore=ignore, overrides=overrides)
    with pytest.raises(FormatError) as caught:
        config.scheme_for_fused("a.self_attn.qkv_proj")
    assert_one_line_with(caught, ["a.self_attn.qkv_proj", "k_proj", "W4A16", "ignore", "overrides"])
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


def test_integer_sums_stay_within_int32():
    weights = WeightScheme(8)
    integer = LinearScheme(weights, ActivationScheme(4))
    assert integer.shape_problem(32, 33024) is None
    assert "more than the 33025 of which 8-bit" in integer.shape_problem(32, 33056)
    assert LinearScheme(weights).shape_problem(32, 33056) is None
    assert "multiple of 32" in integer.shape_problem(32, 48)


def assert_one_line_with(caught, words):
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
