"""Which bit width each part of a model gets under a budget of average bits, from measured sensitivities.

The cost of rounding is estimated with the Fisher information: a small change moves the model's distribution by
KL(p || p') = 1/2 E[(d log p(y))^2], y drawn from p (Martens, arXiv 1412.1193). HAWQ-V2 (arXiv 1911.03852) takes the
average curvature of a layer and SqueezeLLM (arXiv 2306.07629) the Fisher diagonal; here neither is needed, since the
change is the error that rounding really makes: d log p(y) = gradient of log p(y) . error.

A unit is what is served as one matrix product and so has one scheme: the linears of a fused module, or one linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from calibrate.blocks import CalibrationBlock
from calibrate.errors import UserError
from calibrate.layouts import BlockLayout
from calibrate.model import Model
from calibrate.quantizer import fake_quantize_weight, weight_bounds
from sliderquant_vllm.format import FUSED_MODULES, WEIGHT_BITS, WeightScheme

SENSITIVITY_TOKENS = 8192
MAX_STEPS = 1 << 18  # of the budget in `allocate`, where each takes a byte per unit


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """What rounding each unit alone costs; all by the name of the unit, such as ``model.layers.3.mlp.gate_up_proj``.

    Attributes:
        scores: bits -> KL(16-bit || rounded) of the next token's distribution, nats per token.
        sizes: number of weights; blocks: index of the decoder block.
        linears: their names in the checkpoint.
    """

    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    linears: dict[str, tuple[str, ...]] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)


def units(layout: BlockLayout) -> dict[str, tuple[str, ...]]:
    """Unit -> its linears, names within a block, in the order of the layout. Numbered experts are one unit."""
    fused_names = {part: fused for fused, parts in FUSED_MODULES.items() for part in parts}
    fused_names |= {"w1": "w13", "w3": "w13"}  # Mixtral's gate and up
    found: dict[str, tuple[str, ...]] = {}
    for path in layout.linears:
        *stem, leaf = (part for part in path.split(".") if not part.isdigit())
        name = ".".join((*stem, fused_names.get(leaf, leaf)))
        found[name] = (*found.get(name, ()), path)
    return found


def sensitivity_samples(nsamples: int, seqlen: int) -> int:
    """Of those that a run has, how many it measures sensitivities with."""
    return min(nsamples, max(SENSITIVITY_TOKENS // seqlen, 1))


def sensitivities(
    model: Model,
    samples: Tensor,
    choices: Sequence[int] = WEIGHT_BITS,
    draws: int = 1,
    seed: int = 0,
    on_block: Callable[[int], None] = lambda index: None,
) -> Sensitivities:
    """KL that rounding each unit alone to each width would cause: to nearest, otherwise as the recipe's scheme says.

    One pass forward and one backward, block by block; the work is about that of ``4 * len(choices) + 4`` forward
    passes. In memory: one block or the head, the inputs of all blocks (fp32 [nsamples, seqlen, hidden] each, on the
    CPU) and ``draws + 2`` such tensors on the device. Units that stay in 16 bits, and widths that a unit's shape
    cannot have, are left out. Activations are not quantized. Where blocks compute in bf16, as on a GPU, scores at 8
    bits are mostly the rounding of bf16, several times too large.

    Args:
        samples: int64 [nsamples, seqlen]; a few thousand tokens are enough.
        draws: labels drawn per token, to average over; seed: of the labels.
        on_block: called with the index of every block that is done, last block first.

    Raises:
        UserError: a score is not finite.
    """
    position_embeddings = model.position_embeddings(samples.shape[1])
    states = _trajectory(model, samples, position_embeddings)
    gradients = _label_gradients(model, states[-1], draws, seed)
    found = Sensitivities()
    for index in reversed(range(model.blocks)):
        streams = (states.pop().to(model.device), states[-1].to(model.device), gradients)
        batches = list(zip(*(stream.split(model.recipe.batch_size) for stream in streams), strict=True))
        _measure(model.block(index), index, batches, position_embeddings, choices, found)
        on_block(index)
    by_name = (getattr(found, each.name) for each in fields(found))
    return Sensitivities(*(dict(reversed(values.items())) for values in by_name))


@torch.no_grad()
def _trajectory(model: Model, samples: Tensor, position_embeddings: tuple) -> list[Tensor]:
    """16-bit states before every block and behind the last: fp32 [nsamples, seqlen, hidden], on the CPU."""

    def behind(block: CalibrationBlock, inputs: Tensor) -> Tensor:
        batches = inputs.split(model.recipe.batch_size)
        return torch.cat([block(batch.to(model.device), position_embeddings).cpu() for batch in batches])

    states = [model.embed(samples).cpu()]
    for index in range(model.blocks):
        states.append(behind(model.block(index), states[-1]))
    return states


def _label_gradients(model: Model, states: Tensor, draws: int, seed: int) -> Tensor:
    """Gradients of -log p(y), y drawn from p at every token, with respect to the states behind the last block.

    fp32 [nsamples, seqlen, hidden] -> fp32 [nsamples, draws, seqlen, hidden] on the device.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    head = model.head_module()
    gradients = torch.empty(len(states), draws, *states.shape[1:], device=model.device)
    # One sample at a time: the logits of a large vocabulary are larger than everything else here.
    for state, of_sample in zip(states, gradients, strict=True):
        state = state.to(model.device).requires_grad_()
        logits = head(state)
        labels = torch.multinomial(logits.detach().softmax(-1), draws, replacement=True, generator=generator)
        for label, gradient in zip(labels.unbind(1), of_sample, strict=True):
            loss = functional.cross_entropy(logits, label, reduction="sum")
            gradient.copy_(torch.autograd.grad(loss, state, retain_graph=True)[0])
    return gradients


