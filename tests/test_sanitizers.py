"""The CPU kernels under the address and undefined-behaviour sanitizers, in a program of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ISAS, select_isa

ROOT = Path(__file__).parent.parent
CASES = 100  # of every op
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
# Without what vLLM, once imported, has every child load first: the sanitizers must be first themselves.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {"PATH": PATH}
missing = [name for name in ("cmake", "ninja") if shutil.which(name, path=PATH) is None]

pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed"),
    pytest.mark.timeout(1800),  # instrumented code takes long to compile
]


@pytest.fixture(scope="module")
def fuzz_kernels(tmp_path_factory) -> Path:
    build = tmp_path_factory.mktemp("sanitized")
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, "-DSLIDERQUANT_SANITIZE=ON"]
    configure.append(f"-DSLIDERQUANT_TORCH={Path(torch.__file__).parent}")
    for command in (configure, ["cmake", "--build", build, "--target", "fuzz_kernels", "-j", "2"]):
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "fuzz_kernels"


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_stay_within_their_buffers(fuzz_kernels, isa):
    if not select_isa(isa):
        pytest.skip(f"this machine cannot run the {isa} kernels")
    assert select_isa(os.environ.get("SLIDERQUANT_ISA", ""))
    for seed in (20261122, secrets.randbits(32)):
        command = [fuzz_kernels, str(CASES), str(seed)]
        done = subprocess.run(command, env=ENVIRONMENT | {"SLIDERQUANT_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert done.stdout.startswith(isa)
