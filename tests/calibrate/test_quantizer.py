import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.quantizer import (
    fake_quantize_activation,
    fake_quantize_weight,
    quantize_weight,
    quantized_channels,
    weight_bounds,
)
from sliderquant_vllm import references
from sliderquant_vllm.format import ActivationScheme, WeightScheme
from sliderquant_vllm.packing import dequantize

SCHEMES = [
    WeightScheme(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (-1, 32, 64)
    for symmetric in (False, True)
]


def round_straight_through(x):
    return x + (torch.round(x) - x).detach()


def shrunken_bounds(weight, scheme):
    """Bounds that clip some weights, every end by a factor of its own."""
    bounds = weight_bounds(weight, scheme)
    return bounds * (1 - 0.5 * torch.rand_like(bounds))


def plain_fake_quantize(weight, bounds, scheme, channels):
    """The same quantizer written with autograd and detach."""
    groups = scheme.groups(weight.shape[1])
    grouped = weight.unflatten(1, (groups, -1))
    high, low = bounds[0].clamp(min=0), bounds[1].clamp(max=0)
    half = scheme.symmetric_zero_point
    scale = torch.maximum(high / (half - 1), -low / half) if scheme.symmetric else (high - low) / scheme.max_code
    if groups > 1:
        scale = scale + (scale.bfloat16().float() - scale).detach()
    zero = torch.full_like(scale, half) if scheme.symmetric else round_straight_through(-low / scale)
    scale, zero = scale.unsqueeze(2), zero.unsqueeze(2)
    code = round_straight_through(grouped / scale + zero).clamp(0, scheme.max_code)
    quantized = ((code - zero) * scale).flatten(1)
    return torch.cat((quantized[:, :channels], weight[:, channels:]), 1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_gradients_equal_those_of_plain_autograd(scheme, ratio):
    torch.manual_seed(0)
    weight = torch.randn(6, 128, requires_grad=True)
    bounds = shrunken_bounds(weight.detach(), scheme).requires_grad_()
    channels = quantized_channels(ratio, 128, scheme)
    upstream = torch.randn(6, 128)
    gradients = []
    for function in (fake_quantize_weight, plain_fake_quantize):
        output = function(weight, bounds, scheme, channels)
        gradients.append((output.detach(), *torch.autograd.grad(output, (weight, bounds), upstream)))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=2e-3)  # rounding errors are kept in fp16


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_stored_codes_dequantize_to_what_was_calibrated(scheme):
    torch.manual_seed(1)
    weight = torch.randn(32, 128) * torch.logspace(-3, 3, 32).unsqueeze(1)
    weight[0] = 0
    weight[1] = weight[1].abs()
    bounds = shrunken_bounds(weight, scheme)
    codes, scale, zero_point = quantize_weight(weight, bounds, scheme)
    assert codes.max() <= scheme.max_code and zero_point.max() <= scheme.max_code
    stored = dequantize(codes, scale.float(), zero_point, scheme)
    assert torch.equal(stored, fake_quantize_weight(weight, bounds, scheme, 128))
    assert not stored[0].any()


def test_unlearned_clipping_is_plain_round_to_nearest():
    weight = torch.randn(8, 64)
    scheme = WeightScheme(8)
    quantized = fake_quantize_weight(weight, weight_bounds(weight, scheme), scheme, 64)
    step = (weight.amax(1) - weight.amin(1)) / 255
    assert ((quantized - weight).abs() <= step.unsqueeze(1)).all()


def test_channels_beyond_the_ratio_stay_as_they_are():
    weight = torch.randn(8, 128)
    scheme = WeightScheme(2, 32)
    assert quantized_channels(0.6, 128, scheme) == 96
    quantized = fake_quantize_weight(weight, weight_bounds(weight, scheme), scheme, 96)
    assert torch.equal(quantized[:, 96:], weight[:, 96:])
    assert not torch.equal(quantized[:, 64:96], weight[:, 64:96])


@pytest.mark.parametrize(("ratio", "expected"), [(0.5, 5), (0.01, 1), (1.0, 9), (0.34, 4)])
def test_ratio_rounds_up_to_whole_channels(ratio, expected):
    assert quantized_channels(ratio, 9, WeightScheme(4)) == expected


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8), min_size=1, max_size=4),
    bits=st.sampled_from((4, 8)),
    symmetric=st.booleans(),
)
def test_activations_are_quantized_as_they_are_served(rows, bits, symmetric):
    x = torch.tensor(rows)
    codes, scale, zero, _ = references.quantize_per_token(x, bits, symmetric)
    served = (codes.float() - zero[:, None]) * scale[:, None]
    assert torch.equal(fake_quantize_activation(x, ActivationScheme(bits, symmetric), 8), served)


@pytest.mark.parametrize("symmetric", [False, True])
def test_activation_gradient_moves_the_extremes(symmetric):
    """Straight through for every value, plus its rounding error through the scale: all of it by plain autograd."""
    torch.manual_seed(0)
    x = torch.randn(4, 32, requires_grad=True)
    upstream = torch.randn(4, 32)
    (ours,) = torch.autograd.grad(fake_quantize_activation(x, ActivationScheme(4, symmetric), 32), x, upstream)
    if symmetric:
        scale, zero = x.abs().amax(1, keepdim=True) / 7, 8
    else:
        scale = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 15
        zero = torch.round(-x.amin(1, keepdim=True) / scale).detach()
    position = x / scale
    code = (torch.round(position) + zero).clamp(0, 15) - zero
    plain = (position + (code - position).detach()) * scale
    (reference,) = torch.autograd.grad(plain, x, upstream)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_a_row_of_zeros_stays_zero_and_has_finite_gradients():
    x = torch.zeros(2, 16, requires_grad=True)
    output = fake_quantize_activation(x, ActivationScheme(4), 16)
    output.sum().backward()
    assert not output.any() and torch.isfinite(x.grad).all()
