"""Cells of the quality benchmarks: one `python -m calibrate` command each, run in this process, kept in a JSON file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import calibrate  # noqa: F401 - before torch, as the command does, which is what cells measure
from benchmarks.common import library_texts
from calibrate.errors import UserError
from sliderquant_vllm.format import FormatError

PACKAGE = Path(__file__).parents[1] / "calibrate"
TEXT_CHARACTERS = {"calibration": 2_000_000, "evaluation": 60_000}


@dataclass(frozen=True, slots=True)
class Cell:
    """A command, and where its result stands: the table of a model and a scheme, and the row in it.

    Attributes:
        flags: of the calibration, without the seed.
        seeds: one command each; figures are means over them.
        group: of rows in the table, where there are groups.
    """

    model: str
    scheme: str
    row: str
    flags: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    group: str = ""

    def argv(self, seed: int) -> tuple[str, ...]:
        return merged(self.flags, ("--seed", str(seed)))


def merged(*parts: str | Sequence[str]) -> tuple[str, ...]:
    """Flags one after the other; of a flag that occurs twice, or with its no- form, the last one."""
    options: dict[str, list[str]] = {}
    for part in parts:
        for token in shlex.split(part) if isinstance(part, str) else part:
            if token.startswith("--"):
                name = "--" + token.removeprefix("--").removeprefix("no-")
                options.pop(name, None)
                options[name] = current = []
            current.append(token)
    return tuple(token for tokens in options.values() for token in tokens)


def scheme_flags(scheme: str) -> tuple[str, ...]:
    """Of "W4A16", or "W4A16g128" with groups."""
    match = re.fullmatch(r"(W\d+A\d+)(?:g(\d+))?", scheme, re.IGNORECASE)
    if not match:
        raise UserError(f"--schemes: expected such as W4A16, W4A4 or W3A16g128, found {scheme!r}")
    return ("--scheme", match[1].upper(), *(("--group-size", match[2]) if match[2] else ()))


def command(argv: Sequence[str], threads: int = 0) -> str:
    """What a person types to get the same; ``threads`` 0 leaves the number to torch."""
    return (f"OMP_NUM_THREADS={threads} " if threads else "") + f"python -m calibrate {shlex.join(argv)}"


def default_texts(directory: Path) -> tuple[str, str]:
    """Files of ``library_texts``, for calibration and for evaluation, no longer than they need to be."""
    for name, text in library_texts().items():
        (directory / f"{name}.txt").write_text(text[: TEXT_CHARACTERS[name]], encoding="utf-8")
    return str(directory / "calibration.txt"), str(directory / "evaluation.txt")


@cache
def fingerprint(name: str) -> str:
    """SHA-256 of the files that a model or text argument names, or the name itself where it is one of the hub's."""
    from calibrate.data import local_files

    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        files = [path / "config.json", *sorted(path.glob("tokenizer*")), *sorted(path.glob("*.safetensors"))]
    else:
        files = local_files(name)
    return _digest(files) if files else name


@cache
def code_version() -> str:
    """SHA-256 of the calibration's sources."""
    return _digest(sorted(PACKAGE.rglob("*.py")))


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def version(argv: Sequence[str], *names: str) -> dict[str, str]:
    """All that a result depends on beside its command: code, model, texts; ``names`` are further texts."""
    arguments = _parsed(argv)
    used = (arguments.model, arguments.dataset or "", arguments.eval_dataset or "", *names)
    return {"code": code_version()} | {name: fingerprint(name) for name in used if name}


def _parsed(argv: Sequence[str]):
    from calibrate.cli import parse_arguments

    return parse_arguments(argv)


class Results:
    """Results in a JSON file, each of one command; the file is replaced whole, so that a killed run leaves it whole."""

    def __init__(self, path: Path):
        self.path = path
        self.cells: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self.cells = {cell["command"]: cell for cell in json.loads(path.read_text())["cells"]}
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: not what this benchmark writes; delete it or give another folder") from None

    def find(self, command: str, version: dict[str, str]) -> dict[str, Any] | None:
        """What is known of a command if nothing it depends on has changed; a failure is not, so it is tried again."""
        cell = self.cells.get(command)
        return cell if cell and cell["version"] == version and "reason" not in cell else None

    def put(self, cell: dict[str, Any]) -> None:
        self.cells[cell["command"]] = cell
        partial = self.path.with_suffix(".partial")
        with partial.open("w") as file:
            json.dump({"cells": list(self.cells.values())}, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)


