"""Fake quantization with straight-through rounding: weights with learnable clipping, activations per token.

Both quantizers are asymmetric or symmetric, uniform, and their range always includes 0, so that a zero point is a
valid code. ``channels`` is the number of input channels that are quantized, the first ones; the rest stay as they
are (intra-layer sliding, SliderQuant section "intra-layer"). Scales always come from the whole row or group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sliderquant_vllm.format import ActivationScheme, WeightScheme

CLIP_INIT = 4.0  # sigmoid(4) = 0.982: clipping starts just inside the range


def clip_parameters(weight: Tensor, scheme: WeightScheme, learned: bool) -> Tensor:
    """Initial logits of clipping, fp32 [2, N, G], upper bound first: infinite where it is not learned."""
    size = (2, weight.shape[0], scheme.groups(weight.shape[1]))
    return torch.full(size, CLIP_INIT if learned else torch.inf, device=weight.device)


def quantized_channels(ratio: float, in_features: int, scheme: WeightScheme) -> int:
    """How many input channels are quantized at a ratio: rounded up to a whole group where there are groups."""
    step = 1 if scheme.group_size == -1 else scheme.group_size
    return min(-int(-ratio * in_features // step) * step, in_features)


def scale_dtype(scheme: WeightScheme) -> torch.dtype:
    """The dtype in which a checkpoint keeps the scales: bf16 in groups, where fp32 would cost noticeable memory."""
    return torch.float32 if scheme.group_size == -1 else torch.bfloat16


def weight_grid(high: Tensor, low: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point, fp32, of the range [low, high] with low <= 0 <= high, any shape.

    The scale is one that the checkpoint can hold exactly. An empty range gets scale 1, which keeps its zeros.
    """
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


def quantize_weight(weight: Tensor, clip: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor, Tensor]:
    """Integer codes of a weight, as they are stored; dequantized they equal ``fake_quantize_weight`` bit for bit.

    Args:
        weight: fp32 [N, K].
        clip: [2, N, G] logits.

    Returns:
        codes uint8 [N, K], scale [N, G] in ``scale_dtype``, zero_point uint8 [N, G].
    """
    grouped = weight.unflatten(1, (scheme.groups(weight.shape[1]), -1))
    scale, zero_point = _clipped_grid(grouped.amax(2), grouped.amin(2), clip, scheme)
    codes = _round_to_grid(grouped, scale, zero_point, scheme)[2].flatten(1)
    return codes.to(torch.uint8), scale.to(scale_dtype(scheme)), zero_point.to(torch.uint8)


class _FakeQuantizeWeight(torch.autograd.Function):
    """Keeps the weight and [N, G] tensors for backward, nothing else of the weight's size.

    Inside the range the gradient passes straight through; codes at a bound follow that bound; the rest moves the
    bounds by its rounding error (as LSQ, arXiv 1902.08153, with the range in place of the step).
    """

    @staticmethod
    def forward(ctx, weight, clip, scheme, channels):
        grouped = weight.unflatten(1, (scheme.groups(weight.shape[1]), -1))
        high, high_at = grouped.max(2)
        low, low_at = grouped.min(2)
        ctx.scheme, ctx.channels = scheme, channels
        ctx.save_for_backward(weight, clip, high, high_at, low, low_at)
        quantized = _round_to_grid(grouped, *_clipped_grid(high, low, clip, scheme), scheme)[0].flatten(1)
        if channels < weight.shape[1]:
            quantized = torch.cat((quantized[:, :channels], weight[:, channels:]), 1)
        return quantized

    @staticmethod
    def backward(ctx, grad):
        weight, clip, high, high_at, low, low_at = ctx.saved_tensors
        scheme = ctx.scheme
        groups = high.shape[1]
        grouped = weight.unflatten(1, (groups, -1))
        if partial := ctx.channels < weight.shape[1]:
            kept = grad[:, ctx.channels :]
            grad = torch.cat((grad[:, : ctx.channels], torch.zeros_like(kept)), 1)
        grad = grad.unflatten(1, (groups, -1))
        scale, zero_point = _clipped_grid(high, low, clip, scheme)
        _, position, code = _round_to_grid(grouped, scale, zero_point, scheme)
        above, below = position > scheme.max_code + 0.5, position < -0.5
        inside = ~(above | below)
        grad_inside = grad * inside
        error = (code - position).mul_(grad_inside).sum(2)
        grad_above, grad_below = (grad * above).sum(2), (grad * below).sum(2)
        keep_high, keep_low = clip[0].sigmoid(), clip[1].sigmoid()
        high_range, low_range = high.clamp(min=0), low.clamp(max=0)
        if scheme.symmetric:
            half = scheme.symmetric_zero_point
            grad_scale = error + grad_above * (half - 1) - grad_below * half
            from_high = high_range * keep_high / (half - 1) >= -low_range * keep_low / half
            grad_high = torch.where(from_high, grad_scale / (half - 1), 0)
            grad_low = torch.where(from_high, 0, -grad_scale / half)
        else:
            # A value at a bound is off that bound by the rounding of the zero point.
            zero_error = zero_point + low_range * keep_low / scale
            error = (error - zero_error * (grad_above + grad_below)) / scheme.max_code
            grad_high, grad_low = grad_above + error, grad_below - error
        grad_clip = torch.stack(
            (
                grad_high * high_range * keep_high * (1 - keep_high),
                grad_low * low_range * keep_low * (1 - keep_low),
            )
        )
        grad_weight = grad_inside
        grad_weight.scatter_add_(2, high_at.unsqueeze(2), (grad_high * keep_high * (high > 0)).unsqueeze(2))
        grad_weight.scatter_add_(2, low_at.unsqueeze(2), (grad_low * keep_low * (low < 0)).unsqueeze(2))
        grad_weight = grad_weight.flatten(1)
        if partial:
            grad_weight[:, ctx.channels :] += kept
        return grad_weight, grad_clip, None, None


def _clipped_grid(high: Tensor, low: Tensor, clip: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    return weight_grid(high.clamp(min=0) * clip[0].sigmoid(), low.clamp(max=0) * clip[1].sigmoid(), scheme)


def _round_to_grid(grouped, scale, zero_point, scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantized values, real-valued code positions and codes, each [N, G, K/G]."""
    scale, zero_point = scale.unsqueeze(2), zero_point.unsqueeze(2)
    position = grouped / scale + zero_point
    code = torch.round(position).clamp_(0, scheme.max_code)
    return (code - zero_point) * scale, position, code


def fake_quantize_weight(weight: Tensor, clip: Tensor, scheme: WeightScheme, channels: int) -> Tensor:
    """Quantize and dequantize, differentiable in the weight and in the clipping logits.

    Args:
        weight: fp32 [N, K].
        clip: fp32 [2, N, G] logits.
        channels: quantized input channels; a multiple of the group size where there are groups.

    Returns:
        fp32 [N, K].
    """
    return _FakeQuantizeWeight.apply(weight, clip, scheme, channels)


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
