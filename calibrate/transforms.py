"""Function-preserving changes of a model's tensors: norm folding and rotation (SliderQuant+, after QuaRot).

The residual stream is rotated by a random Hadamard-like matrix Q, fused offline: embedding and every linear that
reads the stream take Q on their input side, every linear that writes it on their output side. RMSNorm commutes
with Q once its weight is folded into the linears behind it; the embedding mean is left alone, since RMSNorm,
unlike LayerNorm, does not subtract it. The value heads are rotated too, undone by o_proj: attention is linear in V.
Before anything is rotated the pairs v -> o and up -> down can be equalized: a rotation spreads an outlier channel
over its neighbours, but cannot undo it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrate.layouts import BlockLayout


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


OUTLIER = 4.0  # times the median balance of a pair's channels
CHUNK = 1 << 18  # values that are rotated at a time: their float64 copies stay in a core's cache


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


def fold_norms(tensors: dict[str, Tensor], layout: BlockLayout) -> None:
    """Multiply the norms of a block into the linears behind them, in place; the norms are 1 afterwards."""
    for norm, readers in layout.readers.items():
        for name in readers:
            tensors[f"{name}.weight"] = fold_norm(tensors[f"{norm}.weight"], tensors[f"{name}.weight"])
        tensors[f"{norm}.weight"] = torch.ones_like(tensors[f"{norm}.weight"])


def equalize_pairs(tensors: dict[str, Tensor], layout: BlockLayout, head_dim: int, everywhere: bool) -> None:
    """Balance row j of up and value with column j of down and output, in place; no data, function preserved.

    The two can exchange a factor (cross-layer equalization, Nagel et al., arXiv 1906.04721, eq. 11, with the 2-norm).
    Done ``everywhere`` it makes activations even; otherwise only channels far off their neighbours are changed,
    since the weights of trained models are mostly well balanced for rounding.
    """
    for mlp in layout.mlps:
        columns = tensors[f"{mlp.down}.weight"].double().norm(dim=0)
        scale = _balance(tensors[f"{mlp.up}.weight"].double().norm(dim=1), columns, everywhere)
        _divide_rows(tensors, mlp.up, scale)
        _multiply_columns(tensors, mlp.down, scale)
    rows = tensors[f"{layout.value}.weight"].double().norm(dim=1).view(-1, head_dim)
    columns = tensors[f"{layout.output}.weight"].double().norm(dim=0).view(len(rows), -1, head_dim)
    scale = _balance(rows, columns.norm(dim=1), everywhere)
    _divide_rows(tensors, layout.value, scale.flatten())
    _multiply_columns(tensors, layout.output, scale.unsqueeze(1).expand_as(columns).flatten())


def _balance(rows: Tensor, columns: Tensor, everywhere: bool) -> Tensor:
    """By which to divide rows and multiply columns of these norms."""
    balance = torch.where((rows > 0) & (columns > 0), (rows / columns).sqrt(), torch.nan)
    if everywhere:
        return balance.nan_to_num(1.0)
    off = (balance / balance.nanmedian()).nan_to_num(1.0)
    return torch.where((off > OUTLIER) | (off < 1 / OUTLIER), off, torch.ones_like(off))


def _divide_rows(tensors: dict[str, Tensor], name: str, scale: Tensor) -> None:
    weight = tensors[f"{name}.weight"]
    tensors[f"{name}.weight"] = (weight / scale.unsqueeze(1)).to(weight.dtype)
    if (key := f"{name}.bias") in tensors:
        tensors[key] = (tensors[key] / scale).to(weight.dtype)


def _multiply_columns(tensors: dict[str, Tensor], name: str, scale: Tensor) -> None:
    weight = tensors[f"{name}.weight"]
    tensors[f"{name}.weight"] = (weight * scale).to(weight.dtype)


def rotate_block(tensors: dict[str, Tensor], layout: BlockLayout, stream: Rotation, head: Rotation) -> None:
    """Rotate the residual stream and the value heads of a block whose norms are folded, in place.

    Args:
        tensors: "module.weight" / "module.bias" of one block, any floating dtype.
        stream: rotation of the hidden size; head: rotation of one attention head.
    """
    head_dim = head.signs.numel()
    for readers in layout.readers.values():
        for name in readers:
            tensors[f"{name}.weight"] = stream.apply(tensors[f"{name}.weight"])
    for name in layout.writers:
        for kind in ("weight", "bias"):
            if (key := f"{name}.{kind}") in tensors:
                tensors[key] = stream.apply_left(tensors[key])
    for kind in ("weight", "bias"):
        if (key := f"{layout.value}.{kind}") in tensors:
            heads = tensors[key].unflatten(0, (-1, head_dim)).movedim(1, -1)
            tensors[key] = head.apply(heads).movedim(-1, 1).flatten(0, 1).contiguous()
    output = f"{layout.output}.weight"
    tensors[output] = head.apply(tensors[output].unflatten(1, (-1, head_dim))).flatten(1)


def hadamard_block_size(channels: int, largest: int = 128) -> int:
    """The largest power of 2, at most ``largest``, that divides a number of channels."""
    return min(channels & -channels, largest)
