"""Command line: arguments -> Recipe -> calibrated checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from calibrate.arguments import Parser
from calibrate.errors import UserError
from calibrate.methods import METHODS, PRESETS, compose
from calibrate.recipe import LEARNING, START, WINDOWS, Recipe, flag, parse_scheme
from calibrate.store import discard_leftovers, parent_of, takes_files
from sliderquant_vllm.checkpoint import check_replaceable
from sliderquant_vllm.format import GROUP_SIZES, FormatError

SHORT_SCHEMES = ("W4A4", "W4A16", "W3A16", "W2A16")
EXIT_USAGE = 2
# Of groups of recipe fields.
ABOUT = dict.fromkeys((START, WINDOWS, LEARNING), "what is not given is as method, preset and scheme have it")
LOG_FILE = "calibration.jsonl"


def build_parser() -> argparse.ArgumentParser:
    # A recipe field is None unless given: the method and its preset decide.
    parser = Parser(
        prog="python -m calibrate",
        description="Quantize a Hugging Face LLM with SliderQuant into a checkpoint that vLLM serves.",
    )
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--model", required=True, help="directory, hub id, or a short name such as llama3-8b")
    parser.add_argument("--output-dir", type=Path, default=Path("quantized"), help="checkpoint to write")
    parser.add_argument("--overwrite", action=switch, default=False, help="replace an existing checkpoint")
    parser.add_argument("--max-host-memory", help="such as 16GB; by default most of what the machine has")
    parser.add_argument("--max-gpu-memory", help="such as 80GB; by default most of what the GPU has")
    parser.add_argument(
        "--activation-checkpointing",
        action=switch,
        default=False,
        help="compute hidden states inside of blocks again for gradients, instead of keeping them: less memory, more "
        "time, the same result; done without being asked where memory is short",
    )
    parser.add_argument("--dry-run", action=switch, default=False, help="only tell what a run would do, need and take")
    parser.add_argument("--restart", action=switch, default=False, help="start an unfinished run over")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--method", default="sliderquant", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--preset", help=f"of sliderquant: {', '.join(PRESETS)}; the first if none is given")
    parser.add_argument("--eval-dataset", help="text to measure perplexity on, before and after")

    scheme = parser.add_argument_group("scheme")
    choice = scheme.add_mutually_exclusive_group()
    choice.add_argument("--scheme", help="weight and activation bits, such as W4A16, W2A16, W4A4, W8A8")
    for name in SHORT_SCHEMES:
        choice.add_argument(
            f"--{name.lower()}", dest="scheme", action="store_const", const=name, help=f"--scheme {name}"
        )
    scheme.add_argument("--group-size", type=int, default=-1, help=f"one of {GROUP_SIZES}; -1 is per channel")
    scheme.add_argument("--symmetric", action=switch, default=False, help="symmetric weights")
    scheme.add_argument("--ignore", nargs="+", default=[], help="linears kept in 16 bits: names or re: patterns")

    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(Recipe):
        if title := field.metadata.get("group"):
            group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title, ABOUT.get(title)))
            group.add_argument(flag(field.name), help=_help(field), **_parsing(field.default))
    return parser


def _parsing(default) -> dict:
    """How argparse reads a recipe field, from its default."""
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        return {"type": type(default[0]), "nargs": "+"}
    return {"type": float if default is None else type(default)}


def _help(field: dataclasses.Field) -> str:
    choices = field.metadata["choices"]
    text = field.metadata["help"] + (f": {', '.join(map(str, choices))}" if choices else "")
    return text if field.metadata["group"] in ABOUT else f"{text} (default: {field.default})"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    return build_parser().parse(argv)


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the arguments describe; what was left open is the method's."""
    if arguments.scheme is None:
        raise UserError(f"--scheme: expected one, such as --w4a4 or --scheme W4A16; also {', '.join(SHORT_SCHEMES)}")
    weights, activations = parse_scheme(arguments.scheme, arguments.group_size, arguments.symmetric)
    chosen = {"ignore": ("lm_head", *arguments.ignore)}
    for field in dataclasses.fields(Recipe):
        value = getattr(arguments, field.name, None)
        if "group" in field.metadata and value is not None:
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
    return compose(weights, activations, arguments.method, arguments.preset, **chosen)


