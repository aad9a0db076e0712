"""Methods: each is a file that says which recipe it stands for, with the algorithm that is its own."""

from __future__ import annotations

from collections.abc import Callable

from calibrate.errors import UserError
from calibrate.methods import awq, d2quant, gptq, omniquant, rtn, sliderquant, smoothquant
from calibrate.recipe import Recipe
from sliderquant_vllm.format import ActivationScheme, LinearScheme, WeightScheme

METHODS: dict[str, Callable[..., dict]] = {
    "sliderquant": sliderquant.settings,
    "rtn": rtn.settings,
    "gptq": gptq.settings,
    "awq": awq.settings,
    "smoothquant": smoothquant.settings,
    "omniquant": omniquant.settings,
    "d2quant": d2quant.settings,
}
PRESETS = sliderquant.PRESETS


def compose(
    weights: WeightScheme,
    activations: ActivationScheme | None = None,
    method: str = "sliderquant",
    preset: str | None = None,
    **chosen,
) -> Recipe:
    """The recipe of a method and a preset, with the fields in ``chosen`` in place of theirs.

    Raises:
        UserError: an unknown method or preset, or fields that do not go together.
    """
    if method not in METHODS:
        raise UserError(f"--method: expected one of {', '.join(METHODS)}, found {method!r}")
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset: expected one of {', '.join(PRESETS)}, found {preset!r}")
    if preset is not None and method != "sliderquant":
        raise UserError(f"--preset {preset}: of --method sliderquant; {method} has none")
    scheme = LinearScheme(weights, activations)
    settings = METHODS[method](scheme, preset) if preset else METHODS[method](scheme)
    return Recipe(weights=weights, activations=activations, method=method, **settings | chosen)
