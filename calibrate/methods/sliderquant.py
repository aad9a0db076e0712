"""SliderQuant (arXiv 2603.25284), and what is added to it: a better start, learned rounding, end-to-end tuning."""

from __future__ import annotations

from sliderquant_vllm.format import LinearScheme

PRESETS = ("default", "fast", "best", "paper")


def settings(scheme: LinearScheme, preset: str = "default") -> dict:
    """The recipe of a preset.

    fast is the start alone: minutes for a 7B model. default adds windows of two blocks that do not overlap: from this
    start the overlaps of the published schedule double the time for little. best spends its steps on more samples and,
    with 16-bit activations, tunes all blocks end to end, the norms too, and transforms the input of down_proj while
    serving. paper is the published method and its settings.
    """
    if preset == "paper":
        return paper(scheme)
    quantized_activations = scheme.activations is not None
    start = {
        "equalize": "all" if quantized_activations else "outliers",
        "rotate": True,
        "online_hadamard": quantized_activations,
        "range_start": "search",
        "rounding_start": "gptq",
    }
    if preset == "fast":
        return start
    pairs = {"shallow": 1, "deep": 1, "window": 2, "stride": 2}
    learned = {"learn_clip": True, "learn_rounding": True, "learn_scale": quantized_activations} | pairs
    if preset == "default":
        return start | learned | {"epochs": 10}
    best = start | learned | {"nsamples": 512, "batch_size": 8, "epochs": 2}
    if quantized_activations:
        return best
    tuned = best | {"end_to_end_epochs": 3, "learn_norms": True, "online_hadamard": True}
    if scheme.weights.bits > 3:
        return tuned | {"epochs": 1, "end_to_end_epochs": 5}
    return tuned | {"lr_end_to_end": 1.3 if scheme.weights.bits == 2 else 1.0}


def paper(scheme: LinearScheme) -> dict:
    """Sections 3 and 4, appendix A: two stages, low-rank adaptation, clipping and, with activations, scaling."""
    quantized_activations = scheme.activations is not None
    two_bits = scheme.weights.bits == 2
    return {
        "rotate": quantized_activations,
        "epochs": 60 if two_bits else 20,
        "stages": (0.5, 1.0),
        "learn_clip": True,
        "learn_scale": quantized_activations,
        "lora_rank": 4,
        "lr_lora": 5e-4 if two_bits else 1e-4,
    }
