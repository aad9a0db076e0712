"""What a run costs in time, from how often it does what to a block and how long that takes (calibrate.probe)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calibrate.allocation import sensitivity_samples
from calibrate.pipeline import passes
from calibrate.recipe import Recipe

COLLECTING, CORRECTING = 4, 2  # passes over the samples for initial values, and for D2Quant's shift
SENSITIVITY_FORWARDS = 20  # through every block, see calibrate.allocation
HEADS = 4  # end to end: teacher, student, its gradient, and the logits' comparison
DIGESTS = 2  # of the checkpoint: for the index, and when it is checked


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, of one decoder block where nothing else is said. A sample has the tokens that the recipe says.

    Attributes:
        build: reading and transforming it.
        prepare: fake-quantizing its weights.
        forward: a sample through it.
        statistics: of the inputs of its linears, a sample.
        start: initial values of its linears, given those.
        sample: a sample forward and backward.
        step: what else a step takes: fake quantization and its gradients, the optimiser.
        head: logits of a sample.
        state: writing its state.
        stream: writing hidden states, a byte.
        finish: quantizing, packing, writing and reading it back.
        outer: writing the embedding or the head, a value.
        digest: of the finished checkpoint, a byte.
    """

    build: float
    prepare: float
    forward: float
    statistics: float
    start: float
    sample: float
    step: float
    head: float
    state: float
    stream: float
    finish: float
    outer: float
    digest: float


@dataclass(slots=True)
class Counts:
    """How often a run does what to a block, or with the hidden states of all samples."""

    built: int = 0
    started: int = 0
    plain: int = 0  # all samples through it in 16 bits
    quantized: int = 0  # the same as it is quantized
    epochs: int = 0  # of its windows
    tuned: int = 0  # epochs end to end
    states: int = 0  # written
    streams: int = 0  # written


def counts(recipe: Recipe, blocks: int) -> Counts:
    """What ``calibrate.pipeline.calibrate`` does, summed over all blocks."""
    found, sweeps = Counts(), passes(recipe, blocks)
    for number, sweep in enumerate(sweeps):
        starts = recipe.needs_start and number == 0
        first = end = 0  # of the blocks that are held
        for each in sweep:
            held, new = end - each.window.first, each.window.last + 1 - end
            found.quantized += each.window.first - first
            found.streams += (each.window.first > first) + (new > 0)
            found.built += new
            found.plain += new
            if new and number == 0:
                found.states += new
                found.started += new * starts
                found.quantized += (held + new - 1) * starts
            first, end = each.window.first, each.window.last + 1
            found.epochs += each.epochs * (end - first)
            found.states += (end - first) * bool(each.epochs)
    if recipe.tunes:
        found.tuned = recipe.end_to_end_epochs * blocks
        found.built += blocks
        found.plain += blocks
        found.states += blocks
    if recipe.tunes or not sweeps:
        found.built += blocks
    return found


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model and what becomes of it.

    blocks: number; outer: values of embedding and lm_head; stream: bytes of the hidden states of all samples;
    checkpoint: bytes; evaluated: samples of the text for perplexity.
    """

    blocks: int
    outer: int
    stream: int
    checkpoint: int
    evaluated: int = 0


def phases(costs: Costs, recipe: Recipe, sizes: Sizes) -> dict[str, float]:
    """Seconds of everything that a run does, by what it is."""
    count, blocks, samples = counts(recipe, sizes.blocks), sizes.blocks, recipe.nsamples
    forward = samples * costs.forward
    collecting = COLLECTING + CORRECTING * recipe.correction
    start = costs.start + collecting * (costs.prepare + forward) + samples * costs.statistics
    epoch = samples * costs.sample + math.ceil(samples / recipe.batch_size) * costs.step
    few = 0 if recipe.average_bits is None else sensitivity_samples(samples, recipe.seqlen)
    evaluation = blocks * (costs.build + costs.prepare) + sizes.evaluated * (blocks * costs.forward + costs.head)
    found = {
        "sensitivities": bool(few) * blocks * (2 * costs.build + SENSITIVITY_FORWARDS * few * costs.forward),
        "reading and transforming": count.built * costs.build,
        "starting values": count.started * start,
        "windows": count.epochs * epoch,
        "between windows": count.plain * forward
        + count.quantized * (costs.prepare + forward)
        + count.states * costs.state
        + count.streams * sizes.stream * costs.stream,
        "end to end": count.tuned * (epoch + HEADS * samples * costs.head / blocks),
        "perplexity": 2 * bool(sizes.evaluated) * evaluation,
        "writing and checking": blocks * costs.finish
        + sizes.outer * costs.outer
        + DIGESTS * sizes.checkpoint * costs.digest,
    }
    return {phase: seconds for phase, seconds in found.items() if seconds}
