import logging
import math

import pytest
import torch

from calibrate import end_to_end
from calibrate.end_to_end import check_memory, divergence, tune
from calibrate.errors import UserError
from calibrate.memory import Shapes, tuning_bytes
from calibrate.methods import compose
from calibrate.model import Model
from calibrate.pipeline import calibrate
from calibrate.store import Store, run_directory
from sliderquant_vllm.format import WeightScheme
from tests.calibrate.models import write_random_model
from tests.calibrate.test_pipeline import Losses

SAMPLES = torch.randint(0, 96, (6, 32), generator=torch.Generator().manual_seed(0))


def small_model(directory, **chosen) -> Model:
    settings = {"nsamples": 6, "seqlen": 32, "learn_rounding": True, "learn_clip": True, "end_to_end_epochs": 4}
    recipe = compose(WeightScheme(3), preset="fast", **settings | chosen)
    return Model(write_random_model(directory / "model", "llama"), recipe, torch.device("cpu"))


def test_divergence_is_that_of_float64():
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    p, q = (logits.double().softmax(-1) for logits in (teacher, student))
    torch.testing.assert_close(divergence(student, teacher).double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)


def test_tuning_lowers_the_divergence_and_changes_every_block(tmp_path):
    model = small_model(tmp_path, lr_end_to_end=5.0, end_to_end_epochs=8)
    progress = Losses()
    calibrated = calibrate(model, SAMPLES, progress)
    steps = [loss for loss in progress.steps if not math.isnan(loss)]
    assert len(steps) == 8 * 2 and sum(steps[-2:]) < 0.9 * sum(steps[:2])
    before = calibrate(small_model(tmp_path / "again", end_to_end_epochs=0), SAMPLES, Losses())
    for index, state in calibrated.states.items():
        assert not torch.equal(state["layer.mlp.up_proj.offset"], before.states[index]["layer.mlp.up_proj.offset"])


def test_a_diverging_tuning_keeps_what_it_was_given(tmp_path, caplog):
    model = small_model(tmp_path, lr_end_to_end=1e38)
    store = Store()
    with caplog.at_level(logging.WARNING):
        tune(model, store, SAMPLES, lambda loss: None)
    assert not store.states and "--lr-end-to-end" in caplog.text


def test_a_tuning_that_dies_goes_on_behind_the_last_step_it_kept(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    class Dying(Losses):
        def step(self, loss):
            super().step(loss)
            if sum(not math.isnan(each) for each in self.steps) == 6:
                raise Killed

    monkeypatch.setattr(end_to_end, "KEEP_SECONDS", 0)
    monkeypatch.setattr(end_to_end, "KEEP_SHARE", math.inf)
    model = small_model(tmp_path, learn_norms=True)
    whole, died, resumed = Losses(), Dying(), Losses()
    expected = calibrate(model, SAMPLES, whole).states
    with pytest.raises(Killed), run_directory(tmp_path / "out", {}, restart=False) as run:
        calibrate(model, SAMPLES, died, run)
    with run_directory(tmp_path / "out", {}, restart=False) as run:
        assert run.position["tuning_steps"] == 5 and not run.position["tuned"]
        calibrate(model, SAMPLES, resumed, run)
        assert resumed.resumed == (3, 5) and resumed.steps == whole.steps[-3:]
        for index, state in expected.items():
            kept = run.state(index)
            assert all(torch.equal(value, kept[name]) for name, value in state.items())
        assert not list(run.folder.glob("tuning*"))


def test_a_model_that_does_not_fit_is_refused_before_any_work(tmp_path, monkeypatch):
    whole = tuning_bytes(model := small_model(tmp_path), [Shapes.of(model, index) for index in range(3)], False)
    monkeypatch.setattr(end_to_end, "host_memory", lambda kind: whole - 1)
    progress = Losses()
    with pytest.raises(UserError, match=r"keeps all 3 blocks in memory, about [\d.]+ GB; cpu has .*set it to 0"):
        calibrate(model, SAMPLES, progress)
    assert not progress.windows
    check_memory(model, checkpointing=True)


def test_recentring_keeps_every_code_and_leaves_no_weight_at_an_edge(tmp_path):
    block = small_model(tmp_path).block(1)
    with torch.no_grad():
        for linear in block.linears.values():
            linear.offset.uniform_(-1, 1)
            linear.clip.uniform_(0.6, 1)
    before, _ = block.quantized()
    block.recenter()
    after, _ = block.quantized()
    for path, linear in block.linears.items():
        assert all(map(torch.equal, before[path], after[path]))
        codes, scale, zero_point = (tensor.float() for tensor in after[path])
        position = linear.effective(None, None)[0] / scale + zero_point
        inside = (position > 0) & (position < 7)
        assert (position - codes)[inside].abs().max() < 0.45
