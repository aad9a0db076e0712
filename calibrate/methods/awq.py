"""AWQ (Lin et al., arXiv 2306.00978): searched channel scales and ranges, nearest rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from calibrate.quantizer import fake_quantize_weight, weight_bounds
from sliderquant_vllm.format import LinearScheme, WeightScheme

EXPONENTS = torch.linspace(0, 1, 21).tolist()
FLOOR = 1e-4


def settings(scheme: LinearScheme) -> dict:
    return {"scale_start": "awq", "range_start": "search"}


def normalized(scale: Tensor) -> Tensor:
    """A scale [K] with geometric mean 1, no further from it than a factor of 1 / FLOOR."""
    scale = scale.clamp(min=FLOOR * scale.max().clamp(min=FLOOR))
    return scale / scale.log().mean().exp()


def awq_scale(linears: list[tuple[Tensor, Tensor, WeightScheme]]) -> Tensor:
    """The power of the inputs' root mean square with the least output error after rounding (AWQ, arXiv 2306.00978).

    The error is tr(D H D^T) of the weights' error D, summed over the linears: the same as that of the outputs.

    Args:
        linears: weight fp32 [N, K], second moment [K, K] of its input, scheme; all with the same K.

    Returns:
        fp32 [K], by which the input is to be divided and the weight multiplied.
    """
    seen = sum(moment.diagonal() for _, moment, _ in linears)
    magnitude = normalized(seen.clamp(min=0).sqrt())
    best, least = torch.ones_like(magnitude), torch.inf
    for exponent in EXPONENTS:
        scale = normalized(magnitude**exponent)
        error = 0.0
        for weight, moment, scheme in linears:
            scaled = weight * scale
            rounded = fake_quantize_weight(scaled, weight_bounds(scaled, scheme), scheme, weight.shape[1])
            difference = rounded / scale - weight
            error += ((difference @ moment) * difference).sum().item()
        if error < least:
            best, least = scale, error
    return best
