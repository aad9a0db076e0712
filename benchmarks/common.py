"""What benchmarks, tests and tools share."""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """``||out - ref|| / ||ref||`` in float64: the one error metric of tests and benchmarks; 0 where both are empty."""
    out, ref = out.double(), ref.double()
    if out.shape != ref.shape:
        raise ValueError(f"relative_error: shapes differ, {list(out.shape)} and {list(ref.shape)}")
    norm = torch.linalg.vector_norm(ref)
    return float(torch.linalg.vector_norm(out - ref) / norm) if norm else float(torch.linalg.vector_norm(out))


def positive(text: str) -> int:
    """The type of an argument."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def library_texts() -> dict[str, str]:
    """Sources of the running interpreter's standard library: every fifth file evaluates, the others calibrate."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = {"calibration": [file for i, file in enumerate(files) if i % 5], "evaluation": files[::5]}
    return {
        name: "".join(file.read_text(encoding="utf-8", errors="replace") for file in sources)
        for name, sources in chosen.items()
    }
