"""Streams the blocks of a model through the windows and keeps what they learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from calibrate import parallel
from calibrate.activations import Activations, Place
from calibrate.allocation import allocate, sensitivities, sensitivity_samples
from calibrate.blocks import CalibrationBlock, run_in_place
from calibrate.end_to_end import TUNING, check_memory, tune
from calibrate.experts import counting
from calibrate.model import Model
from calibrate.parallel import Share
from calibrate.recipe import Recipe
from calibrate.reconstruct import WindowResult, reconstruct
from calibrate.start import start_block
from calibrate.store import State, Store
from calibrate.windows import Window

# What the initial values of a block cost, in steps of it over all samples.
START_PASSES = 2


class Progress(Protocol):
    """Where the pipeline reports to. A step counts as ``size`` blocks of one batch."""

    def resume(self, finished: list[Pass], tuning_steps: int, bits_chosen: bool) -> None: ...
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

    store: Store = field(default_factory=Store)
    results: list[tuple[Pass, WindowResult]] = field(default_factory=list)

    @property
    def states(self) -> dict[int, State]:
        """Those that the store holds in memory."""
        return self.store.states

    def finished_block(self, model: Model, index: int) -> CalibrationBlock:
        """A block with what it learned, prepared, its norms where the served dtype holds them exactly."""
        block = model.block(index)
        if (state := self.store.state(index)) is not None:
            block.load_state(state)
        _finish(block, model)
        return block


def passes(recipe, blocks: int) -> list[list[Pass]]:
    """All passes, cut into sweeps; each sweep goes over the model once, from its first block on."""
    if not recipe.slides:
        return [[Pass(Window(index, index), 1.0, 0) for index in range(blocks)]] if recipe.needs_start else []
    windows = recipe.windows(blocks)
    stages = list(zip(recipe.stages, recipe.stage_epochs(), strict=True))
    if recipe.stage_order == "inner":
        return [[Pass(window, ratio, epochs) for window in windows for ratio, epochs in stages]]
    return [[Pass(window, ratio, epochs) for window in windows] for ratio, epochs in stages]


@torch.no_grad()
def _finish(block: CalibrationBlock, model: Model) -> None:
    block.fold_gains(model.dtype)
    block.prepare(ratio=1.0)


class _Sweep:
    """The two streams of one sweep: quantized inputs at the window's start, 16-bit targets at its end.

    A target depends on the 16-bit trajectory alone and windows never end earlier than the one before, so every
    block runs in 16 bits once a sweep, however many windows it is part of.
    """

    def __init__(self, model: Model, store: Store, samples: Tensor, place: Place):
        self.model, self.store = model, store
        self.share = Share(len(samples), model.recipe.batch_size)
        self.inputs = model.activations(samples[self.share.numbers], place)
        self.targets = self.inputs.clone()
        self.position_embeddings = model.position_embeddings(samples.shape[1])
        self.blocks: list[CalibrationBlock] = []
        self.first = 0
        self.ratio = 1.0  # at which the blocks of the window were last optimised
        self.stored = {"inputs": 0, "targets": 0}  # blocks that each stream had passed when it was last stored

    def put(self, learned: bool) -> None:
        """Store what this window left, if its blocks learned, and what going on behind it takes."""
        for index, block in enumerate(self.blocks if learned else (), self.first):
            self.store.put_state(index, block.state())
        passed = {"inputs": self.first, "targets": self.first + len(self.blocks)}
        for name in passed:
            if self.stored[name] != passed[name]:
                self.store.put_stream(name, getattr(self, name))
        self.stored = passed

    def restore(self) -> None:
        """Give the blocks of the window the states that they had when they were last put."""
        for index, block in enumerate(self.blocks, self.first):
            block.load_state(self.store.state(index))

    def load(self, window: Window, ratio: float) -> None:
        """Go back to where ``put`` was called behind this window."""
        self.first, self.ratio = window.first, ratio
        self.stored = {"inputs": window.first, "targets": window.last + 1}
        for name, passed in self.stored.items():
            if passed:
                self.store.load_stream(name, getattr(self, name))
        self.blocks = [self.model.block(index) for index in range(window.first, window.last + 1)]
        self.restore()

    def advance(
        self, window: Window, progress: Progress, on_leave: Callable[[int, CalibrationBlock], None] = lambda *_: None
    ) -> None:
        """Move both streams to a window: inputs through blocks quantized so far, targets through 16-bit ones.

        A block without a state gets its initial values behind the blocks before it, as far as they are learned by then.
        ``on_leave`` gets every block that no later window of the sweep has.
        """
        while self.first < window.first:
            self._run(self.blocks[0], self.inputs, self.ratio)
            on_leave(self.first, self.blocks.pop(0))
            self.first += 1
        entry = None  # quantized inputs of the next block
        while self.first + len(self.blocks) <= window.last:
            index = self.first + len(self.blocks)
            block, state = self.model.block(index), self.store.state(index)
            starts = state is None and self.model.recipe.needs_start
            if starts:
                progress.phase(f"starting values of block {index}", 1, START_PASSES * self.share.batches)
                if entry is None:
                    entry = self.inputs.clone() if self.blocks else self.inputs
                    for before in self.blocks:
                        self._run(before, entry, self.ratio)
                start_block(block, entry, self.targets, self.share, self.position_embeddings, self.model.recipe)
                progress.step(float("nan"))
                if index < window.last:
                    entry = entry.clone() if entry is self.inputs else entry
                    self._run(block, entry, ratio=1.0)
                block.release()
            with counting(None if starts else block.experts):
                run_in_place(block, self.targets, self.position_embeddings)
            if not starts and block.experts is not None:
                parallel.add_up(block.experts.tokens)
            if state is None:
                self.store.put_state(index, block.state())
            else:
                block.load_state(state)
            self.blocks.append(block)

    @torch.no_grad()
    def _run(self, block: CalibrationBlock, hidden: Activations, ratio: float) -> None:
        block.prepare(ratio)
        run_in_place(block, hidden, self.position_embeddings)


@dataclass(slots=True)
class Position:
    """How far a run has come: passes done of a sweep, after all those before it; then steps of the tuning."""

    sweep: int = 0
    passes: int = 0
    bits: dict[str, int] = field(default_factory=dict)
    results: list[tuple[Pass, WindowResult]] = field(default_factory=list)
    tuning_steps: int = 0
    tuned: bool = False

    def to_dict(self) -> dict[str, Any]:
        losses = [(result.first_loss, result.last_loss) for _, result in self.results]
        return {
            "sweep": self.sweep,
            "passes": self.passes,
            "bits": self.bits,
            "losses": losses,
            "tuning_steps": self.tuning_steps,
            "tuned": self.tuned,
        }

    @classmethod
    def of(cls, stored: dict[str, Any] | None, sweeps: list[list[Pass]]) -> Position:
        """The start of a run, or what ``to_dict`` gave."""
        if stored is None:
            return cls()
        learning = [each for sweep in sweeps for each in sweep if each.epochs]
        results = [(each, WindowResult(*losses)) for each, losses in zip(learning, stored["losses"], strict=False)]
        return cls(**{name: value for name, value in stored.items() if name != "losses"}, results=results)


def sensitivity_batches(recipe: Recipe, samples: int) -> int:
    return -(-sensitivity_samples(samples, recipe.seqlen) // recipe.batch_size)


def choose_bits(model: Model, samples: Tensor, progress: Progress) -> None:
    """Give every linear the bits that its sensitivity earns under the recipe's average."""
    few = samples[: sensitivity_samples(*samples.shape)]
    progress.phase("sensitivities", model.blocks, sensitivity_batches(model.recipe, len(samples)))
    found = sensitivities(model, few, seed=model.recipe.seed, on_block=lambda index: progress.step(float("nan")))
    bits = allocate(found.scores, found.sizes, model.recipe.average_bits)
    model.bits = {linear: bits[unit] for unit, linears in found.linears.items() for linear in linears}
    progress.phase_done()


