"""What a model may hold besides one scheme: biases, 16-bit layers, several schemes, tied embeddings; ranks."""

from __future__ import annotations

import os

import pytest
import torch

from sliderquant_vllm.format import ActivationScheme, OnlineHadamard, Override, WeightScheme
from sliderquant_vllm.shards import INDEX_FILE
from tests.helpers import (
    TINY_LLAMA,
    edit_config,
    write_dequantized,
    write_random_model,
    write_rtn_checkpoint,
)
from tests.serving.engine import assert_same, score, start_error

# Every kind of parameter that tensor parallelism splits, in parts that still fill words with two ranks.
MIXED = (
    Override(r"re:model\.layers\.[0-2]\..*", WeightScheme(3)),
    Override(r"re:model\.layers\.[3-4]\..*", WeightScheme(3, 32)),
    Override(r"re:model\.layers\.[5-6]\..*", WeightScheme(2, 64, symmetric=True)),
    Override(r"re:model\.layers\.[7-8]\..*", WeightScheme(8), ActivationScheme(8)),
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write_rtn_checkpoint(
        TINY_LLAMA,
        tmp_path_factory.mktemp("mixed") / "quantized",
        WeightScheme(4, 64),
        overrides=MIXED,
        ignore=("lm_head", r"re:model\.layers\.9\..*", r"re:.*layers\.10\..*down_proj"),
    )


@pytest.mark.parametrize("tied", [True, False])
def test_biases_ignored_layers_and_overrides_in_qwen2(in_engine, tmp_path, tied):
    quantized = write_rtn_checkpoint(
        write_random_model(tmp_path / "qwen2", "qwen2", tied=tied),
        tmp_path / "quantized",
        WeightScheme(4, 32),
        overrides=(Override(r"re:.*self_attn\..*", WeightScheme(3)),),
        ignore=("lm_head", r"re:model\.layers\.1\..*"),
    )
    found = in_engine(score, quantized, check_linears=True, dtype="float16")
    assert len(found.errors) == 2 * 4
    assert max(found.errors.values()) < 5e-4, found.errors
    expected = write_dequantized(quantized, tmp_path / "16bit", torch.float16)
    assert_same(found, in_engine(score, expected, dtype="float16"))


def test_biases_with_quantized_activations(in_engine, tmp_path):
    quantized = write_rtn_checkpoint(
        write_random_model(tmp_path / "qwen2", "qwen2"), tmp_path / "quantized", WeightScheme(4), ActivationScheme(4)
    )
    found = in_engine(score, quantized, check_linears=True)
    assert len(found.errors) == 3 * 4
    assert max(found.errors.values()) < 1e-4, found.errors


@pytest.fixture(scope="module")
def one_kv_head(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one-kv-head")
    return write_rtn_checkpoint(
        write_random_model(directory / "qwen2", "qwen2", kv_heads=1), directory / "quantized", WeightScheme(4, 32)
    )


@pytest.fixture(scope="module")
def rotated_and_biased(tmp_path_factory):
    """With two ranks, blocks that end where a rank's inputs end, and biases of both kinds of parallel linears."""
    return write_rtn_checkpoint(
        TINY_LLAMA,
        tmp_path_factory.mktemp("rotated-and-biased") / "quantized",
        WeightScheme(4, 64),
        online_hadamard=(OnlineHadamard(r"re:.*down_proj", 64), OnlineHadamard(r"re:.*o_proj", 32)),
        added_bias=(r"re:.*",),
    )


CORES = sorted(os.sched_getaffinity(0))
RANKS = torch.cuda.device_count() if torch.cuda.is_available() else len(CORES)


@pytest.mark.skipif(RANKS < 2, reason="two ranks need two cores, or two GPUs where there is one")
@pytest.mark.parametrize(
    ("model", "linears"), [("mixed", 12 * 4 - 5), ("one_kv_head", 3 * 4), ("rotated_and_biased", 12 * 4)]
)
def test_two_ranks(request, in_engine, fresh_engine, model, linears):
    quantized = request.getfixturevalue(model)
    one = in_engine(score, quantized, check_linears=True, dtype="float16")
    assert len(one.errors) == linears
    assert max(one.errors.values()) < 5e-4, one.errors
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, CORES[:2]))}
    two = fresh_engine(quantized, cores, tensor_parallel_size=2, dtype="float16")
    assert_same(two, one)


def remove(name):
    return lambda directory: (directory / name).unlink()


BROKEN = {
    "version": (
        lambda directory: edit_config(directory, format_version=7),
        ["format_version", "reads 1", "7", "install"],
    ),
    "missing shard": (remove("model-00001-of-00003.safetensors"), ["model-00001-of-00003", "missing"]),
    "missing index": (remove(INDEX_FILE), [INDEX_FILE, "missing"]),
    "other bits": (
        lambda directory: edit_config(directory, weights={"bits": 8, "group_size": 64, "symmetric": False}),
        ["weight_packed", "expected int32", "W8A16 group 64", "found int32"],
    ),
    "fused parts disagree": (
        lambda directory: edit_config(directory, ignore=["lm_head", "re:.*v_proj"]),
        ["v_proj", "ignore"],
    ),
}


@pytest.mark.parametrize("damage, words", BROKEN.values(), ids=BROKEN)
def test_broken_checkpoints_are_refused_at_the_start(in_engine, tmp_path, damage, words):
    quantized = write_rtn_checkpoint(TINY_LLAMA, tmp_path / "quantized", WeightScheme(4, 64), max_shard_bytes=10**6)
    damage(quantized)
    message = in_engine(start_error, quantized)
    for word in words:
        assert word in message
