import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from calibrate.model import Model
from calibrate.pipeline import calibrate, passes
from calibrate.progress import RunProgress, peak_memory
from calibrate.recipe import Recipe
from calibrate.reconstruct import WindowResult
from calibrate.windows import Window
from sliderquant_vllm.format import WeightScheme
from tests.calibrate.models import write_random_model

FIRST = Window(0, 0)
RECIPE = Recipe(weights=WeightScheme(4), learn_clip=True, epochs=2, batch_size=3, seqlen=10, shallow=1, deep=1)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("calibrate.progress.time.monotonic", lambda: now[0])
    return now


def shown(path, terminal=False, quiet=False, recipe=RECIPE, blocks=4) -> tuple[RunProgress, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, quiet=quiet, width=200)
    return RunProgress(console, recipe, blocks, samples=6, log=path / "log.jsonl"), text


def run_window(progress, clock, number=1, window=FIRST, seconds=8.0) -> None:
    progress.window(number, 4, window, 1.0, 4)
    for loss in (4.0, 3.0, 2.0, 1.0):
        clock[0] += seconds / 4
        progress.step(loss)
    progress.window_done(WindowResult(3.5, 1.5))


def test_time_left_is_of_the_whole_run_and_in_the_log(tmp_path, clock):
    progress, text = shown(tmp_path)
    total = sum(each.epochs * 2 * (each.window.last - each.window.first + 1) for each in passes(RECIPE, 4)[0])
    assert progress.work == total
    run_window(progress, clock)
    expected = 8 * (total - 4) / 4
    assert progress.remaining == pytest.approx(expected)
    entry = json.loads((tmp_path / "log.jsonl").read_text())
    assert entry["phase"] == "window 1/4 (blocks 0)" and entry["seconds"] == 8
    assert (entry["first_loss"], entry["last_loss"], entry["steps"]) == (3.5, 1.5, 4)
    assert entry["tokens_per_second"] == 4 * 3 * 10 / 8
    assert entry["remaining_seconds"] == pytest.approx(expected)
    assert entry["peak_bytes"]["host"] == pytest.approx(peak_memory()["host"], rel=0.5)
    assert "loss 3.500e+00 -> 1.500e+00, elapsed 0:08, ETA" in text.getvalue()


def test_what_another_process_did_takes_no_time(tmp_path, clock):
    progress, _ = shown(tmp_path)
    first, second, *_ = passes(RECIPE, 4)[0]
    progress.resume([first], 0, False)
    assert math.isnan(progress.remaining)
    run_window(progress, clock, 2, second.window)
    size = second.window.last - second.window.first + 1
    assert progress.remaining == pytest.approx(8 * (progress.work - 4 - 4 * size) / (4 * size))


def test_steps_of_the_tuning_that_another_process_did_count(tmp_path, clock):
    recipe = replace(RECIPE, end_to_end_epochs=2)
    progress, _ = shown(tmp_path, recipe=recipe)
    everything = [each for sweep in passes(recipe, 4) for each in sweep]
    progress.resume(everything, 3, False)
    assert progress.work - progress.done == (2 * progress.batches - 3) * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"rounding_start": "gptq"},
        {"rounding_start": "gptq", "epochs": 0},
        {"stages": (0.5, 1.0), "stage_order": "inner"},
        {"average_bits": 3.5},
        {"average_bits": 3.5, "end_to_end_epochs": 1},
    ],
    ids=str,
)
def test_all_work_is_done_at_the_end_and_all_that_is_done_was_planned(tmp_path, changes):
    recipe = replace(RECIPE, nsamples=8, seqlen=32, **changes)
    model = Model(write_random_model(tmp_path / "model", "llama"), recipe, torch.device("cpu"))
    samples = torch.randint(0, 96, (8, 32))
    progress = RunProgress(Console(quiet=True), recipe, model.blocks, len(samples), tmp_path / "log.jsonl")
    calibrate(model, samples, progress)
    assert progress.done == progress.work > 0


def test_a_terminal_gets_a_bar_and_no_lines(tmp_path, clock):
    progress, text = shown(tmp_path, terminal=True)
    with progress:
        run_window(progress, clock)
        state = progress.bar.tasks[0].fields["state"]
    assert "loss 1.000e+00 (0.25 of the first)" in state and "15 tokens/s" in state and "ETA" in state
    assert "->" not in text.getvalue()


def test_other_ranks_are_quiet(tmp_path, clock):
    progress, text = shown(tmp_path, quiet=True)
    run_window(progress, clock)
    assert not text.getvalue() and not (tmp_path / "log.jsonl").exists()
