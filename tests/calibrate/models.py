"""Small random models of every family, as directories on disk."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
OF_FAMILY = {
    "qwen2": {"hidden_size": 128, "head_dim": None},
    "qwen2_moe": EXPERTS | {"hidden_size": 128, "head_dim": None, "shared_expert_intermediate_size": 96},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
}


def write_random_model(directory: Path, model_type: str, fused: bool = False, **changes) -> Path:
    """A random-weight model with uneven norms and, where the family has them, biases; fp32, two shards.

    ``fused`` keeps the experts of a block in one tensor, as transformers does in memory and hub checkpoints do not.
    """
    settings = {
        "vocab_size": 96,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        **OF_FAMILY.get(model_type, {}),
        **changes,
    }
    if settings["head_dim"] is None:
        settings.pop("head_dim")  # its config has none
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.uniform_(0.5, 2)
            elif name.endswith("bias"):
                value.normal_(0, 0.5)
            else:
                value.normal_(0, 0.1)
    model.save_pretrained(directory, max_shard_size="400KB", save_original_format=not fused)
    return directory
