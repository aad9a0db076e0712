"""The ops take the threads that torch has and no others, on the cores that the process may use, and let go of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.native import PACKAGE

MEASURE = """
import json, os, sys, time
os.sched_setaffinity(0, json.loads(sys.argv[2]))
import torch
from sliderquant_vllm import ops
from tests.native import random_weight
torch.set_num_threads(int(sys.argv[1]))
weight = random_weight(2048, 2048, 4, 128, symmetric=False)
w_packed = ops.repack(weight.packed, 4)
before = len(os.listdir("/proc/self/task"))
for rows in (1, 64):
    x = torch.randn(rows, 2048).bfloat16()
    for _ in range(3):
        ops.wna16_gemm(x, w_packed, weight.scale, weight.zero, None, 4, 128)
        ops.quantize_per_token(x, 4, False, 64)
threads = len(os.listdir("/proc/self/task")) - before
cores = sorted({core for task in os.listdir("/proc/self/task") for core in os.sched_getaffinity(int(task))})
used, started = time.process_time(), time.monotonic()
time.sleep(1)
idle = (time.process_time() - used) / (time.monotonic() - started)
print(json.dumps({"threads": threads, "cores": cores, "idle": idle}))
"""


def measure(threads: int, cores: list[int]) -> dict:
    command = [sys.executable, "-c", MEASURE, str(threads), json.dumps(cores)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_"))}
    process = subprocess.run(command, cwd=PACKAGE.parent, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_one_thread_starts_no_other():
    assert measure(1, sorted(os.sched_getaffinity(0)))["threads"] == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_threads_are_torchs_and_do_not_spin_after_the_call():
    found = measure(2, sorted(os.sched_getaffinity(0)))
    # torch has started its second thread already, or does so in the first call.
    assert found["threads"] <= 1
    assert found["idle"] < 0.05, "a thread kept running after the calls"


def test_bound_to_one_core_it_stays_there():
    core = min(os.sched_getaffinity(0))
    assert measure(2, [core])["cores"] == [core]
