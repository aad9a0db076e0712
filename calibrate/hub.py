"""Where a model is: a directory, or what the Hugging Face hub has."""

from __future__ import annotations

from pathlib import Path

from calibrate.errors import UserError, first_line

SHORT_NAMES = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x7b-instruct": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
}


def hub_id(name: str) -> str:
    """What a short name stands for; any other name as it is."""
    return SHORT_NAMES.get(name.lower(), name)


def resolve_model(name: str, download: bool = True) -> Path:
    """The directory of a model named by a directory, a short name or a hub id. Raises UserError if there is none.

    Args:
        download: what the hub has and this machine has not.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UserError(f"--model {name}: a directory without config.json; name a Hugging Face model directory")
        return directory
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id(name),
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"],
                ignore_patterns=["consolidated*", "original/*"],  # a second copy of the weights
                local_files_only=not download,
            )
        )
    except Exception as error:
        reason = f"the hub did not give it ({first_line(error)})"
        if not download:
            reason = f"it was not downloaded before: do that with 'hf download {hub_id(name)}'"
        raise UserError(
            f"--model {name}: no such directory, and {reason}; name a model directory, a hub id, or one of "
            f"{', '.join(SHORT_NAMES)}"
        ) from None