def calibrate(
    model: Model,
    samples: Tensor,
    progress: Progress,
    store: Store | None = None,
    on_finished: Callable[[int, CalibrationBlock], None] | None = None,
    place: Place | None = None,
) -> Calibrated:
    """Run every pass of the model's recipe, or what is left of it behind the position of the store.

    Args:
        samples: int64 [nsamples, seqlen].
        store: keeps what was found; by default in memory.
        on_finished: called once with every block that nothing changes any more, in order; the store forgets its state.
        place: of the hidden states; by default on the device, in bf16.
    """
    recipe = model.recipe
    calibrated = Calibrated(store or Store())
    store, place = calibrated.store, place or Place(model.device, dtype=torch.bfloat16)
    if recipe.tunes:
        check_memory(model, place.checkpointing)
    sweeps = passes(recipe, model.blocks)
    total = sum(bool(each.epochs) for sweep in sweeps for each in sweep)
    batches = -(-len(samples) // recipe.batch_size)
    at = Position.of(store.position, sweeps)
    calibrated.results = at.results
    model.bits = at.bits
    finished = [len(sweep) for sweep in sweeps[: at.sweep]] + [at.passes]
    passed = [each for sweep, count in zip(sweeps, finished, strict=False) for each in sweep[:count]]
    progress.resume(passed, at.tuning_steps, bits_chosen=bool(model.bits))
    if recipe.average_bits is not None and not model.bits:
        choose_bits(model, samples, progress)
        model.bits = parallel.from_first(model.bits)
        store.commit(Position(bits=model.bits).to_dict())

    def hand_over(index: int, block: CalibrationBlock) -> None:
        on_finished(index, block)
        store.drop_state(index, keep=("tokens", "starved") if block.experts is not None else ())

    def leave(index: int, block: CalibrationBlock) -> None:
        if on_finished is not None:
            _finish(block, model)
            hand_over(index, block)

    for number, sweep_passes in enumerate(sweeps):
        if number < at.sweep:
            continue
        is_last = number == len(sweeps) - 1 and not recipe.tunes
        sweep = _Sweep(model, store, samples, place)
        done = at.passes if number == at.sweep else 0
        if done:
            sweep.load(sweep_passes[done - 1].window, sweep_passes[done - 1].ratio)
        for each in sweep_passes[done:]:
            sweep.advance(each.window, progress, leave if is_last else lambda *_: None)
            if each.epochs:
                progress.window(len(at.results) + 1, total, each.window, each.ratio, each.epochs * batches)
                result = reconstruct(
                    sweep.blocks,
                    sweep.restore,
                    sweep.inputs,
                    sweep.targets,
                    sweep.share,
                    sweep.position_embeddings,
                    recipe,
                    each.ratio,
                    each.epochs,
                    seed=recipe.seed * 100_003 + len(at.results) + 1,
                    on_step=progress.step,
                )
                at.results.append((each, result))
                progress.window_done(result)
            sweep.ratio = each.ratio
            sweep.put(learned=bool(each.epochs))
            done += 1
            store.commit(Position(number, done, model.bits, at.results).to_dict())
        if is_last:
            for index, block in enumerate(sweep.blocks, sweep.first):
                leave(index, block)
        del sweep  # what comes next needs the memory of its blocks and hidden states
    if recipe.tunes and not at.tuned:

        def commit(steps: int, tuned: bool = False) -> None:
            store.commit(Position(len(sweeps), 0, model.bits, at.results, steps, tuned).to_dict())

        progress.phase("end to end", recipe.end_to_end_epochs * batches - at.tuning_steps, model.blocks)
        tune(model, store, samples, progress.step, place.checkpointing, at.tuning_steps, commit)
        progress.phase_done()
        store.drop_tensors(TUNING)
        commit(recipe.end_to_end_epochs * batches, tuned=True)
    if on_finished is not None and (recipe.tunes or not sweeps):
        for index in range(model.blocks):
            hand_over(index, calibrated.finished_block(model, index))
    return calibrated
