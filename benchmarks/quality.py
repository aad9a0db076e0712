"""How much quality each method keeps: perplexity, divergence from the 16-bit model, and what calibration costs.

    python -m benchmarks.quality                        # methods x schemes, on the small model in assets/
    python -m benchmarks.quality --suite ablation       # SliderQuant with one setting changed at a time
    python -m benchmarks.quality --suite sensitivity    # which blocks suffer most from quantization

Every cell is what one `python -m calibrate` command does, and that command stands beside it. Results are kept in
quality.json: what is there, for the same code, model and texts, is not computed again, so a run that was killed goes on
where it stopped. Figures of different suites and of several runs share that file.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import cells, suites
from benchmarks.cells import Bar, Cell, Results, command, exit_code, measure, version
from benchmarks.common import positive
from calibrate.arguments import Parser
from calibrate.errors import UserError
from sliderquant_vllm.format import FormatError

MODEL = "assets/tiny-llama"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--suite", choices=suites.SUITES, default="methods", help="what is compared")
    parser.add_argument("--models", nargs="+", default=[MODEL], help="directories, hub ids or short names")
    parser.add_argument("--schemes", nargs="+", help="such as W4A16, W4A4, W3A16g128; by default the suite's")
    parser.add_argument("--methods", nargs="+", help="METHOD or sliderquant:PRESET; by default the suite's")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="of the ablation: rows that contain one of these")
    parser.add_argument("--calibration", help="text; by default sources of Python's standard library")
    parser.add_argument("--evaluation", help="text; by default other sources of it")
    parser.add_argument("--nsamples", type=positive, default=32, help="calibration samples")
    parser.add_argument("--seqlen", type=positive, default=256, help="tokens per sample and per evaluation window")
    parser.add_argument("--epochs", type=positive, help="of methods that learn in windows; by default their own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of calibrations; several give a spread")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--output-dir", type=Path, default=Path("quality"), help="for JSON, tables and pictures")
    parser.add_argument("--plot", action=switch, default=True, help="draw a picture")
    arguments = parser.parse(argv)
    if arguments.threads < 0:
        parser.error(f"--threads: expected 0 or more, found {arguments.threads}")
    return arguments


def settings_from(arguments: argparse.Namespace) -> suites.Settings:
    default_methods = {"methods": suites.METHODS, "ablation": suites.BASES, "sensitivity": ("rtn",)}[arguments.suite]
    chosen = tuple(arguments.methods or default_methods)
    if arguments.suite == "sensitivity" and arguments.methods:
        raise UserError("--methods: the sensitivity suite rounds to nearest; leave it out")
    check_methods(chosen)
    schemes = tuple(arguments.schemes or suites.SCHEMES[arguments.suite])
    texts = arguments.calibration, arguments.evaluation
    if None in texts:
        texts = [given or made for given, made in zip(texts, cells.default_texts(arguments.output_dir), strict=True)]
    shared = ("nsamples", "seqlen", "epochs", "device")
    return suites.Settings(
        tuple(arguments.models),
        schemes,
        chosen,
        *texts,
        **{name: getattr(arguments, name) for name in shared},
        seeds=tuple(dict.fromkeys(arguments.seeds)),
    )


def chosen_rows(planned: list[Cell], arguments: argparse.Namespace) -> list[Cell]:
    """Cells that --only asks for, and the bases that they are compared with."""
    if not arguments.only:
        return planned
    if arguments.suite != "ablation":
        raise UserError("--only: chooses rows of --suite ablation; leave it out")
    asked = [cell for cell in planned if any(text in cell.row for text in arguments.only)]
    if not asked:
        raise UserError(f"--only: no row of the ablation contains {' or '.join(map(repr, arguments.only))}")
    return [cell for cell in planned if cell.row == suites.BASE_ROW or cell in asked]


def check_methods(chosen: tuple[str, ...]) -> None:
    from calibrate.methods import METHODS, PRESETS

    known = [*METHODS, *(f"sliderquant:{preset}" for preset in PRESETS)]
    for method in chosen:
        if method not in known:
            raise UserError(f"--methods: expected some of {', '.join(known)}, found {method!r}")


def check_inputs(settings: suites.Settings) -> None:
    """Raise UserError for a model or a text that no cell could use, rather than once in every cell."""
    import torch

    from calibrate.data import calibration_samples, token_stream
    from calibrate.hub import resolve_model
    from calibrate.model import Model

    for name in settings.models:
        recipe = suites.recipe_of(settings.flags(name, settings.schemes[0], "rtn"))
        model = Model(resolve_model(name), recipe, torch.device("cpu"))
        calibration_samples(model.tokenizer, recipe.dataset, recipe.nsamples, recipe.seqlen, recipe.seed)
        found = len(token_stream(model.tokenizer, settings.evaluation, split="test"))
        if found < settings.seqlen:
            raise UserError(f"--evaluation: expected at least {settings.seqlen} tokens, found {found}; give more text")


def fill(results: Results, planned: list[Cell], threads: int, console) -> None:
    """Compute what is missing. A combination that cannot be is a result too: its reason."""
    with Bar(console, sum(len(cell.seeds) for cell in planned)) as bar:
        for cell in planned:
            for seed in cell.seeds:
                argv = cell.argv(seed)
                bar.cell(" ".join(filter(None, (Path(cell.model).name, cell.scheme, cell.group, cell.row))))
                key = {"command": command(argv, threads), "version": version(argv)}
                if results.find(**key) is None:
                    try:
                        found = measure(argv, bar)
                    except (UserError, FormatError) as error:
                        found = {"reason": str(error)}
                    date = datetime.now(UTC).isoformat(timespec="seconds")
                    results.put(key | {"date": date} | found)
                bar.cell_done()


def estimates(results: Results, settings: suites.Settings) -> dict[str, dict]:
    """Model -> estimated sensitivities of its blocks, computed where they are missing."""
    found = {}
    for model in settings.models:
        argv = settings.flags(model, settings.schemes[0], "rtn")
        what = f"benchmarks.suites.estimate {model} {settings.nsamples} x {settings.seqlen} of {settings.calibration}"
        key = {"command": what, "version": version(argv)}
        if (known := results.find(**key)) is None:
            known = key | {"estimate": suites.estimate(settings, model)}
            results.put(known)
        found[model] = known["estimate"]
    return found


def run(arguments: argparse.Namespace) -> None:
    import torch
    import transformers
    from rich.console import Console

    from benchmarks import quality_report as report

    transformers.logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    output = arguments.output_dir
    output.mkdir(parents=True, exist_ok=True)
    settings = settings_from(arguments)
    results = Results(output / "quality.json")
    planned = chosen_rows(suites.SUITES[arguments.suite](settings), arguments)
    if any(
        results.find(command(cell.argv(seed), arguments.threads), version(cell.argv(seed))) is None
        for cell in planned
        for seed in cell.seeds
    ):
        check_inputs(settings)
    fill(results, planned, arguments.threads, Console(stderr=True))
    estimated = estimates(results, settings) if arguments.suite == "sensitivity" else {}
    rows = [report.row(cell, arguments.threads, results) for cell in planned]
    name = "quality" if arguments.suite == "methods" else arguments.suite
    threads = arguments.threads or torch.get_num_threads()
    text = report.markdown(arguments.suite, settings, rows, estimated, machine(threads))
    (output / f"{name}.md").write_text(text)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in report.tables(rows):
        console.print(report.terminal_table(table))
    if arguments.plot:
        report.plot(arguments.suite, rows, estimated, output / f"{name}.png")
    written = f"{name}.md" + (f", {name}.png" if arguments.plot else "")
    console.print(f"written to {output}: quality.json, {written}", highlight=False, soft_wrap=True)


def machine(threads: int) -> str:
    import torch

    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{name}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
