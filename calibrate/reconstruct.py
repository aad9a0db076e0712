"""Optimise the blocks of one window against the 16-bit trajectory (SliderQuant section "optimisation")."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibrate.activations import Activations
from calibrate.blocks import CalibrationBlock, run_through
from calibrate.errors import UserError
from calibrate.parallel import Gradients, Share, add_up
from calibrate.products import rough_gradients
from calibrate.recipe import Recipe

logger = logging.getLogger(__name__)

RETRIES = 3


@dataclass(frozen=True, slots=True)
class WindowResult:
    """Mean squared error at the window's output, averaged over the first and over the last epoch."""

    first_loss: float
    last_loss: float


def reconstruct(
    blocks: list[CalibrationBlock],
    restore: Callable[[], None],
    inputs: Activations,
    targets: Activations,
    share: Share,
    position_embeddings: tuple[Tensor, Tensor],
    recipe: Recipe,
    ratio: float,
    epochs: int,
    seed: int,
    on_step: Callable[[float], None],
) -> WindowResult:
    """Tune the learned parameters of a window's blocks in place.

    Args:
        blocks: the window, first block first.
        restore: gives the blocks the states back that they have now.
        inputs: as the blocks quantized so far produce them.
        targets: of the 16-bit model behind the window's last block.
        share: the samples that these are the hidden states of.
        ratio: share of input channels that is quantized.
        on_step: called with the loss of every step.

    Raises:
        UserError: the loss stays non-finite however small the learning rate.
    """
    if not any(True for block in blocks for _ in block.learned()):
        loss = _loss(blocks, inputs, targets, share, position_embeddings, ratio)
        return WindowResult(loss, loss)
    for attempt in range(RETRIES + 1):
        factor = 0.1**attempt
        result = _optimise(
            blocks, inputs, targets, share, position_embeddings, recipe, ratio, epochs, seed, factor, on_step
        )
        if result is not None:
            return result
        restore()
        if attempt < RETRIES:
            logger.warning(
                "the loss became non-finite; starting the window again with %g of the learning rates",
                factor / 10,
            )
    raise UserError(
        f"blocks {blocks[0].name} to {blocks[-1].name}: the loss stays non-finite at {factor:g} of the learning rates; "
        "lower --lr-rounding, --lr-clip, --lr-scale and --lr-lora, or check the calibration text"
    )


@rough_gradients()
def _optimise(
    blocks, inputs, targets, share, position_embeddings, recipe, ratio, epochs, seed, factor, on_step
) -> WindowResult | None:
    optimizer = torch.optim.AdamW(parameter_groups(blocks, recipe, factor), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / (epochs * share.batches))
    generator = torch.Generator().manual_seed(seed)
    epoch_losses = []
    for _ in range(epochs):
        losses = []
        order = share.shuffled(generator)
        own = [slice(number, number + 1) for numbers, _ in order for number in numbers]
        samples = zip(inputs.batches(own), targets.batches(own), strict=True)
        for numbers, size in order:
            batch = itertools.islice(samples, len(numbers))
            errors = (
                backward(blocks, *sample, size, position_embeddings, inputs.place.checkpointing) for sample in batch
            )
            losses.append(take_step(blocks, ratio, errors, optimizer))
            if not math.isfinite(losses[-1]):
                return None
            schedule.step()
            on_step(losses[-1])
        epoch_losses.append(sum(losses) / len(losses))
    if any(not torch.isfinite(value).all() for block in blocks for _, value in block.learned()):
        return None
    return WindowResult(epoch_losses[0], epoch_losses[-1])


def take_step(
    blocks: list[CalibrationBlock], ratio: float, errors: Iterable[float], optimizer: torch.optim.Optimizer
) -> float:
    """One step of the optimiser on all ranks, left out where the loss is not finite; the loss.

    Args:
        errors: parts of the loss, each computed when it is asked for, behind ``prepare``, and passed back by then.
    """
    for block in blocks:
        block.prepare(ratio)
    gradients = Gradients(blocks)
    loss = torch.tensor(sum(errors), dtype=torch.float64)
    for block in blocks:
        block.release()  # gradients need where it came from alone
    add_up(loss)
    if torch.isfinite(loss):
        gradients.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def backward(blocks, hidden, target, size, position_embeddings, checkpointing) -> float:
    """One sample's part of a batch's loss, its gradients passed on. No graph outlives this: it holds their sums."""
    output = run_through(blocks, hidden, position_embeddings, checkpointing)
    error = functional.mse_loss(output, target) / size
    error.backward()
    return error.item()


@torch.no_grad()
def _loss(blocks, inputs, targets, share, position_embeddings, ratio) -> float:
    """The loss over all samples, of blocks that have nothing to learn."""
    for block in blocks:
        block.prepare(ratio)
    total = torch.zeros((), dtype=torch.float64)
    batches = inputs.consecutive(1), targets.consecutive(1)
    for (_, hidden), (_, target) in zip(*batches, strict=True):
        for block in blocks:
            hidden = block(hidden, position_embeddings)
        total += functional.mse_loss(hidden, target, reduction="sum").item()
    add_up(total)
    return total.item() / (share.samples * targets.shape[1:].numel())


def parameter_groups(blocks: list[CalibrationBlock], recipe: Recipe, factor: float) -> list[dict]:
    """Learned parameters by learning rate, each already multiplied by the batch size."""
    rates = {
        "scales": recipe.lr_scale,
        "lora": recipe.lr_lora,
        "clip": recipe.lr_clip,
        "offset": recipe.lr_rounding,
        "gain": recipe.lr_norms,
        "shift": recipe.lr_shift,
    }
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for block in blocks:
        for name, value in block.learned():
            groups[next(kind for kind in rates if kind in name)].append(value)
    return [
        {"params": values, "lr": rates[kind] * recipe.batch_size * factor} for kind, values in groups.items() if values
    ]
