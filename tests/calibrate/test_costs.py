"""What the estimate of a run counts is what the run does, and times follow from the counts."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from benchmarks.cells import Silent
from calibrate import end_to_end, pipeline
from calibrate.cli import parse_arguments, recipe_from
from calibrate.costs import Costs, Counts, Sizes, counts, phases
from calibrate.model import Model
from calibrate.store import Store

CPU = torch.device("cpu")
WINDOWS = ["--shallow", "2", "--deep", "1", "--window", "2", "--stride", "1", "--epochs", "2"]
RUNS = {
    "windows": ["--w4a4", *WINDOWS],
    "fast": ["--w2a16", "--preset", "fast"],
    "two sweeps": ["--w4a4", "--preset", "paper", *WINDOWS, "--stages", "0.5", "1"],
    "start and two sweeps": ["--w4a16", *WINDOWS, "--stages", "0.5", "1"],
    "end to end": ["--w2a16", *WINDOWS, "--end-to-end-epochs", "2"],
    "nearest": ["--w4a16", "--method", "rtn"],
}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_counted_is_what_a_run_does(source, name, monkeypatch):
    recipe = recipe_from(parse_arguments(["--model", "x", *RUNS[name], "--nsamples", "2", "--seqlen", "8"]))
    model, found = Model(source, recipe, CPU), Counts()

    def counting(owner, attribute, of):
        original = getattr(owner, attribute)

        def counted(*args, **kwargs):
            field, number = of(*args)
            setattr(found, field, getattr(found, field) + number)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, counted)

    def ran(block, *_):
        prepared = any(linear.computed is not None for linear in block.linears.values())
        return ("quantized" if prepared else "plain"), 1

    counting(Model, "block", lambda *_: ("built", 1))
    counting(pipeline, "start_block", lambda *_: ("started", 1))
    counting(pipeline, "run_in_place", ran)
    counting(end_to_end, "run_in_place", ran)
    counting(Store, "put_state", lambda *_: ("states", 1))
    counting(Store, "put_stream", lambda *_: ("streams", 1))
    calibrated = pipeline.calibrate(model, torch.randint(0, 96, (2, 8)), Silent(), on_finished=lambda *_: None)
    found.epochs = sum(each.epochs * (each.window.last - each.window.first + 1) for each, _ in calibrated.results)
    found.tuned = recipe.end_to_end_epochs * model.blocks
    assert found == counts(recipe, model.blocks)


def test_times_follow_from_costs_and_counts():
    ones = Costs(**{each.name: 1.0 for each in fields(Costs)})
    recipe = recipe_from(parse_arguments(["--model", "x", *RUNS["windows"], "--nsamples", "7", "--batch-size", "3"]))
    count, sizes = counts(recipe, 5), Sizes(blocks=5, outer=11, stream=13, checkpoint=17)
    found = phases(ones, recipe, sizes)
    assert found["windows"] == count.epochs * (7 + 3)  # samples and steps
    assert found["starting values"] == 5 * (1 + 4 * (1 + 7) + 7)
    assert found["writing and checking"] == 5 + 11 + 2 * 17
    assert found.keys().isdisjoint({"end to end", "perplexity", "sensitivities"})
    further = replace(recipe, average_bits=3.5, end_to_end_epochs=2)
    more = phases(ones, further, replace(sizes, evaluated=3))
    assert more["end to end"] == 2 * (5 * (7 + 3) + 4 * 7)
    assert more["perplexity"] == 2 * (5 * 2 + 3 * (5 + 1))
    assert phases(replace(ones, sample=2.0), recipe, sizes)["windows"] == count.epochs * (2 * 7 + 3)
    nearest = recipe_from(parse_arguments(["--model", "x", *RUNS["nearest"]]))
    assert phases(ones, nearest, sizes).keys() == {"reading and transforming", "writing and checking"}
