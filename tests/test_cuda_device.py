"""What times and checks the CUDA kernels on a GPU, where there is none: it has to bring back whatever it can."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from benchmarks import gpu_kernels, gpu_ops
from tests.cuda import ROOT

# A python that knows no GPU but says that it does, and stages that fail or hang as $FAILING and $HANGING say.
PYTHON = """#!/bin/bash
case "$*" in
  *is_available*) exit 0 ;;
  *setup.py*) stage=build ;;
  *torch.ones*) stage=probe ;;
  *test_cuda_ptx*) stage=ptx ;;
  *gpu_kernels*) stage=times ;;
  *-n\\ 4*) stage=ops ;;
  *) stage=sanitizer ;;
esac
echo "ran $stage"
[[ " $HANGING " == *" $stage "* ]] && sleep 60
[[ " $FAILING " != *" $stage "* ]]
"""
SANITIZER = '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; [[ $1 == 1 ]] && shift; done\nexec "$@"\n'


@pytest.fixture
def device(tmp_path):
    """(stages..., FAILING, HANGING, LIMIT) -> (exit status, what became of each stage)"""
    for name, text in {
        "python": PYTHON,
        "compute-sanitizer": SANITIZER,
        "nvidia-smi": "#!/bin/sh\necho H200\n",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*stages: str, **environment: str) -> tuple[int, dict[str, str]]:
        environment = {"FAILING": "", "HANGING": "", "PYTHON": str(tmp_path / "python")} | environment
        environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        command = [str(ROOT / "benchmarks/device.sh"), "--out", str(tmp_path / "out"), *stages]
        process = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
        lines = (tmp_path / "out/summary.txt").read_text().splitlines()
        assert lines[0] == "H200" and set(lines) <= set(process.stdout.splitlines())
        found = dict(line.removeprefix("device.sh: ").rsplit(",", 1)[0].split(": ") for line in lines[1:])
        for stage in found:
            assert (tmp_path / "out" / f"{stage}.log").exists() or found[stage] == "out of time"
        return process.returncode, found

    return run


def test_every_stage_runs_whatever_became_of_the_others(device):
    stages = ["build", "ptx", "ops", "times", "sanitizer"]
    status, found = device()
    assert status == 0 and list(found.items()) == [(stage, "passed") for stage in stages]
    status, found = device(FAILING="ops sanitizer")
    assert status == 1 and list(found) == stages
    assert found["ops"] == found["sanitizer"] == "failed (1)" and found["times"] == "passed"


def test_stages_that_are_named(device):
    assert device("ops", "times") == (0, {"ops": "passed", "times": "passed"})


def test_a_sanitizer_that_refuses_the_gpu_neither_passes_nor_fails(device):
    assert device("times", "sanitizer", FAILING="probe") == (0, {"times": "passed", "sanitizer": "not available"})


def test_what_hangs_is_ended(device):
    assert device("ops", "times", HANGING="ops", LIMIT="12") == (1, {"ops": "out of time", "times": "out of time"})


@pytest.fixture
def report(tmp_path):
    options = ["--json", str(tmp_path / "times.json"), "--replays", "1"]
    return gpu_kernels.Report(gpu_kernels.parse(options))


def contender(name: str = "", least_m: int = 1) -> gpu_ops.Contender:
    return gpu_ops.Contender(name, 1, 1, lambda copy, x: x, None, least_m=least_m)


def fail_at(failing: int):
    def timed(contender, k: int, m: int, replays: int) -> dict:
        if m == failing:
            raise torch.OutOfMemoryError("no memory\nfor that")
        return {"us": 2.0 * m, "gb_per_s": 1.0, "error": None}

    return timed


def test_rows_after_one_that_fails(report, monkeypatch, capsys):
    monkeypatch.setattr(gpu_kernels, "timed", fail_at(8))
    monkeypatch.setattr(gpu_kernels, "is_lost", lambda: False)
    name = gpu_ops.op_name(4, 128)
    gpu_kernels.measure_contender(report, gpu_ops.BASELINE, 256, 256, [16], contender)
    gpu_kernels.measure_contender(report, name, 256, 256, [1, 8, 16], contender)
    rows = json.loads(report.args.json.read_text())["rows"]
    assert [(row["m"], row["us"], row.get("failed")) for row in rows[1:]] == [
        (1, 2.0, None),
        (8, None, "no memory"),
        (16, 32.0, None),
    ]
    text = capsys.readouterr().out
    assert f"| {name} | 256 x 256 | 16 | 32.0 | 1.00 |" in text and f"| {name} | 256 x 256 | 8 | failed |" in text
    assert report.end() == 1 and f"failed: {name}, 256 x 256, M=8: no memory" in capsys.readouterr().out


def test_peers_may_fail_or_be_absent(report, monkeypatch):
    def absent():
        raise gpu_ops.Absent("not here")

    def too_large():
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gpu_kernels, "timed", fail_at(0))
    monkeypatch.setattr(gpu_kernels, "is_lost", lambda: False)
    gpu_kernels.measure_contender(report, "torch int4", 256, 256, [1, 8], absent)
    gpu_kernels.measure_contender(report, "torch int8", 256, 256, [1, 8], too_large)
    gpu_kernels.measure_contender(report, "torch int2", 256, 256, [1, 8], lambda: contender(least_m=8))
    found = json.loads(report.args.json.read_text())
    assert found["absent"] == {"torch int4": "not here"} and report.end() == 0
    assert [(row["op"], row["m"], "failed" in row) for row in found["rows"]] == [
        ("torch int8", 1, True),
        ("torch int2", 8, False),
    ]


def test_a_gpu_that_is_lost_ends_it_with_all_rows_written(report, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "timed", fail_at(8))
    monkeypatch.setattr(gpu_kernels, "is_lost", lambda: True)
    with pytest.raises(gpu_kernels.Lost):
        gpu_kernels.measure_contender(report, gpu_ops.op_name(4, 128), 256, 256, [1, 8, 16], contender)
    assert [row["m"] for row in json.loads(report.args.json.read_text())["rows"]] == [1, 8]


def test_copies_hold_all_that_a_product_reads():
    weight = (torch.zeros(100, dtype=torch.int32), torch.ones(30), None, torch.ones(7, dtype=torch.uint8))
    assert gpu_ops.bytes_of(weight) == 400 + 120 + 7
    copies = gpu_ops.copies_of(weight, read=527, cold=1600)
    assert len(copies) == 4 and len(gpu_ops.copies_of(weight, read=527, cold=1)) == 2
    addresses = {tensor.data_ptr() for copy in copies for tensor in copy if tensor is not None}
    assert len(addresses) == 4 * 3 and all(copy[2] is None for copy in copies)


@pytest.mark.parametrize("before", [None, "sm80"])
def test_an_override_ends_with_the_call(monkeypatch, before):
    variable = "SLIDERQUANT_CUDA_WNA16"
    monkeypatch.delenv(variable, raising=False)
    if before is not None:
        monkeypatch.setenv(variable, before)
    with gpu_ops.override(variable, "plain"):
        assert os.environ[variable] == "plain"
    assert os.environ.get(variable) == before
