"""What a run tells people: progress on the terminal, and the model card of the checkpoint."""

from __future__ import annotations

import json
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from calibrate.experts import token_table
from calibrate.model import Model
from calibrate.pipeline import Calibrated, passes
from calibrate.recipe import Recipe
from calibrate.reconstruct import WindowResult
from calibrate.windows import Window
from sliderquant_vllm.format import LinearScheme


class TerminalProgress:
    """A progress bar on a terminal; elsewhere one line per window.

    Work is counted in blocks times steps: every phase is worth what it computes.
    """

    def __init__(self, console: Console, recipe: Recipe, blocks: int, samples: int):
        batches = -(-samples // recipe.batch_size)
        self.work = sum(
            each.epochs * batches * _size(each.window) for sweep in passes(recipe, blocks) for each in sweep
        )
        if recipe.learns_anything:
            self.work += recipe.end_to_end_epochs * batches * blocks
        self.work += recipe.needs_start * blocks * batches
        self.blocks, self.batches = blocks, batches
        self.console, self.interactive = console, console.is_terminal
        self.started = time.monotonic()
        self.done = self.size = 0
        self.title = ""
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3e}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not self.interactive,
        )
        self.task = self.bar.add_task("", total=max(self.work, 1), loss=float("nan"))

    def __enter__(self) -> TerminalProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def phase(self, title: str, steps: int, size: int) -> None:
        self.title, self.size = title, size
        self.bar.update(self.task, description=title)

    def window(self, number: int, total: int, window: Window, ratio: float, steps: int) -> None:
        channels = "" if ratio == 1 else f", {ratio:.0%} of channels"
        self.phase(f"window {number}/{total} (blocks {window}{channels})", steps, _size(window))

    def step(self, loss: float) -> None:
        self.done += self.size
        self.bar.update(self.task, completed=self.done, loss=loss)

    def phase_done(self, first_loss: float | None = None, last_loss: float | None = None) -> None:
        if self.interactive:
            return
        elapsed = time.monotonic() - self.started
        # Steps of a window that was started again come on top of the plan.
        remaining = max(elapsed * (self.work / self.done - 1), 0) if self.done else 0
        losses = "" if first_loss is None else f": loss {first_loss:.3e} -> {last_loss:.3e}"
        line = f"{self.title}{losses}, elapsed {elapsed:.0f} s, ETA {remaining:.0f} s"
        self.console.print(line, highlight=False, soft_wrap=True)

    def window_done(self, result: WindowResult) -> None:
        self.phase_done(result.first_loss, result.last_loss)


def _size(window: Window) -> int:
    return window.last - window.first + 1


def model_card(model: Model, calibrated: Calibrated, calibration: dict) -> str:
    """Markdown with what was made, from what, how, and how to serve it."""
    recipe = model.recipe
    scheme = LinearScheme(recipe.weights, recipe.activations)
    settings = "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in recipe.to_dict().items())
    losses = "\n".join(
        f"| {number} | {each.window} | {each.ratio:g} | {result.first_loss:.4e} | {result.last_loss:.4e} |"
        for number, (each, result) in enumerate(calibrated.results, 1)
    )
    learned = f"""
## Reconstruction

Mean squared error at each window's output, averaged over its first and its last epoch.

| # | blocks | ratio | first | last |
|---|---|---|---|---|
{losses}
"""
    states = {index: calibrated.store.state(index) for index in range(model.blocks)}
    table = token_table({index: state for index, state in states.items() if state})
    experts = f"""
## Experts

Calibration tokens per expert; starved ones lean on their block's statistics.

{table}
"""
    perplexity = calibration.get("perplexity")
    quality = (
        f"""
## Quality

Perplexity on `{perplexity["dataset"]}`, windows of {perplexity["seqlen"]} tokens, as computed at calibration:
16-bit {perplexity["16-bit"]:.4f}, quantized {perplexity["quantized"]:.4f}.
"""
        if perplexity
        else ""
    )
    return f"""---
library_name: vllm
base_model: {calibration["model"]}
tags:
- sliderquant
- quantized
---

# {scheme} of {calibration["model"]}

Made by `python -m calibrate` ({recipe.method}). Serve it with

    vllm serve . --quantization sliderquant
{quality}
## Recipe

| setting | value |
|---|---|
{settings}

Calibration data: SHA-256 of the token ids {calibration["data_sha256"]}.
{learned if calibrated.results else ""}{experts if table else ""}"""
