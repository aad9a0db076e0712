"""Fake quantization of weights and its gradient, native against the reference, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common import relative_error
from sliderquant_vllm import ops, references

# (N, K, G): whole registers and tails, one group and many.
SHAPES = ((1, 1, 1), (3, 7, 1), (5, 96, 3), (2, 130, 2), (64, 256, 1), (16, 512, 4), (300, 200, 1))


def random_case(n: int, k: int, groups: int, max_code: int) -> tuple[torch.Tensor, ...]:
    """A weight of which a part lies beyond the range, its scale and its zero point."""
    generator = torch.Generator().manual_seed(n * k + max_code)
    weight = torch.randn(n, k, generator=generator)
    weight.flatten()[::13] *= 1e6
    scale = torch.rand(n, groups, generator=generator) * 3 / max_code + 1e-3
    zero = torch.randint(0, max_code + 1, (n, groups), generator=generator).float()
    return weight, scale, zero


@pytest.mark.parametrize("max_code", [3, 7, 15, 255])
def test_values_and_errors_are_those_of_the_reference(isa, threads, max_code):
    for shape in SHAPES:
        case = random_case(*shape, max_code)
        found, expected = (
            make(*case, max_code) for make in (ops.fake_quantize_weight, references.fake_quantize_weight)
        )
        assert all(map(torch.equal, found, expected)), shape


def test_gradients_are_those_of_the_reference(isa, threads):
    for n, k, groups in SHAPES:
        weight, scale, zero = random_case(n, k, groups, 15)
        _, error = ops.fake_quantize_weight(weight, scale, zero, 15)
        grad = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
        passed, sums = ops.fake_quantize_weight_backward(grad, error, groups)
        exact_passed, exact_sums = references.fake_quantize_weight_backward(grad.double(), error, groups)
        assert torch.equal(passed.double(), exact_passed)
        assert relative_error(sums, exact_sums) < 1e-6


def test_half_a_step_is_inside_and_more_is_outside(isa):
    scale, zero = torch.ones(1, 1), torch.ones(1, 1)
    weight = torch.tensor([[-1.75, -1.5, -1.25, 0.3, 2.25, 2.5, 2.75]])  # codes 0 to 3 stand for -1 to 2
    quantized, error = ops.fake_quantize_weight(weight, scale, zero, 3)
    assert quantized.tolist() == [[-1, -1, -1, 0, 2, 2, 2]]
    passed, sums = ops.fake_quantize_weight_backward(torch.ones(1, 7), error, 1)
    assert passed.tolist() == [[0, 1, 1, 1, 1, 1, 0]]
    assert sums[:2].flatten().tolist() == [1, 1] and sums[2].item() == pytest.approx(
        0.5 + 0.25 - 0.3 - 0.25 - 0.5, abs=1e-4
    )


def test_a_weight_that_is_no_number_stays_none(isa):
    weight = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf] * 9])
    quantized, _ = ops.fake_quantize_weight(weight, torch.ones(1, 1), torch.zeros(1, 1), 15)
    assert torch.equal(quantized.isnan(), weight.isnan())
    assert quantized[0, 2] == 15 and quantized[0, 3] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(4, 8).double()}, "weight: expected float32 [4, 8] for N=4, K=8"),
        ({"weight": torch.randn(4)}, "weight: expected float32 [N, K]; got float32 [4] on cpu"),
        ({"scale": torch.ones(4, 3)}, "scale: expected groups that divide K=8; got float32 [4, 3] on cpu"),
        ({"scale": torch.ones(2, 1)}, "scale: expected float32 [4, 1] for N=4, K=8"),
        ({"zero": torch.ones(4, 2)}, "zero: expected float32 [4, 1] for N=4, K=8"),
        ({"max_code": 256}, "max_code: expected 1 to 255; got 256"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(change, message):
    arguments = {"weight": torch.randn(4, 8), "scale": torch.ones(4, 1), "zero": torch.ones(4, 1), "max_code": 15}
    with pytest.raises(RuntimeError) as caught:
        ops.fake_quantize_weight(**arguments | change)
    assert message in str(caught.value)


def test_gradients_that_do_not_fit_are_refused():
    error = torch.zeros(4, 8, dtype=torch.int16)
    for grad, groups, message in (
        (torch.randn(4, 6), 1, "error: expected int16 [4, 6] for N=4, K=6"),
        (torch.randn(4, 8), 3, "groups: expected a divisor of K=8; got 3"),
    ):
        with pytest.raises(RuntimeError) as caught:
            ops.fake_quantize_weight_backward(grad, error, groups)
        assert message in str(caught.value)
