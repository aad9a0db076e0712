"""How fast calibration is, and where its time goes.

    python -m benchmarks.calibration --threads 1            # CPU seconds beside a yardstick, and the accuracy reached
    python -m benchmarks.calibration --threads 1 --profile  # shares of the parts

The yardstick is a product of two 1024 x 1024 matrices, timed before and after every run in the same process: CPU
seconds over its time is what to compare between machines. It is of bf16, or of fp32 where the CPU has no instructions
for bf16, as the products of calibration are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.cells import Silent, default_texts, exit_code, measure, scheme_flags
from calibrate.arguments import Parser

MODEL = "assets/tiny-llama"
# Parts of the profile: names of torch's operators and of this project's functions that count as each.
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": ("aten::bmm", "aten::_softmax", "aten::_softmax_backward_data", "aten::_scaled_dot_product"),
    "weight quantizer": ("_FakeQuantizeWeight",),
    "activation quantizer": ("_FakeQuantizeActivation",),
    "optimizer": ("Optimizer.step", "aten::_fused_adamw_"),
    "factorization": ("aten::linalg_cholesky_ex", "aten::cholesky_inverse"),
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.calibration", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[MODEL], help="directories, hub ids or short names")
    parser.add_argument("--schemes", nargs="+", default=["W4A4", "W2A16"], help="such as W4A16, W4A4 or W3A16g128")
    parser.add_argument("--preset", default="default", help="of sliderquant")
    parser.add_argument("--calibration", help="text; by default sources of Python's standard library")
    parser.add_argument("--evaluation", help="text; by default other sources of it")
    parser.add_argument("--nsamples", type=int, default=32, help="calibration samples")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per sample and per evaluation window")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--profile", action="store_true", help="shares of the parts instead of seconds")
    parser.add_argument("--output-dir", type=Path, default=Path("quality"), help="for the JSON")
    return parser.parse(argv)


def yardstick() -> tuple[str, float]:
    """The data type, and median CPU seconds of one product of two matrices [1024, 1024] of it."""
    import torch

    from calibrate.products import FAST_BF16

    matrix = torch.randn(1024, 1024, dtype=torch.bfloat16 if FAST_BF16 else torch.float32)
    times = []
    for _ in range(21):
        started = time.process_time()
        torch.mm(matrix, matrix)
        times.append(time.process_time() - started)
    return "bf16" if FAST_BF16 else "fp32", statistics.median(times[1:])


def timed(argv: list[str]) -> dict:
    """CPU seconds, yardsticks and perplexities of one calibration."""
    _, before = yardstick()
    found = measure(argv, Silent())
    dtype, after = yardstick()
    (quality,) = found["quality"].values()
    return {
        "command": f"python -m calibrate {' '.join(argv)}",
        "cpu_seconds": found["cpu_seconds"],
        "yardstick": f"{dtype} 1024^3",
        "yardstick_seconds": (before + after) / 2,
        "excess": quality["perplexity"] / quality["full_precision"] - 1,
    }


def profiled(argv: list[str]) -> dict[str, float]:
    """Part -> share of the CPU time, of its operators themselves; what they call is counted where it belongs."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from calibrate.cli import parse_arguments, recipe_from
    from calibrate.data import calibration_samples
    from calibrate.hub import resolve_model
    from calibrate.memory import return_freed_memory
    from calibrate.model import Model
    from calibrate.pipeline import calibrate

    return_freed_memory()
    arguments = parse_arguments(argv)
    recipe = recipe_from(arguments)
    model = Model(resolve_model(arguments.model), recipe, torch.device("cpu"))
    samples = calibration_samples(model.tokenizer, recipe.dataset, recipe.nsamples, recipe.seqlen, recipe.seed)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        calibrate(model, samples, Silent())
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = dict.fromkeys((*PARTS, "everything else"), 0.0)
    for event in events:
        part = next((part for part, names in PARTS.items() if event.key.startswith(names)), "everything else")
        shares[part] += event.self_cpu_time_total / total
    return shares


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def run(arguments: argparse.Namespace) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    texts = arguments.calibration, arguments.evaluation
    if None in texts:
        texts = [given or made for given, made in zip(texts, default_texts(arguments.output_dir), strict=True)]
    results, rows = [], []
    for model in arguments.models:
        for scheme in arguments.schemes:
            data = ["--dataset", texts[0], "--eval-dataset", texts[1], "--nsamples", str(arguments.nsamples)]
            argv = ["--model", model, *scheme_flags(scheme), "--preset", arguments.preset, *data]
            argv += ["--seqlen", str(arguments.seqlen), "--device", "cpu"]
            name = Path(model).name
            if arguments.profile:
                shares = profiled([*argv, "--epochs", "1"])
                results.append({"model": name, "scheme": scheme, "shares": shares})
                rows.append((name, scheme, *(f"{share:.0%}" for share in shares.values())))
                continue
            found = timed(argv)
            results.append({"model": name, "scheme": scheme} | found)
            seconds, unit = found["cpu_seconds"], found["yardstick_seconds"]
            rows.append(
                (
                    name,
                    scheme,
                    f"{seconds:.1f}",
                    f"{1e3 * unit:.2f}",
                    f"{seconds / unit:,.0f}",
                    f"{found['excess']:.2%}",
                )
            )
    if arguments.profile:
        header = (*PARTS, "everything else")
    else:
        header = ("CPU s", f"{results[0]['yardstick']}, ms", "ratio", "above 16-bit")
    print(table(("model", "scheme", *header), rows))
    name = "profile.json" if arguments.profile else "calibration.json"
    partial = arguments.output_dir / f"{name}.partial"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(arguments.output_dir / name)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
