"""What `make setup` does to .venv, with stand-ins for the interpreter and pip that take no time."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INTERPRETER = """#!/bin/sh
case "$2" in
  venv) mkdir -p "$3/bin" && ln -s /bin/true "$3/bin/python" ;;
  *realpath*) echo "$0" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs make in a small checkout; what it printed, or None where it failed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "pyproject.toml").touch()
    for name in ("python-a", "python-b"):
        (tmp_path / name).write_text(INTERPRETER)
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str) -> str | None:
        # Nothing else of the surroundings: under `make test` they hold what that one was told.
        command, env = ["make", "-C", tmp_path, *arguments], {"PATH": os.environ["PATH"]}
        process = subprocess.run(command, env=env, capture_output=True, text=True)
        return None if process.returncode else process.stdout

    return run


@pytest.fixture
def first(make, tmp_path):
    """An environment, by a file in it."""
    assert "Making" in make("setup", f"PYTHON={tmp_path}/python-a", "LOCK=requirements/cpu.lock")
    (tmp_path / ".venv/first").touch()
    return tmp_path / ".venv/first"


def test_an_environment_keeps_its_interpreter_and_lock(make, tmp_path, first):
    assert "Making" not in make("setup") and "Building" not in make("setup")
    for other in (f"PYTHON={tmp_path}/python-b", "LOCK=requirements/cuda.lock"):
        assert "Making" in make("setup", other)
        assert "Making" not in make("setup")
    assert not first.exists() and "cuda.lock" in (tmp_path / ".venv/choice.mk").read_text()


def test_one_that_cannot_be_replaced_is_put_back(make, tmp_path, first):
    assert make("setup", "LOCK=requirements/cuda.lock", "PIP=false") is None
    assert first.exists() and not (tmp_path / ".venv.old").exists()
    assert "Making" not in make("setup")


def test_a_killed_run_is_recovered_from(make, tmp_path, first):
    old = tmp_path / ".venv.old"
    first.parent.rename(old)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    assert "Making" not in make("setup")
    assert first.exists() and not old.exists()
    # Killed while the old one was removed.
    old.mkdir()
    next(first.parent.glob(".project-*")).unlink()
    assert "Making" not in make("setup")
    assert first.exists() and not old.exists()
    # Killed the first time, when there was nothing to keep.
    for stamp in first.parent.glob(".complete-*"):
        stamp.unlink()
    assert "Making" in make("setup")
    assert not first.exists() and not old.exists()
