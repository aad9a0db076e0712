"""Packing against compressed-tensors and bytes written by hand, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant_vllm.format import FormatError, WeightScheme
from sliderquant_vllm.packing import (
    dequantize,
    expected_tensors,
    pack_codes,
    pack_linear,
    unpack_codes,
    unpack_linear,
)
from tests.helpers import assert_one_line_with

BITS = (2, 3, 4, 8)


def random_codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)


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
