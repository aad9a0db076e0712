"""Where the blocks start from: scales, ranges, codes and shifts found from the calibration samples, without gradients.

Blocks are visited in order, the linears of a block in the order of its forward pass, each with inputs that come
through what is quantized already. Everything that is found is a function of the second moment of a linear's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from calibrate import parallel, products
from calibrate.activations import Activations
from calibrate.blocks import CalibrationBlock
from calibrate.errors import UserError
from calibrate.experts import counting, support_starved, warn_starved
from calibrate.layouts import Site
from calibrate.methods.awq import awq_scale
from calibrate.methods.d2quant import deviation, dual_scale
from calibrate.methods.gptq import Factor, compensated_weight, factorize
from calibrate.methods.smoothquant import smoothquant_scale
from calibrate.modules import CalibrationLinear
from calibrate.parallel import Share
from calibrate.quantizer import fake_quantize_weight, weight_bounds, weight_grid
from calibrate.recipe import Recipe
from sliderquant_vllm.format import WeightScheme

ADDED_ROWS = 512  # of a second moment, at a time
SHRINKS = torch.linspace(1.0, 0.3, 36).tolist()
SEARCHED = 1 << 18  # weights at a time: what is computed of them stays in a core's cache


@dataclass(slots=True)
class InputStatistics:
    """What a linear sees: second moment [K, K] summed over tokens, largest magnitudes fp32 [K], number of tokens.

    Samples are added up in float64, so that the sum, rounded to fp32 in the end, does not depend on their order.
    """

    moment: Tensor
    largest: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, linear: CalibrationLinear) -> InputStatistics:
        channels = linear.weight.shape[1]
        return cls(linear.weight.new_zeros(channels, channels, dtype=torch.float64), linear.weight.new_zeros(channels))

    def add(self, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        added = products.gram(rows)
        for total, part in zip(self.moment.split(ADDED_ROWS), added.split(ADDED_ROWS), strict=True):
            total += part  # all at once it would be copied to float64 first
        if len(rows):
            self.largest = torch.maximum(self.largest, rows.abs().amax(0))
        self.tokens += len(rows)

    def add_up(self) -> None:
        """Take in what the other ranks saw, and round."""
        tokens = torch.tensor(self.tokens)
        parallel.add_up(self.moment, tokens)
        parallel.largest(self.largest)
        self.tokens, self.moment = int(tokens), self.moment.float()


class _Collected(Exception):
    """Ends a forward pass that has shown all that it was to show."""


def collect(
    block: CalibrationBlock, paths: list[str], inputs: Activations, position_embeddings: tuple
) -> dict[str, InputStatistics]:
    """Linear -> statistics of its input, behind the online Hadamard if it has one, in one pass over the samples.

    Raises:
        UserError: an input is not finite.
    """
    found = {path: InputStatistics.of(block.linears[path]) for path in paths}

    missing: set[str] = set()

    def hook(linear: CalibrationLinear, args: tuple[Tensor], path: str) -> None:
        found[path].add(linear.transform_input(*args))
        missing.discard(path)
        if not missing and block.experts is None:  # experts without tokens are never called
            raise _Collected

    hooks = [block.linears[path].register_forward_pre_hook(partial(hook, path=path)) for path in paths]
    with counting(block.experts):
        for _, batch in inputs.consecutive(1):
            missing.update(paths)
            with suppress(_Collected):
                block(batch, position_embeddings)
    for each in hooks:
        each.remove()
    for path, statistics in found.items():
        statistics.add_up()
        if not torch.isfinite(statistics.moment.diagonal()).all():
            raise UserError(
                f"{block.name}.{path}: its inputs are not finite; check that the 16-bit model has a finite perplexity "
                "on the calibration text"
            )
    if block.experts is not None:
        parallel.add_up(block.experts.tokens)
    return found


@torch.no_grad()
def start_block(
    block: CalibrationBlock,
    inputs: Activations,
    targets: Activations,
    share: Share,
    position_embeddings: tuple[Tensor, Tensor],
    recipe: Recipe,
) -> None:
    """Find the initial values of a block, in place.

    Args:
        inputs: behind the blocks quantized so far.
        targets: the same behind the 16-bit blocks.
        share: the samples that these are the hidden states of.
    """
    done: list[str] = []
    pairs: dict[str, list[Site]] = {}
    for site in block.layout.sites:
        pairs.setdefault(site.pair, []).append(site)
    for sites in _passes(block, pairs):
        if sites[0].pair == "mlp_norm" and block.norms[block.layout.mlp_norm].shift is not None:
            block.prepare(1.0, only=done)
            shift = deviation(block, inputs, targets, position_embeddings, share)
            block.norms[block.layout.mlp_norm].shift.copy_(shift)
        quantized = [site for site in sites if block.linears[site.linears[0]].scheme]
        if not quantized:
            continue
        block.prepare(1.0, only=done)
        readers = [site.linears[0] for site in quantized]
        found = collect(block, readers, inputs, position_embeddings)
        block.release()
        if block.experts is not None:
            support_starved(block.experts, block.layout, found)
        for pair in dict.fromkeys(site.pair for site in quantized):
            of_pair = [(site, found[site.linears[0]]) for site in quantized if site.pair == pair]
            _start_scale(block, pair, of_pair, recipe)
        scales = block.channel_scales()
        for site in quantized:
            in_scale = scales[site.linears[0]][0]
            moment = found[site.linears[0]].moment
            if in_scale is not None:
                moment = moment / in_scale / in_scale.unsqueeze(1)
            factor = factorize(moment) if recipe.rounding_start == "gptq" else None
            for path in site.linears:
                _start_linear(block.linears[path], in_scale, moment.diagonal(), factor, recipe)
                done.append(path)
    if block.experts is not None:
        warn_starved(block.experts, block.name)


def _passes(block: CalibrationBlock, pairs: dict[str, list[Site]]) -> list[list[Site]]:
    """Sites whose statistics one pass over the samples can collect: all experts' at once."""
    norm_and_output = [pairs[pair] for pair in ("attention_norm", "value_output", "mlp_norm")]
    return [*norm_and_output, [site for mlp in block.layout.mlps for site in pairs[mlp.pair]]]


