"""Streams the blocks of a model through the windows and keeps what they learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from calibrate.blocks import CalibrationBlock
from calibrate.model import Model
from calibrate.reconstruct import WindowResult, reconstruct
from calibrate.windows import Window


class Progress(Protocol):
    """Where the pipeline reports to."""

    def window(self, number: int, total: int, window: Window, ratio: float, steps: int) -> None: ...
    def step(self, loss: float) -> None: ...
    def window_done(self, result: WindowResult) -> None: ...


@dataclass(frozen=True, slots=True)
class Pass:
    """One optimisation: a window at one ratio."""

    window: Window
    ratio: float
    epochs: int


@dataclass(slots=True)
class Calibrated:
    """Learned parameters of every block, and the losses of every pass."""

    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    results: list[tuple[Pass, WindowResult]] = field(default_factory=list)


def passes(recipe, blocks: int) -> list[list[Pass]]:
    """All passes, cut into sweeps; each sweep goes over the model once, from its first block on."""
    if recipe.method != "sliderquant":
        return []
    windows = recipe.windows(blocks)
    stages = list(zip(recipe.stages, recipe.stage_epochs(), strict=True))
    if recipe.stage_order == "inner":
        return [[Pass(window, ratio, epochs) for window in windows for ratio, epochs in stages]]
    return [[Pass(window, ratio, epochs) for window in windows] for ratio, epochs in stages]


def finished_block(model: Model, calibrated: Calibrated, index: int) -> CalibrationBlock:
    """A block with what it learned, its norm scales where the served dtype holds them exactly."""
    block = model.block(index)
    if index in calibrated.states:
        block.load_learned(calibrated.states[index])
    block.snap_scales(model.dtype)
    return block


class _Sweep:
    """The two streams of one sweep: quantized inputs at the window's start, 16-bit targets at its end.

    A target depends on the 16-bit trajectory alone and windows never end earlier than the one before, so every
    block runs in 16 bits once a sweep, however many windows it is part of.
    """

    def __init__(self, model: Model, calibrated: Calibrated, samples: Tensor):
        self.model, self.calibrated = model, calibrated
        self.inputs = model.embed(samples)
        self.targets = self.inputs.clone()
        self.position_embeddings = model.position_embeddings(samples.shape[1])
        self.blocks: list[CalibrationBlock] = []
        self.first = 0
        self.ratio = 1.0  # at which the blocks of the window were last optimised

    def advance(self, window: Window) -> None:
        """Move both streams to a window: inputs through blocks quantized so far, targets through 16-bit ones."""
        while self.first < window.first:
            block = self.blocks.pop(0)
            block.prepare(self.ratio)
            run_in_place(block, self.inputs, self.position_embeddings, self.model.recipe.batch_size)
            self.first += 1
        while self.first + len(self.blocks) <= window.last:
            index = self.first + len(self.blocks)
            block = self.model.block(index)
            run_in_place(block, self.targets, self.position_embeddings, self.model.recipe.batch_size)
            if index in self.calibrated.states:
                block.load_learned(self.calibrated.states[index])
            self.blocks.append(block)


@torch.no_grad()
def run_in_place(block: CalibrationBlock, hidden: Tensor, position_embeddings: tuple, batch_size: int) -> None:
    """Replace hidden states [samples, seqlen, hidden] by the block's outputs, batch by batch."""
    for batch in hidden.split(batch_size):
        batch.copy_(block(batch, position_embeddings))


def calibrate(model: Model, samples: Tensor, progress: Progress) -> Calibrated:
    """Run every pass of the model's recipe.

    Args:
        samples: int64 [nsamples, seqlen].
    """
    recipe = model.recipe
    calibrated = Calibrated()
    sweeps = passes(recipe, model.blocks)
    total = sum(map(len, sweeps))
    batches = -(-len(samples) // recipe.batch_size)
    for sweep_passes in sweeps:
        sweep = _Sweep(model, calibrated, samples)
        for each in sweep_passes:
            number = len(calibrated.results) + 1
            progress.window(number, total, each.window, each.ratio, each.epochs * batches)
            sweep.advance(each.window)
            result = reconstruct(
                sweep.blocks,
                sweep.inputs,
                sweep.targets,
                sweep.position_embeddings,
                recipe,
                each.ratio,
                each.epochs,
                seed=recipe.seed * 100_003 + number,
                on_step=progress.step,
            )
            sweep.ratio = each.ratio
            for index, block in enumerate(sweep.blocks, sweep.first):
                calibrated.states[index] = block.learned_state()
            calibrated.results.append((each, result))
            progress.window_done(result)
    return calibrated
