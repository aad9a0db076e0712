"""Writes Llamas of any size with random weights, a shard per block, without ever holding one in memory.

python -m benchmarks.random_model DIR --shape llama3-8b
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from calibrate.arguments import Parser
from calibrate.errors import UserError
from sliderquant_vllm.checkpoint import staging_directory
from sliderquant_vllm.shards import shard_name, write_index, write_shard

TOKENIZER = Path(__file__).parents[1] / "assets" / "tiny-llama"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama."""

    blocks: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int


SHAPES = {
    "small": Shape(8, 768, 2048, 4096, 6, 1),
    "tinyllama-1.1b": Shape(22, 2048, 5632, 32000, 32, 4),
    "llama3.2-1b": Shape(16, 2048, 8192, 128256, 32, 8),
    "llama-1.5b": Shape(28, 2048, 5632, 64000, 16, 4),
    "llama3-8b": Shape(32, 4096, 14336, 128256, 32, 8),
    "llama3-70b": Shape(80, 8192, 28672, 128256, 64, 8),
}


def write_random_model(directory: Path, shape: Shape) -> Path:
    """Write a bf16 model of a shape, with the tokenizer of the small trained one. An existing directory is an error."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(".".join(name.split(".")[:3]), []).append(name)
    files = [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    generator = torch.Generator().manual_seed(0)
    with staging_directory(directory) as staging:
        (staging / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
        for name in TOKENIZER_FILES:
            shutil.copy(TOKENIZER / name, staging)
        for file, names in zip(files, shards.values(), strict=True):
            write_shard(staging / file, {name: _random(shapes[name], generator) for name in names})
        write_index(staging, files)
    return directory


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    values = torch.empty(shape, dtype=torch.bfloat16)
    return values.normal_(std=shape[1] ** -0.5, generator=generator)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.random_model", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where to write it")
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.5b", help="of which model")
    parser.add_argument("--blocks", type=int, help="another number of blocks than the shape's")
    try:
        arguments = parser.parse(sys.argv[1:] if argv is None else argv)
        shape = SHAPES[arguments.shape]
        write_random_model(arguments.directory, replace(shape, blocks=arguments.blocks or shape.blocks))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
