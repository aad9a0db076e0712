"""The model card of a checkpoint."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from calibrate.experts import token_table
from calibrate.hub import hub_id
from calibrate.model import Model
from calibrate.pipeline import Calibrated
from sliderquant_vllm.format import LinearScheme

PASSED_ON = ("license", "license_name", "license_link", "language")  # of the parent's card


def of_parent(directory: Path) -> str:
    """Front matter that holds for what is made of a model too, as its own card says it; none where that is no YAML."""
    metadata = {}
    with suppress(FileNotFoundError, ValueError, yaml.YAMLError):
        metadata = metadata_load(directory / "README.md") or {}
    # YAML has dates, JSON has none.
    return "".join(f"{key}: {json.dumps(metadata[key], default=str)}\n" for key in PASSED_ON if key in metadata)


def model_card(model: Model, calibrated: Calibrated, calibration: dict) -> str:
    """Markdown with what was made, from what, how, and how to serve it."""
    recipe = model.recipe
    scheme = LinearScheme(recipe.weights, recipe.activations)
    settings = "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in recipe.to_dict().items())
    losses = "\n".join(
        f"| {number} | {each.window} | {each.ratio:g} | {result.first_loss:.4e} | {result.last_loss:.4e} |"
        for number, (each, result) in enumerate(calibrated.results, 1)
    )
    learned = f"""
## Reconstruction

Mean squared error at each window's output, averaged over its first and its last epoch.

| # | blocks | ratio | first | last |
|---|---|---|---|---|
{losses}
"""
    states = {index: calibrated.store.state(index) for index in range(model.blocks)}
    table = token_table({index: state for index, state in states.items() if state})
    experts = f"""
## Experts

Calibration tokens per expert; starved ones lean on their block's statistics.

{table}
"""
    directory = Path(calibration["model"])
    parent = directory.name if directory.is_dir() else hub_id(calibration["model"])
    base = "" if directory.is_dir() else f"base_model: {parent}\n"
    cache = f", with a cache of {recipe.kv_bits} bits that the server does not have" if recipe.kv_bits != 16 else ""
    perplexity = calibration.get("perplexity")
    quality = (
        f"""
## Quality

Perplexity on `{Path(perplexity["dataset"]).name}`, windows of {perplexity["seqlen"]} tokens, as computed at
calibration{cache}: 16-bit {perplexity["16-bit"]:.4f}, quantized {perplexity["quantized"]:.4f}.
"""
        if perplexity
        else ""
    )
    return f"""---
library_name: vllm
{base}{of_parent(model.directory)}tags:
- sliderquant
- quantized
---

# {scheme} of {parent}

Made by `python -m calibrate` ({recipe.method}). Where vLLM has the plugin sliderquant-vllm, serve it with

    vllm serve . --quantization sliderquant
{quality}
## Recipe

| setting | value |
|---|---|
{settings}

Calibration data: SHA-256 of the token ids {calibration["data_sha256"]}.
{learned if calibrated.results else ""}{experts if table else ""}"""
