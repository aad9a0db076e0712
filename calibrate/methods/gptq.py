"""Error-compensated rounding (GPTQ, Frantar et al., arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from calibrate.quantizer import weight_grid
from sliderquant_vllm.format import LinearScheme, WeightScheme

DAMPING = 0.01
BLOCK = 128
INVERTED_ROWS = 256  # at a time


def settings(scheme: LinearScheme) -> dict:
    """GPTQ with searched ranges; with quantized activations on a rotated model, as QuaRot (arXiv 2404.00456) has it."""
    return {"range_start": "search", "rounding_start": "gptq", "rotate": scheme.activations is not None}


class Factor(NamedTuple):
    """What GPTQ needs of the inputs of linears that share them.

    order: int64 [K], channels in descending order of their energy. Since the grids are fixed beforehand, the order
    leaves no trace in the checkpoint.
    upper: fp32 [K, K], Cholesky factor of the inverse second moment in that order (GPTQ section 3.3, step 3).
    """

    order: Tensor
    upper: Tensor


def factorize(second_moment: Tensor) -> Factor:
    """Factor of E[x x^T] [K, K], finite, up to a positive factor.

    Damping grows until the matrix is positive definite; inputs that are always 0 do not take part.
    """
    order = second_moment.diagonal().argsort(descending=True, stable=True)
    # Backwards: the lower factor of that is the inverse of the upper factor that is asked for, read backwards too.
    backwards = order.flip(0)
    moment = second_moment[backwards][:, backwards].double()
    diagonal = moment.diagonal()
    dead = diagonal <= 0
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    diagonal[dead] = mean
    damping, added = DAMPING, 0.0
    while True:
        moment.diagonal().add_((damping - added) * mean)
        lower, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            break
        damping, added = damping * 10, damping
    del moment, diagonal  # the largest linears' are large
    return Factor(order, invert_lower_(lower).float().flip(0, 1))


def invert_lower_(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix in its place, some rows at a time: [K, K], zeros above the diagonal."""
    for first in range(0, len(lower), INVERTED_ROWS):
        last = min(first + INVERTED_ROWS, len(lower))
        corner = lower[first:last, first:last]
        inverse = torch.linalg.solve_triangular(corner, torch.eye(last - first).to(corner), upper=False)
        lower[first:last, :first] = -inverse @ (lower[first:last, :first] @ lower[:first, :first])
        corner.copy_(inverse)
    return lower


def compensated_weight(
    weight: Tensor, bounds: Tensor, factor: Factor, scheme: WeightScheme, starts: Iterable[int] | None = None
) -> Tensor:
    """The weight whose nearest codes are GPTQ's: every column as it was when its turn came.

    Args:
        weight: fp32 [N, K].
        bounds: fp32 [2, N, G].
        starts: the first columns of the runs of BLOCK columns that are visited; to time a few, by default all.

    Returns:
        fp32 [N, K].
    """
    scale, zero_point = weight_grid(bounds, scheme)
    columns = weight.shape[1]
    order, upper = factor
    group = (torch.arange(columns, device=weight.device) // (columns // scale.shape[1]))[order]
    work, compensated = weight[:, order], torch.empty_like(weight)
    for first in range(0, columns, BLOCK) if starts is None else starts:
        last = min(first + BLOCK, columns)
        # Column by column, as rows: of contiguous memory.
        values, errors = work[:, first:last].T.contiguous(), work.new_empty(last - first, len(weight))
        scales, zero_points = (each.T[group[first:last]].unbind() for each in (scale, zero_point))
        corner = upper[first:last, first:last]
        pivots = corner.diagonal().tolist()
        for place, (value, s, z) in enumerate(zip(values, scales, zero_points, strict=True)):
            rounded = (value / s).add_(z).round_().clamp_(0, scheme.max_code).sub_(z).mul_(s)
            error = torch.sub(value, rounded, out=errors[place]).div_(pivots[place])
            values[place + 1 :].addr_(corner[place, place + 1 :], error, alpha=-1)
        compensated[:, order[first:last]] = values.T
        work[:, last:] -= errors.T @ upper[first:last, last:]
    return compensated