def run(arguments: argparse.Namespace) -> None:
    recipe = recipe_from(arguments)
    discard_leftovers(arguments.output_dir)
    check_output(arguments)

    # Only now: importing transformers takes seconds, and an error in the arguments should not.
    import huggingface_hub
    import torch
    import transformers
    from rich.console import Console

    from calibrate import parallel
    from calibrate.data import calibration_samples, fingerprint, token_stream
    from calibrate.evaluate import perplexity, text_windows
    from calibrate.export import Writer, Written
    from calibrate.hub import resolve_model
    from calibrate.memory import Budget, fit, return_freed_memory
    from calibrate.model import Model
    from calibrate.pipeline import calibrate
    from calibrate.progress import RunProgress
    from calibrate.store import run_directory, weights_fingerprint

    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    return_freed_memory()
    started = time.monotonic()
    device = parallel.start(device_named(arguments.device))
    parallel.check_work(recipe.nsamples, recipe.batch_size)
    writes = parallel.rank() == 0
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not writes)
    model = Model(resolve_model(arguments.model), recipe, device)
    model.check_schemes()
    budget = Budget.of(device, arguments.max_host_memory, arguments.max_gpu_memory)
    place = fit(model, budget, arguments.output_dir.resolve().parent, arguments.activation_checkpointing)
    # Windows as the smallest memory allows.
    recipe = min(parallel.from_all(model.recipe), key=lambda each: (each.window, each.shallow, each.deep))
    model.recipe = recipe
    if recipe.correction and all(layout.routers for layout in model.layouts):
        console.print("--correction is left out: in every block a router, which stays in 16 bits, reads the same norm")
    samples = calibration_samples(model.tokenizer, recipe.dataset, recipe.nsamples, recipe.seqlen, recipe.seed)
    evaluation = None
    if arguments.eval_dataset:
        evaluation = token_stream(model.tokenizer, arguments.eval_dataset, split="test", flag="--eval-dataset")
        text_windows(evaluation, recipe.seqlen)  # refuses too little text
    calibration = {
        "model": str(model.directory.resolve()) if Path(arguments.model).is_dir() else arguments.model,
        "recipe": recipe.to_dict(),
        "data_sha256": fingerprint(samples),
        "versions": {
            "sliderquant-vllm": _version("sliderquant-vllm"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    same = calibration | {"weights_sha256": weights_fingerprint(model.reader), "device": device.type}
    same["processes"] = parallel.world()
    with run_directory(arguments.output_dir, same, arguments.restart) as run:
        console.print(
            f"{arguments.model}: {model.blocks} blocks, {arguments.scheme}, {recipe.method}, "
            f"{recipe.nsamples} x {recipe.seqlen} tokens, on {device}"
            + (f"; going on with {run.directory}" if run.position else ""),
        )
        writer = Writer(model, run.directory)
        try:
            log = run.directory / LOG_FILE
            with RunProgress(console, recipe, model.blocks, len(samples), log) as progress:
                on_finished = writer.block if writes else lambda *_: None
                calibrated = calibrate(model, samples, progress, run, on_finished, place)
        except torch.OutOfMemoryError:
            raise UserError(f"{device} is out of memory; lower --max-gpu-memory, --seqlen or --nsamples") from None
        parallel.stop()
        if not writes:
            return
        if evaluation is not None:
            calibration["perplexity"] = {
                "dataset": arguments.eval_dataset,
                "seqlen": recipe.seqlen,
                "16-bit": perplexity(model, evaluation, recipe.seqlen),
                "quantized": perplexity(model, evaluation, recipe.seqlen, Written(run.directory)),
            }
            found = calibration["perplexity"]
            console.print(f"perplexity: 16-bit {found['16-bit']:.3f}, quantized {found['quantized']:.3f}")
        with console.status("writing and checking"):
            writer.finish(calibrated, calibration)
        run.complete(arguments.overwrite)
    console.print(
        f"wrote and checked {arguments.output_dir} in {time.monotonic() - started:.0f} s; "
        f"serve it with: vllm serve {arguments.output_dir} --quantization sliderquant",
    )


def check_output(arguments: argparse.Namespace) -> None:
    """Refuse, before any work, an output that could not be written or would replace the model itself."""
    output, model = arguments.output_dir.resolve(), Path(arguments.model).expanduser().resolve()
    if output == model or output in model.parents:
        raise UserError(f"--output-dir {arguments.output_dir}: holds the model to be quantized; choose another")
    if output.is_mount():
        raise UserError(f"--output-dir {arguments.output_dir}: a mount point cannot be renamed; name a folder in it")
    check_replaceable(output, arguments.overwrite)
    place = parent_of(output)
    if not takes_files(place):
        raise UserError(f"--output-dir {arguments.output_dir}: {place} is not a directory that can be written to")


def device_named(name: str):
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try --device cpu") from None
    return device


def _remedy(error: OSError) -> str:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return "; free some space or choose another --output-dir" if error.errno in full else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for anything a person can mend, 130 when interrupted."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # As an exception a termination request unwinds through the clean-up of half-written output.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        if arguments.dry_run:
            from calibrate.plan import dry_run

            return dry_run(arguments)
        run(arguments)
    except (UserError, FormatError, FileExistsError) as error:
        print(f"calibrate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"calibrate: error: {' '.join(str(error).split())}{_remedy(error)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("calibrate: interrupted; the same command goes on from the last finished window", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
