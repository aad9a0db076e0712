"""Tune all blocks together against the 16-bit model's logits: knowledge distillation on the calibration samples."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from calibrate import parallel
from calibrate.activations import Place
from calibrate.blocks import CalibrationBlock, run_in_place, run_through
from calibrate.errors import UserError
from calibrate.memory import Shapes, host_memory, tuning_bytes
from calibrate.model import Model
from calibrate.parallel import Share
from calibrate.products import rough_gradients
from calibrate.reconstruct import parameter_groups, take_step
from calibrate.store import Store

logger = logging.getLogger(__name__)

WARMUP = 0.05
# What was learned so far is kept this often, and more rarely where keeping it would take a larger share of the time.
KEEP_SECONDS, KEEP_SHARE = 60.0, 0.05
TUNING = "tuning"  # its name in the store


def check_memory(model: Model, checkpointing: bool) -> None:
    """Refuse, before any work, a model whose blocks do not fit together. Raises UserError with what would."""
    shapes = [Shapes.of(model, index) for index in range(model.blocks)]
    needed = tuning_bytes(model, shapes, checkpointing)
    if model.device.type == "cuda":
        available = torch.cuda.mem_get_info(model.device)[0]
    else:
        available = host_memory("MemAvailable")
    if needed > available:
        raise UserError(
            f"--end-to-end-epochs {model.recipe.end_to_end_epochs}: keeps all {model.blocks} blocks in memory, about "
            f"{needed / 1e9:.2f} GB; {model.device} has {available / 1e9:.2f} GB left; set it to 0, or choose "
            "--preset default"
        )


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) per token, fp32 [...], of logits [..., vocabulary]."""
    student, teacher = functional.log_softmax(student.float(), -1), functional.log_softmax(teacher.float(), -1)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


@rough_gradients()
def tune(
    model: Model,
    store: Store,
    samples: Tensor,
    on_step: Callable[[float], None],
    checkpointing: bool = False,
    done: int = 0,
    commit: Callable[[int], None] = lambda done: None,
) -> None:
    """Replace the states of all blocks by tuned ones.

    Args:
        store: has the states as windows left them.
        samples: int64 [nsamples, seqlen].
        on_step: called with the loss of every step, in nats per token.
        checkpointing: as ``Place`` says.
        done: steps that the store knows the outcome of; the tuning goes on behind them.
        commit: called with that number whenever the store was given the outcome.

    A loss that is not finite ends the tuning with a warning and leaves the states as they were.
    """
    recipe = model.recipe
    position_embeddings = model.position_embeddings(samples.shape[1])
    head = model.head_module()
    blocks = [model.block(index) for index in range(model.blocks)]
    share = Share(len(samples), recipe.batch_size)
    inputs = model.activations(samples[share.numbers], Place(model.device))
    targets = inputs.clone()
    for block in blocks:
        run_in_place(block, targets, position_embeddings)
    for index, block in enumerate(blocks):
        if (state := store.state(index)) is not None:
            block.load_state(state)
            block.recenter()
        for norm in block.norms.values():
            norm.gain.requires_grad_(recipe.learns("norms"))

    def backward(sample: slice, size: int) -> float:
        """One sample's part of a batch's loss, its gradients passed on. No graph outlives this: it holds their sums."""
        hidden = run_through(blocks, inputs.read(sample), position_embeddings, checkpointing)
        with torch.no_grad():
            teacher = head(targets.read(sample))
        error = divergence(head(hidden), teacher).mean() / size
        error.backward()
        return error.item()

    groups = parameter_groups(blocks, recipe, recipe.lr_end_to_end)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    if done:
        _load(blocks, optimizer, store.tensors(TUNING))
    steps = recipe.end_to_end_epochs * -(-len(samples) // recipe.batch_size)
    warmup = max(steps * WARMUP, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda here: min(1, (done + here + 1) / warmup) * (1 - (done + here) / steps)
    )
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + 99_991)
    epochs = (share.shuffled(generator) for _ in range(recipe.end_to_end_epochs))
    batches = itertools.chain.from_iterable(epochs)
    due = time.monotonic() + KEEP_SECONDS
    for step, (numbers, size) in enumerate(itertools.islice(batches, done, None), done + 1):
        errors = (backward(slice(number, number + 1), size) for number in numbers)
        loss = take_step(blocks, 1.0, errors, optimizer)
        if not math.isfinite(loss):
            logger.warning(
                "end to end: the loss became non-finite; keeping what the windows gave; "
                "a smaller --lr-end-to-end may help"
            )
            return
        schedule.step()
        on_step(loss)
        if store.survives and parallel.from_first(time.monotonic() >= due):
            started = time.monotonic()
            store.put_tensors(TUNING, dict(_tuned(blocks, optimizer)))
            commit(step)
            due = time.monotonic() + max(KEEP_SECONDS, (time.monotonic() - started) / KEEP_SHARE)
    if any(not torch.isfinite(value).all() for block in blocks for _, value in block.learned()):
        logger.warning("end to end: the last step gave values that are not finite; keeping what the windows gave")
        return
    for index, block in enumerate(blocks):
        store.put_state(index, block.state())


def _tuned(blocks: list[CalibrationBlock], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """All that steps change: name and value of what is learned, and of what the optimizer knows about it."""
    for index, block in enumerate(blocks):
        for name, parameter in block.learned():
            yield f"{index}.{name}", parameter.detach()
            for kind, value in optimizer.state[parameter].items():
                yield f"{index}.{name}.{kind}", value


@torch.no_grad()
def _load(blocks: list[CalibrationBlock], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give back what ``_tuned`` gave."""
    for index, block in enumerate(blocks):
        for name, parameter in block.learned():
            parameter.copy_(tensors[f"{index}.{name}"])
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][kind] = tensors[f"{index}.{name}.{kind}"].to(parameter.device)
