"""The recipe: one frozen dataclass with everything that decides the result of a calibration."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from calibrate.errors import UserError
from calibrate.windows import Window, schedule
from sliderquant_vllm.format import (
    ACTIVATION_BITS,
    GROUP_SIZES,
    WEIGHT_BITS,
    ActivationScheme,
    LinearScheme,
    WeightScheme,
)


def option(default: Any, group: str, meaning: str, choices: tuple = ()) -> Any:
    """A field that is a flag of the command line too, in one of its groups."""
    return field(default=default, metadata={"group": group, "help": meaning, "choices": choices})


def flag(name: str) -> str:
    """Of a field, on the command line."""
    return f"--{name.replace('_', '-')}"


START, WINDOWS, LEARNING, DATA = "start", "windows", "learning", "calibration data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides the result. The defaults switch everything off; ``calibrate.methods`` has the settings that
    make up a method. What a field means stands beside it.
    """

    weights: WeightScheme
    activations: ActivationScheme | None = None
    method: str = "rtn"
    ignore: tuple[str, ...] = ("lm_head",)

    kv_bits: int = option(16, START, "calibrate for a cache that keeps K and V in so many bits", (16, 8, 4))
    average_bits: float | None = option(
        None, START, "choose the weight bits per layer by sensitivity, so many on average"
    )
    equalize: str = option("off", START, "balance v -> o and up -> down, needs no data", ("off", "outliers", "all"))
    rotate: bool = option(False, START, "rotate the residual stream and the value heads; folds the norms")
    online_hadamard: bool = option(False, START, "transform the input of down_proj, while serving too")
    scale_start: str = option("ones", START, "initial channel scales", ("ones", "awq", "smoothquant"))
    range_start: str = option("whole", START, "initial range of the weights", ("whole", "search"))
    rounding_start: str = option("nearest", START, "initial codes", ("nearest", "gptq"))
    dual_scale: bool = option(False, START, "D2Quant's scale of the input channels of down_proj")
    correction: bool = option(False, START, "D2Quant's shift behind the MLP norm, served as a bias")

    shallow: int = option(4, WINDOWS, "blocks of the shallow part")
    deep: int = option(4, WINDOWS, "blocks of the deep part")
    window: int = option(2, WINDOWS, "blocks per window between them")
    stride: int = option(1, WINDOWS, "blocks from window to window")
    stages: tuple[float, ...] = option((1.0,), WINDOWS, "growing ratios of quantized input channels, the last one 1")
    stage_order: str = option("outer", WINDOWS, "stages around the windows, or inside each", ("outer", "inner"))
    epochs: int = option(0, WINDOWS, "passes over the samples per window; 0 leaves every block at its start")
    end_to_end_epochs: int = option(0, WINDOWS, "passes that tune all blocks together against the 16-bit logits")
    batch_size: int = option(3, WINDOWS, "samples per step")

    learn_scale: bool = option(False, LEARNING, "channel scales")
    learn_clip: bool = option(False, LEARNING, "ranges of the weights")
    learn_rounding: bool = option(False, LEARNING, "an offset per weight")
    learn_norms: bool = option(False, LEARNING, "gains of the norms, end to end only")
    learn_shift: bool = option(False, LEARNING, "the shift of --correction")
    lora_rank: int = option(0, LEARNING, "low-rank adaptation inside the quantizer; 0 is off")
    lr_scale: float = option(1e-3, LEARNING, "learning rate per sample of a step")
    lr_clip: float = option(5e-4, LEARNING, "learning rate per sample of a step, as a share of the range")
    lr_rounding: float = option(1.5e-3, LEARNING, "learning rate per sample of a step, in steps of the grid")
    lr_norms: float = option(1e-4, LEARNING, "learning rate per sample of a step")
    lr_shift: float = option(1e-4, LEARNING, "learning rate per sample of a step")
    lr_lora: float = option(1e-4, LEARNING, "learning rate per sample of a step")
    lr_end_to_end: float = option(1.0, LEARNING, "factor on all learning rates end to end")

    dataset: str = option("Salesforce/wikitext:wikitext-2-raw-v1", DATA, "text file, directory, glob or hub id")
    nsamples: int = option(128, DATA, "samples, of which --preset best takes more")
    seqlen: int = option(2048, DATA, "tokens per sample")
    seed: int = option(0, DATA, "seed of everything random")

    def __post_init__(self):
        for each in fields(self):
            choices, value = each.metadata.get("choices"), getattr(self, each.name)
            if choices and value not in choices:
                expected = ", ".join(map(str, choices))
                raise UserError(f"{flag(each.name)}: expected one of {expected}, found {value!r}")
        for name, least in {
            "epochs": 0,
            "end_to_end_epochs": 0,
            "batch_size": 1,
            "nsamples": 1,
            "seqlen": 2,
            "lora_rank": 0,
            "seed": 0,
        }.items():
            if getattr(self, name) < least:
                raise UserError(f"{flag(name)}: expected at least {least}, found {getattr(self, name)}")
        for name in (each.name for each in fields(self) if each.name.startswith("lr_")):
            rate = getattr(self, name)
            if not (math.isfinite(rate) and rate > 0):
                raise UserError(f"{flag(name)}: expected a learning rate above 0, found {rate}")
        narrowest, widest = min(WEIGHT_BITS), max(WEIGHT_BITS)
        if self.average_bits is not None and not narrowest <= self.average_bits <= widest:
            raise UserError(f"--average-bits: expected from {narrowest} to {widest}, found {self.average_bits}")
        if self.dual_scale and self.online_hadamard:
            raise UserError(
                "--dual-scale: with --online-hadamard a transform stands between the two linears that it would scale; "
                "choose one of them"
            )
        if self.learn_shift and not self.correction:
            raise UserError("--learn-shift: learns the shift of --correction; add it")
        if self.seed >= 2**32:
            raise UserError(f"--seed: expected less than 2**32, found {self.seed}")
        stages = self.stages
        if not stages or list(stages) != sorted(set(stages)) or stages[0] <= 0 or stages[-1] != 1:
            raise UserError(f"--stages: expected growing ratios above 0 that end with 1.0, found {list(stages)}")
        if 0 < self.epochs < len(stages):
            expected = f"at least one for each of the {len(stages)} stages"
            raise UserError(f"--epochs: expected {expected}, found {self.epochs}")
        if self.activations is not None and (self.correction or self.learn_shift):
            raise UserError("--correction: for weight-only schemes, since a shift would widen quantized activations")
        try:
            LinearScheme(self.weights, self.activations)
            schedule(1, self.shallow, self.deep, self.window, self.stride)
        except ValueError as error:
            raise UserError(str(error)) from None

    def learns(self, kind: str) -> bool:
        """Whether a kind of parameter is learned: scale, clip, lora, rounding, norms or shift."""
        if not (self.epochs or self.end_to_end_epochs):
            return False
        if kind == "norms":
            return self.learn_norms and self.end_to_end_epochs > 0
        return self.lora_rank > 0 if kind == "lora" else getattr(self, f"learn_{kind}")

    @property
    def learns_anything(self) -> bool:
        return any(map(self.learns, ("scale", "clip", "rounding", "norms", "shift", "lora")))

    @property
    def slides(self) -> bool:
        """Whether anything is learned in windows."""
        return self.epochs > 0 and self.learns_anything

    @property
    def tunes(self) -> bool:
        """Whether anything is learned end to end."""
        return self.end_to_end_epochs > 0 and self.learns_anything

    @property
    def has_offset(self) -> bool:
        """Whether weights are rounded to other codes than the nearest ones."""
        return self.learns("rounding") or self.rounding_start == "gptq" or self.dual_scale

    @property
    def has_scales(self) -> bool:
        return self.learns("scale") or self.scale_start != "ones" or self.dual_scale

    @property
    def folds_norms(self) -> bool:
        return self.equalize != "off" or self.rotate

    @property
    def needs_start(self) -> bool:
        """Whether the initial values depend on the calibration samples."""
        starts = (self.scale_start != "ones", self.range_start == "search", self.rounding_start == "gptq")
        return any(starts) or self.dual_scale or self.correction

    def windows(self, blocks: int) -> list[Window]:
        return schedule(blocks, self.shallow, self.deep, self.window, self.stride)

    def stage_epochs(self) -> list[int]:
        """Epochs of each stage; an uneven rest goes to the last ones, which see the whole quantization."""
        share, rest = divmod(self.epochs, len(self.stages))
        return [share + (stage >= len(self.stages) - rest) for stage in range(len(self.stages))]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_scheme(text: str, group_size: int, symmetric: bool) -> tuple[WeightScheme, ActivationScheme | None]:
    """Parse "W4A16" and the like. Raises UserError naming what is understood."""
    match = re.fullmatch(r"W(\d+)A(\d+)", text.upper())
    weight_bits, activation_bits = (int(match[1]), int(match[2])) if match else (0, 0)
    if weight_bits not in WEIGHT_BITS or activation_bits not in (*ACTIVATION_BITS, 16):
        raise UserError(
            f"--scheme: expected W{{{','.join(map(str, WEIGHT_BITS))}}}A{{{','.join(map(str, ACTIVATION_BITS))},16}}, "
            f"such as W4A16 or W4A4, found {text!r}"
        )
    if group_size not in GROUP_SIZES:
        raise UserError(f"--group-size: expected one of {list(GROUP_SIZES)} (-1: per channel), found {group_size}")
    activations = None if activation_bits == 16 else ActivationScheme(activation_bits)
    return WeightScheme(weight_bits, group_size, symmetric), activations
