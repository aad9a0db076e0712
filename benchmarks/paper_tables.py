"""Tables 1 to 4 of the SliderQuant paper (arXiv 2603.25284), made again: its figures, ours, and the difference.

    python -m benchmarks.paper_tables --models Llama2-7B --tables 1 3 --dry-run     # commands and sizes, no download
    python -m benchmarks.paper_tables --models Llama2-7B --tables 1 3

For who has the weights and a GPU. A row is one `python -m calibrate` command with the paper's budget; perplexity is
that of WikiText2 and C4 in windows of 2048 tokens, and zero-shot tasks run in lm-eval with vLLM on the checkpoint.
Results are kept in paper.json; what is there, for the same code, model and texts, is not computed again.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import paper_texts
from benchmarks.cells import Bar, Results, command, exit_code, fingerprint, measure, merged, scheme_flags, version
from benchmarks.common import positive
from benchmarks.paper_numbers import Entry, entries
from benchmarks.paper_report import NOTES, comparison, markdown, sizes
from calibrate.arguments import Parser
from calibrate.errors import UserError
from sliderquant_vllm.format import FormatError

MODELS = {
    "Llama2-7B": "meta-llama/Llama-2-7b-hf",
    "Llama2-13B": "meta-llama/Llama-2-13b-hf",
    "Llama2-70B": "meta-llama/Llama-2-70b-hf",
    "Llama3-8B": "meta-llama/Meta-Llama-3-8B",
    "Qwen2.5-7B": "Qwen/Qwen2.5-7B",
    "Qwen2.5-7B-Instruct": "Qwen/Qwen2.5-7B-Instruct",
    "Qwen2.5-14B": "Qwen/Qwen2.5-14B",
    "Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B",
}
# The paper's methods that there is a command for.
RECIPES = {
    "RTN": "--method rtn",
    "AWQ": "--method awq",
    "GPTQ": "--method gptq",
    "SmoothQuant": "--method smoothquant",
    "OmniQuant": "--method omniquant",
    "CBQ": "--method sliderquant --preset paper --shallow 0 --deep 0 --stages 1.0 --no-learn-scale",
    "QuaRot": "--method gptq --rotate --online-hadamard",
    "SliderQuant": "--method sliderquant --preset paper",
    "SliderQuant+": "--method sliderquant --preset paper --rotate --online-hadamard",
}
OURS = ("sliderquant:fast", "sliderquant:default", "sliderquant:best")
DEFAULT_METHODS = ("SliderQuant", "SliderQuant+", "sliderquant:default", "sliderquant:best")
FULL_PRECISION = "W16A16"
# Column -> task of lm-eval and its metric: normalized by length where there is that, as the published code takes it.
TASKS = {
    "PIQA": ("piqa", "acc_norm"),
    "ARC-e": ("arc_easy", "acc_norm"),
    "ARC-c": ("arc_challenge", "acc_norm"),
    "HS": ("hellaswag", "acc_norm"),
    "WG": ("winogrande", "acc"),
    "BoolQ": ("boolq", "acc"),
    "MMLU": ("mmlu", "acc"),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One row of ours: what makes its checkpoint and what is measured on it; no ``argv`` for the 16-bit model."""

    model: str
    directory: str
    scheme: str
    method: str
    argv: tuple[str, ...]
    tasks: tuple[str, ...]
    checkpoint: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.scheme} {self.method}"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.paper_tables", description=__doc__.splitlines()[0])
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--tables", nargs="+", type=int, choices=(1, 2, 3, 4), default=[1, 2, 3, 4], help="of the paper"
    )
    parser.add_argument("--models", nargs="+", default=["Llama2-7B"], help=f"all, or some of {', '.join(MODELS)}")
    parser.add_argument("--schemes", nargs="+", help="by default those of the tables")
    parser.add_argument(
        "--methods", nargs="+", default=DEFAULT_METHODS, help=f"all, or some of {', '.join((*RECIPES, *OURS))}"
    )
    parser.add_argument("--model-dirs", nargs="+", default=[], help="NAME=DIRECTORY: weights that are here already")
    parser.add_argument("--texts", nargs="+", default=[], help="NAME=FILE: evaluate on these local texts alone")
    parser.add_argument("--calibration", help="text; by default the paper's: WikiText2, or C4 for table 4")
    parser.add_argument("--nsamples", type=positive, default=128, help="calibration samples")
    parser.add_argument("--seqlen", type=positive, default=2048, help="tokens per sample and evaluation window")
    parser.add_argument("--epochs", type=positive, help="of methods that learn in windows; by default their own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; of calibrations")
    parser.add_argument("--tasks", action=switch, default=True, help="zero-shot tasks with lm-eval and vLLM")
    parser.add_argument("--limit", type=positive, help="examples per task, for a trial")
    parser.add_argument("--tensor-parallel-size", type=positive, default=1, help="GPUs that serve one model")
    parser.add_argument("--keep-checkpoints", action=switch, default=False, help="after their tasks are measured")
    parser.add_argument("--dry-run", action=switch, default=False, help="print commands and sizes, and do nothing")
    parser.add_argument("--output-dir", type=Path, default=Path("paper"), help="for results, tables and logs")
    arguments = parser.parse(argv)
    for flag, known in (("models", list(MODELS)), ("methods", [*RECIPES, *OURS])):
        given = list(getattr(arguments, flag))
        setattr(arguments, flag, known if given == ["all"] else given)
        if unknown := [each for each in getattr(arguments, flag) if each not in known]:
            parser.error(f"--{flag}: expected all, or some of {', '.join(known)}, found {unknown[0]!r}")
    arguments.model_dirs = pairs("--model-dirs", arguments.model_dirs, MODELS)
    arguments.texts = pairs("--texts", arguments.texts, paper_texts.STREAMS)
    return arguments


