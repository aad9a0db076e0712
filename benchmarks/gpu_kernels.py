"""Times our CUDA kernels against torch's bf16 product on a GPU, beside what a model expects of them.

    python -m benchmarks.gpu_kernels --shapes 28672x4096 --m 1 16 64 --json times.json

Calls are replayed from a CUDA graph, each time behind another replay, so that no launch counts, and go through more
copies of the weights than L2 holds. Each time is a median over replays. That of an integer product counts the
quantization of its tokens; quantizers, and what is fused with them, are timed alone as well, and find their tokens in
L2 as they do when served. The error of an op is that against the float64 product of what its codes stand for. Without a
GPU only the model is printed; its columns say that they were not measured.

Rows are printed and written as they come. One that fails says why and the next ones follow, unless the GPU is lost to
this process; the exit status is 1 where one of ours is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import gpu_model
from benchmarks.common import relative_error
from benchmarks.gpu_ops import (
    BASELINE,
    Absent,
    Contender,
    bf16_contender,
    grouped_contender,
    int4_contender,
    int8_contender,
    integer_contender,
    integer_name,
    marlin_contender,
    op_name,
    own_contender,
)
from sliderquant_vllm import ops

# gate_up, down, qkv and o of Llama-3 8B, gate_up of 70B on one of eight GPUs
SHAPES = [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (7168, 8192)]
# Experts, those of a token, N, K: gates and ups of Qwen3-30B-A3B and of Mixtral
EXPERTS = [(128, 8, 1536, 2048), (8, 2, 28672, 4096)]
# The quantizers that are timed alone: what of gpu_model they are, and the block of their transform
QUANTIZERS = {
    "quantize_per_token": ("quantize", 1),
    "quantize_per_token, Hadamard": ("quantize", 128),
    "rms_norm_quantize, residual": ("rms_norm", 1),
    "silu_mul_quantize, Hadamard": ("silu_mul", 128),
}
TOKENS = [1, 4, 8, 16, 32, 64, 128, 512, 2048]
MICRO = 1e6
WARM_UP, LONGEST = 0.05, 0.5  # s, of a row: before what is timed, and with it, three samples at least
COLUMNS = ["op", "N x K", "M", "us", "x bf16", "GB/s", "error"]
COLUMNS += ["H200 model, not measured: us", "x bf16", "limit", "blocks (splits)"]
HEADS = "| " + " | ".join(COLUMNS) + " |\n" + "|" + "---|" * len(COLUMNS)


class Report:
    """Rows as they come: printed at once, and all of them written after each contender."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows, self.absent, self.baseline = args, [], {}, {}
        self.gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        print(HEADS, flush=True)

    def add(self, row: dict) -> None:
        row |= expected(row, self.args)
        self.rows.append(row)
        sizes = row["n"], row["k"], row["m"]
        if row["op"] == BASELINE:
            self.baseline[sizes] = row["us"]
        print(line(row, self.baseline.get(sizes)), flush=True)

    def save(self) -> None:
        if self.args.json is None:
            return
        result = {"gpu": self.gpu, "torch": torch.__version__, "group_size": self.args.group_size, "rows": self.rows}
        partial = self.args.json.with_suffix(".partial")
        partial.write_text(json.dumps(result | {"absent": self.absent}, indent=2))
        partial.replace(self.args.json)

    def end(self) -> int:
        """The exit status: 1 where one of ours is missing."""
        failed = [row for row in self.rows if "failed" in row]
        for row in failed:
            print(f"failed: {row['op']}, {row['n']} x {row['k']}, M={row['m']}: {row['failed']}")
        for name, reason in self.absent.items():
            print(f"absent: {name}: {reason}")
        self.save()
        return int(any(name.startswith("sliderquant") for name in (*self.absent, *(row["op"] for row in failed))))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if not torch.cuda.is_available():
        print("No GPU that torch can use: nothing is measured, the model alone.\n")
        report = Report(args)
        for name, n, k in ops_of_the_model(args):
            for m in args.m:
                report.add({"op": name, "n": n, "k": k, "m": m, "us": None})
        return report.end()
    report = Report(args)
    try:
        for n, k in args.shapes:
            measure(report, n, k)
        for sizes in args.experts:
            measure_experts(report, *sizes)
        for k in {k: None for _, k in args.shapes}:
            measure_quantizers(report, k)
    except Lost:
        print("The GPU takes no more work from this process after that: the rest is left out.")
    return report.end()


