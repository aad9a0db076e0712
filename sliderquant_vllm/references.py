"""A pure-torch reference of every op in ``sliderquant_vllm.ops``, under the same names and with the same arguments.

They serve where there are no native kernels, and say what those must compute. Weights are in the layout of such
installations: codes packed as in the checkpoint.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch

from sliderquant_vllm.packing import unpack_codes

ERROR_ONE = 1 << 14  # one step of the grid in an error of fake_quantize_weight


def wna16_gemm(x, w_packed, scale, zero, bias, bits: int, group_size: int) -> torch.Tensor:
    codes = unpack_codes(w_packed, bits).to(torch.float32).unflatten(1, (scale.shape[0], -1))
    zero_point = 2 ** (bits - 1) if zero is None else zero.T.to(torch.float32).unsqueeze(-1)
    weight = ((codes - zero_point) * scale.T.unsqueeze(-1)).flatten(1)
    y = x.to(torch.float32) @ weight.T
    return (y if bias is None else y + bias).to(x.dtype)


def quantize_per_token(x, bits: int, symmetric: bool, block_size: int = 1) -> tuple[torch.Tensor, ...]:
    x = x.to(torch.float32)
    if block_size > 1:
        x = hadamard(x, block_size)
    max_code = 2**bits - 1
    if symmetric:
        scale = x.abs().amax(1) / (2 ** (bits - 1) - 1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
        scale = (high - low) / max_code
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.round(-low / scale)
    codes = (torch.round(x / scale[:, None]) + zero[:, None]).clamp(0, max_code)
    return codes.to(torch.uint8), scale, zero.to(torch.int32), codes.sum(1).to(torch.int32)


def rms_norm_quantize(
    x, residual, weight, epsilon: float, bits: int, symmetric: bool, block_size: int = 1
) -> tuple[torch.Tensor, ...]:
    wide, total = x.to(torch.float32), x.new_empty(0, x.shape[1])
    if residual is not None:
        wide = wide + residual
        total = wide.to(x.dtype)
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight
    return *quantize_per_token(normed, bits, symmetric, block_size), total


def silu_mul_quantize(x, bits: int, symmetric: bool, block_size: int = 1) -> tuple[torch.Tensor, ...]:
    gate, up = x.chunk(2, -1)
    return quantize_per_token(torch.nn.functional.silu(gate) * up, bits, symmetric, block_size)


def hadamard(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """``hadamard``, differentiable in x; fp64 stays fp64."""
    if block_size < 1 or block_size & (block_size - 1) or x.shape[-1] % block_size:
        raise RuntimeError(
            f"hadamard: block_size: expected a power of 2 that divides K={x.shape[-1]}; got {block_size}"
        )
    blocks = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, block_size))
    # H of b*c is the Kronecker product of those of b and c. Two small products beat one large from 128 channels on, and
    # butterflies everywhere (measured on x86). Entries stay 1 and -1, which every arithmetic multiplies exactly.
    power = block_size.bit_length() - 1
    outer = 1 if block_size <= 64 else 2 ** (power // 2)
    inner = block_size // outer
    y = blocks.unflatten(-1, (outer, inner)) @ sylvester_matrix(inner, blocks.dtype, x.device)
    if outer > 1:
        y = sylvester_matrix(outer, blocks.dtype, x.device) @ y
    return (y * block_size**-0.5).flatten(-3).to(x.dtype)


@functools.cache
def sylvester_matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The Hadamard matrix of Sylvester's construction, entries 1 and -1: [size, size], size a power of 2."""
    # Made under inference mode and kept, it could serve no calibration later in the same process.
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=dtype, device=device)
        while len(matrix) < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def w4a4_gemm(codes, sa, za, row_sum, w_packed, sw, zw, col_sum, bias, weight_bits: int, out_dtype) -> torch.Tensor:
    weight = unpack_codes(w_packed, weight_bits)
    # Every product and partial sum stays below 2**53, so float64 adds integers exactly and at BLAS speed.
    a, za, row_sum = codes.double(), za.double()[:, None], row_sum.double()[:, None]
    zw = torch.full_like(sw, 2 ** (weight_bits - 1)).double() if zw is None else zw.double()
    exact = a @ weight.double().T - za * col_sum.double() - zw * row_sum + codes.shape[1] * za * zw
    y = exact.float() * (sa[:, None] * sw)
    return (y if bias is None else y + bias).to(out_dtype)


def wna16_gemm_grouped(x, offsets, w_packed, scale, zero, bias, bits: int, group_size: int) -> torch.Tensor:
    product = functools.partial(torch.ops.sliderquant.wna16_gemm, bits=bits, group_size=group_size)
    y = x.new_zeros(x.shape[0], scale.shape[-1])
    return _by_expert(product, (x,), offsets, (w_packed, scale, zero, bias), y)


def w4a4_gemm_grouped(
    codes, sa, za, row_sum, offsets, w_packed, sw, zw, col_sum, bias, weight_bits: int, out_dtype
) -> torch.Tensor:
    product = functools.partial(torch.ops.sliderquant.w4a4_gemm, weight_bits=weight_bits, out_dtype=out_dtype)
    y = sw.new_zeros(codes.shape[0], sw.shape[-1], dtype=out_dtype)
    return _by_expert(product, (codes, sa, za, row_sum), offsets, (w_packed, sw, zw, col_sum, bias), y)


def _by_expert(product: Callable, tokens: tuple, offsets: torch.Tensor, weights: tuple, y: torch.Tensor):
    """One product per expert that has tokens, by whatever serves that op here."""
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if begin < end:
            own = (None if weight is None else weight[expert] for weight in weights)
            y[begin:end] = product(*(rows[begin:end] for rows in tokens), *own)
    return y


def fake_quantize_weight(weight, scale, zero, max_code: int) -> tuple[torch.Tensor, torch.Tensor]:
    grouped, scale, zero = weight.unflatten(1, (scale.shape[1], -1)), scale.unsqueeze(2), zero.unsqueeze(2)
    position = grouped / scale + zero
    code = position.round().clamp_(0, max_code)
    error = torch.sub(code, position, out=position).clamp_(-1, 1).mul_(ERROR_ONE).round_()
    return code.sub_(zero).mul_(scale).flatten(1), error.to(torch.int16).flatten(1)


def fake_quantize_weight_backward(grad, error, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    above, below = error < -ERROR_ONE // 2, error > ERROR_ONE // 2
    inside = grad.masked_fill(above | below, 0)
    parts = (grad * above, grad * below, inside * error / ERROR_ONE)
    return inside, torch.stack([part.unflatten(1, (groups, -1)).sum(2) for part in parts])