def pairs(flag: str, given: list[str], known) -> dict[str, str]:
    """NAME=VALUE arguments as a mapping."""
    found = dict(each.split("=", 1) if "=" in each else (each, "") for each in given)
    for name, value in found.items():
        if name not in known or not value:
            raise UserError(f"{flag}: expected NAME=PATH with a name of {', '.join(known)}, found {name}={value}")
    return found


def chosen_entries(arguments: argparse.Namespace) -> list[Entry]:
    found = [
        each
        for each in entries()
        if each.table in arguments.tables
        and each.model in arguments.models
        and (not arguments.schemes or each.scheme in (*arguments.schemes, FULL_PRECISION))
    ]
    if not any(each.scheme != FULL_PRECISION for each in found):
        raise UserError("--tables, --models, --schemes: no row of the paper is in all of them; choose others")
    return found


def jobs(arguments: argparse.Namespace, printed: list[Entry]) -> list[Job]:
    """Our rows beside those of the paper, each once whatever number of tables it stands in."""
    found = []
    for model in dict.fromkeys(each.model for each in printed):
        of_model = [each for each in printed if each.model == model]
        for scheme in dict.fromkeys(each.scheme for each in of_model):
            of_scheme = [each for each in of_model if each.scheme == scheme]
            in_paper = {each.method for each in of_scheme}
            directory = arguments.model_dirs.get(model, MODELS[model])
            wanted = ["-"] if scheme == FULL_PRECISION else arguments.methods
            for method in wanted:
                if method in RECIPES and method not in in_paper:
                    continue
                tasks = ()
                if arguments.tasks:
                    beside = [each.column for each in of_scheme if method in OURS or each.method == method]
                    tasks = tuple(name for name in TASKS if name in beside)
                if method == "-":
                    found.append(Job(model, directory, scheme, method, (), tasks))
                    continue
                label = f"{model}-{scheme}-{method}".replace("+", "plus").replace(":", "-")
                checkpoint = arguments.output_dir / "checkpoints" / label
                argv = calibration(arguments, model, directory, scheme, method)
                argv = merged(argv, ("--output-dir", str(checkpoint), "--overwrite"))
                found.append(Job(model, directory, scheme, method, argv, tasks, checkpoint))
    return found


