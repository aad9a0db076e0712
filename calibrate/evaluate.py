"""Quality of a model as calibration sees it: 16-bit, or fake-quantized with what was learned."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibrate.activations import Place
from calibrate.blocks import CalibrationBlock, run_in_place
from calibrate.end_to_end import divergence
from calibrate.errors import UserError
from calibrate.model import Model


class Finished(Protocol):
    """What has quantized blocks: ``calibrate.pipeline.Calibrated`` or ``calibrate.export.Written``."""

    def finished_block(self, model: Model, index: int) -> CalibrationBlock: ...


class Comparison(NamedTuple):
    """A quantized model beside the 16-bit one that it was made from, on the same text.

    Attributes:
        perplexity: of the quantized model; full_precision: of the 16-bit one.
        divergence: mean of KL(16-bit || quantized) of the next token's distribution, nats per token.
    """

    perplexity: float
    full_precision: float
    divergence: float


@torch.no_grad()
def perplexity(model: Model, stream: Tensor, seqlen: int, calibrated: Finished | None = None) -> float:
    """exp of the mean negative log-likelihood over consecutive windows.

    Args:
        model: read block by block.
        stream: int64 [T]; the last incomplete window is left out.
        seqlen: tokens per window; the first of each is context only.
        calibrated: has the quantized blocks, None for the 16-bit model.
    """
    windows = text_windows(stream, seqlen)
    hidden = _final_states(model, windows, calibrated)
    total = 0.0
    head = model.head_module()
    # One window at a time: the logits of a large vocabulary are larger than everything else here.
    for states, tokens in zip(hidden, windows.to(hidden.device), strict=True):
        total += functional.cross_entropy(head(states[:-1]), tokens[1:], reduction="sum").item()
    return _exp(total / windows[:, 1:].numel())


class Reference(NamedTuple):
    """The 16-bit side of a comparison, in the basis of whichever recipe it was computed under.

    Attributes:
        states: behind the last block, fp32 [windows, seqlen, hidden]; head: hidden states -> logits.
    """

    states: Tensor
    head: nn.Module

    @classmethod
    def of(cls, model: Model, stream: Tensor, seqlen: int) -> Reference:
        with torch.no_grad():
            return cls(_final_states(model, text_windows(stream, seqlen), None), model.head_module())


@torch.no_grad()
def compare(
    model: Model, stream: Tensor, seqlen: int, calibrated: Finished, reference: Reference | None = None
) -> Comparison:
    """Perplexity of both models and how far their distributions are apart; arguments as of ``perplexity``.

    In memory: the states behind the last block of both, fp32 [windows, seqlen, hidden] each on the device.

    Args:
        reference: of the same model and text, where it is known already.
    """
    windows = text_windows(stream, seqlen)
    hidden = _final_states(model, windows, calibrated)
    reference = reference or Reference.of(model, stream, seqlen)
    totals = torch.zeros(3, dtype=torch.float64)
    head = model.head_module()
    for states, wanted, tokens in zip(hidden, reference.states, windows.to(hidden.device), strict=True):
        student, teacher = head(states[:-1]), reference.head(wanted[:-1])
        totals[0] += functional.cross_entropy(student, tokens[1:], reduction="sum").item()
        totals[1] += functional.cross_entropy(teacher, tokens[1:], reduction="sum").item()
        totals[2] += divergence(student, teacher).sum().item()
    quantized, full_precision, apart = (totals / windows[:, 1:].numel()).tolist()
    return Comparison(_exp(quantized), _exp(full_precision), apart)


def text_windows(stream: Tensor, seqlen: int) -> Tensor:
    """int64 [windows, seqlen] of a stream [T]. Raises UserError where there is not even one."""
    windows = stream[: len(stream) // seqlen * seqlen].view(-1, seqlen)
    if not len(windows):
        raise UserError(f"evaluation text: expected at least {seqlen} tokens, found {len(stream)}; give more text")
    return windows


def _final_states(model: Model, windows: Tensor, calibrated: Finished | None) -> Tensor:
    """Hidden states behind the last block: fp32 [windows, seqlen, hidden]."""
    position_embeddings = model.position_embeddings(windows.shape[1])
    hidden = model.activations(windows, Place(model.device))
    for index in range(model.blocks):
        block = model.block(index) if calibrated is None else calibrated.finished_block(model, index)
        run_in_place(block, hidden, position_embeddings, model.recipe.batch_size)
    return hidden.read(slice(None))


def _exp(mean: float) -> float:
    """Infinite where a double cannot hold it: a broken model's perplexity is a figure too."""
    return math.inf if mean > 709 else math.exp(mean)
