"""Products of the calibration and their gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from benchmarks.common import relative_error
from calibrate import products


def attention_and_gradients(attend, tensors) -> list[torch.Tensor]:
    query, key, value, grad = tensors
    learned = [each.clone().requires_grad_() for each in (query, key, value)]
    output = attend(*learned)
    output.backward(grad)
    return [output.detach(), *(each.grad for each in learned)]


@pytest.mark.parametrize(("rough", "bound"), [(False, 1e-6), (True, 5e-3)])
def test_attention_has_the_gradients_of_causal_attention(rough, bound):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, 40, 16, generator=generator) for _ in range(4)]

    def expected(query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)

    def ours(query, key, value):
        with products.rough_gradients() if rough else torch.enable_grad():
            return products.attention(query, key, value, 0.3)

    references = attention_and_gradients(expected, [each.double() for each in tensors])
    for found, reference in zip(attention_and_gradients(ours, tensors), references, strict=True):
        assert found.dtype == torch.float32 and relative_error(found, reference) < bound


def test_products_that_learn_nothing_are_those_of_fp32():
    """On CPUs with tiles too, where oneDNN would multiply fp32 in bf16."""
    x, weight = torch.randn(96, 256), torch.randn(128, 256)
    assert relative_error(products.linear(x, weight), x.double() @ weight.double().T) < 1e-6
    assert relative_error(products.gram(x), x.double().T @ x.double()) < 1e-6


def test_attention_rounds_nothing_where_nothing_learns():
    tensors = [torch.randn(1, 2, 8, 4) for _ in range(3)]
    exact = products.attention(*tensors, 0.5)
    with products.rough_gradients():
        assert torch.equal(products.attention(*tensors, 0.5), exact)
