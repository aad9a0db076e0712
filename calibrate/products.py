"""Matrix products of the calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional


@contextmanager
def _onednn() -> Iterator[None]:
    """Let oneDNN compute fp32 products; torch asks it only where bf16 inside would do.

    On AVX-512 without AMX oneDNN computes in fp32 all the same, at more than twice the speed of torch's default on some
    CPUs. With AMX it rounds the factors to bf16, as autocast does on a GPU.
    """
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


class _Linear(torch.autograd.Function):
    """Attention keeps torch's default, hence the setting is local to every product, backward too."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        with _onednn():
            return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = grad_weight = grad_bias = None
        with _onednn():
            if ctx.needs_input_grad[0]:
                grad_x = (rows @ weight).view_as(x)
            if ctx.needs_input_grad[1]:
                grad_weight = rows.T @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear``, on the CPU by oneDNN."""
    return functional.linear(x, weight, bias) if x.is_cuda else _Linear.apply(x, weight, bias)