def ops_of_the_model(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """(name, N, K)"""
    own = [*(op_name(bits, args.group_size) for bits in args.bits), *map(integer_name, args.integer)]
    yield from ((name, n, k) for n, k in args.shapes for name in own)
    for experts, top_k, n, k in args.experts:
        yield from ((f"{name}, {top_k} of {experts} experts", n, k) for name in own)
    yield from ((f"sliderquant {name}", 0, k) for k in {k: None for _, k in args.shapes} for name in QUANTIZERS)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, help="NxK")
    parser.add_argument("--m", nargs="+", type=int, default=TOKENS, help="tokens")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2, 8])
    parser.add_argument(
        "--integer", nargs="*", type=widths, default=[(4, 4), (8, 8)], help="of weights x activations, such as 4x8"
    )
    parser.add_argument(
        "--experts", nargs="*", type=experts_shape, default=EXPERTS, help="EXPERTSxTOPKxNxK of grouped products"
    )
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true", help="weights without zero points")
    parser.add_argument("--plain", action="store_true", help="time the plain kernels as well")
    parser.add_argument("--replays", type=int, default=9, help="that a median is taken of")
    parser.add_argument("--json", type=Path, help="write every figure here")
    return parser.parse_args(argv)


def shape(text: str) -> tuple[int, int]:
    try:
        n, k = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NxK such as 28672x4096, found {text!r}") from None
    if k % 128:
        raise argparse.ArgumentTypeError(f"{text}: K must be a multiple of 128")
    return n, k


def experts_shape(text: str) -> tuple[int, int, int, int]:
    try:
        experts, top_k, n, k = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected EXPERTSxTOPKxNxK such as 128x8x1536x2048, found {text!r}") from None
    if k % 128 or not 1 <= top_k <= experts:
        raise argparse.ArgumentTypeError(f"{text}: K must be a multiple of 128, and TOPK no more than EXPERTS")
    return experts, top_k, n, k


def widths(text: str) -> tuple[int, int]:
    try:
        bits, activation_bits = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two widths such as 4x8, found {text!r}") from None
    if bits not in (2, 3, 4, 8) or not 2 <= activation_bits <= 8:
        raise argparse.ArgumentTypeError(f"{text}: weights have 2, 3, 4 or 8 bits, activations 2 to 8")
    return bits, activation_bits


class Lost(Exception):
    """A CUDA error that stays with this process."""


def measure_contender(
    report: Report, name: str, n: int, k: int, tokens: list[int], build: Callable[[], Contender], rows_of_token: int = 1
) -> None:
    """A row for each number of tokens, each of which is so many rows of x.

    Raises:
        Lost: after that nothing can be measured.
    """
    try:
        contender = None
        for m in tokens:
            row = {"op": name, "n": n, "k": k, "m": m}
            try:
                contender = contender or build()
                if m < contender.least_m:
                    continue
                report.add(row | timed(contender, k, m * rows_of_token, report.args.replays))
            except RuntimeError as error:
                report.add(row | {"us": None, "failed": (str(error).splitlines() or [type(error).__name__])[0]})
                if is_lost():
                    raise Lost from error
                if contender is None:
                    break
    except Absent as reason:
        report.absent[name] = str(reason)
    finally:
        report.save()
    del contender
    torch.cuda.empty_cache()


def is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def measure(report: Report, n: int, k: int) -> None:
    args, cold = report.args, cold_bytes()
    builders = {
        BASELINE: lambda: bf16_contender(n, k, cold),
        "torch int4": lambda: int4_contender(n, k, cold),
        "torch int8, product alone": lambda: int8_contender(n, k, cold, max(args.m)),
        "vLLM Marlin W4A16 g128": lambda: marlin_contender(n, k, cold),
    }
    for bits in args.bits:
        name = op_name(bits, args.group_size)
        builders[name] = lambda bits=bits: own_contender(args, n, k, bits, cold, "")
        if args.plain:
            builders[f"{name}, plain"] = lambda bits=bits: own_contender(args, n, k, bits, cold, "plain")
    for both in args.integer:
        name = integer_name(both)
        builders[name] = lambda both=both: integer_contender(args, n, k, both, cold, "")
        if args.plain:
            builders[f"{name}, plain"] = lambda both=both: integer_contender(args, n, k, both, cold, "plain")
    for name, build in builders.items():
        measure_contender(report, name, n, k, args.m, build)


def cold_bytes() -> int:
    return 4 * torch.cuda.get_device_properties(0).L2_cache_size


def measure_experts(report: Report, experts: int, top_k: int, n: int, k: int) -> None:
    args, cold = report.args, cold_bytes()
    for both in [*((bits, 16) for bits in args.bits), *args.integer]:
        own = op_name(both[0], args.group_size) if both[1] == 16 else integer_name(both)
        for m in args.m:
            # Every token goes to top_k experts at random.
            choice = torch.rand(m, experts, device="cuda").argsort(1)[:, :top_k].flatten()
            counts = torch.bincount(choice, minlength=experts)
            offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
            measure_contender(
                report,
                f"{own}, {top_k} of {experts} experts",
                n,
                k,
                [m],
                lambda both=both, offsets=offsets: grouped_contender(args, experts, n, k, both, cold, offsets),
                top_k,
            )


