"""What a wheel carries, what its packages may import, and which CUDA compiler it is built with."""

from __future__ import annotations

import ast
import runpy
import sysconfig
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
# Packages of the checkout that each one does without: a wheel holds no others, and a server runs without calibrate.
FOREIGN = {
    "sliderquant_vllm": {"calibrate", "benchmarks", "tests", "tools"},
    "calibrate": {"vllm", "benchmarks", "tests", "tools"},
}


def imported(file: Path) -> set[str]:
    """Top-level names of all absolute imports, those within functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_a_wheel_holds_two_packages():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = find_packages(str(ROOT), include=settings["include"])
    assert {name.partition(".")[0] for name in found} == set(FOREIGN)


@pytest.mark.parametrize("package", FOREIGN)
def test_a_package_imports_nothing_that_it_must_do_without(package):
    for file in (ROOT / package).rglob("*.py"):
        assert not imported(file) & FOREIGN[package], file


@pytest.fixture
def find_nvcc(tmp_path, monkeypatch):
    """As setup.py finds it on a machine that has none."""
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    for name in ("SLIDERQUANT_CUDA", "CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    return runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]


def write_nvcc(folder: Path, release: str = "13.0") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
    nvcc.chmod(0o755)
    return str(nvcc)


def test_nvcc_is_the_named_one_or_that_of_path_or_cuda_home_or_a_wheel(tmp_path, monkeypatch, find_nvcc):
    assert find_nvcc() is None
    wheel = write_nvcc(tmp_path / "site-packages/nvidia/cu13/bin")
    assert find_nvcc() == wheel
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert find_nvcc() == wheel
    assert write_nvcc(tmp_path / "home/bin") == find_nvcc()
    assert write_nvcc(tmp_path / "path") == find_nvcc()
    monkeypatch.setenv("CUDACXX", write_nvcc(tmp_path / "named"))
    assert find_nvcc() == str(tmp_path / "named/nvcc")


def test_a_build_that_must_have_cuda_kernels_says_what_it_misses(tmp_path, monkeypatch, find_nvcc, capsys):
    monkeypatch.setenv("SLIDERQUANT_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc not found; put it on PATH .*; SLIDERQUANT_CUDA=0 builds without"):
        find_nvcc()
    nvcc = write_nvcc(tmp_path / "path", "11.8")
    with pytest.raises(SystemExit, match=f"expected nvcc 12.0 or later, found release 11.8 .{nvcc}.; name a newer one"):
        find_nvcc()
    monkeypatch.setenv("SLIDERQUANT_CUDA", "")
    assert find_nvcc() is None and "building without CUDA kernels" in capsys.readouterr().err
