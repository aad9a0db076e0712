"""What `benchmarks.quality` measures: which commands make up each of its suites."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import NamedTuple

from benchmarks.cells import Cell, merged, scheme_flags
from calibrate.errors import UserError

PRESETS = tuple(f"sliderquant:{preset}" for preset in ("fast", "default", "best", "paper"))
METHODS = ("rtn", "awq", "smoothquant", "gptq", "omniquant", "d2quant", *PRESETS)
SCHEMES = {
    "methods": ("W4A16", "W3A16", "W2A16", "W4A4"),
    "ablation": ("W2A16", "W4A4"),
    "sensitivity": ("W2A16", "W4A4"),
}
OWN_SAMPLES = ("sliderquant:best",)  # presets that decide how many samples they take
BASES = ("sliderquant:default", "sliderquant:paper")
BASE_ROW = "as it is"
ONLY, UP_TO = "only this block", "the blocks up to this one"


class Change(NamedTuple):
    """Flags that change a base recipe. ``*`` turns a switch the other way, and stands for every other choice in turn of
    a flag that has choices, for half and twice a learning rate that is in use; ``{bits}`` are the scheme's.

    Attributes:
        where: schemes that it makes sense for: "weights" are those with 16-bit activations.
    """

    flags: str
    where: str = ""


# One line each: every field of the recipe that is a decision has one.
CHANGES = (
    Change("--window 1 --stride 1 --shallow 0 --deep 0"),
    Change("--shallow 0 --deep 0"),
    Change("--shallow 4 --deep 1"),
    Change("--shallow 1 --deep 4"),
    Change("--shallow 4 --deep 4"),
    Change("--shallow 4 --deep 4 --stride 1"),
    Change("--stride 1"),
    Change("--window 4"),
    Change("--window 4 --stride 4"),
    Change("--stages 1.0"),
    Change("--stages 0.5 1.0"),
    Change("--stages 0.5 1.0 --stage-order *"),
    Change("--learn-scale *"),
    Change("--learn-clip *"),
    Change("--learn-rounding *"),
    Change("--lora-rank 0"),
    Change("--lora-rank 4"),
    Change("--rotate * --no-online-hadamard"),
    Change("--rotate --online-hadamard *"),
    Change("--equalize *"),
    Change("--range-start *"),
    Change("--rounding-start *"),
    Change("--scale-start *"),
    Change("--dual-scale *", "weights"),
    Change("--correction *", "weights"),
    Change("--correction --learn-shift *", "weights"),
    Change("--epochs 0"),
    Change("--end-to-end-epochs 0"),
    Change("--end-to-end-epochs 3"),
    Change("--end-to-end-epochs 3 --learn-norms"),
    *(Change(f"--lr-{name} *") for name in ("rounding", "clip", "scale", "norms", "shift", "lora", "end-to-end")),
    Change("--batch-size 1"),
    Change("--batch-size 8"),
    Change("--kv-bits *"),
    Change("--average-bits {bits}"),
    Change("--average-bits {bits}.25"),
    Change("--group-size 64", "weights"),
    Change("--symmetric"),
    Change(r"--ignore 're:model\.layers\.0\..*'"),
)
# Decided by the table and the base that a change stands in.
AXES = ("activations", "method")


@dataclass(frozen=True, slots=True)
class Settings:
    """What all cells of a run share, and the axes of its tables."""

    models: tuple[str, ...]
    schemes: tuple[str, ...]
    methods: tuple[str, ...]
    calibration: str
    evaluation: str
    nsamples: int
    seqlen: int
    epochs: int | None = None
    seeds: tuple[int, ...] = (0,)
    device: str = "auto"

    def flags(self, model: str, scheme: str, method: str) -> tuple[str, ...]:
        """Of one calibration; --epochs where there are windows, --nsamples but for `OWN_SAMPLES`."""
        name, _, preset = method.partition(":")
        data = ("--dataset", self.calibration, "--seqlen", str(self.seqlen))
        if method not in OWN_SAMPLES:
            data += ("--nsamples", str(self.nsamples))
        flags = merged(
            ("--model", model, *scheme_flags(scheme), "--method", name),
            ("--preset", preset) if preset else (),
            (*data, "--eval-dataset", self.evaluation),
            () if self.device == "auto" else ("--device", self.device),
        )
        if self.epochs is not None and method not in OWN_SAMPLES and recipe_of(flags).epochs:
            flags = merged(flags, ("--epochs", str(self.epochs)))
        return flags


def recipe_of(flags: tuple[str, ...]):
    from calibrate.cli import parse_arguments, recipe_from

    return recipe_from(parse_arguments(flags))


def methods(settings: Settings) -> list[Cell]:
    return [
        Cell(model, scheme, method, settings.flags(model, scheme, method), settings.seeds)
        for model in settings.models
        for scheme in settings.schemes
        for method in settings.methods
    ]


def resolved(change: Change, recipe) -> list[str]:
    """The flags that a change of a recipe stands for."""
    known = {field.name: field for field in fields(recipe)}
    tokens = change.flags.format(bits=recipe.weights.bits).split(" ")
    variants = [[]]
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        if token == "*":
            continue
        options = [token]
        if following == "*":
            name = token.removeprefix("--")
            field = known[name.replace("-", "_")]
            value = getattr(recipe, field.name)
            if name.startswith("lr-"):
                kind = field.name.removeprefix("lr_")
                used = recipe.tunes if kind == "end_to_end" else recipe.learns(kind)
                options = [f"{token} {factor * value:g}" for factor in (0.5, 2)] if used else []
            else:
                others = [choice for choice in field.metadata["choices"] if choice != value]
                options = [f"{token} {other}" for other in others] or [f"--no-{name}" if value else token]
        variants = [[*variant, option] for variant in variants for option in options]
    return [" ".join(variant) for variant in variants]


def ablation(settings: Settings) -> list[Cell]:
    """Each base as it is and with one change at a time; what would change nothing is left out."""
    cells = []
    for model in settings.models:
        for scheme in settings.schemes:
            for base in settings.methods:
                flags = settings.flags(model, scheme, base)
                cells.append(Cell(model, scheme, BASE_ROW, flags, settings.seeds, base))
                recipe = recipe_of(flags)
                kind = "weights" if recipe.activations is None else "activations"
                for text in (text for each in CHANGES if each.where in ("", kind) for text in resolved(each, recipe)):
                    changed = merged(flags, text)
                    if not _same(changed, recipe):
                        cells.append(Cell(model, scheme, text, changed, settings.seeds, base))
    return cells


def _same(flags: tuple[str, ...], recipe) -> bool:
    try:
        return recipe_of(flags) == recipe
    except UserError:  # a combination that there is not: its row says why
        return False


def sensitivity(settings: Settings) -> list[Cell]:
    """Round to nearest, only one block or the first few: what the estimate is to be compared with."""
    cells = []
    for model in settings.models:
        blocks = number_of_blocks(model)
        for scheme in settings.schemes:
            flags = settings.flags(model, scheme, "rtn")
            for group in (ONLY, UP_TO):
                for block in range(blocks):
                    kept = [block] if group == ONLY else list(range(block + 1))
                    pattern = rf"re:model\.layers\.(?!({'|'.join(map(str, kept))})\.).*"
                    ignored = () if len(kept) == blocks else ("--ignore", pattern)
                    cells.append(Cell(model, scheme, str(block), (*flags, *ignored), group=group))
    return cells


def number_of_blocks(model: str) -> int:
    from calibrate.hub import resolve_model

    return json.loads((resolve_model(model) / "config.json").read_text())["num_hidden_layers"]


def estimate(settings: Settings, model_name: str) -> dict[str, dict[str, float]]:
    """Block -> bits -> estimated KL of rounding the weights of that block alone, nats per token."""
    import torch

    from calibrate.allocation import block_sensitivities, sensitivities, sensitivity_samples
    from calibrate.data import calibration_samples
    from calibrate.hub import resolve_model
    from calibrate.model import Model

    recipe = recipe_of(settings.flags(model_name, settings.schemes[0], "rtn"))
    model = Model(resolve_model(model_name), recipe, torch.device("cpu"))
    samples = calibration_samples(model.tokenizer, recipe.dataset, recipe.nsamples, recipe.seqlen, recipe.seed)
    few = samples[: sensitivity_samples(*samples.shape)]
    found = block_sensitivities(sensitivities(model, few))
    return {str(block): {str(bits): value for bits, value in scores.items()} for block, scores in sorted(found.items())}


SUITES = {"methods": methods, "ablation": ablation, "sensitivity": sensitivity}
