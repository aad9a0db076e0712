"""The models that the served benchmark times: quantized, and the stock format's copy of the same weights."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import served, throughput
from benchmarks.random_model import SHAPES
from sliderquant_vllm.checkpoint import read_config, validate_checkpoint
from sliderquant_vllm.packing import dequantize, unpack_codes, unpack_linear
from sliderquant_vllm.shards import Reader


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    return directory, served.write_models("small", ["W4A16", "W4A4"], 1, directory)


def test_models_have_the_shape_and_the_schemes(models):
    directory, written = models
    config = json.loads((directory / "16-bit" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (SHAPES["small"].hidden, 1)
    assert [len(validate_checkpoint(model, data=True).linears) for model in written[:2]] == [7, 7]
    assert read_config(written[1])[1].online_hadamard  # its cost belongs to what is timed
    labels = throughput.find_models([str(model) for model in written], "auto")
    assert list(labels) == ["16-bit", "W4A16", "W4A4", "gptq 4-bit"]
    assert labels["16-bit"] == str(directory / "16-bit")


def test_the_stock_copy_holds_the_same_weights(models):
    _, (ours, _, stock) = models
    scheme = read_config(ours)[1].weights
    mine, theirs = Reader(ours), Reader(stock)
    for module, headers in mine.modules().items():
        if "weight_packed" not in headers:
            continue
        codes, scale, _ = unpack_linear({suffix: mine.tensor(f"{module}.{suffix}") for suffix in headers}, scheme)
        held = {name: theirs.tensor(f"{module}.{name}") for name in ("qweight", "scales", "qzeros", "g_idx")}
        (n, k), groups = codes.shape, scale.shape[1]
        shapes = {"qweight": (k // 8, n), "scales": (groups, n), "qzeros": (groups, n // 8), "g_idx": (k,)}
        assert {name: tuple(tensor.shape) for name, tensor in held.items()} == shapes
        zero = unpack_codes(held["qzeros"], 4).float() + 1
        group = held["g_idx"].long()
        dense = (unpack_codes(held["qweight"].T, 4).T.float() - zero[group]) * held["scales"].float()[group]
        torch.testing.assert_close(dense.T, dequantize(codes, scale.float(), None, scheme), rtol=1e-3, atol=0)


def test_only_weights_that_the_stock_format_can_say(models, tmp_path):
    _, (_, w4a4, _) = models
    with pytest.raises(ValueError, match="expected WeightScheme"):
        served.write_gptq(w4a4, tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()
    assert served.main(["--shape", "huge"]) == 2
