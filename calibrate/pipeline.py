"""Streams the blocks of a model through the windows and keeps what they learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from calibrate.allocation import allocate, sensitivities
from calibrate.blocks import CalibrationBlock, run_in_place
from calibrate.end_to_end import check_memory, tune
from calibrate.experts import counting
from calibrate.model import Model
from calibrate.reconstruct import WindowResult, reconstruct
from calibrate.start import start_block
from calibrate.windows import Window

SENSITIVITY_TOKENS = 8192


class Progress(Protocol):
    """Where the pipeline reports to. A step counts as ``size`` blocks of one batch."""

    def window(self, number: int, total: int, window: Window, ratio: float, steps: int) -> None: ...
    def phase(self, title: str, steps: int, size: int) -> None: ...
    def step(self, loss: float) -> None: ...
    def phase_done(self) -> None: ...
    def window_done(self, result: WindowResult) -> None: ...


@dataclass(frozen=True, slots=True)
class Pass:
    """One optimisation: a window at one ratio. With 0 epochs its blocks only get their initial values."""

    window: Window
    ratio: float
    epochs: int


@dataclass(slots=True)
class Calibrated:
    """What was decided about every block, and the losses of every pass."""

    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    results: list[tuple[Pass, WindowResult]] = field(default_factory=list)


def passes(recipe, blocks: int) -> list[list[Pass]]:
    """All passes, cut into sweeps; each sweep goes over the model once, from its first block on."""
    if not (recipe.epochs and recipe.learns_anything):
        return [[Pass(Window(index, index), 1.0, 0) for index in range(blocks)]] if recipe.needs_start else []
    windows = recipe.windows(blocks)
    stages = list(zip(recipe.stages, recipe.stage_epochs(), strict=True))
    if recipe.stage_order == "inner":
        return [[Pass(window, ratio, epochs) for window in windows for ratio, epochs in stages]]
    return [[Pass(window, ratio, epochs) for window in windows] for ratio, epochs in stages]


def finished_block(model: Model, calibrated: Calibrated, index: int) -> CalibrationBlock:
    """A block with what it learned, its norms where the served dtype holds them exactly."""
    block = model.block(index)
    if index in calibrated.states:
        block.load_state(calibrated.states[index])
    block.snap_gains(model.dtype)
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
        self.batch_size = model.recipe.batch_size
        self.blocks: list[CalibrationBlock] = []
        self.first = 0
        self.ratio = 1.0  # at which the blocks of the window were last optimised

    def advance(self, window: Window, progress: Progress) -> None:
        """Move both streams to a window: inputs through blocks quantized so far, targets through 16-bit ones.

        A block without a state gets its initial values behind the blocks before it, as far as they are learned by then.
        """
        while self.first < window.first:
            self._run(self.blocks.pop(0), self.inputs, self.ratio)
            self.first += 1
        entry = None  # quantized inputs of the next block
        while self.first + len(self.blocks) <= window.last:
            index = self.first + len(self.blocks)
            block, state = self.model.block(index), self.calibrated.states.get(index)
            starts = state is None and self.model.recipe.needs_start
            if starts:
                progress.phase(f"starting values of block {index}", 1, -(-len(self.inputs) // self.batch_size))
                if entry is None:
                    entry = self.inputs.clone() if self.blocks else self.inputs
                    for before in self.blocks:
                        self._run(before, entry, self.ratio)
                start_block(block, entry, self.targets, self.position_embeddings, self.model.recipe)
                progress.step(float("nan"))
                if index < window.last:
                    entry = entry.clone() if entry is self.inputs else entry
                    self._run(block, entry, ratio=1.0)
                block.release()
            with counting(None if starts else block.experts):
                run_in_place(block, self.targets, self.position_embeddings, self.batch_size)
            if state is not None:
                block.load_state(state)
            self.blocks.append(block)

    def _run(self, block: CalibrationBlock, hidden: Tensor, ratio: float) -> None:
        block.prepare(ratio)
        run_in_place(block, hidden, self.position_embeddings, self.batch_size)


def choose_bits(model: Model, samples: Tensor, progress: Progress) -> None:
    """Give every linear the bits that its sensitivity earns under the recipe's average."""
    few = samples[: max(SENSITIVITY_TOKENS // samples.shape[1], 1)]
    progress.phase("sensitivities", model.blocks, -(-len(few) // model.recipe.batch_size))
    found = sensitivities(model, few, seed=model.recipe.seed, on_block=lambda index: progress.step(float("nan")))
    bits = allocate(found.scores, found.sizes, model.recipe.average_bits)
    model.bits = {linear: bits[unit] for unit, linears in found.linears.items() for linear in linears}
    progress.phase_done()


def calibrate(model: Model, samples: Tensor, progress: Progress) -> Calibrated:
    """Run every pass of the model's recipe.

    Args:
        samples: int64 [nsamples, seqlen].
    """
    recipe = model.recipe
    calibrated = Calibrated()
    if recipe.end_to_end_epochs and recipe.learns_anything:
        check_memory(model)
    if recipe.average_bits is not None:
        choose_bits(model, samples, progress)
    sweeps = passes(recipe, model.blocks)
    total = sum(bool(each.epochs) for sweep in sweeps for each in sweep)
    batches = -(-len(samples) // recipe.batch_size)
    for sweep_passes in sweeps:
        sweep = _Sweep(model, calibrated, samples)
        for each in sweep_passes:
            sweep.advance(each.window, progress)
            if each.epochs:
                number = len(calibrated.results) + 1
                progress.window(number, total, each.window, each.ratio, each.epochs * batches)
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
                calibrated.results.append((each, result))
                progress.window_done(result)
            sweep.ratio = each.ratio
            for index, block in enumerate(sweep.blocks, sweep.first):
                calibrated.states[index] = block.state()
    if recipe.end_to_end_epochs and recipe.learns_anything:
        progress.phase("end to end", recipe.end_to_end_epochs * batches, model.blocks)
        tune(model, calibrated.states, samples, progress.step)
        progress.phase_done()
    return calibrated
