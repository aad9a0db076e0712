import ctypes
import os

import pytest
import torch

from sliderquant_vllm import ops
from tests.native import LIBRARY

ENGINES = "tests/serving/"
ISAS = ("portable", "avx2", "avx512f", "avx512", "amx")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of several test processes one runs all tests of a file, which share what they prepare, and one starts engines."""
    if config.getvalue("dist") != "load":
        return None  # asked for otherwise
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return ENGINES if file.startswith(ENGINES) else file

    return ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With SLIDERQUANT_NO_SKIPS=1 a test that is skipped has failed: benchmarks/device.sh must not pass unchecked."""
    report = yield
    if report.skipped and os.environ.get("SLIDERQUANT_NO_SKIPS") == "1":
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: {call.excinfo.value}"
    return report


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
