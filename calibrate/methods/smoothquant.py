"""SmoothQuant (Xiao et al., arXiv 2211.10438): channel scales by formula, nearest rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from calibrate.methods.awq import normalized
from sliderquant_vllm.format import LinearScheme


def settings(scheme: LinearScheme) -> dict:
    return {"scale_start": "smoothquant"}


def smoothquant_scale(largest_inputs: Tensor, largest_weights: Tensor, strength: float = 0.5) -> Tensor:
    """max|x|^a / max|w|^(1-a) per channel (SmoothQuant, arXiv 2211.10438, eq. 4), with geometric mean 1.

    Args:
        largest_inputs, largest_weights: [K].
    """
    tiny = torch.finfo(torch.float32).tiny
    return normalized(largest_inputs.clamp(min=tiny) ** strength / largest_weights.clamp(min=tiny) ** (1 - strength))
