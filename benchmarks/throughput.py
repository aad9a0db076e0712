"""Tokens per second of quantized models and of their 16-bit parent in vLLM, prefill and decode apart.

    python -m benchmarks.throughput --model ./quantized --batch-sizes 1 8 32

All models get the same prompts of random tokens. Each runs in a process of its own, in turns, so that a change of the
machine's load does not fall on one of them alone. Models of other quantization methods may stand beside ours. Prefill
is the time to the first token of a batch; decode is what the further tokens take, end of sequence ignored. The engine
may take a whole batch of prompts in one step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common import positive
from calibrate.arguments import Parser
from calibrate.errors import UserError
from sliderquant_vllm.checkpoint import CONFIG_FILE, read_config
from sliderquant_vllm.format import QUANT_METHOD, FormatError
from sliderquant_vllm.shards import read_json

PHASES = ("prefill", "decode")
WIDTH = 200
SETTINGS = (
    *("dtype", "batch_sizes", "input_len", "output_len", "repeats"),
    *("tensor_parallel_size", "gpu_memory_utilization", "enforce_eager"),
)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, nargs="+", help="quantized checkpoints")
    parser.add_argument("--baseline", default="auto", help="directory or hub id; auto: the parent; none: no baseline")
    add_settings(parser)
    return parser.parse(argv)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags that say how models are timed."""
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--batch-sizes", nargs="+", type=positive, default=[1, 8, 32], help="prompts at once")
    parser.add_argument("--input-len", type=positive, default=512, help="tokens per prompt")
    parser.add_argument("--output-len", type=two_or_more, default=128, help="tokens generated per prompt, 2 or more")
    parser.add_argument("--repeats", type=positive, default=3, help="measurements in each round")
    parser.add_argument("--rounds", type=positive, default=2, help="engine starts of each model, in turns")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float16")
    parser.add_argument("--tensor-parallel-size", type=positive, default=1, help="ranks")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.8, help="share of the memory, on CPUs too, that vLLM may take"
    )
    parser.add_argument("--enforce-eager", action=switch, default=False, help="do not compile or capture graphs")
    parser.add_argument("--output-dir", type=Path, default=Path("throughput"), help="for JSON, picture and logs")
    parser.add_argument("--plot", action=switch, default=True, help="draw a picture")


def two_or_more(text: str) -> int:
    if positive(text) < 2:
        raise argparse.ArgumentTypeError("expected 2 or more, because the first token belongs to prefill")
    return int(text)


def find_models(models: list[str], baseline: str) -> dict[str, str]:
    """Label -> directory, the baseline first. Raises UserError or FormatError when there is none."""
    labels: dict[str, str] = {}
    for model in models:
        name = label(model)
        name = f"{name} {Path(model).name}" if name in labels else name
        if name in labels:
            raise UserError(f"--model {model}: named twice, or of one name with {labels[name]}")
        labels[name] = model
    if baseline == "none":
        return labels
    if baseline == "auto":
        baseline = read_config(models[0])[1].calibration.get("model")
        if not isinstance(baseline, str):
            raise UserError(
                f"--model {models[0]}: its config names no parent; name one with --baseline, or --baseline none"
            )
    if not Path(baseline).is_dir():
        # Only now: this imports torch and transformers, and may download.
        from calibrate.hub import resolve_model

        try:
            baseline = str(resolve_model(baseline))
        except UserError as error:
            raise UserError(str(error).replace("--model", "--baseline", 1)) from None
    return {"16-bit": baseline} | labels


def label(model: str) -> str:
    """The scheme of a checkpoint of ours, such as W4A16; method and bits of another's."""
    fields = read_json(Path(model) / CONFIG_FILE).get("quantization_config")
    if isinstance(fields, dict) and fields.get("quant_method") not in (None, QUANT_METHOD):
        return f"{fields['quant_method']} {fields['bits']}-bit" if "bits" in fields else fields["quant_method"]
    _, config = read_config(model)
    return f"W{config.weights.bits}A{config.activations.bits if config.activations else 16}"


