"""What the tests of the CUDA kernels share: nvcc and its tools, the emulators, and calls into them."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sliderquant_vllm import ops, references
from tests.native import random_weight

ROOT = Path(__file__).parents[1]
BUILT_ARCHS = ("80", "90a")
NVCC = runpy.run_path(str(ROOT / "setup.py"))["locate_nvcc"]()  # the one that the kernels are built with
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # in the order of numeric.h
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def known_archs() -> list[str]:
    """Those of the architectures of interest that this nvcc compiles for; all where there is none."""
    archs = [*BUILT_ARCHS, "89", "100a", "120a"]
    if NVCC is None:
        return archs
    listing = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [arch for arch in archs if f"compute_{arch.rstrip('a')}" in listing.split()]


def find_cuobjdump() -> str:
    """Skips the test where there is none."""
    beside = Path(NVCC).resolve().parent / "cuobjdump" if NVCC else None
    if beside is not None and beside.exists():
        return str(beside)
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    if bundled is None or not bundled.exists():
        pytest.skip("cuobjdump is not installed")
    return str(bundled)


def compile_cuda(source: Path, target: Path, arch: str, *options: str) -> str:
    """Compile for one architecture, without spills and without a stack frame; what the compiler reported."""
    command = [NVCC, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v"]
    command += ["-Xcompiler=-fPIC", *options, str(source), "-o", str(target)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    report = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", process.stderr)
    assert report and set(report) == {("0", "0", "0")}, process.stderr
    assert f"for 'sm_{arch}'" in process.stderr
    return process.stderr


def instructions(binary: Path, arch: str) -> set[str]:
    """Every instruction, with its suffixes, in the machine code for one architecture."""
    command = [find_cuobjdump(), "-sass", "-arch", f"sm_{arch}", str(binary)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", listing))


def build_emulator(source: str, directory: Path) -> ctypes.CDLL:
    """A test program that runs CUDA code on the host, as a library."""
    library = directory / f"{source}.so"
    command = ["c++", "-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run([*command, str(ROOT / "tests" / f"{source}.cpp"), "-o", library], check=True)
    return ctypes.CDLL(str(library))


def call(function, *arguments) -> str:
    """Call a C function with tensors, None, text and integers; the text that it returns, if it returns text."""
    converted = []
    for value in arguments:
        if value is None or isinstance(value, torch.Tensor):
            converted.append(ctypes.c_void_p(None if value is None else value.data_ptr()))
        elif isinstance(value, str):
            converted.append(ctypes.c_char_p(value.encode()))
        else:
            converted.append(ctypes.c_int64(value))
    found = function(*converted)
    return found.decode() if isinstance(found, bytes) else ""


def repack(emulator, packed: torch.Tensor, bits: int, pairs: bool) -> torch.Tensor:
    """Kernel layout of a GPU, made by its own kernel."""
    n, k = packed.shape[0], packed.shape[1] * 32 // bits
    found = torch.full((ops.host().gpu.packed_words(bits, n, k),), -1, dtype=torch.int32)
    assert call(emulator.emulate_repack, packed, found, n, k, bits, int(pairs), 0) == ""
    return found


def integer_operands(
    emulator, n: int, k: int, m: int, bits: int, activation_bits: int, symmetric: bool
) -> tuple[tuple, tuple]:
    """What a kernel takes, from codes to bias, and the same for the reference."""
    weight = random_weight(n, k, bits, -1, symmetric)
    quantized = references.quantize_per_token(torch.randn(m, k), activation_bits, symmetric)
    zw = None if symmetric else weight.zero[0].contiguous()
    bias = torch.randn(n) if symmetric else None
    rest = (weight.scale[0].contiguous(), zw, ops.column_sums(weight.packed, bits), bias)
    w_packed = repack(emulator, weight.packed, bits, pairs=False)
    return (*quantized, w_packed, *rest), (*quantized, weight.packed, *rest)
