"""Block-wise learning of clipping and channel scales, as OmniQuant does (Shao et al., arXiv 2308.13137)."""

from __future__ import annotations

from sliderquant_vllm.format import LinearScheme


def settings(scheme: LinearScheme) -> dict:
    """One window per block, no stages; the initial scales are SmoothQuant's."""
    return {
        "epochs": 20,
        "shallow": 0,
        "deep": 0,
        "window": 1,
        "learn_clip": True,
        "learn_scale": True,
        "scale_start": "smoothquant" if scheme.activations else "ones",
    }
