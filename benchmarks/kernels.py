"""Times our CPU kernels against those that vLLM and torch serve, all in one process, and prints one table per shape.

    python -m benchmarks.kernels --shapes qwen2.5-7b 4096x4096 --m 1 16 256 --threads 1 2

Weights rotate through more copies than the caches hold, contenders take turns, and each time is a median. Activation
quantization counts where an op needs it. The error of an op is that against the float64 product of the weights that
it stands for, so it holds what the op adds, and not what quantizing the weights lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

GIGA = 1e9
KINDS = ("bf16", "int8")  # of multiplications
# o, gate_up and down
MODELS = {
    "llama3-8b": [(4096, 4096), (28672, 4096), (4096, 14336)],
    "qwen2.5-7b": [(3584, 3584), (37888, 3584), (3584, 18944)],
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    known = ", ".join(MODELS)
    parser.add_argument(
        "--shapes", nargs="+", type=shapes, default=[MODELS["llama3-8b"]], help=f"NxK such as 4096x14336, or {known}"
    )
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64, 256], help="tokens")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=21, help="calls that a median is taken of")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--plot", type=Path, help="draw the rooflines here, a picture")
    parser.add_argument("--cpu", action="store_true", help="compare on the CPU although there is a GPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.shapes = [each for several in args.shapes for each in several]
    return args


def shapes(text: str) -> list[tuple[int, int]]:
    """Those of a model, or the one that the text says."""
    if text in MODELS:
        return MODELS[text]
    try:
        n, k = (int(part) for part in text.split("x"))
    except ValueError:
        expected = f"NxK such as 4096x14336, or one of {', '.join(MODELS)}"
        raise argparse.ArgumentTypeError(f"expected {expected}; found {text!r}") from None
    if n % 32 or k % 128:
        raise argparse.ArgumentTypeError(f"{text}: the peers need N a multiple of 32 and K of 128")
    return [(n, k)]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.worker:
        args.json.write_text(json.dumps(measure(args)))
        return
    if Path("/dev/nvidia0").exists() and not args.cpu:
        raise SystemExit("benchmarks.kernels compares CPU kernels; pass --cpu to do so on a machine with a GPU")
    results = [run_worker(args, threads) for threads in args.threads]
    for result in results:
        show(result)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))
    if args.plot:
        draw(results, args.plot)


def run_worker(args: argparse.Namespace, threads: int) -> dict:
    """Measure in a process of its own: OpenMP runtimes settle their number of threads when they start."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks.kernels", "--worker", "--json", file.name]
        command += ["--shapes", *(f"{n}x{k}" for n, k in args.shapes), "--m", *map(str, args.m)]
        command += ["--repeats", str(args.repeats), "--threads", str(threads)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True)
        return json.load(file)


def measure(args: argparse.Namespace) -> dict:
    import torch

    from benchmarks.cpu_ops import BUILDERS, Absent, Problem
    from sliderquant_vllm import ops

    (threads,) = args.threads
    torch.set_num_threads(threads)
    isa = ops.host().isa() if ops.is_native("cpu") else "none: the pure-torch references"
    result = {"threads": threads, "isa": isa, "torch": torch.__version__, "rows": [], "absent": {}}
    for n, k in args.shapes:
        # Contenders take turns: between two calls with one copy the copies of all of them are read.
        problem, contenders = Problem(n, k, last_level_cache_bytes()), []
        for name, build in BUILDERS.items():
            try:
                contenders.append(build(problem))
            except Absent as reason:
                result["absent"][name] = str(reason)
        for m in args.m:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).bfloat16()
            limits = {"read_gb_per_s": read_bandwidth()} | peaks(threads)
            for contender, seconds in zip(contenders, time_in_turns(contenders, x, args.repeats), strict=True):
                row = {"op": contender.name, "n": n, "k": k, "m": m, "ms": seconds * 1e3}
                row["gb_per_s"] = contender.bytes / seconds / GIGA
                row["operations"] = 2 * m * n * k
                row["kind"] = contender.kind
                row["error"] = error_of(contender, x)
                result["rows"].append(row | limits)
    return result


