"""Writes a calibrated model as a checkpoint, a shard per block, and reads every block back to compare."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from calibrate.blocks import CalibrationBlock
from calibrate.model import Model
from calibrate.pipeline import Calibrated
from calibrate.report import model_card
from sliderquant_vllm.checkpoint import staging_directory, validate_checkpoint
from sliderquant_vllm.format import FormatError
from sliderquant_vllm.packing import dequantize, pack_linear, unpack_linear
from sliderquant_vllm.shards import shard_name, write_index, write_shard


class Writer:
    """Fills a directory with a checkpoint.

    The first shard holds the embedding, the last one the final norm and lm_head, every other one a block. A shard
    appears whole or not at all, so that what a killed run has written stays good.
    """

    def __init__(self, model: Model, directory: Path):
        self.model, self.directory = model, Path(directory)

    def file(self, index: int) -> str:
        """The shard of a block; of the embedding at -1, of the head behind the last block."""
        return shard_name(index + 2, self.model.blocks + 2)

    @torch.no_grad()
    def block(self, index: int, block: CalibrationBlock) -> None:
        """Write a prepared block whose norms are exact in the served dtype.

        Raises:
            FormatError: what was written does not read back as what was calibrated.
        """
        codes, others = block.quantized()
        tensors = {}
        for path, (code, scale, zero_point) in codes.items():
            scheme = block.linears[path].scheme.weights
            packed = pack_linear(code, scale, None if scheme.symmetric else zero_point, scheme)
            tensors |= {f"{block.name}.{path}.{suffix}": tensor for suffix, tensor in packed.items()}
        for name, tensor in others.items():
            name = f"{block.name}.{name}"
            tensors[name] = tensor if name.endswith(".added_bias") else tensor.to(self.model.dtype)
        write_shard(self.directory / self.file(index), tensors)
        check_block(self.directory / self.file(index), block)

    def finish(self, calibrated: Calibrated, calibration: dict) -> None:
        """Write all that is not in the blocks, and validate the whole.

        Args:
            calibration: provenance for config.json and the model card.
        """
        model, directory = self.model, self.directory
        model.copy_other_files(directory)
        config = json.loads((model.directory / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(model.dtype).removeprefix("torch.")
        config["tie_word_embeddings"] = model.tied and not model.recipe.rotate
        config["quantization_config"] = model.quantization_config(calibration).to_dict()
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (directory / "README.md").write_text(model_card(model, calibrated, calibration))
        write_shard(directory / self.file(-1), model.embedding_tensors())
        write_shard(directory / self.file(model.blocks), model.head_tensors())
        write_index(directory, map(self.file, range(-1, model.blocks + 1)))
        validate_checkpoint(directory, data=True)


class Written:
    """The blocks of a checkpoint as they were written, to be evaluated like calibrated ones."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)

    @torch.no_grad()
    def finished_block(self, model: Model, index: int) -> CalibrationBlock:
        block = model.block(index)
        tensors = load_shard(self.directory / Writer(model, self.directory).file(index), f"{block.name}.")
        for path, linear in block.linears.items():
            bias = tensors.get(f"{path}.bias", tensors.get(f"{path}.added_bias"))
            weight = tensors.get(f"{path}.weight")
            if linear.scheme is not None:
                weight = stored_weight(tensors, path, linear.scheme.weights)
            device = linear.weight.device
            bias = None if bias is None else bias.float().to(device)
            linear.computed = (weight.float().to(device), bias, weight.shape[1] if linear.scheme else 0)
        for path, norm in block.norms.items():
            norm.norm.weight.copy_(tensors[f"{path}.weight"])
            norm.prepare(None)
        block.layer.self_attn.kv_scheme = block.kv_scheme
        return block


def export(model: Model, calibrated: Calibrated, output_dir: Path, overwrite: bool, calibration: dict) -> None:
    """Write what was calibrated in memory to ``output_dir``, whole or not at all."""
    with staging_directory(output_dir, overwrite) as staging:
        writer = Writer(model, staging)
        for index in range(model.blocks):
            writer.block(index, calibrated.finished_block(model, index))
        writer.finish(calibrated, calibration)


def load_shard(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a shard, their names without a prefix that all of them have."""
    return {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}


def stored_weight(tensors, path, scheme) -> torch.Tensor:
    """fp32 [N, K], dequantized."""
    parts = {name.removeprefix(f"{path}."): value for name, value in tensors.items() if name.startswith(f"{path}.")}
    codes, scale, zero_point = unpack_linear(parts, scheme)
    return dequantize(codes, scale.float(), zero_point, scheme)


@torch.no_grad()
def check_block(path: Path, block: CalibrationBlock) -> None:
    """Compare every dequantized weight of a shard with the one that was calibrated. Raises FormatError."""
    tensors = load_shard(path, f"{block.name}.")
    for name, linear in block.linears.items():
        if linear.scheme is None:
            continue
        stored, calibrated = stored_weight(tensors, name, linear.scheme.weights), linear.computed[0].cpu()
        if not torch.equal(stored, calibrated):
            difference = (stored - calibrated).abs().max().item()
            raise FormatError(
                f"{block.name}.{name}: read back, its weights differ from the calibrated ones by up to "
                f"{difference:.3g}; the disk or memory of this machine is faulty, or this is a bug: please report it"
            )
