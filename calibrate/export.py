"""Writes a calibrated model as a checkpoint, then reads it back and compares."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from calibrate.model import Model
from calibrate.pipeline import Calibrated, finished_block
from calibrate.report import model_card
from sliderquant_vllm.checkpoint import staging_directory, validate_checkpoint
from sliderquant_vllm.format import FormatError
from sliderquant_vllm.packing import dequantize, pack_linear, unpack_linear
from sliderquant_vllm.shards import Reader, write_shards


def export(
    model: Model,
    calibrated: Calibrated,
    output_dir: Path,
    overwrite: bool,
    calibration: dict,
    max_shard_bytes: int,
    on_block: Callable[[int], None],
) -> None:
    """Write ``output_dir`` whole, or not at all.

    Args:
        calibration: provenance for config.json and the model card.
        on_block: called with the number of blocks written.

    Raises:
        FormatError: what was written does not read back as what was calibrated.
    """
    with staging_directory(output_dir, overwrite) as staging:
        model.copy_other_files(staging)
        config = json.loads((model.directory / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(model.dtype).removeprefix("torch.")
        config["tie_word_embeddings"] = model.tied and not model.recipe.rotate
        config["quantization_config"] = model.quantization_config(calibration).to_dict()
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (staging / "README.md").write_text(model_card(model.recipe, calibrated, calibration))
        write_shards(staging, _tensors(model, calibrated, on_block), max_shard_bytes)
        check(model, calibrated, staging)


def _tensors(model: Model, calibrated: Calibrated, on_block: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", model.embedding.to(model.dtype)
    for index in range(model.blocks):
        block = finished_block(model, calibrated, index)
        codes, others = block.quantized()
        for path, (code, scale, zero_point) in codes.items():
            scheme = block.linears[path].scheme.weights
            packed = pack_linear(code, scale, None if scheme.symmetric else zero_point, scheme)
            yield from ((f"{block.name}.{path}.{suffix}", tensor) for suffix, tensor in packed.items())
        for name, tensor in others.items():
            yield f"{block.name}.{name}", tensor if name.endswith(".added_bias") else tensor.to(model.dtype)
        on_block(index + 1)
    head = {name: tensor.to(model.dtype) for name, tensor in model.head_tensors.items()}
    if model.tied and not model.recipe.rotate:
        head.pop("lm_head.weight")
    yield from head.items()


@torch.no_grad()
def check(model: Model, calibrated: Calibrated, directory: Path) -> None:
    """Validate a written checkpoint and compare every dequantized weight with the one that was calibrated."""
    validate_checkpoint(directory, data=True)
    reader = Reader(directory)
    modules = reader.modules()
    for index in range(model.blocks):
        block = finished_block(model, calibrated, index)
        block.prepare(ratio=1.0)
        for path, linear in block.linears.items():
            if linear.scheme is None:
                continue
            name = f"{block.name}.{path}"
            tensors = {suffix: reader.tensor(f"{name}.{suffix}") for suffix in modules[name]}
            codes, scale, zero_point = unpack_linear(tensors, linear.scheme.weights)
            stored = dequantize(codes, scale.float(), zero_point, linear.scheme.weights)
            calibrated_weight = linear.computed[0].cpu()
            if not torch.equal(stored, calibrated_weight):
                difference = (stored - calibrated_weight).abs().max().item()
                raise FormatError(
                    f"{name}: read back, its weights differ from the calibrated ones by up to {difference:.3g}; "
                    "the disk or the memory of this machine is faulty, or this is a bug: please report it"
                )