Texts = Callable[[Any], dict[str, Any]]


def measure(argv: Sequence[str], progress, texts: Texts | None = None, write: bool = False) -> dict[str, Any]:
    """Do what a command does, with the functions that it calls, and compare the result with the 16-bit model.

    Args:
        argv: of `python -m calibrate`.
        progress: a calibrate.pipeline.Progress.
        texts: tokenizer -> name -> token stream, to evaluate on; by default the command's --eval-dataset.
        write: the checkpoint too, where --output-dir says.

    Returns:
        quality (name of the text -> figures), cpu_seconds, wall_seconds.
    """
    import torch

    from calibrate import pipeline
    from calibrate.cli import check_output, device_named, recipe_from
    from calibrate.data import calibration_samples, token_stream
    from calibrate.data import fingerprint as samples_fingerprint
    from calibrate.evaluate import compare
    from calibrate.export import export
    from calibrate.hub import resolve_model
    from calibrate.memory import return_freed_memory
    from calibrate.model import Model

    return_freed_memory()
    arguments = _parsed(argv)
    recipe = recipe_from(arguments)
    if write:
        check_output(arguments)
    device = device_named(arguments.device)
    model = Model(resolve_model(arguments.model), recipe, device)
    model.check_schemes()
    samples = calibration_samples(model.tokenizer, recipe.dataset, recipe.nsamples, recipe.seqlen, recipe.seed)
    if texts is None:
        name = arguments.eval_dataset
        streams = {name: token_stream(model.tokenizer, name, split="test")}
    else:
        streams = texts(model.tokenizer)
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        calibrated = pipeline.calibrate(model, samples, progress)
        seconds = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
        quality = {
            name: compare(
                model, stream, recipe.seqlen, calibrated, _reference(arguments.model, model, stream)
            )._asdict()
            for name, stream in streams.items()
        }
    except torch.OutOfMemoryError:
        raise UserError(f"{device} is out of memory; lower --nsamples or --seqlen") from None
    if write:
        provenance = {
            "model": arguments.model,
            "recipe": recipe.to_dict(),
            "data_sha256": samples_fingerprint(samples),
        }
        export(model, calibrated, arguments.output_dir, arguments.overwrite, provenance)
    return {"quality": quality} | seconds


_references: dict[tuple[str, int, bytes], Any] = {}


def _reference(name: str, model, stream):
    """The 16-bit side, kept from cell to cell on a CPU, where it takes as long as many a calibration."""
    from calibrate.evaluate import Reference

    if model.device.type != "cpu":
        return None
    key = fingerprint(name), model.recipe.seqlen, hashlib.sha256(stream.numpy()).digest()
    if key not in _references:
        if any(known[0] != key[0] for known in _references):
            _references.clear()  # one model's are enough to hold
        _references[key] = Reference.of(model, stream, model.recipe.seqlen)
    return _references[key]


class Silent:
    """A calibrate.pipeline.Progress that shows nothing."""

    def resume(self, finished, tuning_steps, bits_chosen) -> None: ...
    def window(self, number, total, window, ratio, steps) -> None: ...
    def phase(self, title, steps, size) -> None: ...
    def step(self, loss) -> None: ...
    def phase_done(self) -> None: ...
    def window_done(self, result) -> None: ...


class Bar(Silent):
    """One bar for all cells, with what the current one is doing; nothing where there is no terminal."""

    def __init__(self, console, total: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.task = self.progress.add_task("", total=total)
        self.title = ""

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self.progress.stop()

    def cell(self, title: str) -> None:
        self.title = title
        self.progress.update(self.task, description=title)

    def cell_done(self) -> None:
        self.progress.advance(self.task)

    def phase(self, title: str, steps: int, size: int) -> None:
        self.progress.update(self.task, description=f"{self.title}: {title}")

    def window(self, number, total, window, ratio, steps) -> None:
        self.phase(f"window {number}/{total}", steps, 1)


def exit_code(command: Callable[[], None]) -> int:
    """Run a resumable command: 0, 2 for anything a person can mend, 130 when interrupted."""
    try:
        command()
    except (UserError, FormatError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0
