"""Fake quantization with straight-through rounding: weights over learned bounds, activations per token.

Both quantizers are asymmetric or symmetric, uniform, and their range always includes 0, so that a zero point is a
valid code. ``channels`` is the number of input channels that are quantized, the first ones; the rest stay as they
are (intra-layer sliding, SliderQuant section "intra-layer"). Scales always come from the whole row or group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sliderquant_vllm import ops
from sliderquant_vllm.format import ActivationScheme, WeightScheme


def weight_bounds(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Largest and smallest weight of every row or group, 0 included: fp32 [2, N, G] of a weight [N, K]."""
    grouped = weight.unflatten(1, (scheme.groups(weight.shape[1]), -1))
    return torch.stack((grouped.amax(2).clamp(min=0), grouped.amin(2).clamp(max=0)))


def quantized_channels(ratio: float, in_features: int, scheme: WeightScheme) -> int:
    """How many input channels are quantized at a ratio: rounded up to a whole group where there are groups."""
    step = 1 if scheme.group_size == -1 else scheme.group_size
    return min(-int(-ratio * in_features // step) * step, in_features)


def scale_dtype(scheme: WeightScheme) -> torch.dtype:
    """The dtype in which a checkpoint keeps the scales: bf16 in groups, where fp32 would cost noticeable memory."""
    return torch.float32 if scheme.group_size == -1 else torch.bfloat16


def weight_grid(bounds: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point, fp32 [...], of bounds [2, ...]: the upper one, then the lower one.

    The scale is one that the checkpoint can hold exactly. An empty range gets scale 1, which keeps its zeros.
    """
    high, low = bounds[0].clamp(min=0), bounds[1].clamp(max=0)
    if scheme.symmetric:
        half = scheme.symmetric_zero_point
        scale = torch.maximum(high / (half - 1), -low / half)
    else:
        scale = (high - low) / scheme.max_code
    scale = scale.to(scale_dtype(scheme)).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if scheme.symmetric:
        return scale, torch.full_like(scale, half)
    return scale, torch.round(-low / scale).clamp_(0, scheme.max_code)


def quantize_weight(weight: Tensor, bounds: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor, Tensor]:
    """Integer codes of a weight, as they are stored; dequantized they equal ``fake_quantize_weight`` bit for bit.

    Args:
        weight: fp32 [N, K].
        bounds: fp32 [2, N, G], as ``weight_bounds`` gives them.

    Returns:
        codes uint8 [N, K], scale [N, G] in ``scale_dtype``, zero_point uint8 [N, G].
    """
    scale, zero_point = weight_grid(bounds, scheme)
    grouped = weight.unflatten(1, (scale.shape[1], -1))
    codes = (grouped / scale.unsqueeze(2)).add_(zero_point.unsqueeze(2)).round_().clamp_(0, scheme.max_code)
    return codes.flatten(1).to(torch.uint8), scale.to(scale_dtype(scheme)), zero_point.to(torch.uint8)


class _FakeQuantizeWeight(torch.autograd.Function):
    """Keeps 16 bits per weight for backward: how far it was moved, as far as one step.

    It tells inside from outside, since rounding moves no value by more than half a step. Inside, the gradient
    passes straight through; codes at a bound follow that bound; the rest moves the bounds by its rounding error (as
    LSQ, arXiv 1902.08153, with the range in place of the step).
    """

    @staticmethod
    def forward(ctx, weight, bounds, scheme, channels):
        scale, zero_point = weight_grid(bounds, scheme)
        quantized, error = ops.fake_quantize_weight(weight, scale, zero_point, scheme.max_code)
        if channels < weight.shape[1]:
            quantized[:, channels:] = weight[:, channels:]
            error[:, channels:] = 0
        ctx.scheme = scheme
        ctx.save_for_backward(error, bounds, scale, zero_point)
        return quantized

    @staticmethod
    def backward(ctx, grad):
        error, bounds, scale, zero_point = ctx.saved_tensors
        scheme = ctx.scheme
        grad_weight, sums = ops.fake_quantize_weight_backward(grad, error, scale.shape[1])
        grad_above, grad_below, along_error = sums
        high, low = bounds[0], bounds[1]
        if scheme.symmetric:
            half = scheme.symmetric_zero_point
            grad_scale = along_error + grad_above * (half - 1) - grad_below * half
            from_high = high / (half - 1) >= -low / half
            grad_high = torch.where(from_high, grad_scale / (half - 1), 0)
            grad_low = torch.where(from_high, 0, -grad_scale / half)
        else:
            # A value at a bound is off that bound by the rounding of the zero point.
            zero_error = zero_point + low.clamp(max=0) / scale
            along_error = (along_error - zero_error * (grad_above + grad_below)) / scheme.max_code
            grad_high, grad_low = grad_above + along_error, grad_below - along_error
        grad_bounds = torch.stack((grad_high * (high > 0), grad_low * (low < 0)))
        return grad_weight, grad_bounds, None, None


def fake_quantize_weight(weight: Tensor, bounds: Tensor, scheme: WeightScheme, channels: int) -> Tensor:
    """Quantize and dequantize, differentiable in the weight and in the bounds.

    Args:
        weight: fp32 [N, K].
        bounds: fp32 [2, N, G], upper and lower end of the range; clamped so that it includes 0.
        channels: quantized input channels; a multiple of the group size where there are groups.

    Returns:
        fp32 [N, K].
    """
    return _FakeQuantizeWeight.apply(weight, bounds, scheme, channels)


class _FakeQuantizeActivation(torch.autograd.Function):
    """Straight through inside the range; the rounding error moves the row's extremes, which set its scale."""

    @staticmethod
    def forward(ctx, x, scheme, channels):
        max_code = 2**scheme.bits - 1
        if scheme.symmetric:
            half = 2 ** (scheme.bits - 1)
            steps = half - 1
            extremes = x.abs().argmax(-1, keepdim=True)
            signs = x.gather(-1, extremes).sign()
            scale = x.gather(-1, extremes).abs() / steps
        else:
            steps = max_code
            high, high_at = x.max(-1, keepdim=True)
            low, low_at = x.min(-1, keepdim=True)
            high, low = high.clamp(min=0), low.clamp(max=0)
            extremes = torch.cat((high_at, low_at), -1)
            signs = torch.cat((high.sign(), low.sign()), -1)
            scale = (high - low) / steps
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.full_like(scale, half) if scheme.symmetric else torch.round(-low / scale)
        position = x[..., :channels] / scale
        code = torch.round(position).add_(zero).clamp_(0, max_code).sub_(zero)
        quantized = code * scale
        ctx.save_for_backward(code.sub_(position).div_(steps), extremes, signs)
        if channels < x.shape[-1]:
            quantized = torch.cat((quantized, x[..., channels:]), -1)
        return quantized

    @staticmethod
    def backward(ctx, grad):
        error, extremes, signs = ctx.saved_tensors
        grad_scale = (grad[..., : error.shape[-1]] * error).sum(-1, keepdim=True)
        # scatter_add_, not assignment: both extremes of a row of zeros are the same element.
        return grad.clone().scatter_add_(-1, extremes, grad_scale * signs), None, None


def fake_quantize_activation(x: Tensor, scheme: ActivationScheme, channels: int) -> Tensor:
    """Quantize and dequantize every row (token) over its own range; differentiable in x.

    The rule is that of ``sliderquant_vllm.ops.quantize_per_token``, code for code.

    Args:
        x: floating point [..., K].
        channels: how many of the K channels are quantized, the first ones.
    """
    return _FakeQuantizeActivation.apply(x, scheme, channels)
