"""The entry point ``vllm.general_plugins``: makes vLLM know the quantization method ``sliderquant``."""

from __future__ import annotations


def register() -> None:
    """Register the quantization config. vLLM calls this in every process, often more than once.

    Importing the module registers its class, and Python imports it once; kernels load with the first layer.
    """
    import sliderquant_vllm.config  # noqa: F401