def calibration(arguments, model: str, directory: str, scheme: str, method: str) -> tuple[str, ...]:
    """Flags of the calibration, with the settings of the paper's appendix B for the model."""
    from benchmarks.suites import recipe_of

    preset = method.partition(":")[2]
    flags = RECIPES.get(method, f"--method sliderquant --preset {preset}")
    mixture = model == "Qwen3-30B-A3B"
    dataset = arguments.calibration or ("allenai/c4:en" if mixture else "Salesforce/wikitext:wikitext-2-raw-v1")
    # Activations of 4 bits come with a cache of 4 bits there; groups and quantized activations exclude each other here.
    special = "--kv-bits 4" if scheme == "W4A4" else "--group-size 128" if mixture else ""
    flags = merged(
        ("--model", directory, *scheme_flags(scheme)),
        flags,
        special,
        "--batch-size 1" if mixture else "",
        ("--dataset", dataset, "--nsamples", str(arguments.nsamples), "--seqlen", str(arguments.seqlen)),
        () if arguments.device == "auto" else ("--device", arguments.device),
    )
    if arguments.epochs is not None and recipe_of(flags).epochs:
        flags = merged(flags, ("--epochs", str(arguments.epochs)))
    return flags


def task_argv(arguments: argparse.Namespace, job: Job) -> list[str]:
    """Arguments of `python -m lm_eval` for a checkpoint, or for the 16-bit model."""
    engine = {"pretrained": job.checkpoint or job.directory, "dtype": "auto", "max_model_len": 4096}
    engine |= {"tensor_parallel_size": arguments.tensor_parallel_size, "gpu_memory_utilization": 0.85}
    if job.checkpoint:
        engine["quantization"] = "sliderquant"
    names = ",".join(TASKS[task][0] for task in job.tasks)
    argv = ["--model", "vllm", "--model_args", ",".join(f"{key}={value}" for key, value in engine.items())]
    argv += ["--tasks", names, "--num_fewshot", "0", "--batch_size", "auto"]
    argv += ["--limit", str(arguments.limit)] if arguments.limit else []
    return [*argv, "--output_path", str(task_folder(arguments, job))]


def task_folder(arguments: argparse.Namespace, job: Job) -> Path:
    return arguments.output_dir / "lm-eval" / (job.checkpoint.name if job.checkpoint else job.model)


def task_command(arguments: argparse.Namespace, job: Job) -> str:
    return f"python -m lm_eval {shlex.join(task_argv(arguments, job))}"


def run_tasks(arguments: argparse.Namespace, job: Job) -> dict[str, float]:
    """Column -> accuracy in percent. Raises UserError with the place of the log where lm-eval fails."""
    folder = task_folder(arguments, job)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    with log.open("w") as output:
        argv = [sys.executable, "-m", "lm_eval", *task_argv(arguments, job)]
        status = subprocess.run(argv, stdout=output, stderr=output).returncode
    written = sorted(folder.rglob("results*.json"))
    if status or not written:
        raise UserError(f"lm-eval failed with exit code {status}; its log is {log}")
    results = json.loads(written[-1].read_text())["results"]
    try:
        return {column: 100 * results[TASKS[column][0]][f"{TASKS[column][1]},none"] for column in job.tasks}
    except KeyError as error:
        raise UserError(f"{written[-1]}: expected {error} in what lm-eval found; use lm-eval 0.4 or newer") from None


def keys(arguments: argparse.Namespace, job: Job) -> tuple[dict, dict]:
    """What identifies the results of a job: of its calibration and perplexities, and of its tasks."""
    local = tuple(arguments.texts.values())
    if job.argv:
        made = {"command": command(job.argv), "version": version(job.argv, *local)}
    else:
        made = {"command": f"16-bit {job.directory}", "version": {job.directory: fingerprint(job.directory)}}
    return made, {"command": task_command(arguments, job), "version": made["version"]}


