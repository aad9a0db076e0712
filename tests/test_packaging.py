"""What a wheel carries, and what its packages may import."""

from __future__ import annotations

import ast
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
