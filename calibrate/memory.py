"""What a calibration needs of memory, and how it is made to fit what there is."""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from calibrate import parallel, products
from calibrate.activations import Place
from calibrate.allocation import sensitivity_samples
from calibrate.errors import UserError
from calibrate.model import OUTER_ROWS, Model
from calibrate.recipe import Recipe

logger = logging.getLogger(__name__)

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
HEADROOM = 0.9  # share of the machine that a run without a given budget takes
PROCESS = 510 * 10**6  # Python, torch, transformers, a tokenizer and its text
FP16, FP32, FP64 = 2, 4, 8
RETURNED_PIECES = 4 * 2**20  # bytes, at least
M_MMAP_THRESHOLD = -3  # malloc.h
STREAMS = 3  # inputs, targets, and those of a block that gets its initial values inside a window
STREAM_DTYPE = torch.bfloat16
LOGITS = 6  # fp32 copies of a sample's, of teacher and student with their logarithms and gradient
ROTATED = 20  # bytes per value while rows of an embedding are rotated


def return_freed_memory() -> None:
    """Have the allocator give the system back what is freed in large pieces, from here on.

    By default glibc keeps pieces of up to 32 MiB, between which larger ones then do not fit: hundreds of megabytes
    while the blocks of a model come and go. Other allocators are left alone.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, RETURNED_PIECES)


def parse_size(text: str) -> int:
    """Bytes of "2GB", "512 MiB" or "1e9". Raises UserError."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    unit = UNITS.get(match[2].upper()) if match else None
    try:
        size = int(float(match[1]) * unit)
    except (TypeError, ValueError):
        raise UserError(f"expected a size such as 2GB or 512MiB, found {text!r}") from None
    if size <= 0:
        raise UserError(f"expected a size above 0, found {text!r}")
    return size


def host_memory(kind: str) -> int:
    """Bytes of the machine, or of the control groups that this process may not leave, where that is less.

    "MemTotal", or "MemAvailable", which a new process could take without swapping.
    """
    lines = (PROC / "meminfo").read_text().splitlines()
    found = [1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))]
    found += [limit - (kind == "MemAvailable") * used for limit, used in _control_groups()]
    return max(min(found), 0)


