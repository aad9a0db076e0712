"""What times the CUDA kernels on a GPU, where there is none."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import gpu_ops


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
