"""Tokens per second in vLLM of a model that is big enough to be bound by memory: random weights in the shape of one.

    python -m benchmarks.served --shape tinyllama-1.1b

Writes the 16-bit model, quantizes it to nearest at each scheme (speed depends on the scheme, not on how the codes were
found), writes the 4-bit weights once more as the GPTQ checkpoint that stock vLLM reads, and times all in turns as
benchmarks.throughput does. What is already written is used again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import throughput
from benchmarks.common import positive
from benchmarks.random_model import SHAPES, write_random_model
from calibrate.arguments import Parser
from calibrate.errors import UserError
from sliderquant_vllm.checkpoint import CONFIG_FILE, read_config, staging_directory
from sliderquant_vllm.format import FormatError, WeightScheme
from sliderquant_vllm.packing import pack_codes, unpack_linear
from sliderquant_vllm.shards import Reader, shard_name, write_index, write_shard

ROOT = Path(__file__).parents[1]
STOCK_SCHEME = WeightScheme(4, 128, symmetric=True)


def write_gptq(quantized: Path, target: Path) -> Path:
    """The weights of a W4A16 checkpoint (symmetric, in groups) in the GPTQ format, a shard per block.

    ``qweight`` int32 [K / 8, N], the code of input channel k in bits 4 * (k % 8) of row k / 8; ``scales`` fp16 [G, N];
    ``qzeros`` int32 [G, N / 8], which hold the zero point less one; ``g_idx`` int32 [K], the group of each channel.

    Raises:
        ValueError: the checkpoint is of another scheme, or has what the format cannot say.
    """
    config, own = read_config(quantized)
    if own.weights != STOCK_SCHEME or own.activations or own.online_hadamard or own.added_bias or own.overrides:
        raise ValueError(f"{quantized}: expected {STOCK_SCHEME} and nothing beside it, found {own}")
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": own.weights.bits,
        "group_size": own.weights.group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
    }
    reader = Reader(quantized)
    shards: dict[str, dict[str, list[str]]] = {}
    for module, headers in reader.modules().items():
        shards.setdefault(".".join(module.split(".")[:3]), {})[module] = list(headers)
    files = [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    with staging_directory(target) as staging:
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        for path in Path(quantized).glob("*.json"):
            if path.name.startswith("tokenizer") or path.name == "generation_config.json":
                shutil.copy(path, staging)
        for file, modules in zip(files, shards.values(), strict=True):
            write_shard(staging / file, dict(_gptq_tensors(reader, modules, own.weights)))
        write_index(staging, files)
    return target


def _gptq_tensors(
    reader: Reader, modules: dict[str, list[str]], scheme: WeightScheme
) -> Iterator[tuple[str, torch.Tensor]]:
    for module, suffixes in modules.items():
        held = {suffix: reader.tensor(f"{module}.{suffix}".lstrip(".")) for suffix in suffixes}
        if "weight_packed" in held:
            codes, scale, _ = unpack_linear(held, scheme)
            (n, k), groups = codes.shape, scale.shape[1]
            zeros = torch.full((groups, n), scheme.symmetric_zero_point - 1)
            held = {suffix: held[suffix] for suffix in held if not suffix.startswith("weight_")} | {
                "qweight": pack_codes(codes, scheme.bits).T.contiguous(),
                "scales": scale.T.to(torch.float16).contiguous(),
                "qzeros": pack_codes(zeros, scheme.bits),
                "g_idx": torch.arange(k, dtype=torch.int32) // scheme.group_size,
            }
        yield from ((f"{module}.{suffix}".lstrip("."), tensor) for suffix, tensor in held.items())


def quantize(parent: Path, target: Path, scheme: str) -> None:
    """Round to nearest in a process of its own. Raises UserError with what it said."""
    # As GPTQ checkpoints usually are; with quantized activations, what the default preset of calibrate puts before
    # down_proj.
    like_stock = ["--group-size", str(STOCK_SCHEME.group_size), "--symmetric"]
    flags = {"W4A16": like_stock}.get(scheme, [] if scheme.endswith("A16") else ["--online-hadamard"])
    command = [sys.executable, "-m", "calibrate", "--model", parent, "--output-dir", target, "--scheme", scheme]
    data = ["--dataset", ROOT / "README.md", "--nsamples", "1", "--seqlen", "32"]  # any text: rounding needs none
    process = subprocess.run([*command, "--method", "rtn", *data, *flags], capture_output=True, text=True)
    if process.returncode != 0:
        raise UserError(f"{scheme}: {(process.stderr or process.stdout).strip()}")


def write_models(shape: str, schemes: list[str], blocks: int | None, directory: Path) -> list[Path]:
    """The quantized models, ours first; their configs name the 16-bit one."""
    sizes = SHAPES[shape]
    parent = directory / "16-bit"
    if not parent.exists():
        write_random_model(parent, replace(sizes, blocks=blocks or sizes.blocks))
    models = []
    for scheme in schemes:
        target = directory / scheme
        if not target.exists():
            quantize(parent, target, scheme)
        models.append(target)
    if "W4A16" in schemes:
        stock = directory / "gptq"
        if not stock.exists():
            write_gptq(directory / "W4A16", stock)
        models.append(stock)
    return models


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.served", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b", help="of which model")
    parser.add_argument("--blocks", type=positive, help="another number of blocks than the shape's")
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "W2A16", "W4A4"], help="to quantize to")
    throughput.add_settings(parser)
    try:
        arguments = parser.parse(sys.argv[1:] if argv is None else argv)
        models = write_models(arguments.shape, arguments.schemes, arguments.blocks, arguments.output_dir / "models")
        arguments.model, arguments.baseline = [str(model) for model in models], "auto"
        throughput.run(arguments)
    except (UserError, FormatError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