def _control_groups() -> Iterator[tuple[int, int]]:
    """Limit and use of memory, bytes, of every control group of this process that limits it, of version 1 or 2.

    A container's own group is at the top of what it sees, whatever its path is called outside. Used is what could not
    be freed by dropping files.
    """
    with suppress(OSError):
        for line in (PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                top, limit, use, prefix = GROUPS, "memory.max", "memory.current", ""
            elif "memory" in controllers.split(","):
                top, limit, use, prefix = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
            else:
                continue
            group = top / path.lstrip("/")
            for folder in (each for each in (group, *group.parents) if each.is_relative_to(top)):
                with suppress(OSError, ValueError):  # no such group, or "max"
                    allowed, used = (int((folder / name).read_text()) for name in (limit, use))
                    parts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    files = (int(parts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                    yield allowed, max(used - sum(files), 0)


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that a process may take: of the host, all of it, and of its GPU."""

    host: int
    device: int

    @classmethod
    def of(cls, device: torch.device, host: str | None, gpu: str | None) -> Budget:
        """What was asked for, or most of what the machine has, busy or not: a run that goes on must decide the same.

        Ranks on one machine share that. Raises UserError.
        """
        try:
            flag = "--max-host-memory"
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
            host_bytes = parse_size(host) if host else int(HEADROOM * host_memory("MemTotal") / ranks)
            flag = "--max-gpu-memory"
            if gpu and device.type != "cuda":
                raise UserError(f"there is no GPU in use, {device} was chosen; leave it out")
            gpu_bytes = parse_size(gpu) if gpu else 0
        except UserError as error:
            raise UserError(f"{flag}: {error}") from None
        if device.type == "cuda" and not gpu_bytes:
            gpu_bytes = int(HEADROOM * torch.cuda.mem_get_info(device)[1])
        return cls(host_bytes, gpu_bytes)


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of one decoder block, numbers of values.

    Attributes:
        weights: of all linears; largest: of the largest one.
        moment: second moment of the inputs of the widest one; moments: all that one pass over the samples collects.
        per_token: what backward keeps.
    """

    weights: int
    largest: int
    moment: int
    moments: int
    hidden: int
    per_token: int

    @classmethod
    def of(cls, model: Model, index: int) -> Shapes:
        layer, layout = model.skeleton.model.layers[index], model.layouts[index]
        shapes = [layer.get_submodule(path).weight.shape for path in layout.linears]
        sizes = [shape.numel() for shape in shapes]
        # What autograd saves between the linears: about the inputs of each, its outputs, and norms or gate in between.
        hidden = model.config.hidden_size
        active = [layer.get_submodule(path).weight.shape for path in active_linears(model, index)]
        per_token = 6 * hidden + 2 * sum(shape[0] for shape in active) + sum(shape[1] for shape in active)
        moment = max(shape[1] for shape in shapes) ** 2
        return cls(sum(sizes), max(sizes), moment, _collected(model, index), hidden, per_token)


def _collected(model: Model, index: int) -> int:
    """Values of the second moments that are held together while a block gets its initial values.

    Those of a norm's readers, and those of all downs, come from one pass over the samples, and every expert has its own
    (calibrate.start).
    """
    layer, layout = model.skeleton.model.layers[index], model.layouts[index]
    downs, passes = {mlp.down for mlp in layout.mlps}, Counter()
    for pair, (path, *_) in layout.sites:
        if f"model.layers.{index}.{path}" in model.quantized:
            passes["downs" if path in downs else pair] += layer.get_submodule(path).weight.shape[1] ** 2
    return max(passes.values(), default=0)


def active_linears(model: Model, index: int) -> list[str]:
    """The linears that one token goes through."""
    layout = model.layouts[index]
    idle = {path for mlp in layout.routed[getattr(model.config, "num_experts_per_tok", 0) :] for path in mlp}
    return [path for path in layout.linears if path not in idle]


def learning_bytes(model: Model) -> int:
    """Per weight of a block that learns."""
    recipe = model.recipe
    quantized = FP16 if model.device.type == "cuda" or products.FAST_BF16 else FP32
    held = FP32 + quantized + FP16 + FP64  # itself, quantized, its rounding error, a sum of gradients
    if recipe.has_offset:
        held += FP32
    if recipe.learns("rounding"):
        held += 2 * FP32  # moments; the gradient replaces the sum
    return held


def window_bytes(model: Model, shapes: list[Shapes], checkpointing: bool) -> int:
    """Peak while a window of these blocks is optimised, without the hidden states of the samples."""
    weights = sum(each.weights for each in shapes)
    per_token = [each.per_token for each in shapes]
    kept = max(per_token) + sum(each.hidden for each in shapes) if checkpointing else sum(per_token)
    values = model.recipe.seqlen * kept + 2 * max(each.largest for each in shapes)
    return learning_bytes(model) * weights + FP32 * values


def tuning_bytes(model: Model, shapes: list[Shapes], checkpointing: bool) -> int:
    """Peak while all blocks are tuned end to end."""
    recipe, config = model.recipe, model.config
    logits = LOGITS * recipe.seqlen * config.vocab_size
    states = 2 * most_samples(recipe) * recipe.seqlen * config.hidden_size
    outer = config.vocab_size * config.hidden_size + logits + states
    return window_bytes(model, shapes, checkpointing) + FP32 * outer


def sensitivity_bytes(model: Model, shapes: list[Shapes]) -> tuple[int, int]:
    """Peak while bits are chosen by sensitivity: what the host keeps of every block, and the work on the device."""
    recipe, config = model.recipe, model.config
    samples = sensitivity_samples(recipe.nsamples, recipe.seqlen)
    states = samples * recipe.seqlen * config.hidden_size  # behind one block
    head = config.vocab_size * (config.hidden_size + LOGITS * recipe.seqlen)
    tokens = min(recipe.batch_size, samples) * recipe.seqlen
    block = max(2 * each.weights + 2 * each.largest + tokens * each.per_token for each in shapes)
    return FP32 * (len(shapes) + 1) * states, FP32 * (max(head, block) + STREAMS * states)


def start_bytes(shapes: Shapes, recipe: Recipe) -> int:
    """Peak while a block gets its initial values: of its forward pass, of GPTQ's factor, and of the search."""
    held = 1 + recipe.has_offset
    # Sums are float64 while samples are added, each in fp32.
    forward = (held + 1) * shapes.weights + 2 * shapes.moments + shapes.moment + recipe.seqlen * shapes.per_token
    factor = held * shapes.weights + shapes.moments + 4 * shapes.moment  # two in float64
    search = held * shapes.weights + shapes.moments + shapes.moment + 5 * shapes.largest
    return FP32 * max(forward, factor, search)


def finish_bytes(shapes: Shapes, recipe: Recipe) -> int:
    """Peak while a block is read and transformed, or rounded, packed, written and read back."""
    held = 2 + recipe.has_offset  # itself, quantized, and how far its codes are from the nearest ones
    return FP32 * (held * shapes.weights + 6 * shapes.largest) + shapes.weights  # and its codes


def longest_window(recipe: Recipe, blocks: int) -> int:
    """Blocks that are held together: one where no windows slide."""
    windows = recipe.windows(blocks) if recipe.slides else ()
    return max((window.last - window.first + 1 for window in windows), default=1)


def most_samples(recipe: Recipe) -> int:
    """Samples of the rank that has the most, the first one; see ``parallel.Share``."""
    return int((parallel.ranks_of(recipe.nsamples, recipe.batch_size) == 0).sum())


def stream_bytes(model: Model, recipe: Recipe) -> int:
    """Hidden states of one rank's samples."""
    return STREAMS * STREAM_DTYPE.itemsize * most_samples(recipe) * recipe.seqlen * model.config.hidden_size


def fit(model: Model, budget: Budget, directory: Path, checkpointing: bool = False) -> Place:
    """Choose where the hidden states are kept and which of them, and shorten windows where they still do not fit.

    Args:
        model: its recipe gets the shorter windows.
        directory: for hidden states on disk.
        checkpointing: as ``Place`` says, even where there is enough memory without.

    Raises:
        UserError: not even one block fits, or something else that takes memory does not.
    """
    recipe = model.recipe
    on_gpu = model.device.type == "cuda"
    limit, taken = (budget.device, 0) if on_gpu else (budget.host, PROCESS)
    room = limit - taken
    shapes = [Shapes.of(model, index) for index in range(model.blocks)]
    size = longest = longest_window(recipe, model.blocks)
    while size > 1 and _peak(model, shapes, size, checkpointing=True) > room:
        size -= 1
    everything = _peak(model, shapes, size, checkpointing=False)
    if recipe.tunes:
        everything = max(everything, tuning_bytes(model, shapes, checkpointing=False))
    recomputes = checkpointing or everything > room
    needed = _peak(model, shapes, size, recomputes)
    name = "GPU" if on_gpu else "host"
    if needed > room:
        raise UserError(
            f"--max-{name.lower()}-memory: {limit / 1e9:.2f} GB are too little for one block, which takes about "
            f"{(needed + taken) / 1e9:.2f} GB; lower --seqlen, choose --preset fast or "
            "--no-learn-rounding, or allow more"
        )
    allow = f"--max-{name.lower()}-memory allows more"
    if recomputes and not checkpointing:
        logger.warning("%.2f GB do not hold all that gradients need: activation checkpointing; %s", limit / 1e9, allow)
    if size < longest:
        logger.warning("%.2f GB hold windows of %d blocks, not of %d: shortened; %s", limit / 1e9, size, longest, allow)
        window = min(recipe.window, size)
        stride = min(recipe.stride, window)
        shallow, deep = min(recipe.shallow, size), min(recipe.deep, size)
        model.recipe = replace(recipe, shallow=shallow, deep=deep, window=window, stride=stride)
    streams = stream_bytes(model, recipe)
    if streams <= room - needed:
        kind = "device"
    else:
        kind = "host" if on_gpu and streams <= budget.host - PROCESS else "disk"
    place = Place(model.device, kind, directory if kind == "disk" else None, STREAM_DTYPE, recomputes)
    for part in _parts(model, place):
        part.check(budget)
    return place


class Part(NamedTuple):
    """Of a run: what it is, what the process takes at its peak, and what else but memory would mend that."""

    what: str
    peak: Budget
    remedy: str

    def check(self, budget: Budget) -> None:
        """Raises UserError where it does not fit."""
        of_host, of_device = (self.peak.host, budget.host), (self.peak.device, budget.device)
        for flag, (needed, allowed) in {"--max-host-memory": of_host, "--max-gpu-memory": of_device}.items():
            if needed > allowed:
                raise UserError(
                    f"{flag}: {allowed / 1e9:.2f} GB are too little for {self.what}, which takes about "
                    f"{needed / 1e9:.2f} GB; {self.remedy}allow more"
                )


def _parts(model: Model, place: Place) -> list[Part]:
    """Those that one after the other take memory, with the hidden states in this place, after ``fit``."""
    recipe, found = model.recipe, []

    def add(what: str, work: int, host: int = 0, remedy: str = "") -> None:
        peak = Budget(PROCESS + host, work) if model.device.type == "cuda" else Budget(PROCESS + host + work, 0)
        found.append(Part(what, peak, remedy))

    shapes = [Shapes.of(model, index) for index in range(model.blocks)]
    if recipe.average_bits is not None:
        states, work = sensitivity_bytes(model, shapes)
        add("--average-bits", work, states, "leave it out, lower --seqlen, or ")
    needed = _peak(model, shapes, longest_window(recipe, model.blocks), place.checkpointing)
    streams = stream_bytes(model, recipe)
    add("its blocks", needed + streams * (place.kind == "device"), streams * (place.kind == "host"))
    if recipe.tunes:
        remedy = "set it to 0, choose --preset default, or "
        what = f"--end-to-end-epochs {recipe.end_to_end_epochs}, with all {model.blocks} blocks at once"
        add(what, tuning_bytes(model, shapes, place.checkpointing), remedy=remedy)
    hidden, rows = model.config.hidden_size, min(model.config.vocab_size, OUTER_ROWS)
    # Itself, as it is written, and a piece.
    outer = 2 * model.dtype.itemsize * model.config.vocab_size * hidden + ROTATED * rows * hidden
    add("embedding and head", 0, outer)
    return found


def expected(model: Model, place: Place) -> Budget:
    """What a run takes at its peak with the hidden states in this place, after ``fit``."""
    peaks = [part.peak for part in _parts(model, place)]
    return Budget(max(peak.host for peak in peaks), max(peak.device for peak in peaks))


def _peak(model: Model, shapes: list[Shapes], size: int, checkpointing: bool) -> int:
    """Of any window of so many blocks."""
    recipe = model.recipe
    needed = [finish_bytes(each, recipe) for each in shapes]
    for first in range(max(len(shapes) - size + 1, 1)):
        inside = shapes[first : first + size]
        if recipe.slides:
            needed.append(window_bytes(model, inside, checkpointing))
        if recipe.needs_start:
            held = 3 if recipe.has_offset else 2
            needed.append(start_bytes(inside[-1], recipe) + FP32 * held * sum(each.weights for each in inside[:-1]))
    return max(needed)
