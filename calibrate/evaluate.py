"""Perplexity of a model as calibration sees it: 16-bit, or fake-quantized with what was learned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from calibrate.errors import UserError
from calibrate.model import Model
from calibrate.pipeline import Calibrated, finished_block, run_in_place


@torch.no_grad()
def perplexity(model: Model, stream: Tensor, seqlen: int, calibrated: Calibrated | None = None) -> float:
    """exp of the mean negative log-likelihood over consecutive windows.

    Args:
        model: read block by block.
        stream: int64 [T]; the last incomplete window is left out.
        seqlen: tokens per window; the first of each is context only.
        calibrated: learned parameters, None for the 16-bit model.
    """
    windows = stream[: len(stream) // seqlen * seqlen].view(-1, seqlen)
    if not len(windows):
        raise UserError(f"evaluation text: expected at least {seqlen} tokens, found {len(stream)}; give more text")
    position_embeddings = model.position_embeddings(seqlen)
    hidden = model.embed(windows)
    for index in range(model.blocks):
        if calibrated is None:
            block = model.block(index)
        else:
            block = finished_block(model, calibrated, index)
            block.prepare(ratio=1.0)
        run_in_place(block, hidden, position_embeddings, model.recipe.batch_size)
    total = 0.0
    head = model.head_module()
    # One window at a time: the logits of a large vocabulary are larger than everything else here.
    for states, tokens in zip(hidden, windows.to(hidden.device), strict=True):
        total += functional.cross_entropy(head(states[:-1]), tokens[1:], reduction="sum").item()
    return float(torch.tensor(total / windows[:, 1:].numel(), dtype=torch.float64).exp())
