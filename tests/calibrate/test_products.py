"""Products of the calibration and their gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from benchmarks.common import relative_error
from calibrate import products


def output_and_gradients(function, values, grad) -> list[torch.Tensor]:
    learned = [each.clone().requires_grad_() for each in values]
    output = function(*learned)
    output.backward(grad.to(output.dtype))
    return [output.detach(), *(each.grad for each in learned)]


@pytest.mark.parametrize(("rough", "bound"), [(False, 1e-6), (True, 5e-3)])
def test_attention_has_the_gradients_of_causal_attention(rough, bound):
    generator = torch.Generator().manual_seed(0)
    *tensors, grad = [torch.randn(2, 3, 40, 16, generator=generator) for _ in range(4)]

    def expected(query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)

    def ours(query, key, value):
        with products.rough_gradients() if rough else torch.enable_grad():
            return products.attention(query, key, value, 0.3)

    references = output_and_gradients(expected, [each.double() for each in tensors], grad)
    for found, reference in zip(output_and_gradients(ours, tensors, grad), references, strict=True):
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


@pytest.mark.parametrize("shape", [(2, 5, 48), (1, 5, 3, 16)])
@pytest.mark.parametrize("shifted", [False, True])
def test_rms_norm_has_the_gradients_of_its_formula(shape, shifted):
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, shape[-1:], shape[-1:]) if shifted else (shape, shape[-1:])
    values, grad = [torch.randn(size, generator=generator) for size in sizes], torch.randn(shape, generator=generator)

    def formula(x, weight, shift=0):
        return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight + shift

    def ours(x, weight, shift=None):
        return products.rms_norm(x, weight, shift, 0.1)

    found, expected = (
        output_and_gradients(function, values_of, grad)
        for function, values_of in ((ours, values), (formula, [value.double() for value in values]))
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and relative_error(one, other) < 1e-6


@pytest.mark.parametrize(("rough", "bound"), [(False, 1e-6), (True, 5e-3)])
def test_weights_below_each_other_are_products_of_their_own(rough, bound):
    generator = torch.Generator().manual_seed(0)
    rows = [3, 16, 5]
    x, weight, grad = (torch.randn(size, generator=generator) for size in ((2, 7, 32), (24, 32), (2, 7, 24)))

    def ours(*values):
        with products.rough_gradients() if rough else torch.enable_grad():
            outputs = products.linears(*values, rows)
        assert [output.shape[-1] for output in outputs] == rows
        return torch.cat(outputs, -1)

    found = output_and_gradients(ours, (x, weight), grad)
    expected = output_and_gradients(functional.linear, (x.double(), weight.double()), grad)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < bound


@pytest.mark.parametrize("rough", [False, True])
def test_gradients_of_a_weight_are_summed_where_they_arise(rough):
    rows = [products.ADDED_ROWS + 8, 16]
    weight = torch.randn(sum(rows), 32).requires_grad_()
    samples = torch.randn(3, 7, 32)
    total = torch.zeros(weight.shape, dtype=torch.float64)

    def learn():
        with products.rough_gradients() if rough else torch.enable_grad():
            leaf = products.factor(weight.detach()).requires_grad_()
            products.sum_gradients(leaf, total)
            for sample in samples:
                torch.cat(products.linears(sample, leaf, rows), -1).sum().backward()
            assert leaf.grad is None
            products.sum_gradients(leaf, None)
            torch.cat(products.linears(samples[0], leaf, rows), -1).sum().backward()
            return leaf.grad

    own, bound = learn(), 5e-3 if rough else 1e-6
    assert relative_error(total, samples.double().sum((0, 1)).expand_as(weight)) < bound
    assert relative_error(own, samples[0].double().sum(0).expand_as(weight)) < bound


def test_second_moments_are_not_rounded_where_blocks_compute_in_bf16():
    rows = torch.randn(100, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(products.gram(rows), rows.double().T @ rows.double()) < 1e-6
        assert products.hadamard(rows, 8).dtype == torch.float32
