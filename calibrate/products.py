"""What the calibration computes with gradients of its own: linears, norms, the Hadamard transform, attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from sliderquant_vllm import ops

FAST_BF16 = torch.cpu._is_avx512_bf16_supported()
ROUNDS_FP32 = torch.cpu._is_amx_tile_supported()  # oneDNN does, where torch lets it
ADDED_ROWS = 512  # of a weight whose gradient is added to a sum, at a time
_rough = False  # inside ``rough_gradients``


@contextmanager
def rough_gradients() -> Iterator[None]:
    """Products that need a gradient run in bf16 meanwhile, where the CPU has instructions for it, as on a GPU."""
    global _rough
    before, _rough = _rough, FAST_BF16
    try:
        yield
    finally:
        _rough = before


class _OneDnn:
    """Let oneDNN compute fp32 products; torch asks it only where bf16 inside would do.

    On AVX-512 without AMX oneDNN computes in fp32 all the same, at more than twice the speed of torch's default on some
    CPUs. With AMX it would round the factors to bf16 (a relative error of 2e-3), so there torch's default stays.
    """

    def __enter__(self) -> None:
        self.before = torch.backends.mkldnn.matmul.fp32_precision
        if not ROUNDS_FP32:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"

    def __exit__(self, *exception) -> None:
        torch.backends.mkldnn.matmul.fp32_precision = self.before


class _Linear(torch.autograd.Function):
    """One product for weights that lie below each other; torch's own attention is slower with oneDNN, hence the setting
    is local to every product, backward too.
    """

    @staticmethod
    def forward(ctx, x, weight, rows, in_bf16):
        ctx.weight_dtype, ctx.total = weight.dtype, getattr(weight, "gradient_sum", None)
        if in_bf16:
            x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        with _OneDnn():
            return functional.linear(x, weight).float().split(rows, -1)

    @staticmethod
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        tokens = x.shape[:-1].numel()
        grad_x = grad_weight = None
        # Rounded on the way to their places: no pass over them of its own.
        above = torch.empty(tokens, weight.shape[0], dtype=x.dtype, device=x.device)
        for part, grad in zip(above.split(ctx.rows, 1), grads, strict=True):
            part.view(grad.shape).copy_(grad)
        with _OneDnn():
            if ctx.needs_input_grad[0]:
                grad_x = (above @ weight).float().view_as(x)
            if ctx.total is not None:
                # Some rows at a time: a gradient of all of them would take as much memory as the weight.
                for total, part in zip(ctx.total.split(ADDED_ROWS), above.split(ADDED_ROWS, 1), strict=True):
                    total += part.T @ x.flatten(0, -2)
            elif ctx.needs_input_grad[1]:
                grad_weight = (above.T @ x.flatten(0, -2)).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None


def sum_gradients(weight: Tensor, total: Tensor | None) -> None:
    """From here on, add the gradients of a weight, a leaf, to a total of its shape where products with it arise.

    On the CPU; elsewhere, and with None, they arrive at the leaf.
    """
    weight.gradient_sum = total


def factor(weight: Tensor) -> Tensor:
    """A weight in the dtype of products that need a gradient: rounded once for all of them."""
    return weight.bfloat16() if _rough or weight.is_cuda else weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear`` of fp32 x, on the CPU by oneDNN; with a weight from ``factor`` only as it says there."""
    (product,) = linears(x, weight, [weight.shape[0]])
    return product if bias is None else product + bias


def linears(x: Tensor, weight: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
    """``linear`` of several weights that lie below each other, of so many ``rows`` each: an output for each."""
    if x.is_cuda:
        return functional.linear(x, weight).split(rows, -1)
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _Linear.apply(x, weight, rows, _rough and learns)


class _RmsNorm(torch.autograd.Function):
    """Five passes over the tokens where torch's operators, one by one, take twenty."""

    @staticmethod
    def forward(ctx, x, weight, shift, epsilon):
        size = x.shape[-1]
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(epsilon).rsqrt_()
        normalized = x * inverse
        ctx.save_for_backward(normalized, weight, inverse)
        return normalized * weight if shift is None else torch.addcmul(shift, normalized, weight)

    @staticmethod
    def backward(ctx, grad):
        normalized, weight, inverse = ctx.saved_tensors
        grad_x = grad_weight = grad_shift = None
        if ctx.needs_input_grad[2]:
            grad_shift = grad.flatten(0, -2).sum(0)
        along = grad * normalized
        if ctx.needs_input_grad[1]:
            grad_weight = along.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            along = (along @ weight).unsqueeze(-1).div_(-weight.shape[0])
            grad_x = torch.addcmul(grad * weight, normalized, along).mul_(inverse)
        return grad_x, grad_weight, grad_shift, None


def rms_norm(x: Tensor, weight: Tensor, shift: Tensor | None, epsilon: float) -> Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight + shift`` over the last dimension of fp32 x [..., K]."""
    return _RmsNorm.apply(x, weight, shift, epsilon)


class _Hadamard(torch.autograd.Function):
    """Its matrix is symmetric: a gradient is transformed as the input was."""

    @staticmethod
    def forward(ctx, x, block_size):
        ctx.block_size = block_size
        with torch.autocast(x.device.type, enabled=False):  # the reference is a product
            return ops.hadamard(x, block_size)

    @staticmethod
    def backward(ctx, grad):
        return ops.hadamard(grad, ctx.block_size), None


def hadamard(x: Tensor, block_size: int) -> Tensor:
    """``sliderquant_vllm.ops.hadamard`` of fp32, with a gradient."""
    ops.load()
    return _Hadamard.apply(x, block_size)


def gram(rows: Tensor) -> Tensor:
    """``rows.T @ rows`` in fp32, on the CPU by oneDNN, whatever the blocks around it compute in."""
    with torch.autocast(rows.device.type, enabled=False), _OneDnn():
        return rows.T @ rows


@lru_cache(maxsize=8)
def _causal_mask(size: int, device: torch.device) -> Tensor:
    return torch.full((size, size), -torch.inf, device=device).triu_(1)


class _Attention(torch.autograd.Function):
    """Keeps all probabilities: twice the speed of torch's fused attention on a CPU as long as sequences are short.

    All behind the scores, which stay fp32, and all of backward is what ``in_bf16`` is about.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling, in_bf16):
        dtype = torch.bfloat16 if in_bf16 else query.dtype
        query = query * scaling
        with _OneDnn():
            scores = query @ key.transpose(-1, -2)
            scores += _causal_mask(query.shape[2], query.device)
            probabilities, value = scores.softmax(-1).to(dtype), value.to(dtype)
            output = (probabilities @ value).to(query.dtype)
        ctx.save_for_backward(query.to(dtype), key.to(dtype), value, probabilities)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, probabilities = ctx.saved_tensors
        rows = grad.to(query.dtype)
        with _OneDnn():
            grad_value = probabilities.transpose(-1, -2) @ rows
            above = rows @ value.transpose(-1, -2)
            scores = torch._softmax_backward_data(above, probabilities, -1, above.dtype)
            grad_query, grad_key = scores @ key, scores.transpose(-1, -2) @ query
        grads = (each.to(grad.dtype) for each in (grad_query, grad_key, grad_value))
        return next(grads).mul_(ctx.scaling), *grads, None, None


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention in fp32, by oneDNN; [batch, heads, seqlen, head_dim], as many heads of each."""
    learns = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    return _Attention.apply(query, key, value, scaling, _rough and learns)
