"""What benchmarks and tests share."""

from __future__ import annotations

import torch


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """``||out - ref|| / ||ref||`` in float64: the one error metric of tests and benchmarks; 0 where both are empty."""
    out, ref = out.double(), ref.double()
    if out.shape != ref.shape:
        raise ValueError(f"relative_error: shapes differ, {list(out.shape)} and {list(ref.shape)}")
    norm = torch.linalg.vector_norm(ref)
    return float(torch.linalg.vector_norm(out - ref) / norm) if norm else float(torch.linalg.vector_norm(out))
