"""What a run would do, need and take, told before any work from headers and config alone: ``--dry-run``."""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import torch
import transformers
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from calibrate.activations import Place
from calibrate.cli import EXIT_USAGE, check_output, device_named, recipe_from
from calibrate.costs import Sizes, phases
from calibrate.data import calibration_samples, local_files, token_stream
from calibrate.end_to_end import check_memory
from calibrate.errors import UserError
from calibrate.evaluate import text_windows
from calibrate.hub import resolve_model
from calibrate.memory import FP32, STREAMS, Budget, expected, fit, host_memory, return_freed_memory, stream_bytes
from calibrate.model import EMBEDDING, HEAD, Model
from calibrate.pipeline import passes
from calibrate.probe import measure
from calibrate.quantizer import scale_dtype
from calibrate.recipe import Recipe
from calibrate.store import parent_of, partial_directory, takes_files
from sliderquant_vllm.format import FormatError, LinearScheme
from sliderquant_vllm.packing import expected_tensors

RANKS = (1, 2, 4, 8)  # of a server with tensor parallelism
PLAIN_WIDTH = 160  # of what is printed anywhere but on a terminal


@dataclass(slots=True)
class Kind:
    """Linears of one name, shape and scheme.

    Attributes:
        path: inside a block, numbers of experts as ``*``.
        shape: [N, K]; nbytes: of one in the checkpoint; blocks: index, once for every linear.
        splits: ranks of a server -> why they cannot have a part each, None where they can.
    """

    path: str
    shape: tuple[int, int]
    scheme: LinearScheme | None
    nbytes: int
    splits: dict[int, str | None]
    blocks: list[int] = field(default_factory=list)


def kinds(model: Model) -> list[Kind]:
    """All linears of a model, in the order of the forward pass."""
    config, found = model.quantization_config(), {}
    for index, layout in enumerate(model.layouts):
        for path in layout.linears:
            scheme = config.scheme_for(f"model.layers.{index}.{path}")
            shape = tuple(model.skeleton.model.layers[index].get_submodule(path).weight.shape)
            name = re.sub(r"(?<=experts\.)\d+", "*", path)
            if (key := (name, shape, scheme)) not in found:
                nbytes = linear_bytes(scheme, *shape) if scheme else math.prod(shape) * model.dtype.itemsize
                splits = {ranks: split_problem(model, index, path, scheme, ranks) for ranks in RANKS}
                found[key] = Kind(name, shape, scheme, nbytes, splits)
            found[key].blocks.append(index)
    return list(found.values())


def linear_bytes(scheme: LinearScheme, out_features: int, in_features: int) -> int:
    """What a quantized linear takes in a checkpoint."""
    total = scheme.added_bias * out_features * FP32
    for suffix, (shape, dtypes) in expected_tensors(scheme.weights, out_features, in_features).items():
        dtype = scale_dtype(scheme.weights) if suffix == "weight_scale" else dtypes[0]
        total += math.prod(shape) * dtype.itemsize
    return total


def split_problem(model: Model, index: int, path: str, scheme: LinearScheme | None, ranks: int) -> str | None:
    """Why so many ranks of a server cannot have a part of a linear each, or None.

    Linears that read the residual stream are split by output channels, attention by whole heads (a key head is repeated
    where there are fewer than ranks), those that write it by input channels. A rank's part must itself have the scheme,
    as ``sliderquant_vllm.linear`` demands when it loads one.
    """
    config, layout = model.config, model.layouts[index]
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    rows, columns = model.skeleton.model.layers[index].get_submodule(path).weight.shape
    if path in (layout.query, layout.output) and heads % ranks:
        return f"its {heads} heads are not a multiple of {ranks}"
    if path in (layout.key, layout.value):
        if key_heads % ranks and ranks % key_heads:
            return f"its {key_heads} heads neither divide {ranks} nor are a multiple of it"
        rows = rows // key_heads * max(key_heads // ranks, 1)
    elif path in layout.writers:
        if columns % ranks:
            return f"its {columns} input channels are not a multiple of {ranks}"
        columns //= ranks
    else:
        if rows % ranks:
            return f"its {rows} output channels are not a multiple of {ranks}"
        rows //= ranks
    problem = scheme and scheme.shape_problem(rows, columns)
    return f"a rank's part is [{rows}, {columns}], and {problem}" if problem else None