def work(arguments: argparse.Namespace, job: Job, results: Results, bar: Bar) -> None:
    """Measure what is missing of a job; what cannot be measured leaves its reason."""
    made, tasked = keys(arguments, job)
    needs_tasks = bool(job.tasks) and results.find(**tasked) is None
    current = made
    try:
        if job.argv and (results.find(**made) is None or (needs_tasks and not job.checkpoint.exists())):
            texts = paper_texts.streams(arguments.texts, arguments.seqlen)
            _put(results, made, measure(job.argv, bar, texts, write=needs_tasks))
        if needs_tasks:
            current = tasked
            free_memory()
            bar.phase("lm-eval", 1, 1)
            _put(results, tasked, {"tasks": run_tasks(arguments, job)})
        if job.checkpoint and not arguments.keep_checkpoints:
            shutil.rmtree(job.checkpoint, ignore_errors=True)
    except (UserError, FormatError) as error:
        _put(results, current, {"reason": str(error)})


def _put(results: Results, key: dict, found: dict) -> None:
    results.put(key | {"date": datetime.now(UTC).isoformat(timespec="seconds")} | found)


def free_memory() -> None:
    """Give back what calibration keeps of the GPU: the engine that follows wants it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_tools(planned: list[Job]) -> None:
    if any(job.tasks for job in planned) and importlib.util.find_spec("lm_eval") is None:
        raise UserError("zero-shot tasks need lm-eval: pip install lm-eval, or leave them out with --no-tasks")


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    printed = chosen_entries(arguments)
    planned = jobs(arguments, printed)
    if arguments.dry_run:
        for line in plan(arguments, planned):
            console.print(line, markup=False)
        return
    check_tools(planned)
    import transformers

    transformers.logging.set_verbosity_error()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.output_dir / "paper.json")
    with Bar(Console(stderr=True), len(planned)) as bar:
        for job in planned:
            bar.cell(job.name)
            work(arguments, job, results, bar)
            bar.cell_done()
            (arguments.output_dir / "paper.md").write_text(report(arguments, printed, planned, results))
    console.print((arguments.output_dir / "paper.md").read_text(), markup=False)
    console.print(f"written to {arguments.output_dir}: paper.json, paper.md")


def plan(arguments: argparse.Namespace, planned: list[Job]):
    """Lines of a dry run: what each model weighs, and every command in the order of a run."""
    for model in dict.fromkeys(job.model for job in planned):
        of_model = [job for job in planned if job.model == model]
        local = arguments.model_dirs.get(model)
        schemes = tuple(dict.fromkeys(job.scheme for job in of_model if job.argv))
        yield f"{model} ({of_model[0].directory}): {sizes(model, local, schemes, arguments.nsamples, arguments.seqlen)}"
        for job in of_model:
            yield f"  {job.scheme} {job.method if job.argv else '16-bit'}"
            if job.argv:
                yield f"    {command(job.argv)}"
            if job.tasks:
                yield f"    {task_command(arguments, job)}"


def report(arguments: argparse.Namespace, printed: list[Entry], planned: list[Job], results: Results) -> str:
    """The tables in markdown, as far as they are known."""
    ours: dict[tuple[str, str, str], dict[str, float]] = {}
    reasons: list[str] = []
    for job in planned:
        made, tasked = keys(arguments, job)
        found = ours.setdefault((job.model, job.scheme, job.method), {})
        for key in (made, tasked):
            cell = results.cells.get(key["command"], {})
            if cell.get("version") != key["version"]:
                continue
            if "reason" in cell:
                reasons.append(f"{job.name}: {cell['reason']}")
            found |= cell.get("tasks", {})
            for name, figures in cell.get("quality", {}).items():
                found[name] = figures["perplexity"]
                ours.setdefault((job.model, FULL_PRECISION, "-"), {}).setdefault(name, figures["full_precision"])
    budget = f"{arguments.nsamples} x {arguments.seqlen} tokens to calibrate"
    budget += f", {arguments.epochs} epochs" if arguments.epochs else ""
    budget += f", {arguments.limit} examples per task" if arguments.limit else ""
    tables = comparison(printed, ours, OURS)
    without = sorted({each.method for each in printed} - {*RECIPES, "-"})
    notes = [*NOTES, f"No command here for {', '.join(without)}."] if without else list(NOTES)
    return markdown(tables, budget, reasons, notes)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
