"""A model with injected outliers that computes what the original computes."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_outlier_model(source: Path, directory: Path, seed: int = 0) -> Path:
    """A Llama whose activations have outlier channels, 20 to 50 times as large; function preserving, in fp32.

    On the norms: 1% of each norm's channels are scaled and the columns behind divided; folding the norms undoes it.
    Inside the blocks: 1% of the rows of up_proj and v_proj are scaled, and the matching columns of down_proj and
    o_proj divided; no rotation of the residual stream can undo it.
    """
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(source, directory)
    tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(shard).items()}
        shard.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    config = json.loads((directory / "config.json").read_text())

    def outliers(channels: int) -> torch.Tensor:
        scale = torch.ones(channels)
        chosen = torch.randperm(channels, generator=generator)[: max(round(channels / 100), 1)]
        scale[chosen] = 20 + 30 * torch.rand(len(chosen), generator=generator)
        return scale

    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}."
        readers = {
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        }
        for norm, linears in readers.items():
            scale = outliers(config["hidden_size"])
            tensors[f"{block}{norm}.weight"] *= scale
            for linear in linears:
                tensors[f"{block}{linear}.weight"] /= scale
        scale = outliers(config["intermediate_size"])
        tensors[f"{block}mlp.up_proj.weight"] *= scale.unsqueeze(1)
        tensors[f"{block}mlp.down_proj.weight"] /= scale
        heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
        scale = outliers(key_heads * config["head_dim"])
        tensors[f"{block}self_attn.v_proj.weight"] *= scale.unsqueeze(1)
        shared = scale.view(key_heads, 1, -1).expand(-1, heads // key_heads, -1)
        tensors[f"{block}self_attn.o_proj.weight"] /= shared.flatten()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
