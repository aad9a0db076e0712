"""Times our CUDA kernels against torch's bf16 product on a GPU, beside what a model expects of them.

    python -m benchmarks.gpu_kernels --shapes 28672x4096 --m 1 16 64 --json times.json

Calls are replayed from a CUDA graph, each time behind another replay, so that no launch counts, and go through more
copies of the weights than L2 holds. Each time is a median over replays. That of an integer product counts the
quantization of its tokens; quantizers, and what is fused with them, are timed alone as well, and find their tokens in
L2 as they do when served. The error of an op is that against the float64 product of what its codes stand for. Without a
GPU only the model is printed; its columns say that they were not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks import gpu_model
from benchmarks.common import relative_error
from benchmarks.gpu_ops import (
    BASELINE,
    Absent,
    Contender,
    bf16_contender,
    grouped_product,
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


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows, absent = [], {}
    if torch.cuda.is_available():
        for n, k in args.shapes:
            measure(args, n, k, rows, absent)
        for sizes in args.experts:
            measure_experts(args, *sizes, rows, absent)
        for k in {k: None for _, k in args.shapes}:
            measure_quantizers(args, k, rows, absent)
    else:
        print("No GPU that torch can use: nothing is measured, the model alone.\n")
        rows = [
            {"op": name, "n": n, "k": k, "m": m, "us": None}
            for n, k in args.shapes
            for name in [*(op_name(bits, args.group_size) for bits in args.bits), *map(integer_name, args.integer)]
            for m in args.m
        ]
        rows += [
            {"op": grouped_name(args, both, experts, top_k), "n": n, "k": k, "m": m, "us": None}
            for experts, top_k, n, k in args.experts
            for both in [*((bits, 16) for bits in args.bits), *args.integer]
            for m in args.m
        ]
        rows += [
            {"op": f"sliderquant {name}", "n": 0, "k": k, "m": m, "us": None}
            for k in {k: None for _, k in args.shapes}
            for name in QUANTIZERS
            for m in args.m
        ]
    for row in rows:
        row |= expected(row, args)
    print(table(rows, args))
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    if args.json:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        result = {"gpu": gpu, "torch": torch.__version__, "group_size": args.group_size, "rows": rows}
        args.json.write_text(json.dumps(result | {"absent": absent}, indent=2))


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


def grouped_name(args: argparse.Namespace, bits_of_both: tuple[int, int], experts: int, top_k: int) -> str:
    own = op_name(bits_of_both[0], args.group_size) if bits_of_both[1] == 16 else integer_name(bits_of_both)
    return f"{own}, {top_k} of {experts} experts"


def measure(args: argparse.Namespace, n: int, k: int, rows: list[dict], absent: dict[str, str]) -> None:
    cold = 4 * torch.cuda.get_device_properties(0).L2_cache_size
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
        try:
            contender = build()
            for m in (m for m in args.m if m >= contender.least_m):
                rows.append({"op": name, "n": n, "k": k, "m": m} | timed(contender, k, m, args.replays))
        except Absent as reason:
            absent[name] = str(reason)
        torch.cuda.empty_cache()


def measure_experts(
    args: argparse.Namespace, experts: int, top_k: int, n: int, k: int, rows: list[dict], absent: dict[str, str]
) -> None:
    """Weights of all experts are beyond L2 already where many of them are used."""
    if not ops.is_native("cuda"):
        absent["grouped products"] = "this library was built without CUDA kernels"
        return
    for both in [*((bits, 16) for bits in args.bits), *args.integer]:
        product = grouped_product(args, experts, n, k, both)
        for m in args.m:
            # Every token goes to top_k experts at random.
            choice = torch.rand(m, experts, device="cuda").argsort(1)[:, :top_k].flatten()
            counts = torch.bincount(choice, minlength=experts)
            offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
            read = int((counts > 0).sum()) * n * k * both[0] // 8
            name = grouped_name(args, both, experts, top_k)
            contender = Contender(name, read, 1, lambda _, x, run=product, offsets=offsets: run(x, offsets), None)
            rows.append({"op": name, "n": n, "k": k, "m": m} | timed(contender, k, m * top_k, args.replays))
        torch.cuda.empty_cache()


def measure_quantizers(args: argparse.Namespace, k: int, rows: list[dict], absent: dict[str, str]) -> None:
    if not ops.is_native("cuda"):
        absent["quantizers"] = "this library was built without CUDA kernels"
        return
    weight = torch.ones(k, device="cuda", dtype=torch.bfloat16)
    for name, (kind, block) in QUANTIZERS.items():
        for m in args.m:
            other = torch.randn(m, 2 * k, device="cuda", dtype=torch.bfloat16)

            def run(_, x: torch.Tensor, kind=kind, block=block, other=other) -> torch.Tensor:
                if kind == "quantize":
                    return ops.quantize_per_token(x, 4, False, block)[0]
                if kind == "silu_mul":
                    return ops.silu_mul_quantize(other, 4, False, block)[0]
                return ops.rms_norm_quantize(x, other[:, :k], weight, 1e-6, 4, False, block)[0]

            size = m * k * gpu_model.ROW_BYTES[kind]
            found = timed(Contender(name, size, 1, run, None), k, m, args.replays)
            rows.append({"op": f"sliderquant {name}", "n": 0, "k": k, "m": m} | found)


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


def table(rows: list[dict], args: argparse.Namespace) -> str:
    """Markdown; every figure of the model in columns that say that it was not measured."""
    baseline = {(row["n"], row["k"], row["m"]): row["us"] for row in rows if row["op"] == BASELINE}
    heads = ["op", "N x K", "M", "us", "x bf16", "GB/s", "error"]
    heads += ["H200 model, not measured: us", "x bf16", "limit", "blocks (splits)"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        base = baseline.get((row["n"], row["k"], row["m"]))
        cells = [row["op"], f"{row['n'] or '-'} x {row['k']}", str(row["m"])]
        cells += [f"{row['us']:.1f}", f"{base / row['us']:.2f}" if base else "-"] if row["us"] else ["-", "-"]
        cells += [f"{row['gb_per_s']:.0f}" if row.get("gb_per_s") else "-"]
        cells += [f"{row['error']:.1e}" if row.get("error") is not None else "-"]
        cells += [f"{row['model_us']:.1f}" if row["model_us"] else "-"]
        cells += [f"{row['model_speedup']:.2f}" if "model_speedup" in row else "-", row["model_limit"] or "-"]
        cells += [f"{row['model_blocks']} ({row['model_splits']})" if "model_blocks" in row else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
