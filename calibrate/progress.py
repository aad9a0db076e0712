"""What a run tells while it lasts: a bar on a terminal, a line per window elsewhere, and a log for machines."""

from __future__ import annotations

import json
import math
import resource
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from calibrate.pipeline import START_PASSES, Pass, passes, sensitivity_batches
from calibrate.recipe import Recipe
from calibrate.reconstruct import WindowResult
from calibrate.windows import Window


class RunProgress:
    """Shows window, loss against that at the window's start, tokens per second, time left and peak memory.

    Work is counted in blocks times steps: every phase is worth what it computes.

    Args:
        log: a file that gets a JSON object per line for every window and phase, behind what is there already.
    """

    def __init__(self, console: Console, recipe: Recipe, blocks: int, samples: int, log: Path):
        self.recipe, self.blocks, self.log = recipe, blocks, log
        self.batches = -(-samples // recipe.batch_size)
        self.tokens = min(recipe.batch_size, samples) * recipe.seqlen  # of a step
        self.work = self._work([each for sweep in passes(recipe, blocks) for each in sweep])
        if recipe.tunes:
            self.work += recipe.end_to_end_epochs * self.batches * blocks
        self.choosing = 0 if recipe.average_bits is None else blocks * sensitivity_batches(recipe, samples)
        self.work += self.choosing
        self.done = self.resumed = self.size = self.steps = 0
        self.console, self.interactive = console, console.is_terminal and not console.quiet
        self.started = self.phase_started = time.monotonic()
        self.title, self.first_loss = "", math.nan
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
        self.bar = Progress(
            SpinnerColumn(), *columns, TimeElapsedColumn(), console=console, disable=not self.interactive
        )
        self.task = self.bar.add_task("", total=max(self.work, 1), state="")

    def _work(self, some: list[Pass]) -> int:
        """Of passes and of the initial values of the blocks that they reach."""
        learned = sum(each.epochs * self.batches * _size(each.window) for each in some)
        reached = max((each.window.last + 1 for each in some), default=0)
        return learned + self.recipe.needs_start * reached * self.batches * START_PASSES

    def __enter__(self) -> RunProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def resume(self, finished: list[Pass], tuning_steps: int, bits_chosen: bool) -> None:
        self.done = self.resumed = self._work(finished) + tuning_steps * self.blocks + bits_chosen * self.choosing
        self.bar.update(self.task, completed=self.done)

    def phase(self, title: str, steps: int, size: int) -> None:
        self.title, self.size, self.steps = title, size, 0
        self.first_loss, self.phase_started = math.nan, time.monotonic()
        self.bar.update(self.task, description=title)

    def window(self, number: int, total: int, window: Window, ratio: float, steps: int) -> None:
        channels = "" if ratio == 1 else f", {ratio:.0%} of channels"
        self.phase(f"window {number}/{total} (blocks {window}{channels})", steps, _size(window))

    def step(self, loss: float) -> None:
        self.done += self.size
        self.steps += 1
        if self.steps == 1:
            self.first_loss = loss
        if self.interactive:
            self.bar.update(self.task, completed=self.done, state=self._state(loss))

    def _state(self, loss: float) -> str:
        shown = f"loss {loss:.3e} ({loss / self.first_loss:.2f} of the first)  " if math.isfinite(loss) else ""
        speed = f"{self.tokens_per_second:,.0f} tokens/s  " if math.isfinite(loss) else ""
        memory = "  ".join(f"{name} {size / 1e9:.1f} GB" for name, size in peak_memory().items())
        return f"{shown}{speed}{memory}  ETA {_clock(self.remaining)}"

    @property
    def tokens_per_second(self) -> float:
        return self.steps * self.tokens / max(time.monotonic() - self.phase_started, 1e-9)

    @property
    def remaining(self) -> float:
        """Seconds, as fast as it went since this process started."""
        here = self.done - self.resumed
        # Steps of a window that was started again come on top of the plan.
        left = max(self.work - self.done, 0)
        return (time.monotonic() - self.started) * left / here if here else math.nan

    def phase_done(self, result: WindowResult | None = None) -> None:
        now = time.monotonic()
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "phase": self.title,
            "seconds": round(now - self.phase_started, 3),
            "steps": self.steps,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "remaining_seconds": round(self.remaining, 1) if math.isfinite(self.remaining) else None,
            "peak_bytes": peak_memory(),
        }
        losses = ""
        if result is not None:
            entry |= {"first_loss": result.first_loss, "last_loss": result.last_loss}
            losses = f": loss {result.first_loss:.3e} -> {result.last_loss:.3e}"
        if not self.console.quiet:
            with self.log.open("a") as log:
                log.write(json.dumps(entry) + "\n")
        if not self.interactive:
            elapsed = now - self.started
            line = f"{self.title}{losses}, elapsed {_clock(elapsed)}, ETA {_clock(self.remaining)}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def window_done(self, result: WindowResult) -> None:
        self.phase_done(result)


def peak_memory() -> dict[str, int]:
    """Bytes: the process on the host so far, and on the GPU in use."""
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["GPU"] = torch.cuda.max_memory_allocated()
    return found


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _size(window: Window) -> int:
    return window.last - window.first + 1
