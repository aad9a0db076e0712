import ctypes
import os
from pathlib import Path

import pytest
import torch

from sliderquant_vllm import ops
from tests.native import LIBRARY

ISAS = ("portable", "avx2", "avx512f", "avx512", "amx")


def pytest_collection_modifyitems(config, items):
    """Of several test processes one runs all tests of a file, which share what they prepare, and one starts engines."""
    if config.pluginmanager.hasplugin("xdist"):
        engines = Path(__file__).parent / "serving"
        for item in items:
            together = engines if engines in item.path.parents else item.path
            item.add_marker(pytest.mark.xdist_group(str(together.relative_to(config.rootpath))))


def select_isa(name: str) -> bool:
    ops.load()
    return ctypes.CDLL(str(LIBRARY)).sliderquant_select_isa(name.encode()) == 0


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that the kernels know; one that this machine cannot run is skipped."""
    if not select_isa(request.param):
        pytest.skip(f"this machine cannot run the {request.param} kernels")
    yield request.param
    assert select_isa(os.environ.get("SLIDERQUANT_ISA", ""))


@pytest.fixture
def threads():
    """One thread unless a test asks for more: on a busy machine two wait for each other ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
