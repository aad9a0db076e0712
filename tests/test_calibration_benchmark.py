import json
import shutil

import pytest
import torch

from benchmarks import calibration
from tests.calibrate.models import write_random_model
from tests.helpers import TINY_LLAMA

SOURCE = torch.functional.__file__


@pytest.fixture
def command(tmp_path):
    model = write_random_model(tmp_path / "model", "llama", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, model)
    argv = ["--models", str(model), "--nsamples", "2", "--seqlen", "32", "--preset", "fast", "--threads", "1"]
    return [*argv, "--calibration", SOURCE, "--evaluation", __file__, "--output-dir", str(tmp_path)]


def test_seconds_stand_beside_the_yardstick_and_the_accuracy(tmp_path, command, capsys):
    assert calibration.main([*command, "--schemes", "W4A16"]) == 0
    (found,) = json.loads((tmp_path / "calibration.json").read_text())
    assert found["cpu_seconds"] > found["yardstick_seconds"] > 0
    assert -0.2 < found["excess"] < 1
    printed = capsys.readouterr().out
    assert f"{found['cpu_seconds']:.1f}" in printed and found["yardstick"] in printed


def test_shares_of_the_profile_add_up(tmp_path, command, capsys):
    assert calibration.main([*command, "--schemes", "W4A4", "--profile"]) == 0
    (found,) = json.loads((tmp_path / "profile.json").read_text())
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["matrix products"] > 0.001 and found["shares"]["activation quantizer"] > 0.001
    assert "matrix products" in capsys.readouterr().out
