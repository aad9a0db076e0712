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

from calibrate.pipeline import Calibrated, passes
from calibrate.recipe import Recipe
from calibrate.reconstruct import WindowResult
from calibrate.windows import Window
from sliderquant_vllm.format import LinearScheme


class TerminalProgress:
    """A progress bar on a terminal; elsewhere one line per window."""

    def __init__(self, console: Console, recipe: Recipe, blocks: int, samples: int):
        batches = -(-samples // recipe.batch_size)
        self.work = sum(
            each.epochs * batches * _size(each.window) for sweep in passes(recipe, blocks) for each in sweep
        )
        self.console, self.interactive = console, console.is_terminal
        self.started = time.monotonic()
        self.done = 0
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

    def window(self, number: int, total: int, window: Window, ratio: float, steps: int) -> None:
        self.title = f"window {number}/{total} (blocks {window}, {ratio:.0%} of channels)"
        self.size = _size(window)
        self.bar.update(self.task, description=self.title)

    def step(self, loss: float) -> None:
        self.done += self.size
        self.bar.update(self.task, completed=self.done, loss=loss)

    def window_done(self, result: WindowResult) -> None:
        elapsed = time.monotonic() - self.started
        # Steps of a window that was started again come on top of the plan.
        remaining = max(elapsed * (self.work / self.done - 1), 0) if self.done else 0
        line = f"{self.title}: loss {result.first_loss:.3e} -> {result.last_loss:.3e}"
        if not self.interactive:
            self.console.print(
                f"{line}, elapsed {elapsed:.0f} s, ETA {remaining:.0f} s", highlight=False, soft_wrap=True
            )


def _size(window: Window) -> int:
    return window.last - window.first + 1


def model_card(recipe: Recipe, calibrated: Calibrated, calibration: dict) -> str:
    """Markdown with what was made, from what, how, and how to serve it."""
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
{learned if calibrated.results else ""}"""
