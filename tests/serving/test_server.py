"""``vllm serve``, asked by the openai client: with and without ``--quantization``, eager and compiled."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

from sliderquant_vllm import ops
from sliderquant_vllm.format import ActivationScheme, OnlineHadamard, Override, WeightScheme
from tests.helpers import TINY_LLAMA, write_rtn_checkpoint
from tests.serving.engine import Score, assert_same, score, windows

pytest.importorskip("openai")
from tools import server

START_SECONDS = 600  # compiling takes minutes where two busy cores have to do it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_KERNELS = f"no native {DEVICE.upper()} kernels"


@contextlib.contextmanager
def asked(model: Path, env: dict[str, str], log: Path, *flags: str):
    """An openai client of a server of this model. Where that does not start, what it printed last is shown."""
    arguments = ["serve", str(model), "--max-model-len", "256", "--dtype", "float16", *flags]
    try:
        with server.served(arguments, log, START_SECONDS, {**os.environ, **env}) as client:
            yield client
    except server.ServerError:
        print(log.read_text()[-4000:])
        raise


def served_logprobs(client, model: Path) -> Score:
    completion = client.completions.create(
        model=str(model),
        prompt=windows(model),
        max_tokens=1,
        temperature=0,
        extra_body={"prompt_logprobs": 0},
    )
    return Score(
        torch.tensor(
            [
                choice.prompt_logprobs[i][str(token)]["logprob"]
                for choice, prompt in zip(completion.choices, windows(model), strict=True)
                for i, token in enumerate(prompt)
                if i > 0
            ]
        )
    )


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    return write_rtn_checkpoint(
        TINY_LLAMA,
        tmp_path_factory.mktemp("server") / "quantized",
        WeightScheme(4, 64),
        overrides=(
            Override(r"re:model\.layers\.[0-3]\..*", WeightScheme(3)),
            Override(r"re:model\.layers\.[4-7]\..*", WeightScheme(4), ActivationScheme(8)),
        ),
        online_hadamard=(OnlineHadamard(r"re:.*down_proj", 128),),
        added_bias=(r"re:.*\.(gate|up)_proj",),
    )


@pytest.fixture(scope="module")
def expected(in_engine, quantized) -> Score:
    return in_engine(score, quantized, dtype="float16")


def test_named_method_eager_without_native_kernels(engine_env, quantized, expected, tmp_path):
    env = {**engine_env, "SLIDERQUANT_NATIVE": "0"}
    log = tmp_path / "log"
    with asked(quantized, env, log, "--quantization", "sliderquant", "--enforce-eager") as client:
        assert_same(served_logprobs(client, quantized), expected)
    assert log.read_text().count(NO_KERNELS) == 1


def test_unnamed_method_compiled(engine_env, quantized, expected, tmp_path):
    log = tmp_path / "log"
    with asked(quantized, engine_env, log) as client:
        assert_same(served_logprobs(client, quantized), expected)
    assert (NO_KERNELS not in log.read_text()) == ops.is_native(DEVICE)
