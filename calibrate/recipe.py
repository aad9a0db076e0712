"""The recipe: one frozen dataclass with everything that decides the result of a calibration."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
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

METHODS = ("sliderquant", "rtn")
STAGE_ORDERS = ("outer", "inner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides the result; defaults are the published SliderQuant settings (arXiv 2603.25284).

    Attributes:
        method: "sliderquant", or "rtn" for plain round-to-nearest of the same model.
        rotate: rotate the residual stream and the value heads first (SliderQuant+).
        shallow, deep, window, stride: sizes of the window schedules, in blocks.
        stages: growing ratios of quantized input channels; the last one is 1.
        stage_order: "outer" passes over all windows once per stage; "inner" runs the stages inside each window.
        epochs: passes over the samples per window, split evenly over the stages.
        lr_scale, lr_lora, lr_clip: learning rates per sample; multiplied by the batch size.
        lora_rank: 0 switches low-rank adaptation off.
        learn_scale, learn_clip: channel scaling (needs quantized activations), weight clipping.
        nsamples, seqlen: calibration samples and tokens per sample.
        ignore: names or "re:" patterns of linears that stay in 16 bits.
    """

    weights: WeightScheme
    activations: ActivationScheme | None = None
    method: str = "sliderquant"
    rotate: bool = False
    shallow: int = 4
    deep: int = 4
    window: int = 2
    stride: int = 1
    stages: tuple[float, ...] = (0.5, 1.0)
    stage_order: str = "outer"
    epochs: int = 20
    batch_size: int = 3
    lr_scale: float = 1e-3
    lr_lora: float = 1e-4
    lr_clip: float = 1e-2
    lora_rank: int = 4
    learn_scale: bool = False
    learn_clip: bool = True
    dataset: str = "Salesforce/wikitext:wikitext-2-raw-v1"
    nsamples: int = 128
    seqlen: int = 2048
    seed: int = 0
    ignore: tuple[str, ...] = ("lm_head",)

    def __post_init__(self):
        self._choice("method", METHODS)
        self._choice("stage_order", STAGE_ORDERS)
        for name, least in {
            "epochs": 1,
            "batch_size": 1,
            "nsamples": 1,
            "seqlen": 2,
            "lora_rank": 0,
            "seed": 0,
        }.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name}: expected at least {least}, found {getattr(self, name)}")
        for name in ("lr_scale", "lr_lora", "lr_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name}: expected a finite number of 0 or more, found {getattr(self, name)}")
        if self.seed >= 2**32:
            raise UserError(f"--seed: expected less than 2**32, found {self.seed}")
        if not self.stages or list(self.stages) != sorted(set(self.stages)) or self.stages[-1] != 1:
            raise UserError(f"--stages: expected growing ratios that end with 1, found {list(self.stages)}")
        if self.stages[0] <= 0:
            raise UserError(f"--stages: expected ratios above 0, found {self.stages[0]}")
        if self.epochs < len(self.stages):
            raise UserError(
                f"--epochs: expected at least one for each of the {len(self.stages)} stages, found {self.epochs}"
            )
        if self.learn_scale and self.activations is None:
            raise UserError("--learn_scale: channel scaling needs quantized activations; this scheme is weight-only")
        try:
            LinearScheme(self.weights, self.activations)
            schedule(1, self.shallow, self.deep, self.window, self.stride)
        except ValueError as error:
            raise UserError(str(error)) from None

    def _choice(self, name: str, choices: tuple) -> None:
        if getattr(self, name) not in choices:
            raise UserError(f"--{name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}")

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
        raise UserError(f"--group_size: expected one of {list(GROUP_SIZES)} (-1: per channel), found {group_size}")
    activations = None if activation_bits == 16 else ActivationScheme(activation_bits)
    return WeightScheme(weight_bits, group_size, symmetric), activations
