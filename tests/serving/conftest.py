"""Engines for serving tests: one process that starts many, and fresh processes where it matters."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.serving.engine import Score, set_environment

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.serving)
            if find_spec("vllm") is None:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.fixture(scope="session")
def engine_env(tmp_path_factory) -> dict[str, str]:
    return {
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm-cache")),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="session")
def in_engine(engine_env) -> Callable:
    """``in_engine(function, *args)`` calls a function of ``engine`` in a process that has vLLM loaded.

    The first engine of a process takes half a minute to start, the others seconds; and vLLM binds threads to
    cores, which the process of the tests must be spared.
    """
    with ProcessPoolExecutor(
        1,
        multiprocessing.get_context("spawn"),
        initializer=set_environment,
        initargs=({**engine_env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},),
    ) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture
def fresh_engine(engine_env, tmp_path) -> Callable:
    """``fresh_engine(model, env, **engine_args)``: the score from a process of its own."""

    def run(model: Path, env: dict[str, str] | None = None, **engine_args) -> Score:
        output = tmp_path / "logprobs.pt"
        command = [sys.executable, "-m", "tests.serving.engine", str(model), "--output", str(output)]
        process = subprocess.run(
            [*command, "--engine-args", json.dumps(engine_args)],
            env={**os.environ, **engine_env, **(env or {})},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        return Score(torch.load(output, weights_only=True))

    return run
