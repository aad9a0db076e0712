"""Times our CUDA kernels against torch's bf16 product on a GPU, beside what a model expects of them.

    python -m benchmarks.gpu_kernels --shapes 28672x4096 --m 1 16 64 --json times.json

Calls are replayed from a CUDA graph, so that no launch from Python counts, and go through more copies of the weights
than L2 holds. Each time is a median over replays. That of an integer product counts the quantization of its tokens;
quantizers, and what is fused with them, are timed alone as well, and find their tokens in L2 as they do when served.
The error of an op is that against the float64 product of what its codes stand for. Without a GPU only the model is
printed; its columns say that they were not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import gpu_model
from benchmarks.common import relative_error
from sliderquant_vllm import ops
from sliderquant_vllm.packing import pack_codes

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
BASELINE = "torch bf16"
MICRO = 1e6


@dataclass(frozen=True)
class Contender:
    name: str
    bytes: int  # of the weights that one call reads
    copies: int
    run: Callable[[int, torch.Tensor], torch.Tensor]  # (copy of the weights, x) -> y
    dense: torch.Tensor | None  # [N, K], what the weights stand for; None: not checked
    seen: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double  # x as the op sees it
    least_m: int = 1


class Absent(Exception):
    """A peer that this installation does not have."""


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


def op_name(bits: int, group_size: int) -> str:
    return f"sliderquant W{bits}A16 {'per channel' if group_size == -1 else f'g{group_size}'}"


def integer_name(bits_of_both: tuple[int, int]) -> str:
    return "sliderquant W{}A{} per channel".format(*bits_of_both)


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


def grouped_product(
    args: argparse.Namespace, experts: int, n: int, k: int, both: tuple[int, int]
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(x, offsets) -> y, with random weights."""
    bits, activation_bits = both
    groups = 1 if activation_bits < 16 or args.group_size == -1 else k // args.group_size
    packed = torch.randint(0, 256, (experts * n, k * bits // 8), device="cuda", dtype=torch.uint8).view(torch.int32)
    weight = ops.repack(packed, bits, activation_bits).unflatten(0, (experts, -1))
    scale = torch.rand(experts, groups, n, device="cuda") * 0.02
    zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8, device="cuda")
    if activation_bits == 16:
        return lambda x, offsets: ops.wna16_gemm_grouped(x, offsets, weight, scale, zero, None, bits, args.group_size)
    col_sum = torch.zeros(experts, n, dtype=torch.int32, device="cuda")
    channels = (weight, scale[:, 0].contiguous(), zero[:, 0].contiguous(), col_sum)

    def run(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        tokens = ops.quantize_per_token(x, activation_bits, args.symmetric)
        return ops.w4a4_gemm_grouped(*tokens, offsets, *channels, None, bits, x.dtype)

    return run


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


def copies_of(size: int, cold: int) -> int:
    return max(2, -(-cold // size))


def bf16_contender(n: int, k: int, cold: int) -> Contender:
    size = 2 * n * k
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies_of(size, cold))]
    return Contender(
        BASELINE, size, len(weights), lambda copy, x: torch.nn.functional.linear(x, weights[copy]), weights[0]
    )


def int4_contender(n: int, k: int, cold: int) -> Contender:
    """The int4 product that torch itself has: bf16, asymmetric, groups of 128."""
    try:
        codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.randn(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        weights = [packed.clone() for _ in range(copies_of(n * k // 2, cold))]
        torch.ops.aten._weight_int4pack_mm(torch.ones(1, k, device="cuda").bfloat16(), packed, 128, scales)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise Absent(str(error).splitlines()[0]) from error
    return Contender(
        "torch int4",
        n * k // 2,
        len(weights),
        lambda copy, x: torch.ops.aten._weight_int4pack_mm(x, weights[copy], 128, scales),
        None,
    )


def int8_contender(n: int, k: int, cold: int, most: int) -> Contender:
    """The int8 product that torch itself has, of codes that are there already: no scales, sums in int32."""
    least_m = 17
    codes = torch.randint(-128, 128, (max(most, least_m), k), device="cuda", dtype=torch.int8)
    weights = [
        torch.randint(-128, 128, (n, k), device="cuda", dtype=torch.int8).t() for _ in range(copies_of(n * k, cold))
    ]
    try:
        torch._int_mm(codes[:least_m], weights[0])
    except (RuntimeError, AttributeError) as error:
        raise Absent(str(error).splitlines()[0]) from error
    return Contender(
        "torch int8, product alone",
        n * k,
        len(weights),
        lambda copy, x: torch._int_mm(codes[: len(x)], weights[copy]),
        None,
        least_m=least_m,
    )


def marlin_contender(n: int, k: int, cold: int) -> Contender:
    """What vLLM serves int4 with: bf16, symmetric, groups of 128."""
    try:
        from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
        from vllm.scalar_type import scalar_types

        kind = scalar_types.uint4b8
        weight = torch.randn(k, n, device="cuda", dtype=torch.bfloat16)
        dense, packed, scales = marlin_utils_test.marlin_quantize(weight, kind, 128)
        workspace = marlin_utils.marlin_make_workspace_new(packed.device)
        no_zeros = torch.empty(0, dtype=torch.int32, device="cuda")
        weights = [packed.clone() for _ in range(copies_of(n * k // 2, cold))]

        def run(copy: int, x: torch.Tensor) -> torch.Tensor:
            return marlin_utils.apply_gptq_marlin_linear(x, weights[copy], scales, no_zeros, workspace, kind, n, k)

        run(0, torch.ones(1, k, device="cuda", dtype=torch.bfloat16))
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise Absent((str(error).splitlines() or [type(error).__name__])[0]) from error
    return Contender("vLLM Marlin W4A16 g128", n * k // 2, len(weights), run, dense.T)


def own_contender(args: argparse.Namespace, n: int, k: int, bits: int, cold: int, kernel: str) -> Contender:
    if not ops.is_native("cuda"):
        raise Absent("this library was built without CUDA kernels")
    groups = 1 if args.group_size == -1 else k // args.group_size
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
    scale = torch.rand(groups, n, device="cuda") * 0.02 + 0.001
    zero = torch.randint(0, 2**bits, (groups, n), dtype=torch.uint8, device="cuda")
    if args.symmetric:
        zero.fill_(2 ** (bits - 1))
    dense = codes.float().unflatten(1, (groups, -1)) - zero.T.float()[..., None]
    dense = (dense * scale.T[..., None]).flatten(1)
    size = n * k * bits // 8
    packed = ops.repack(pack_codes(codes, bits), bits)
    weights = [packed.clone() for _ in range(copies_of(size, cold))]
    zero = None if args.symmetric else zero

    def run(copy: int, x: torch.Tensor) -> torch.Tensor:
        os.environ["SLIDERQUANT_CUDA_WNA16"] = kernel
        return ops.wna16_gemm(x, weights[copy], scale, zero, None, bits, args.group_size)

    return Contender(op_name(bits, args.group_size), size, len(weights), run, dense)


def integer_contender(
    args: argparse.Namespace, n: int, k: int, both: tuple[int, int], cold: int, kernel: str
) -> Contender:
    if not ops.is_native("cuda"):
        raise Absent("this library was built without CUDA kernels")
    bits, activation_bits = both
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
    scale = torch.rand(n, device="cuda") * 0.02 + 0.001
    zero = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, device="cuda")
    if args.symmetric:
        zero.fill_(2 ** (bits - 1))
    dense = (codes.float() - zero.float()[:, None]) * scale[:, None]
    size = n * k * bits // 8
    col_sum = codes.sum(1, dtype=torch.int32)
    packed = ops.repack(pack_codes(codes, bits), bits, activation_bits)
    weights = [packed.clone() for _ in range(copies_of(size, cold))]
    zero = None if args.symmetric else zero

    def run(copy: int, x: torch.Tensor) -> torch.Tensor:
        os.environ["SLIDERQUANT_CUDA_INTEGER"] = kernel
        tokens = ops.quantize_per_token(x, activation_bits, args.symmetric)
        return ops.w4a4_gemm(*tokens, weights[copy], scale, zero, col_sum, None, bits, x.dtype)

    def seen(x: torch.Tensor) -> torch.Tensor:
        codes, scale, zero, _ = ops.quantize_per_token(x, activation_bits, args.symmetric)
        return (codes.double() - zero[:, None]) * scale[:, None].double()

    return Contender(integer_name(both), size, len(weights), run, dense, seen)


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
        times = []
        for replay in range(-2, replays):  # two rounds to warm up
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            if replay >= 0:
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
