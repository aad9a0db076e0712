"""What methods are worth on a trained model, on text that they were not calibrated on."""

from functools import partial
from pathlib import Path

import pytest
import torch

from calibrate.data import calibration_samples, token_stream
from calibrate.evaluate import perplexity
from calibrate.methods import compose
from calibrate.model import Model
from calibrate.pipeline import calibrate
from calibrate.recipe import parse_scheme
from tests.calibrate.outliers import write_outlier_model
from tests.calibrate.test_pipeline import Losses
from tests.helpers import TINY_LLAMA

CPU = torch.device("cpu")
SEQLEN = 128


@pytest.fixture(scope="module")
def outlier_model(tmp_path_factory):
    return write_outlier_model(TINY_LLAMA, tmp_path_factory.mktemp("outliers") / "model")


def judged(text, directory, scheme, method="sliderquant", preset=None, **chosen) -> float:
    """Perplexity of a model calibrated on 32 samples of the text."""
    recipe = compose(*parse_scheme(scheme, -1, False), method, preset, nsamples=32, seqlen=SEQLEN, **chosen)
    model = Model(directory, recipe, CPU)
    samples = calibration_samples(model.tokenizer, str(text), recipe.nsamples, SEQLEN, 0)
    held_out = token_stream(model.tokenizer, torch.optim.lr_scheduler.__file__)[: 60 * SEQLEN]
    return perplexity(model, held_out, SEQLEN, calibrate(model, samples, Losses()))


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """``judged`` on a large enough text, every combination once."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    sources = (pytest, torch.nn.modules.module, torch.nn.functional, torch._tensor)
    text.write_text("\n".join(Path(source.__file__).read_text() for source in sources))
    return partial(judged, text)


def test_injected_outliers_preserve_the_function(outlier_model):
    tokens = torch.arange(64).unsqueeze(0) * 13 % 2048
    logits = []
    for directory in (TINY_LLAMA, outlier_model):
        model = Model(directory, compose(*parse_scheme("W4A16", -1, False), "rtn"), CPU)
        hidden = model.embed(tokens)
        with torch.no_grad():
            for index in range(model.blocks):
                hidden = model.block(index)(hidden, model.position_embeddings(64))
            logits.append(model.head_module()(hidden).double())
    assert (logits[1] - logits[0]).norm() / logits[0].norm() < 1e-5


def test_outliers_break_round_to_nearest_and_not_us(measure, outlier_model):
    plain = measure(TINY_LLAMA, "W4A4", "rtn")
    assert measure(outlier_model, "W4A4", "rtn") > 3 * plain
    for scheme in ("W4A4", "W4A16", "W2A16"):
        ours, with_outliers = (measure(model, scheme, preset="fast") for model in (TINY_LLAMA, outlier_model))
        assert with_outliers < 1.1 * ours, scheme


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16", "W2A16", "W4A4"])
def test_the_start_alone_is_no_worse_than_any_baseline(measure, scheme):
    """GPTQ is a part of the start and close to it; half a percent is what another sample of text changes."""
    ours = measure(TINY_LLAMA, scheme, preset="fast")
    for method in ("rtn", "awq", "smoothquant", "gptq"):
        assert ours < 1.005 * measure(TINY_LLAMA, scheme, method), method


def test_each_step_of_gptq_improves_on_the_one_before(measure):
    steps = ({}, {"range_start": "search"}, {"range_start": "search", "rounding_start": "gptq"})
    nearest, searched, compensated = (measure(TINY_LLAMA, "W2A16", "rtn", **step) for step in steps)
    assert compensated < 0.9 * searched < 0.9 * 0.7 * nearest


def test_learning_improves_on_the_start(measure):
    start = measure(TINY_LLAMA, "W2A16", preset="fast")
    assert measure(TINY_LLAMA, "W2A16", epochs=4) < 0.98 * start
    learned = {"learn_rounding": True, "learn_clip": True, "end_to_end_epochs": 6}
    assert measure(TINY_LLAMA, "W2A16", preset="fast", **learned) < 0.98 * start


def test_a_four_bit_cache_costs_a_little(measure):
    plain = measure(TINY_LLAMA, "W4A4", preset="fast")
    with_cache = measure(TINY_LLAMA, "W4A4", preset="fast", kv_bits=4)
    assert plain < with_cache < 1.1 * plain


def test_bits_by_sensitivity_beat_the_same_bits_everywhere(measure):
    assert measure(TINY_LLAMA, "W3A16", preset="fast", average_bits=3.0) < measure(TINY_LLAMA, "W3A16", preset="fast")
