"""What times the CUDA kernels on a GPU, where there is none."""

from __future__ import annotations

import os

import pytest

from benchmarks import gpu_ops


@pytest.mark.parametrize("before", [None, "sm80"])
def test_an_override_ends_with_the_call(monkeypatch, before):
    variable = "SLIDERQUANT_CUDA_WNA16"
    monkeypatch.delenv(variable, raising=False)
    if before is not None:
        monkeypatch.setenv(variable, before)
    with gpu_ops.override(variable, "plain"):
        assert os.environ[variable] == "plain"
    assert os.environ.get(variable) == before