def _start_scale(block: CalibrationBlock, pair: str, sites: list[tuple[Site, InputStatistics]], recipe: Recipe) -> None:
    if pair not in block.scales:
        return
    linears = [(block.linears[path], statistics) for site, statistics in sites for path in site.linears]
    is_value = pair == "value_output"
    scale = None
    if recipe.dual_scale and sites[0][0].linears[0] in (mlp.down for mlp in block.layout.mlps):
        ((linear, seen),) = linears
        scale = 1 / dual_scale(linear.weight, seen.moment, partial(_rounded, linear.scheme.weights, recipe))
    elif recipe.scale_start == "awq":
        scale = awq_scale([(linear.weight, seen.moment, linear.scheme.weights) for linear, seen in linears])
    elif recipe.scale_start == "smoothquant":
        largest = torch.stack([seen.largest for _, seen in linears]).amax(0)
        weights = torch.stack([linear.weight.abs().amax(0) for linear, _ in linears]).amax(0)
        scale = smoothquant_scale(largest, weights)
    if scale is None:
        return
    if is_value:
        # One scale per value channel: query heads that share it get their mean, on a logarithmic scale.
        head_dim = block.layer.self_attn.head_dim
        scale = scale.log().view(block.key_heads, -1, head_dim).mean(1).exp().flatten()
    block.scales[pair].copy_(scale)


def _start_linear(
    linear: CalibrationLinear, in_scale: Tensor | None, importance: Tensor, factor: Factor | None, recipe: Recipe
) -> None:
    """Range and codes of one linear.

    Args:
        importance: [K], energy of the scaled inputs; factor: GPTQ's of them.
    """
    scheme = linear.scheme.weights
    weight = linear.weight if in_scale is None else linear.weight * in_scale
    linear.bounds.copy_(weight_bounds(weight, scheme))
    step = linear.step()
    if recipe.range_start == "search":
        searched = search_bounds(weight, importance, scheme)
        linear.clip.copy_(torch.where(linear.bounds != 0, searched / linear.bounds, 1))
    if factor is not None:
        compensated = compensated_weight(weight, linear.range(None), factor, scheme)
        groups = step.shape[1]
        moved = (compensated - weight).unflatten(1, (groups, -1))
        linear.offset.copy_((moved / torch.where(step > 0, step, 1).unsqueeze(2)).flatten(1))


def _rounded(scheme: WeightScheme, recipe: Recipe, weight: Tensor, moment: Tensor) -> Tensor:
    """What a weight [N, K] becomes that meets inputs of this second moment: the recipe's range and codes."""
    searched = recipe.range_start == "search"
    bounds = search_bounds(weight, moment.diagonal(), scheme) if searched else weight_bounds(weight, scheme)
    if recipe.rounding_start == "gptq":
        weight = compensated_weight(weight, bounds, factorize(moment), scheme)
    return fake_quantize_weight(weight, bounds, scheme, weight.shape[1])


def search_bounds(
    weight: Tensor, importance: Tensor, scheme: WeightScheme, shrinks: Sequence[float] = SHRINKS
) -> Tensor:
    """Of the weight's bounds, shrunk in steps, those with the least squared error weighted by ``importance`` [K].

    Returns:
        fp32 [2, N, G].
    """
    rows = len(weight) if weight.is_cuda else max(SEARCHED // weight.shape[1], 1)
    return torch.cat([_search_bounds(part, importance, scheme, shrinks) for part in weight.split(rows)], 1)


def _search_bounds(weight: Tensor, importance: Tensor, scheme: WeightScheme, shrinks: Sequence[float]) -> Tensor:
    whole = weight_bounds(weight, scheme)
    best, least = whole.clone(), torch.full_like(whole[0], torch.inf)
    grouped, importance = (each.unflatten(-1, (whole.shape[2], -1)) for each in (weight, importance))
    candidates = torch.stack([whole * shrink for shrink in shrinks], 1)
    for bounds, *grid in zip(candidates.unbind(1), *weight_grid(candidates, scheme), strict=True):
        scale, zero_point = (each.unsqueeze(2) for each in grid)
        codes = (grouped / scale).add_(zero_point).round_().clamp_(0, scheme.max_code)
        error = codes.sub_(zero_point).mul_(scale).sub_(grouped).square_().mul_(importance).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, bounds, best)
    return best
