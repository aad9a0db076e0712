"""From `calibrate` to the server: a calibrated checkpoint is as good when served as it was when calibrated."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cells import Silent
from calibrate.evaluate import perplexity
from calibrate.export import export
from calibrate.methods import compose
from calibrate.model import Model
from calibrate.pipeline import calibrate
from sliderquant_vllm.format import ActivationScheme, WeightScheme
from tests.helpers import TINY_LLAMA, write_random_model
from tests.serving.engine import WINDOW, score, windows

SMALL = {"nsamples": 8, "seqlen": 64, "shallow": 1, "deep": 1}
LEARN_ALL = {"epochs": 2, "learn_scale": True, "learn_rounding": True, "learn_clip": True, "lora_rank": 2}


@pytest.mark.parametrize(
    ("family", "settings", "dtype", "tolerance"),
    [
        ("llama", {"weights": WeightScheme(2), **LEARN_ALL}, "float16", 2e-3),
        ("llama", {"weights": WeightScheme(4, 64, symmetric=True), "preset": "fast"}, "float16", 2e-3),
        ("llama", {"weights": WeightScheme(3), "method": "d2quant"}, "float16", 2e-3),
        ("llama", {"weights": WeightScheme(4), "preset": "fast", "average_bits": 3.5}, "float16", 2e-3),
        # A 4-bit activation code falls to the other side for less than the rounding of 16-bit arithmetic.
        ("llama", {"weights": WeightScheme(4), "activations": ActivationScheme(4), **LEARN_ALL}, "bfloat16", 2e-2),
        ("qwen2", {"weights": WeightScheme(8), "activations": ActivationScheme(8), **LEARN_ALL}, "float16", 2e-2),
        ("qwen2", {"weights": WeightScheme(3), "method": "d2quant", "rotate": True}, "float16", 5e-3),
        # Some tokens take another expert, where the 16 bits of a router end in a tie.
        ("qwen3_moe", {"weights": WeightScheme(4, 32), "method": "rtn"}, "float16", 1e-2),
        ("mixtral", {"weights": WeightScheme(3), "method": "gptq"}, "float16", 1e-2),
        (
            "qwen2_moe",
            {"weights": WeightScheme(4), "activations": ActivationScheme(8), "preset": "fast"},
            "float16",
            1e-2,
        ),
    ],
    ids=[
        *("W2A16", "W4A16", "W3A16-d2quant", "W3.5A16", "W4A4", "qwen2-W8A8", "qwen2-W3A16-d2quant"),
        *("qwen3_moe-W4A16-rtn", "mixtral-W3A16-gptq", "qwen2_moe-W4A8"),
    ],
)
def test_served_as_calibrated(in_engine, tmp_path, family, settings, dtype, tolerance):
    source = TINY_LLAMA
    if family != "llama":
        source = write_random_model(tmp_path / "parent", family, tied=family == "qwen2")
    model = Model(source, compose(**SMALL | settings), torch.device("cpu"))
    stream = torch.tensor(windows(source)).flatten()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calibrated = calibrate(model, stream[:512].view(8, 64), Silent())
        expected = perplexity(model, stream, WINDOW, calibrated)
    finally:
        torch.set_num_threads(threads)
    provenance = {"model": str(source), "data_sha256": ""}
    export(model, calibrated, tmp_path / "quantized", False, provenance)
    assert in_engine(score, tmp_path / "quantized", dtype=dtype).perplexity == pytest.approx(expected, rel=tolerance)