def outer_values(model: Model) -> int:
    """Of embedding and lm_head in the checkpoint; a tied head is the embedding, unless it is rotated."""
    return math.prod(model.reader.headers[EMBEDDING].shape) * (1 if model.tied and not model.recipe.rotate else 2)


def checkpoint_bytes(model: Model, linears: list[Kind]) -> int:
    """Of all shards: quantized linears, and everything else in 16 bits."""
    quantized = [kind for kind in linears if kind.scheme]
    packed = sum(kind.nbytes * len(kind.blocks) for kind in quantized)
    if average := model.recipe.average_bits:
        packed = round(packed * average / model.recipe.weights.bits)
    state = model.skeleton.state_dict()
    rest = sum(value.numel() for name, value in state.items() if name not in (EMBEDDING, HEAD))
    rest -= sum(math.prod(kind.shape) * len(kind.blocks) for kind in quantized)
    return packed + (rest + outer_values(model)) * model.dtype.itemsize


def run_bytes(model: Model, place: Place, linears: list[Kind]) -> int:
    """What a run keeps on disk at its peak beside the checkpoint: states of blocks and hidden states.

    States are written when a block starts, behind each of its windows and end to end; what that replaces is deleted
    behind a window only. While all blocks are tuned, what is learned is written with both moments, once more before the
    last such file is deleted.
    """
    recipe, sweeps = model.recipe, passes(model.recipe, model.blocks)
    states = learned = 0
    for kind in linears:
        if kind.scheme:
            rows, columns = kind.shape
            bounds = 2 * rows * kind.scheme.weights.groups(columns)
            low_rank = recipe.learns("lora") * recipe.lora_rank * (rows + columns)
            values = 2 * bounds + recipe.has_offset * rows * columns + low_rank
            learns = recipe.learns("clip") * bounds + recipe.learns("rounding") * rows * columns + low_rank
            states += FP32 * values * len(kind.blocks)
            learned += FP32 * learns * len(kind.blocks)
    longest = max((each.window.last - each.window.first + 1 for sweep in sweeps for each in sweep), default=0)
    kept = model.blocks if recipe.tunes or len(sweeps) > 1 else longest
    written = (kept + 2 * longest) * states // model.blocks
    if recipe.tunes:
        written = max(written, states + max(6 * learned, 3 * learned + states))
    streams = 4 * bool(sweeps) + STREAMS * (place.kind == "disk")
    return written + streams * stream_bytes(model, recipe) // STREAMS


