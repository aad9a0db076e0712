"""Tune all blocks together against the 16-bit model's logits: knowledge distillation on the calibration samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from calibrate.activations import Place
from calibrate.blocks import run_in_place
from calibrate.errors import UserError
from calibrate.memory import host_memory, learning_bytes
from calibrate.model import Model
from calibrate.parallel import Share
from calibrate.products import rough_gradients
from calibrate.reconstruct import parameter_groups, take_step
from calibrate.store import Store

logger = logging.getLogger(__name__)

WARMUP = 0.05


def check_memory(model: Model) -> None:
    """Refuse, before any work, a model whose blocks do not fit together. Raises UserError with what would."""
    state = model.skeleton.state_dict()
    weights = sum(value.numel() for name, value in state.items() if name.startswith("model.layers."))
    needed = learning_bytes(model.recipe) * weights
    if model.device.type == "cuda":
        available = torch.cuda.mem_get_info(model.device)[0]
    else:
        available = host_memory("MemAvailable")
    if needed > available:
        raise UserError(
            f"--end_to_end_epochs {model.recipe.end_to_end_epochs}: keeps all {model.blocks} blocks in memory, about "
            f"{needed / 1e9:.0f} GB; {model.device} has {available / 1e9:.0f} GB left; set it to 0, or choose "
            "--preset default"
        )


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) per token, fp32 [...], of logits [..., vocabulary]."""
    student, teacher = functional.log_softmax(student.float(), -1), functional.log_softmax(teacher.float(), -1)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


@rough_gradients()
def tune(model: Model, store: Store, samples: Tensor, on_step: Callable[[float], None]) -> None:
    """Replace the states of all blocks by tuned ones.

    Args:
        store: has the states as windows left them.
        samples: int64 [nsamples, seqlen].
        on_step: called with the loss of every step, in nats per token.

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
        hidden = inputs.read(sample)
        for block in blocks:
            hidden = block(hidden, position_embeddings)
        with torch.no_grad():
            teacher = head(targets.read(sample))
        error = divergence(head(hidden), teacher).mean() / size
        error.backward()
        return error.item()

    groups = parameter_groups(blocks, recipe, recipe.lr_end_to_end)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    steps = recipe.end_to_end_epochs * -(-len(samples) // recipe.batch_size)
    warmup = max(steps * WARMUP, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1, (done + 1) / warmup) * (1 - done / steps)
    )
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + 99_991)
    for _ in range(recipe.end_to_end_epochs):
        for numbers, size in share.shuffled(generator):
            errors = (backward(slice(number, number + 1), size) for number in numbers)
            loss = take_step(blocks, 1.0, errors, optimizer)
            if not math.isfinite(loss):
                logger.warning(
                    "end to end: the loss became non-finite; keeping what the windows gave; "
                    "a smaller --lr_end_to_end may help"
                )
                return
            schedule.step()
            on_step(loss)
    if any(not torch.isfinite(value).all() for value in parameters):
        logger.warning("end to end: the last step gave values that are not finite; keeping what the windows gave")
        return
    for index, block in enumerate(blocks):
        store.put_state(index, block.state())