def _measure(block, index: int, batches: list[tuple], position_embeddings, choices, found: Sensitivities) -> None:
    """Add the units of one block to what was found, and turn the gradients behind it into those before it.

    Args:
        batches: outputs and inputs [batch, seqlen, hidden] of the block, gradients [batch, draws, seqlen, hidden].
    """
    for name, paths in reversed(units(block.layout).items()):
        if block.linears[paths[0]].scheme is None:
            continue
        unit = f"{block.name}.{name}"
        found.scores[unit] = {
            scheme.bits: _score(block, _rounded(block, paths, scheme), batches, position_embeddings)
            for scheme in _schemes(block, paths, choices)
        }
        if not all(map(math.isfinite, found.scores[unit].values())):
            raise UserError(f"{unit}: its sensitivity is not finite; check the model and the calibration text")
        found.sizes[unit] = sum(block.linears[path].weight.numel() for path in paths)
        found.linears[unit] = tuple(f"{block.name}.{path}" for path in paths)
        found.blocks[unit] = index
    for _, inputs, gradients in batches:
        inputs = inputs.detach().requires_grad_()
        outputs = block(inputs, position_embeddings)
        for gradient in gradients.unbind(1):
            gradient.copy_(torch.autograd.grad(outputs, inputs, gradient, retain_graph=True)[0])


def _schemes(block: CalibrationBlock, paths: Sequence[str], choices: Sequence[int]) -> list[WeightScheme]:
    """The scheme of a unit at each of the widths that its shapes can have."""
    scheme, shapes = block.linears[paths[0]].scheme, [block.linears[path].weight.shape for path in paths]
    found = [replace(scheme, weights=replace(scheme.weights, bits=bits)) for bits in sorted(set(choices))]
    return [each.weights for each in found if not any(each.shape_problem(*shape) for shape in shapes)]


def _rounded(block: CalibrationBlock, paths: Sequence[str], scheme: WeightScheme) -> dict[str, Tensor]:
    """The weights of a unit rounded to nearest, by their names in the block."""
    weights = {f"layer.{path}.weight": block.linears[path].weight for path in paths}
    return {name: fake_quantize_weight(w, weight_bounds(w, scheme), scheme, w.shape[1]) for name, w in weights.items()}