@dataclass(slots=True)
class Plan:
    """What was found out; what a problem kept from being known is empty.

    Attributes:
        needs: resource -> bytes that a run takes at its peak, and bytes that it may take.
        phases: part of a run -> seconds.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    model: Model | None = None
    linears: list[Kind] = field(default_factory=list)
    checkpoint: int = 0
    needs: dict[str, tuple[int, int]] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Add what goes wrong to the problems, and go on behind it."""
        try:
            yield
        except (UserError, FormatError, OSError) as error:
            self.problems.append(" ".join(str(error).split()))


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Check all that can be checked before any work, and estimate what the run takes."""
    started, plan = time.monotonic(), Plan()
    recipe = device = directory = place = None
    with plan.noting():
        check_output(arguments)
    with plan.noting():
        recipe = recipe_from(arguments)
    with plan.noting():
        device = device_named(arguments.device)
    with plan.noting():
        directory = resolve_model(arguments.model, download=False)
    with plan.noting():
        if recipe and device and directory:
            plan.model = Model(directory, recipe, device)
    if (model := plan.model) is None:
        return plan
    plan.linears = kinds(model)
    plan.checkpoint = checkpoint_bytes(model, plan.linears)
    for problem in (misfits := list(model.scheme_problems())):
        with plan.noting():
            raise problem
    with plan.noting():
        budget = Budget.of(device, arguments.max_host_memory, arguments.max_gpu_memory)
        place = fit(model, budget, arguments.output_dir.resolve().parent, arguments.activation_checkpointing)
        _compare_needs(plan, place, budget, arguments.output_dir.resolve())
    with plan.noting():
        if place and model.recipe.tunes:
            check_memory(model, place.checkpointing)
    evaluated = _check_texts(plan, arguments.eval_dataset)
    if place and not misfits:
        stream = stream_bytes(model, model.recipe) // STREAMS
        sizes = Sizes(model.blocks, outer_values(model), stream, plan.checkpoint, evaluated)
        plan.phases["checking and tokenizing"] = time.monotonic() - started
        with plan.noting():
            costs = measure(model, place.checkpointing, _timed_in(plan, arguments.output_dir.resolve()))
            plan.phases |= phases(costs, model.recipe, sizes)
    return plan


def _timed_in(plan: Plan, output: Path) -> Path | None:
    """Where writing is timed: beside the output, or where temporary files go."""
    directory = parent_of(output)
    if takes_files(directory):
        return directory
    plan.notes.append(f"{directory} cannot be written to: the time for writing is that of {tempfile.gettempdir()}")
    return None


def _compare_needs(plan: Plan, place: Place, budget: Budget, output: Path) -> None:
    """What a run takes, beside what it may take and the machine has."""
    model, peak = plan.model, expected(plan.model, place)
    exists = parent_of(output)
    unfinished = partial_directory(output)
    written = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
    less = "lower --max-host-memory, --seqlen or --nsamples"
    found = [("host memory", peak.host, min(budget.host, host_memory("MemTotal")), less)]
    if model.device.type == "cuda":
        less = "lower --max-gpu-memory, --seqlen or --nsamples"
        there = min(budget.device, torch.cuda.mem_get_info(model.device)[1])
        found.append(("GPU memory", peak.device, there, less))
    disk = plan.checkpoint + run_bytes(model, place, plan.linears)
    less = "free some space, or choose another --output-dir"
    found.append((f"disk of {exists}", disk, shutil.disk_usage(exists).free + written, less))
    for what, needed, there, remedy in found:
        plan.needs[what] = (needed, there)
        if needed > there:
            plan.problems.append(f"{what}: expected {decimal(needed)}, found {decimal(there)}; {remedy}")
    if peak.host > (available := host_memory("MemAvailable")):
        plan.notes.append(f"only {decimal(available)} of the host's memory are not in use now")
    if written:
        plan.notes.append(f"{unfinished} holds an unfinished run; times are those of a whole one")


def _check_texts(plan: Plan, evaluation: str | None) -> int:
    """Tokenize the texts that are on this machine; the number of samples for perplexity."""
    model, recipe = plan.model, plan.model.recipe
    for dataset in filter(None, (recipe.dataset, evaluation)):
        if not local_files(dataset):
            plan.notes.append(f"{dataset} is no local text: not checked, and the time for it not counted")
    with plan.noting():
        if local_files(recipe.dataset):
            calibration_samples(model.tokenizer, recipe.dataset, recipe.nsamples, recipe.seqlen, recipe.seed)
    with plan.noting():
        if evaluation and local_files(evaluation):
            return len(text_windows(token_stream(model.tokenizer, evaluation), recipe.seqlen))
    return 0


def dry_run(arguments: argparse.Namespace) -> int:
    """Print the problems of a run, then its plan; the exit code. Of several ranks the first one does."""
    if int(os.environ.get("RANK", "0")):
        return 0
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    return_freed_memory()  # as a run does, which takes time
    with Console(stderr=True).status("checking, and timing parts of the model"):
        plan = make_plan(arguments)
    for problem in plan.problems:
        print(f"calibrate: error: {problem}", file=sys.stderr)
    if plan.model:
        show(plan, Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH))
    return EXIT_USAGE if plan.problems else 0


def show(plan: Plan, console: Console) -> None:
    """Print all of a plan but its problems."""
    model, recipe = plan.model, plan.model.recipe
    scheme = f"{LinearScheme(recipe.weights, recipe.activations)}"
    if recipe.average_bits:
        scheme += f", bits chosen by sensitivity, {recipe.average_bits:g} on average"
    samples = f"{recipe.nsamples} x {recipe.seqlen} tokens"
    console.print(f"{model.directory}: {model.blocks} blocks, {scheme}, {recipe.method}, {samples}, on {model.device}")
    table = _table(console, "model.layers.*", "shape", "blocks", "scheme", "bytes each", *(f"TP {n}" for n in RANKS))
    for kind in plan.linears:
        splits = ("no" if kind.splits[ranks] else "yes" for ranks in RANKS)
        shape = " x ".join(map(str, kind.shape))
        table.add_row(
            kind.path, shape, ranges(kind.blocks), str(kind.scheme or "16-bit"), decimal(kind.nbytes), *splits
        )
    console.print(table)
    for text in (*split_lines(plan.linears), *window_lines(recipe, model.blocks)):
        console.print(text, soft_wrap=True)
    console.print(f"checkpoint: {decimal(plan.checkpoint)}")
    if plan.needs:
        table = _table(console, "at its peak", "a run takes", "it may take")
        for what, sizes in plan.needs.items():
            table.add_row(what, *map(decimal, sizes))
        console.print(table)
    if plan.phases:
        table = _table(console, "on this machine, as busy as it is now", "estimate")
        for what, seconds in (*plan.phases.items(), ("all together", sum(plan.phases.values()))):
            table.add_row(what, duration(seconds))
        console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _table(console: Console, first: str, *others: str) -> Table:
    table = Table(first, box=box.SIMPLE if console.is_terminal else None, pad_edge=False)
    for other in others:
        table.add_column(other, justify="right")
    return table


def split_lines(linears: list[Kind]) -> list[str]:
    """Which numbers of ranks can serve the model, and why others cannot."""
    working, lines = [], []
    for ranks in RANKS:
        reasons: dict[str, dict[str, None]] = {}
        for kind in linears:
            if problem := kind.splits[ranks]:
                reasons.setdefault(problem, {})[kind.path] = None
        if reasons:
            listed = "; ".join(f"{', '.join(paths)}: {problem}" for problem, paths in reasons.items())
            lines.append(f"TP {ranks}: {listed}")
        else:
            working.append(str(ranks))
    return [f"tensor parallelism that can serve it: {', '.join(working) or 'none'}", *lines]


def window_lines(recipe: Recipe, blocks: int) -> list[str]:
    """The windows of every pass over the model."""
    lines = []
    for sweep in passes(recipe, blocks):
        for ratio, epochs in dict.fromkeys((each.ratio, each.epochs) for each in sweep):
            windows = [str(each.window) for each in sweep if (each.ratio, each.epochs) == (ratio, epochs)]
            what = f"{len(windows)} windows of {epochs} epochs, {ratio:.0%} of the input channels"
            lines.append(f"{what if epochs else 'initial values of blocks'}: {' '.join(windows)}")
    if recipe.tunes:
        lines.append(f"all blocks end to end: {recipe.end_to_end_epochs} epochs")
    return lines or ["no windows: every weight to nearest"]


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as "0-3, 7"; repeated ones once."""
    runs: list[list[int]] = []
    for number in dict.fromkeys(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
