"""Writes Llamas of any size with random weights, a shard per block, without ever holding one in memory."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sliderquant_vllm.shards import shard_name, write_index, write_shard
from tests.helpers import TINY_LLAMA

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def write_large_model(
    directory: Path, blocks: int = 28, hidden: int = 2048, intermediate: int = 5632, vocabulary: int = 64000
) -> Path:
    """By default 1.5 billion parameters, 3 GB in bf16. The tokenizer is the small trained model's."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(hidden // 512, 1),
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    for name in TOKENIZER:
        shutil.copy(TINY_LLAMA / name, directory)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(".".join(name.split(".")[:3]), []).append(name)
    files = [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    generator = torch.Generator().manual_seed(0)
    for file, names in zip(files, shards.values(), strict=True):
        write_shard(directory / file, {name: _random(shapes[name], generator) for name in names})
    write_index(directory, files)
    return directory


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    values = torch.empty(shape, dtype=torch.bfloat16)
    return values.normal_(std=shape[1] ** -0.5, generator=generator)


if __name__ == "__main__":
    target, *sizes = sys.argv[1:]
    write_large_model(Path(target), *map(int, sizes))