def last_level_cache_bytes() -> int:
    """Of the first core; 64 MB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=64 << 20)


def read_bandwidth() -> float:
    """GB/s at which this process reads memory that no cache holds: the best of several simple reductions."""
    import torch

    data = torch.ones(1 << 27)
    return max(
        data.numel() * data.element_size() / timed(reduce, data) / GIGA
        for reduce in (torch.sum, torch.amax, lambda values: torch.dot(values, values))
        for _ in range(3)
    )


def peaks(threads: int) -> dict[str, float]:
    """Billions of operations per second out of registers, all threads together: what no kernel can exceed."""
    from sliderquant_vllm import ops

    found = {}
    for kind in KINDS:
        with contextlib.suppress(ValueError), ThreadPoolExecutor(threads) as pool:
            each = pool.map(lambda _, kind=kind: ops.host().peak(kind, 0.05), range(threads))
            found[f"{kind}_gop_per_s"] = sum(each) / GIGA
    return found


def fraction(row: dict) -> float:
    """Of the speed that the machine allows: of reading the weights, or of multiplying, whichever takes longer."""
    least = row["gb_per_s"] * row["ms"] / row["read_gb_per_s"]
    if peak := row.get(f"{row['kind']}_gop_per_s"):
        least = max(least, row["operations"] / peak / 1e6)
    return least / row["ms"]


def draw(results: list[dict], path: Path) -> None:
    """Operations per second over operations per byte of weights, under the roofs of memory and arithmetic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(7 * len(results), 5), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        rows = [row for row in result["rows"] if row["n"] == result["rows"][0]["n"]]
        for op in dict.fromkeys(row["op"] for row in rows):
            points = [row for row in rows if row["op"] == op]
            intensity = [row["operations"] / (row["gb_per_s"] * row["ms"] * 1e6) for row in points]
            speed = [row["operations"] / row["ms"] / 1e6 for row in points]
            ours = op.startswith("sliderquant")
            axis.loglog(intensity, speed, "o-" if ours else "x--", label=op, linewidth=1.5 if ours else 1)
        read, low, high = rows[0]["read_gb_per_s"], 0.5, 4096
        roofs = {"bf16": rows[0].get("bf16_gop_per_s"), "int8": rows[0].get("int8_gop_per_s")}
        for kind, peak in roofs.items():
            if peak:
                axis.loglog([low, peak / read, high], [low * read, peak, peak], "k-", linewidth=0.8)
                axis.annotate(f"{kind}: {peak:,.0f} Gop/s", (high, peak), ha="right", va="bottom", fontsize=8)
        shape = f"N={rows[0]['n']} K={rows[0]['k']}"
        axis.set(
            xlabel="operations per byte of weights", ylabel="Gop/s", title=f"{shape}, {result['threads']} thread(s)"
        )
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def timed(function, *arguments) -> float:
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


def time_in_turns(contenders: list, x, repeats: int) -> list[float]:
    """Median seconds per call. Each contender's every call meets another copy of its weights."""
    times = [[] for _ in contenders]
    for repeat in range(-2, repeats):  # two rounds to warm up
        for contender, found in zip(contenders, times, strict=True):
            seconds = timed(contender.run, repeat % contender.copies, x)
            if repeat >= 0:
                found.append(seconds)
    return [statistics.median(found) for found in times]


def error_of(contender, x) -> float:
    from benchmarks.common import relative_error

    rows = x[:16]
    exact = rows.double() @ contender.dense.T
    return relative_error(contender.run(0, x)[:16, : exact.shape[1]], exact)


def peak_text(row: dict) -> str:
    return "".join(f", {kind} {row[f'{kind}_gop_per_s']:,.0f} Gop/s" for kind in KINDS if f"{kind}_gop_per_s" in row)


def show(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    from benchmarks.cpu_ops import BASELINE

    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = result["rows"]
    for n, k in dict.fromkeys((row["n"], row["k"]) for row in rows):
        of_shape = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        tokens = list(dict.fromkeys(row["m"] for row in of_shape))
        found = {(row["op"], row["m"]): row for row in of_shape}
        baselines = {row["m"]: row for row in of_shape if row["op"].startswith(BASELINE)}
        read = max(row["read_gb_per_s"] for row in of_shape)
        table = Table(
            title=f"N={n} K={k}, {result['threads']} thread(s), {result['isa']}; memory reads {read:.1f} GB/s"
            f"{peak_text(of_shape[0])}\n"
            "ms, times as fast as bf16, share of what reading or multiplying allows",
        )
        for column in ("op", *(f"M={m}" for m in tokens), "error"):
            table.add_column(column, justify="left" if column == "op" else "right")
        for op in dict.fromkeys(row["op"] for row in of_shape):
            cells = []
            for m in tokens:
                row, baseline = found[op, m], baselines.get(m)
                ratio = f"{baseline['ms'] / row['ms']:.2f}x" if baseline else "-"
                cells.append(f"{row['ms']:.3f} {ratio:>6} {fraction(row):4.0%}")
            table.add_row(op, *cells, f"{max(found[op, m]['error'] for m in tokens):.1e}")
        console.print(table)
    for name, reason in result["absent"].items():
        console.print(f"absent: {name}: {reason}")


if __name__ == "__main__":
    main()
