"""Perplexity of a model as calibration sees it: 16-bit, or fake-quantized with what was learned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from calibrate.errors import UserError
from calibrate.model import Model
from calibrate.pipeline import Calibrated


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
        block = model.block(index)
        if calibrated is not None:
            block.load_learned(calibrated.states.get(index, block.learned_state()))
            block.snap_scales(model.dtype)
            block.prepare(ratio=1.0)
        hidden = torch.cat([block(batch, position_embeddings) for batch in hidden.split(16)])
    total = 0.0
    for batch, tokens in zip(hidden.split(16), windows.split(16), strict=True):
        logits = model.logits(batch)[:, :-1]
        loss = functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten().to(logits.device), reduction="sum"
        )
        total += loss.item()
    return float(torch.tensor(total / windows[:, 1:].numel(), dtype=torch.float64).exp())