def measure(job: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Run in a process of its own: batch size -> phase -> tokens per second of each repeat."""
    from vllm import LLM, SamplingParams

    input_len, output_len = job["input_len"], job["output_len"]
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        max_model_len=input_len + output_len,
        max_num_seqs=max(job["batch_sizes"]),
        max_num_batched_tokens=max(max(job["batch_sizes"]) * input_len, input_len + output_len),
        tensor_parallel_size=job["tensor_parallel_size"],
        gpu_memory_utilization=job["gpu_memory_utilization"],
        enforce_eager=job["enforce_eager"],
        enable_prefix_caching=False,
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def seconds(prompts: list[dict], tokens: int) -> float:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
        started = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - started

    rates: dict[str, dict[str, list[float]]] = {}
    for batch in job["batch_sizes"]:
        draw = random.Random(batch)
        prompts = [{"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(input_len)]} for _ in range(batch)]
        seconds(prompts, 2)  # whatever compiles or allocates at first use
        rates[str(batch)] = {phase: [] for phase in PHASES}
        for _ in range(job["repeats"]):
            first, all_tokens = seconds(prompts, 1), seconds(prompts, output_len)
            if all_tokens <= first:  # the machine was busy with something else in the shorter run
                continue
            rates[str(batch)]["prefill"].append(batch * input_len / first)
            rates[str(batch)]["decode"].append(batch * (output_len - 1) / (all_tokens - first))
        if not rates[str(batch)]["decode"]:
            raise UserError(
                f"batch size {batch}: in no measurement did {output_len} tokens take longer than the first alone; "
                "raise --output-len or --repeats, or let the machine come to rest"
            )
    return rates


def measure_apart(job: dict[str, Any], log: Path) -> dict[str, dict[str, list[float]]]:
    """``measure`` in a fresh process. Raises UserError with the reason, and the place of the log."""
    result = log.with_suffix(".worker.json")
    result.unlink(missing_ok=True)
    with log.open("w") as output:
        status = subprocess.run(
            [sys.executable, "-m", "benchmarks.throughput", "--worker", json.dumps(job), str(result)],
            stdout=output,
            stderr=output,
            env={"VLLM_NO_USAGE_STATS": "1", **os.environ},
        ).returncode
    if status != 0 or not result.exists():
        reasons = re.findall(r"(?:Value error,|Error:|Exception:) (.+?)(?: \[type=|$)", log.read_text(), re.MULTILINE)
        reasons = [reason for reason in reasons if "validation error" not in reason]
        # The first error is the cause; those that follow only say that a process ended.
        reason = reasons[0].strip()[:300] if reasons else f"exit status {status}"
        raise UserError(f"{job['model']}: vLLM failed ({reason}); the whole log is in {log}")
    rates = json.loads(result.read_text())
    result.unlink()
    return rates


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    models = find_models(arguments.model, arguments.baseline)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)  # a file has room for the table of many models
    job = {name: getattr(arguments, name) for name in SETTINGS}
    rates: dict[str, dict[str, dict[str, list[float]]]] = {label: {} for label in models}
    for turn in range(arguments.rounds):
        for label, model in models.items():
            with console.status(f"round {turn + 1} of {arguments.rounds}: {label}"):
                found = measure_apart(job | {"model": model}, arguments.output_dir / f"{label}.log")
            for batch, phases in found.items():
                for phase, values in phases.items():
                    rates[label].setdefault(batch, {}).setdefault(phase, []).extend(values)
    medians = {
        label: {batch: {phase: statistics.median(phases[phase]) for phase in PHASES} for batch, phases in held.items()}
        for label, held in rates.items()
    }
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "models": models,
        "settings": job | {"rounds": arguments.rounds},
        "tokens_per_second": medians,
        "samples": rates,
    }
    path = arguments.output_dir / "throughput.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    console.print(table(medians))
    if arguments.plot:
        plot(medians, arguments.output_dir / "throughput.png")
    console.print(f"written to {arguments.output_dir}", highlight=False)


def machine() -> dict[str, Any]:
    import torch
    import vllm

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), None)
    return {"gpu": gpu, "cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "vllm": vllm.__version__}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table(medians: dict[str, dict[str, dict[str, float]]]):
    """Median tokens per second by batch size, and each model's ratio to the first."""
    from rich.table import Table

    table = Table(title="tokens per second", title_justify="left")
    for heading in ("batch", "phase", *medians):
        table.add_column(heading, justify="right")
    labels = list(medians)
    for label in labels[1:]:
        table.add_column(f"{label} / {labels[0]}", justify="right")
    for batch in medians[labels[0]]:
        for phase in PHASES:
            values = [medians[label][batch][phase] for label in labels]
            ratios = [f"{value / values[0]:.2f}x" for value in values[1:]]
            table.add_row(batch, phase, *(f"{value:,.1f}" for value in values), *ratios)
    return table


def plot(medians: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = list(next(iter(medians.values())))
    figure, axes = plt.subplots(1, len(PHASES), figsize=(9, 3.5))
    width = 0.8 / len(medians)
    for axis, phase in zip(axes, PHASES, strict=True):
        for i, (label, held) in enumerate(medians.items()):
            left = [position + (i - (len(medians) - 1) / 2) * width for position in range(len(batches))]
            bars = axis.bar(left, [held[batch][phase] for batch in batches], width, label=label)
            axis.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axis.set_title(phase)
        axis.set_xlabel("batch size")
        axis.set_xticks(range(len(batches)), batches)
        axis.set_ylabel("tokens per second")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        Path(argv[2]).write_text(json.dumps(measure(json.loads(argv[1]))))
        return 0
    try:
        run(parse(argv))
    except (UserError, FormatError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
