"""A run that dies goes on where it was, and ends in the same bytes as one that was left alone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from calibrate import end_to_end, pipeline, reconstruct, store
from calibrate.cli import main
from calibrate.store import differences
from sliderquant_vllm.checkpoint import validate_checkpoint
from sliderquant_vllm.shards import Reader
from tests.calibrate.models import write_random_model
from tests.helpers import TINY_LLAMA

WINDOWS = ["--epochs", "2", "--shallow", "1", "--deep", "1", "--stride", "1"]
RUNS = {
    "default": ["--w2a16", *WINDOWS],
    "two sweeps": ["--w4a4", "--preset", "paper", *WINDOWS, "--stages", "0.5", "1"],
    "end to end": ["--w2a16", *WINDOWS, "--end-to-end-epochs", "1"],
    "chosen bits": ["--w4a16", "--preset", "fast", "--average-bits", "3"],
}


@pytest.fixture
def command(tmp_path, text_file):
    """Arguments of a run on a small model of random weights; the output comes last."""
    model = write_random_model(tmp_path / "model", "llama", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, model)
    return ["--model", str(model), "--dataset", str(text_file), "--nsamples", "4", "--seqlen", "32", "--output-dir"]


def in_child(
    argv, kill_after: float | None = None, kill_once: Path | None = None, file_limit: int | None = None
) -> int:
    """Run the command in a child process, killed after so many seconds or once a file is there.

    Returns:
        Its exit code, negative for a signal.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if file_limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            code = main(argv)
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    if kill_once is not None:
        while not kill_once.exists():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def shards(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_in_the_same_bytes(tmp_path, command, name, monkeypatch):
    monkeypatch.setattr(end_to_end, "KEEP_SECONDS", 0.01)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    started = time.monotonic()
    assert in_child([*command, str(whole), *RUNS[name]]) == 0
    duration = time.monotonic() - started
    seed = random.randrange(10**6)
    print(f"seed {seed}, {duration:.1f} s")
    moments = random.Random(seed)
    kills = 0
    while in_child([*command, str(broken), *RUNS[name]], kill_after=moments.uniform(0.05, 0.6) * duration) != 0:
        kills += 1
        assert not broken.exists()
        if kills == 5:
            assert in_child([*command, str(broken), *RUNS[name]]) == 0
            break
    assert kills
    assert shards(broken) == shards(whole)
    validate_checkpoint(broken, data=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "model", "text.txt", "whole"]


def interrupted(command, output, *flags) -> None:
    """Leave a run that has finished at least one window."""
    run = output.parent / f".{output.name}.partial" / "run" / "run.json"
    assert in_child([*command, str(output), *flags], kill_once=run) == -signal.SIGKILL


def test_another_recipe_is_refused_with_the_difference_until_restarted(tmp_path, command, capfd):
    output = tmp_path / "out"
    interrupted(command, output, "--w2a16", *WINDOWS)
    changed = [*command, str(output), "--w2a16", *WINDOWS, "--lr-clip", "0.001"]
    assert in_child(changed) == 2
    assert "recipe.lr_clip was 0.0005, is 0.001" in (error := capfd.readouterr().err) and "--restart" in error
    assert in_child([*changed, "--restart"]) == 0
    assert output.is_dir() and not list(tmp_path.glob(".*"))


def test_other_weights_or_text_are_another_run(tmp_path, command, text_file, capfd):
    output = tmp_path / "out"
    interrupted(command, output, "--w2a16", *WINDOWS)
    text_file.write_text(text_file.read_text()[1000:] * 2)
    assert in_child([*command, str(output), "--w2a16", *WINDOWS]) == 2
    assert "data_sha256 was" in capfd.readouterr().err


def test_two_runs_do_not_share_an_output(tmp_path, command, capfd):
    output = tmp_path / "out"
    with (tmp_path / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert in_child([*command, str(output), "--w2a16", *WINDOWS]) == 2
    assert "another calibration is writing there" in capfd.readouterr().err
    assert in_child([*command, str(output), "--w2a16", *WINDOWS]) == 0
    assert not (tmp_path / ".out.lock").exists()


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(*_):
    raise OSError(errno.EBUSY, "Device or resource busy")


@pytest.mark.parametrize(("name", "function"), [("put_in_place", die), ("put_in_place", refuse), ("_discard", die)])
def test_the_last_steps_lose_nothing(tmp_path, command, capfd, name, function):
    """Once all is calibrated the folder that a run goes on from must not be deleted before the checkpoint is there."""
    output = tmp_path / "out"
    argv = [*command, str(output), "--w2a16", *WINDOWS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, name, function)
        assert in_child(argv) == (2 if function is refuse else -signal.SIGKILL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct, "_optimise", die)  # nothing is left to learn
        assert in_child(argv) == (2 if name == "_discard" else 0)
    if name == "_discard":
        assert "exists already" in capfd.readouterr().err
    validate_checkpoint(output, data=True)
    assert not list(tmp_path.glob(".*"))


def test_bits_are_kept_as_soon_as_they_are_chosen(tmp_path, command):
    output = tmp_path / "out"
    argv = [*command, str(output), *RUNS["chosen bits"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline._Sweep, "advance", die)
        assert in_child(argv) == -signal.SIGKILL
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "sensitivities", die)  # they are not measured again
        assert in_child(argv) == 0
    validate_checkpoint(output, data=True)


def test_a_leftover_of_a_finished_run_is_not_what_a_new_one_goes_on_from(tmp_path):
    """Its checkpoint was deleted by hand, and the new run died."""
    old, new = tmp_path / ".out.run" / "run.json", tmp_path / ".out.partial" / "run" / "new"
    for path in (old, new):
        path.parent.mkdir(parents=True)
        path.touch()
    with store.run_directory(tmp_path / "out", {}, restart=False) as run:
        assert run.position is None
        assert not old.parent.exists() and run.folder.exists()


def test_what_cannot_be_read_any_more_is_named(tmp_path, command, capfd):
    output = tmp_path / "out"
    interrupted(command, output, "--w2a16", *WINDOWS)
    for stored in (tmp_path / ".out.partial" / "run").glob("block-*"):
        stored.unlink()
    assert in_child([*command, str(output), "--w2a16", *WINDOWS]) == 2
    assert "block-" in (error := capfd.readouterr().err) and "--restart" in error
    assert in_child([*command, str(output), "--w2a16", *WINDOWS, "--restart"]) == 0


def test_a_full_disk_is_an_error_that_keeps_what_was_done(tmp_path, command, capfd):
    whole, output = tmp_path / "whole", tmp_path / "out"
    argv = ["--w2a16", *WINDOWS]
    assert in_child([*command, str(whole), *argv]) == 0
    interrupted(command, output, *argv)
    position = json.loads((tmp_path / ".out.partial" / "run" / "run.json").read_text())["position"]
    largest = max(path.stat().st_size for path in whole.glob("*.safetensors"))
    assert in_child([*command, str(output), *argv], file_limit=largest // 2) == 2
    error = capfd.readouterr().err
    assert "calibrate: error:" in error and "free some space" in error and not output.exists()
    kept = json.loads((tmp_path / ".out.partial" / "run" / "run.json").read_text())["position"]
    assert kept["passes"] >= position["passes"]
    assert in_child([*command, str(output), *argv]) == 0
    assert shards(output) == shards(whole)


def test_a_shard_that_becomes_unreadable_is_an_error_that_keeps_what_was_done(tmp_path, command, capfd):
    output, model = tmp_path / "out", tmp_path / "model"
    interrupted(command, output, "--w2a16", *WINDOWS)
    shard = model / Reader(model).headers["model.layers.2.mlp.down_proj.weight"].file
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert in_child([*command, str(output), "--w2a16", *WINDOWS]) == 2
    assert shard.name in (error := capfd.readouterr().err) and "download it again" in error
    shard.write_bytes(whole)
    assert in_child([*command, str(output), "--w2a16", *WINDOWS]) == 0


def test_differences_name_the_field():
    before = {"recipe": {"epochs": 10, "seed": 0}, "device": "cpu"}
    assert differences(before, before) == []
    now = {"recipe": {"epochs": 20, "seed": 0}, "device": "cpu", "new": 1}
    assert differences(before, now) == ["recipe.epochs was 10, is 20", "new was null, is 1"]
