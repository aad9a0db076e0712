"""Function-preserving changes of a model's tensors: norm folding and rotation (SliderQuant+, after QuaRot).

The residual stream is rotated by a random Hadamard-like matrix Q, fused offline: embedding and every linear that
reads the stream take Q on their input side, every linear that writes it on their output side. RMSNorm commutes
with Q once its weight is folded into the linears behind it; the embedding mean is left alone, since RMSNorm,
unlike LayerNorm, does not subtract it. The value heads are rotated too, undone by o_proj: attention is linear in V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def walsh_hadamard(x: Tensor) -> Tensor:
    """Orthonormal fast Walsh-Hadamard transform along the last dimension, whose size must be a power of 2."""
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"walsh_hadamard: expected a power of 2, found {size}")
    half = 1
    while half < size:
        pairs = x.unflatten(-1, (size // (2 * half), 2, half))
        first, second = pairs.unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        half *= 2
    return x / math.sqrt(size)


def cosine_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II matrix, float64 [size, size]: spreads any channel about evenly where no Hadamard exists."""
    rows, columns = torch.meshgrid(torch.arange(size).double(), torch.arange(size).double(), indexing="ij")
    matrix = torch.cos(math.pi * (columns + 0.5) * rows / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.T.contiguous()


CHUNK = 1 << 22  # values that are rotated at a time: float64 copies of a whole embedding would not fit


@dataclass(frozen=True, eq=False)
class Rotation:
    """Orthogonal Q = diag(signs) (H_p kron C_m) of a size 2^k m with m odd: never materialised.

    Args:
        signs: float64 [size] of +-1.
    """

    signs: Tensor

    @classmethod
    def random(cls, size: int, seed: int) -> Rotation:
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1)

    def apply(self, x: Tensor) -> Tensor:
        """``x @ Q`` along the last dimension, computed in float64, returned in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1])
        chunks = rows.split(max(CHUNK // x.shape[-1], 1))
        return torch.cat([self._apply(chunk) for chunk in chunks]).view(x.shape)

    def _apply(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        odd = size // (size & -size)
        y = (x.double() * self.signs.to(x.device)).unflatten(-1, (size // odd, odd))
        y = walsh_hadamard(y.transpose(-1, -2)).transpose(-1, -2)
        if odd > 1:
            y = y @ cosine_matrix(odd).to(x.device)
        return y.flatten(-2).to(x.dtype)

    def apply_left(self, x: Tensor) -> Tensor:
        """``Q.T @ x`` along the first dimension: weight [N, K] or bias [N] of a linear that writes the stream."""
        return self.apply(x.movedim(0, -1)).movedim(-1, 0).contiguous()


def fold_norm(norm_weight: Tensor, weight: Tensor) -> Tensor:
    """The weight [N, K] of a linear behind an RMSNorm, with the norm's weight [K] multiplied into its columns."""
    return (weight.double() * norm_weight.double()).to(weight.dtype)
