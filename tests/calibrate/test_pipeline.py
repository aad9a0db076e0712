import logging
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from calibrate.activations import Place
from calibrate.data import calibration_samples, token_stream
from calibrate.errors import UserError
from calibrate.evaluate import perplexity
from calibrate.methods import compose
from calibrate.model import Model
from calibrate.pipeline import Calibrated, Pass, _Sweep, calibrate, passes
from calibrate.recipe import Recipe
from calibrate.start import start_block
from calibrate.store import Store
from calibrate.windows import Window
from sliderquant_vllm.checkpoint import validate_checkpoint
from sliderquant_vllm.format import ActivationScheme, WeightScheme
from tests.calibrate.models import write_random_model
from tests.calibrate.test_experts import calibrate_and_export
from tests.helpers import TINY_LLAMA

CPU = torch.device("cpu")
EVERY = slice(None)


class Losses:
    """Records what the pipeline reports."""

    def __init__(self):
        self.windows, self.steps, self.results = [], [], []

    def resume(self, finished, tuning_steps, bits_chosen):
        self.resumed = (len(finished), tuning_steps)

    def window(self, number, total, window, ratio, steps):
        self.windows.append((number, total, str(window), ratio, steps))

    def phase(self, title, steps, size):
        self.windows.append((title, steps))

    def phase_done(self):
        pass

    def step(self, loss):
        self.steps.append(loss)

    def window_done(self, result):
        self.results.append(result)


def small_recipe(**changes) -> Recipe:
    settings = {
        "weights": WeightScheme(2),
        "nsamples": 6,
        "seqlen": 32,
        "epochs": 4,
        "shallow": 1,
        "deep": 1,
        "lora_rank": 4,
        "lr_lora": 5e-4,
        "learn_clip": True,
        "stages": (0.5, 1.0),
    }
    return Recipe(**settings | changes)


@pytest.fixture
def random_model(tmp_path):
    return write_random_model(tmp_path / "model", "llama")


def test_stage_orders():
    recipe = small_recipe(stages=(0.5, 1.0))
    half, whole = [[Pass(window, ratio, 2) for window in recipe.windows(3)] for ratio in (0.5, 1.0)]
    assert passes(recipe, 3) == [half, whole]
    inner = passes(replace(recipe, stage_order="inner"), 3)
    assert inner == [[each for pair in zip(half, whole, strict=True) for each in pair]]
    assert passes(replace(recipe, epochs=0), 3) == []


@pytest.mark.parametrize("order", ["outer", "inner"])
def test_every_pass_is_reported_and_the_loss_falls(random_model, order):
    recipe = small_recipe(stage_order=order, epochs=8)
    model = Model(random_model, recipe, CPU)
    samples = torch.randint(0, 96, (6, 32), generator=torch.Generator().manual_seed(0))
    progress = Losses()
    calibrated = calibrate(model, samples, progress)
    total = 2 * len(recipe.windows(3))
    assert [number for number, *_ in progress.windows] == list(range(1, total + 1))
    assert len(progress.steps) == sum(steps for *_, steps in progress.windows)
    assert set(calibrated.states) == {0, 1, 2}
    assert all(result.last_loss < result.first_loss for _, result in calibrated.results)


def test_the_same_recipe_gives_the_same_bytes(random_model):
    samples = torch.randint(0, 96, (6, 32))
    runs = [calibrate(Model(random_model, small_recipe(), CPU), samples, Losses()) for _ in range(2)]
    for index, state in runs[0].states.items():
        assert all(torch.equal(value, runs[1].states[index][name]) for name, value in state.items())
    other = calibrate(Model(random_model, small_recipe(seed=1), CPU), samples, Losses())
    assert not torch.equal(other.states[0]["layer.mlp.up_proj.lora_b"], runs[0].states[0]["layer.mlp.up_proj.lora_b"])


def test_inputs_that_are_not_finite_are_refused_by_name(random_model):
    recipe = small_recipe(range_start="search")
    model = Model(random_model, recipe, CPU)
    block = model.block(1)
    block.norms["post_attention_layernorm"].norm.weight.fill_(torch.inf)
    sweep = _Sweep(model, Store(), torch.randint(0, 96, (4, 32)), Place(CPU))
    with pytest.raises(UserError, match="model.layers.1.mlp.gate_proj: its inputs are not finite; check"):
        start_block(block, sweep.inputs, sweep.targets, sweep.share, sweep.position_embeddings, recipe)


