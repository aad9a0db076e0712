"""The algorithms that methods consist of, each against what it promises."""

import pytest
import torch

from benchmarks.common import relative_error
from calibrate.methods.awq import awq_scale, normalized
from calibrate.methods.d2quant import dual_scale
from calibrate.methods.gptq import INVERTED_ROWS, compensated_weight, factorize
from calibrate.methods.smoothquant import smoothquant_scale
from calibrate.quantizer import fake_quantize_weight, weight_bounds
from calibrate.start import search_bounds
from sliderquant_vllm.format import WeightScheme

SCHEMES = [WeightScheme(2), WeightScheme(3, 32), WeightScheme(4, 64, True)]


def correlated_moment(channels: int = 128) -> torch.Tensor:
    """Of inputs with a few strong directions and channels of very different energy."""
    x = torch.randn(1000, 12) @ torch.randn(12, channels) + 0.3 * torch.randn(1000, channels)
    x = x * torch.logspace(-1, 1, channels)[torch.randperm(channels)]
    return x.T @ x


def nearest(weight, bounds, scheme):
    return fake_quantize_weight(weight, bounds, scheme, weight.shape[1])


def output_error(weight, rounded, moment) -> float:
    difference = (rounded - weight).double()
    return ((difference @ moment.double()) * difference).sum().item()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_compensates_the_error_of_correlated_inputs(scheme):
    weight, moment = torch.randn(48, 128), correlated_moment()
    bounds = weight_bounds(weight, scheme)
    compensated = compensated_weight(weight, bounds, factorize(moment), scheme)
    error = output_error(weight, nearest(compensated, bounds, scheme), moment)
    assert error < 0.4 * output_error(weight, nearest(weight, bounds, scheme), moment)


def test_gptq_of_uncorrelated_inputs_is_rounding_to_nearest():
    scheme, weight = WeightScheme(3), torch.randn(8, 64)
    compensated = compensated_weight(weight, weight_bounds(weight, scheme), factorize(torch.eye(64)), scheme)
    torch.testing.assert_close(compensated, weight)


def test_gptq_agrees_with_the_column_by_column_definition():
    """Optimal brain surgeon: each column's error moves the rest by the inverse of what remains of H (GPTQ eq. 2)."""
    scheme, weight, moment = WeightScheme(4), torch.randn(6, 24), correlated_moment(24)
    bounds = weight_bounds(weight, scheme)
    order = moment.diagonal().argsort(descending=True, stable=True)
    damped = moment.double()[order][:, order]
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    work, expected = weight.double()[:, order], torch.empty(6, 24, dtype=torch.float64)
    for column in range(24):
        inverse = torch.linalg.inv(damped[column:, column:])
        expected[:, column] = work[:, column]
        rounded = nearest(work[:, column : column + 1].float().expand(-1, 24).contiguous(), bounds, scheme)[:, 0]
        error = (work[:, column] - rounded) / inverse[0, 0]
        work[:, column:] -= error.unsqueeze(1) * inverse[0]
    ours = compensated_weight(weight, bounds, factorize(moment), scheme)[:, order]
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4)


def test_gptq_factors_the_inverse_of_moments_that_take_several_pieces():
    channels = 2 * INVERTED_ROWS + 88
    moment = correlated_moment(channels)
    moment[:, 5] = moment[5] = 0  # an input that is always 0
    order, upper = factorize(moment)
    assert order[-1] == 5 and torch.equal(upper, upper.triu())
    damped = moment.double()[order][:, order]
    mean = damped.diagonal().mean()
    damped[-1, -1] = mean
    damped.diagonal().add_(0.01 * mean)
    assert relative_error(upper.T @ upper, torch.linalg.inv(damped)) < 1e-5


@pytest.mark.parametrize("moment", [torch.zeros(32, 32), torch.ones(32, 32), torch.full((32, 32), 1e-30)])
def test_gptq_stays_finite_with_hardly_any_inputs(moment):
    scheme, weight = WeightScheme(2), torch.randn(4, 32)
    compensated = compensated_weight(weight, weight_bounds(weight, scheme), factorize(moment), scheme)
    assert compensated.isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_searched_bounds_are_no_worse_in_any_row_or_group(scheme):
    weight, importance = torch.randn(16, 128) ** 3, torch.rand(128)

    def errors(bounds):
        squares = (nearest(weight, bounds, scheme) - weight).square() * importance
        return squares.unflatten(1, (scheme.groups(128), -1)).sum(2)

    searched, whole = errors(search_bounds(weight, importance, scheme)), errors(weight_bounds(weight, scheme))
    assert (searched <= whole).all() and searched.sum() < 0.95 * whole.sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_searched_bounds_do_not_depend_on_how_many_rows_are_searched_at_a_time(scheme, monkeypatch):
    weight, importance = torch.randn(16, 128) ** 3, torch.rand(128)
    at_once = search_bounds(weight, importance, scheme)
    monkeypatch.setattr("calibrate.start.SEARCHED", 3 * 128)
    assert torch.equal(search_bounds(weight, importance, scheme), at_once)


def test_awq_protects_channels_with_large_inputs():
    scheme, weight = WeightScheme(3), torch.randn(32, 64)
    moment = torch.diag(torch.logspace(-2, 2, 64))
    scale = awq_scale([(weight, moment, scheme)])
    assert scale.log().mean().abs() < 1e-5 and scale[-1] > 2 * scale[0]
    scaled = weight * scale
    rounded = nearest(scaled, weight_bounds(scaled, scheme), scheme) / scale
    plain = nearest(weight, weight_bounds(weight, scheme), scheme)
    assert output_error(weight, rounded, moment) < 0.7 * output_error(weight, plain, moment)


def test_smoothquant_meets_in_the_middle():
    inputs, weights = torch.rand(16) + 0.1, torch.rand(16) + 0.1
    scale = smoothquant_scale(inputs, weights)
    ratio = (inputs / scale) / (weights * scale)
    torch.testing.assert_close(ratio, ratio[:1].expand(16))
    assert normalized(torch.zeros(4)).isfinite().all()


def test_the_dual_scale_lowers_the_output_error():
    scheme, moment = WeightScheme(3), torch.diag(torch.logspace(-2, 2, 128))
    weight = torch.randn(48, 128) * torch.logspace(-0.4, 0.4, 128)

    def rounding(scaled, seen):
        return nearest(scaled, weight_bounds(scaled, scheme), scheme)

    scale = dual_scale(weight, moment, rounding)
    assert (scale > 0).all() and not torch.equal(scale, torch.ones(128))
    error = output_error(weight, rounding(weight / scale, moment) * scale, moment)
    assert error < 0.98 * output_error(weight, rounding(weight, moment), moment)