def measure_quantizers(report: Report, k: int) -> None:
    weight = torch.ones(k, device="cuda", dtype=torch.bfloat16)
    for name, (kind, block) in QUANTIZERS.items():
        for m in report.args.m:
            measure_contender(
                report,
                f"sliderquant {name}",
                0,
                k,
                [m],
                lambda m=m, kind=kind, block=block: quantizer_contender(m, k, kind, block, weight),
            )


def quantizer_contender(m: int, k: int, kind: str, block: int, weight: torch.Tensor) -> Contender:
    if not ops.is_native("cuda"):
        raise Absent("this library was built without CUDA kernels")
    other = torch.randn(m, 2 * k, device="cuda", dtype=torch.bfloat16)

    def run(_, x: torch.Tensor) -> torch.Tensor:
        if kind == "quantize":
            return ops.quantize_per_token(x, 4, False, block)[0]
        if kind == "silu_mul":
            return ops.silu_mul_quantize(other, 4, False, block)[0]
        return ops.rms_norm_quantize(x, other[:, :k], weight, 1e-6, 4, False, block)[0]

    return Contender(kind, m * k * gpu_model.ROW_BYTES[kind], 1, run, None)


def timed(contender: Contender, k: int, m: int, replays: int) -> dict:
    """Microseconds per call, the share of the weights' bytes, and the error of the first 16 tokens."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    y = contender.run(0, x)
    calls = contender.copies * max(1, 20 // contender.copies)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        contender.run(0, x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in range(calls):
                contender.run(call % contender.copies, x)
        started = time.perf_counter()
        while time.perf_counter() - started < WARM_UP:
            graph.replay()
            stream.synchronize()
        times = []
        while len(times) < replays and (len(times) < 3 or time.perf_counter() - started < LONGEST):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # the GPU is busy with it while the next one is launched
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / calls)
    microseconds = statistics.median(times)
    error = None
    if contender.dense is not None:
        error = relative_error(y[:16], contender.seen(x[:16]) @ contender.dense.double().T)
    return {"us": microseconds, "gb_per_s": contender.bytes / microseconds / 1e3, "error": error}


def expected(row: dict, args: argparse.Namespace) -> dict:
    """What the model says of an H200: of our kernels and of a 16-bit product."""
    m, n, k = row["m"], row["n"], row["k"]
    sixteen = gpu_model.bf16_cost(gpu_model.H200, m, n, k)
    if row["op"] == BASELINE:
        return {"model_us": sixteen * MICRO, "model_limit": ""}
    if not row["op"].startswith("sliderquant") or row["op"].endswith("plain"):
        return {"model_us": None, "model_limit": ""}
    if n == 0:
        quantizer = gpu_model.row_cost(gpu_model.H200, m, k, *QUANTIZERS[row["op"].removeprefix("sliderquant ")])
        return {"model_us": quantizer * MICRO, "model_limit": ""}
    bits, activations = map(int, row["op"].split("W")[1].split()[0].split("A"))
    if row["op"].endswith("experts"):
        top_k, experts = (int(word) for word in row["op"].rpartition(", ")[2].split() if word.isdigit())
        grouped = gpu_model.grouped_cost(gpu_model.H200, m, n, k, bits, experts, top_k, activations < 16)
        return {"model_us": grouped * MICRO, "model_limit": ""}
    if activations == 16:
        cost = gpu_model.wna16_cost(gpu_model.H200, m, n, k, bits, args.group_size, not args.symmetric)
    else:
        cost = gpu_model.integer_cost(gpu_model.H200, m, n, k, bits, not args.symmetric)
    return {
        "model_us": cost.total * MICRO,
        "model_limit": cost.limit,
        "model_speedup": sixteen / cost.total,
        "model_blocks": cost.blocks,
        "model_splits": cost.splits,
        "model_blocks_per_processor": cost.blocks_per_processor,
    }


def line(row: dict, baseline: float | None) -> str:
    """Of a Markdown table; every figure of the model in columns that say that it was not measured."""
    cells = [row["op"], f"{row['n'] or '-'} x {row['k']}", str(row["m"])]
    cells += [f"{row['us']:.1f}" if row["us"] else "failed" if "failed" in row else "-"]
    cells += [f"{baseline / row['us']:.2f}" if row["us"] and baseline else "-"]
    cells += [f"{row['gb_per_s']:.0f}" if row.get("gb_per_s") else "-"]
    cells += [f"{row['error']:.1e}" if row.get("error") is not None else "-"]
    cells += [f"{row['model_us']:.1f}" if row["model_us"] else "-"]
    cells += [f"{row['model_speedup']:.2f}" if "model_speedup" in row else "-", row["model_limit"] or "-"]
    cells += [f"{row['model_blocks']} ({row['model_splits']})" if "model_blocks" in row else "-"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