@torch.no_grad()
def test_targets_are_the_16_bit_trajectory_and_inputs_the_quantized_one(random_model):
    recipe = small_recipe(lora_rank=0)
    model = Model(random_model, recipe, CPU)
    samples = torch.randint(0, 96, (4, 32))
    hidden = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)(
        samples, output_hidden_states=True
    ).hidden_states
    sweep = _Sweep(model, Store(), samples, Place(CPU))
    sweep.advance(Window(0, 1), Losses())
    torch.testing.assert_close(sweep.targets.read(EVERY), hidden[2], rtol=1e-4, atol=1e-4)
    assert torch.equal(sweep.inputs.read(EVERY), model.embed(samples))
    sweep.advance(Window(1, 1), Losses())
    torch.testing.assert_close(sweep.targets.read(EVERY), hidden[2], rtol=1e-4, atol=1e-4)
    block = model.block(0)
    block.prepare(1.0)
    expected = block(model.embed(samples), model.position_embeddings(32))
    torch.testing.assert_close(sweep.inputs.read(EVERY), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sweep.inputs.read(EVERY), hidden[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("order", ["outer", "inner"])
def test_blocks_that_leave_a_window_run_as_they_were_last_optimised(random_model, order, monkeypatch):
    """With the stages inside each window a block leaves it wholly quantized, though the next pass starts at half."""
    prepared = []
    advance = _Sweep.advance

    def recorded(sweep, window, *arguments):
        if sweep.first < window.first:
            prepared.append((str(window), sweep.ratio))
        advance(sweep, window, *arguments)

    monkeypatch.setattr(_Sweep, "advance", recorded)
    model = Model(random_model, small_recipe(stage_order=order, epochs=2), CPU)
    calibrate(model, torch.randint(0, 96, (6, 32)), Losses())
    whole = [("1-2", 1.0), ("2", 1.0)]
    assert prepared == (whole if order == "inner" else [("1-2", 0.5), ("2", 0.5), *whole])


def test_a_window_with_nothing_to_learn_is_passed_over(random_model):
    recipe = small_recipe(ignore=("lm_head", r"re:model\.layers\.0\..*"))
    progress = Losses()
    calibrated = calibrate(Model(random_model, recipe, CPU), torch.randint(0, 96, (6, 32)), progress)
    first, last = progress.results[0].first_loss, progress.results[0].last_loss
    assert first == last == pytest.approx(0, abs=1e-4)  # targets are kept in bf16
    assert not any(name.endswith("bounds") for name in calibrated.states[0])
    assert any(name.endswith("bounds") for name in calibrated.states[1])


@pytest.mark.parametrize(
    ("settings", "ignored", "rotated", "corrected"),
    [
        ({"activations": ActivationScheme(4), "preset": "fast"}, "re:.*down_proj", 0, 0),
        ({"activations": ActivationScheme(4), "preset": "fast"}, r"re:model\.layers\.0\..*", 2, 0),
        ({"method": "d2quant"}, r"re:model\.layers\.0\..*", 0, 4),
        ({"method": "d2quant"}, "re:.*(gate|up)_proj", 0, 0),
    ],
    ids=str,
)
def test_what_is_ignored_is_neither_rotated_nor_corrected(
    tmp_path, random_model, settings, ignored, rotated, corrected
):
    recipe = compose(WeightScheme(3), **settings, seqlen=32, ignore=("lm_head", ignored))
    calibrate_and_export(Model(random_model, recipe, CPU), tmp_path / "quantized")
    schemes = [linear.scheme for linear in validate_checkpoint(tmp_path / "quantized").linears.values()]
    assert sum(scheme.hadamard_block_size is not None for scheme in schemes) == rotated
    assert sum(scheme.added_bias for scheme in schemes) == corrected


def test_perplexity_agrees_with_transformers():
    model = Model(TINY_LLAMA, small_recipe(), CPU)
    stream = token_stream(model.tokenizer, __file__)
    windows = stream[: len(stream) // 64 * 64].view(-1, 64)
    reference = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.stack([reference(row[None], labels=row[None]).loss for row in windows]).mean().exp()
    assert perplexity(model, stream, 64) == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(UserError, match="at least 64 tokens, found 10"):
        perplexity(model, stream[:10], 64)


@pytest.mark.parametrize(
    ("weights", "activations", "at_most"),
    [(2, None, 0.9), (4, ActivationScheme(4), 0.99)],
    ids=["W2A16", "W4A4"],
)
def test_calibration_beats_round_to_nearest(text_file, weights, activations, at_most):
    """A short run on the trained model, judged on text it was not calibrated on."""
    learn = activations is not None
    recipe = Recipe(
        weights=WeightScheme(weights),
        activations=activations,
        rotate=learn,
        learn_scale=learn,
        learn_clip=True,
        lora_rank=4,
        nsamples=16,
        seqlen=128,
        epochs=6,
        lr_lora=5e-4,
    )
    model = Model(TINY_LLAMA, recipe, CPU)
    samples = calibration_samples(model.tokenizer, str(text_file), recipe.nsamples, recipe.seqlen, 0)
    held_out = token_stream(model.tokenizer, torch.optim.lr_scheduler.__file__)[: 60 * 128]
    plain = Model(TINY_LLAMA, replace(recipe, epochs=0, rotate=False), CPU)
    calibrated = calibrate(model, samples, Losses())
    full = perplexity(model, held_out, 128)
    rounded = perplexity(plain, held_out, 128, Calibrated())
    ours = perplexity(model, held_out, 128, calibrated)
    assert full < ours < at_most * rounded


def test_a_diverging_run_backs_off_and_then_says_why(random_model, caplog):
    samples = torch.randint(0, 96, (6, 32))
    model = Model(random_model, small_recipe(lr_lora=1e30), CPU)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match=r"blocks model.layers.0 .*lower --lr-rounding"),
    ):
        calibrate(model, samples, Losses())
    for rate, message in zip(("0.1", "0.01", "0.001"), caplog.messages, strict=True):
        assert f"with {rate} of the learning rates" in message