@torch.no_grad()
def _score(block: CalibrationBlock, rounded: dict[str, Tensor], batches: list[tuple], position_embeddings) -> float:
    """Mean over tokens and draws of 1/2 (gradient . change of the block's output)^2.

    The change of the block's output, not of the unit's: so attention, gating and norm are not linearised. Token by
    token, not summed over a sequence first: labels are drawn independently, so the cross terms have almost no
    expectation, but most of the noise.
    """
    squares = []
    for outputs, inputs, gradients in batches:
        change = functional_call(block, rounded, (inputs, position_embeddings)) - outputs
        squares.append((gradients * change.unsqueeze(1)).sum(-1).double().square())
    return torch.cat(squares).mean().item() / 2


def block_sensitivities(found: Sensitivities) -> dict[int, dict[int, float]]:
    """Decoder block -> bits -> sum of its units' scores, for the widths that all of them can have."""
    by_block: dict[int, list[dict[int, float]]] = {}
    for unit, scores in found.scores.items():
        by_block.setdefault(found.blocks[unit], []).append(scores)
    common = {index: sorted(set.intersection(*map(set, scores))) for index, scores in by_block.items()}
    return {index: {bits: sum(each[bits] for each in by_block[index]) for bits in common[index]} for index in common}


def allocate(
    scores: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    average_bits: float,
    choices: Sequence[int] = WEIGHT_BITS,
) -> dict[str, int]:
    """The bits of each unit that minimise the sum of scores, ``sum(size * bits) <= average_bits * sum(size)``.

    Exact, by dynamic programming over the budget in steps of the sizes' greatest common divisor (a multiple-choice
    knapsack). Beyond MAX_STEPS of them costs are rounded up to larger steps, which wastes less than one per unit.
    More budget never gives a larger sum; where it gains nothing it is left.

    Args:
        scores: unit -> bits -> score.
        sizes: unit -> number of weights.
        choices: bit widths; a unit takes those that it has a score for.

    Raises:
        UserError: an average below what the narrowest choices need or above what the widest can use.
    """
    widths = {unit: sorted(set(choices) & set(by_bits)) for unit, by_bits in scores.items()}
    for unit, found in widths.items():
        if not found:
            raise UserError(f"{unit}: can have none of the widths {sorted(choices)}; add one of {sorted(scores[unit])}")
    narrowest, widest = (sum(sizes[unit] * of(found) for unit, found in widths.items()) for of in (min, max))
    total = sum(sizes[unit] for unit in scores)
    # By its decimal digits: the binary 2.3 is a little less, which would cost a step.
    wanted = Fraction(str(average_bits)) * total if math.isfinite(average_bits) else -1
    if not narrowest <= wanted <= widest:
        raise UserError(
            f"--average-bits {average_bits}: expected from {narrowest / total:g} to {widest / total:g}, which is what "
            f"the widths {sorted(choices)} can give; choose an average between them, or other widths"
        )
    step = max(1, math.gcd(*(sizes[unit] for unit in scores)), -(-(widest - narrowest) // MAX_STEPS))
    costs = [[-(-sizes[unit] * (bits - found[0]) // step) for bits in found] for unit, found in widths.items()]
    values = [[scores[unit][bits] for bits in found] for unit, found in widths.items()]
    chosen = _knapsack(costs, values, int(wanted - narrowest) // step)
    return {unit: found[option] for (unit, found), option in zip(widths.items(), chosen, strict=True)}


def _knapsack(costs: list[list[int]], values: list[list[float]], capacity: int) -> list[int]:
    """The options with the least sum of values at a cost of at most ``capacity``; the first of each item is free."""
    best = torch.zeros(capacity + 1, dtype=torch.float64)  # of the items so far, by capacity
    options = torch.zeros(len(costs), capacity + 1, dtype=torch.uint8)
    for chosen, item_costs, item_values in zip(options, costs, values, strict=True):
        previous, best = best, best + item_values[0]
        for option, (cost, value) in enumerate(zip(item_costs, item_values, strict=True)):
            reached = previous[: max(capacity + 1 - cost, 0)] + value
            better = reached < best[cost:]
            best[cost:][better] = reached[better]
            chosen[cost:][better] = option
    picked = []
    for chosen, item_costs in zip(reversed(options.unbind()), reversed(costs), strict=True):
        picked.append(int(chosen[capacity]))
        capacity -= item_costs[picked[-1]]
    return picked[::-1]
