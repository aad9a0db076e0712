"""`make demo`: the shipped small model, calibrated, served by `vllm serve`, asked through the openai client, measured.

Everything is written below demo-output/: checkpoints, server logs, results.json and a picture. The text is the
source of the running interpreter's standard library, different files for calibration and for evaluation.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.common import library_texts
from tools.server import ServerError, served

MODEL = Path(__file__).parents[1] / "assets" / "tiny-llama"
WINDOW = 256
START_TIMEOUT = 180
STREAMS, STREAM_TOKENS = 8, 128
INT8_ACTIVATIONS = json.dumps({"sliderquant": {"int8_activations": True}})
PROMPT = "def read_json(path):\n    "
METHODS = {"SliderQuant": [], "round-to-nearest": ["--method", "rtn"]}
console = Console(soft_wrap=True, highlight=False)


class DemoError(Exception):
    """A step failed; the message says which and where its log is."""


def calibrate(flags: list[str], text: Path, output: Path, epochs: int) -> None:
    """Run the command that a user would."""
    budget = ["--nsamples", "32", "--seqlen", str(WINDOW), "--epochs", str(epochs)]
    command = ["-m", "calibrate", "--model", str(MODEL), *flags, "--dataset", str(text), *budget]
    shown = " ".join(["python", *command, "--output-dir", output.name])
    console.print(f"[bold]$ {shown.replace(str(MODEL), 'assets/tiny-llama').replace(str(text), text.name)}[/bold]")
    result = subprocess.run([sys.executable, *command, "--output-dir", str(output), "--overwrite"])
    if result.returncode:
        raise DemoError(f"calibration failed with exit code {result.returncode}: {shown}")


def perplexity(client: openai.OpenAI, windows: list[list[int]]) -> float:
    """exp of the mean negative log-probability that the server gives the tokens of the windows, the first excepted."""
    total = count = 0
    for start in range(0, len(windows), STREAMS):
        batch = windows[start : start + STREAMS]
        response = client.completions.create(
            model="demo", prompt=batch, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        for choice in response.choices:
            tokens = batch[choice.index]
            for token, entry in zip(tokens[1:], choice.prompt_logprobs[1:], strict=True):
                total -= entry[str(token)]["logprob"]
                count += 1
    return math.exp(total / count)


def tokens_per_second(client: openai.OpenAI) -> float:
    """Generated tokens a second over concurrent streams; the best of three, since machines are shared."""
    best = 0.0
    for _ in range(3):
        started = time.monotonic()
        response = client.completions.create(
            model="demo",
            prompt=PROMPT,
            n=STREAMS,
            max_tokens=STREAM_TOKENS,
            temperature=1,
            extra_body={"ignore_eos": True},
        )
        best = max(best, response.usage.completion_tokens / (time.monotonic() - started))
    return best


def measure(model: Path, flags: list[str], windows: list[list[int]], log: Path) -> dict:
    # The model is named as in the quick start, from the folder that it lies in.
    shown = ["serve", f"./{model.name}", *flags]
    console.print(f"[bold]$ vllm {' '.join(shown)}[/bold]")
    limits = ["--max-model-len", str(2 * WINDOW), "--max-num-seqs", str(STREAMS), "--served-model-name", "demo"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ
    with served([*shown, *limits], log, START_TIMEOUT, environment, cwd=model.parent) as client:
        answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, temperature=0)
        return {
            "answer": answer.choices[0].text,
            "perplexity": perplexity(client, windows),
            "tokens_per_second": tokens_per_second(client),
            "megabytes": sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6,
        }


def draw(results: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = results["16-bit"]["perplexity"]
    names = list(results)
    colours = ["#777777" if name == "16-bit" else "#c44e52" if "nearest" in name else "#4c72b0" for name in names]
    panels = {
        "perplexity above that of 16-bit, as served, %": [
            (100 * (result["perplexity"] / base - 1), f"{result['perplexity']:.2f}") for result in results.values()
        ],
        "checkpoint, MB": [(result["megabytes"], f"{result['megabytes']:.1f}") for result in results.values()],
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.45 * len(names)), sharey=True)
    for axis, (label, bars) in zip(axes, panels.items(), strict=True):
        axis.barh(names, [length for length, _ in bars], color=colours)
        for row, (length, text) in enumerate(bars):
            axis.annotate(text, (length, row), (3, 0), textcoords="offset points", va="center")
        axis.set_xlabel(label)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle("tiny-llama, 2.9M parameters, quantized and served by vLLM; figures left: perplexity")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def show(results: dict[str, dict]) -> None:
    table = Table(title="as served by vLLM", title_justify="left")
    table.add_column("model")
    for heading in ("perplexity", "over 16-bit", "tokens/s", "checkpoint MB"):
        table.add_column(heading, justify="right")
    base = results["16-bit"]["perplexity"]
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['perplexity']:.3f}",
            "" if name == "16-bit" else f"{result['perplexity'] / base - 1:+.2%}",
            f"{result['tokens_per_second']:.0f}",
            f"{result['megabytes']:.2f}",
        )
    console.print(table)
    console.print(
        f"tokens/s: {STREAMS} streams at once. A model this small measures the server around it, not the kernels; "
        "benchmarks.kernels and benchmarks.throughput do that."
    )


def run(output: Path, schemes: list[str], epochs: int, eval_tokens: int, int8_activations: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    texts, calibration = library_texts(), output / "calibration.txt"
    calibration.write_text(texts["calibration"], encoding="utf-8")
    started = time.monotonic()
    models, flags = {"16-bit": output / "sixteen-bit"}, {"16-bit": []}
    shutil.copytree(MODEL, models["16-bit"], dirs_exist_ok=True)
    for scheme in schemes:
        for method, options in METHODS.items():
            name = f"{scheme} {method}"
            # The first one is the model that the quick start serves.
            models[name] = output / ("quantized" if len(models) == 1 else name.lower().replace(" ", "-"))
            flags[name] = ["--quantization", "sliderquant"]
            calibrate(["--scheme", scheme, *options], calibration, models[name], epochs)
            if int8_activations and scheme.endswith("A16"):
                models[f"{name}, int8"] = models[name]
                flags[f"{name}, int8"] = [*flags[name], "--additional-config", INT8_ACTIVATIONS]
    console.print(f"calibrated in {time.monotonic() - started:.0f} s\n")

    tokens = AutoTokenizer.from_pretrained(MODEL)(texts["evaluation"], verbose=False)["input_ids"][:eval_tokens]
    windows = [tokens[at : at + WINDOW] for at in range(0, len(tokens) - WINDOW + 1, WINDOW)]
    results = {}
    for name, model in models.items():
        log = output / f"serve-{name.lower().replace(', ', '-').replace(' ', '-')}.log"
        results[name] = measure(model, flags[name], windows, log)
        console.print(f"{name}: {PROMPT!r} continues {results[name]['answer']!r}\n", markup=False)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, output / "demo.png")
    show(results)
    console.print(f"all in {time.monotonic() - started:.0f} s; picture: {output / 'demo.png'}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"))
    parser.add_argument("--schemes", nargs="+", default=["W4A4", "W4A16"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument(
        "--int8-activations",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="serve weight-only models once more, with activations in 8 bits",
    )
    arguments = parser.parse_args()
    # As an exception a termination request reaches the clean-up of a running server.
    for request in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(request, lambda number, _: sys.exit(128 + number))
    try:
        if arguments.eval_tokens < WINDOW:
            raise DemoError(f"--eval-tokens: expected at least {WINDOW}, found {arguments.eval_tokens}")
        run(
            arguments.output_dir.resolve(),
            arguments.schemes,
            arguments.epochs,
            arguments.eval_tokens,
            arguments.int8_activations,
        )
    except (DemoError, ServerError, openai.APIError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; no server was left running", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
