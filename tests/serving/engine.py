"""What serving tests run in other processes: by a pool, or ``python -m tests.serving.engine MODEL``."""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.common import relative_error
from sliderquant_vllm.checkpoint import read_config
from sliderquant_vllm.format import FUSED_MODULES
from sliderquant_vllm.shards import Reader
from tests.helpers import ReferenceLinear

WINDOWS, WINDOW = 5, 200


@dataclass
class Score:
    """Log-probabilities of the windows' tokens and, per module, the relative error of its largest call."""

    logprobs: torch.Tensor
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return float(torch.exp(-self.logprobs.mean()))


def assert_same(found: Score, expected: Score) -> None:
    """As near as two fp16 engines are that add in different orders; in bf16 that noise is eight times as large."""
    difference = (found.logprobs - expected.logprobs).abs()
    assert difference.mean() <= 0.01
    assert difference.max() <= 0.15
    assert abs(found.perplexity / expected.perplexity - 1) <= 2e-3


def set_environment(env: Mapping[str, str]) -> None:
    os.environ.update(env)


def has_op(name: str) -> bool:
    """Whether vLLM's own library has this operator; it has fewer for CPUs without AVX512."""
    from vllm import _custom_ops  # noqa: F401 -- loads the library

    return hasattr(torch.ops._C, name)


def windows(model: str | Path) -> list[list[int]]:
    """Token windows of the standard library's source, which every interpreter has."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    tokens = tokenizer.encode(inspect.getsource(argparse)).ids
    return [tokens[start : start + WINDOW] for start in range(0, WINDOWS * WINDOW, WINDOW)]


def score(model: str | Path, check_linears: bool = False, **engine_args) -> Score:
    """Start vLLM in this process, score the windows, stop it.

    With ``check_linears`` every quantized linear, and the experts of every block, are also computed by the reference
    ops from the tensors of the checkpoint, on the inputs that they get here.
    """
    from vllm import LLM, SamplingParams

    prompts = windows(model)
    # Few tokens at once, because an engine begins with a batch of as many as it allows.
    limits = {"max_model_len": 256, "max_num_seqs": WINDOWS, "max_num_batched_tokens": WINDOWS * WINDOW}
    defaults = {"dtype": "bfloat16", "enforce_eager": True, **limits}
    with _checked_linears(model) if check_linears else nullcontext({}) as errors, _without_collections():
        llm = LLM(str(model), **{**defaults, **engine_args})
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
            use_tqdm=False,
        )
    logprobs = [
        output.prompt_logprobs[i][token].logprob
        for output, prompt in zip(outputs, prompts, strict=True)
        for i, token in enumerate(prompt)
        if i > 0
    ]
    with _without_collections():
        llm.llm_engine.engine_core.shutdown()
    del llm, outputs
    gc.collect()
    return Score(torch.tensor(logprobs), errors)


def fused_score(model: str | Path, **engine_args) -> tuple[Score, dict[str, int]]:
    """``score``, and how often each fused quantizer was put into the compiled graphs."""
    from sliderquant_vllm.fusion import QuantizerFusion

    QuantizerFusion.fused.clear()
    found = score(model, **engine_args)
    return found, dict(QuantizerFusion.fused)


@contextmanager
def _without_collections() -> Iterator[None]:
    """An engine starts and stops with eight full collections, two thirds of its time here: one behind it must do."""
    with patch.multiple(gc, collect=lambda *_: 0, freeze=lambda: None, unfreeze=lambda: None):
        yield


@contextmanager
def _checked_linears(model: str | Path) -> Iterator[dict[str, float]]:
    from sliderquant_vllm.compat import activate_experts
    from sliderquant_vllm.linear import SliderQuantLinearMethod
    from sliderquant_vllm.moe import SliderQuantMoEMethod, names_of

    _, config = read_config(model)
    reader = Reader(model)
    modules = reader.modules()
    errors: dict[str, float] = {}
    linear, experts = SliderQuantLinearMethod.apply, SliderQuantMoEMethod.apply

    def reference(name):
        tensors = {suffix: reader.tensor(f"{name}.{suffix}") for suffix in modules[name]}
        return ReferenceLinear(tensors, config.scheme_for(name))

    def record(prefix, y, expected):
        errors[prefix] = max(errors.get(prefix, 0.0), relative_error(y, expected))

    def checked_linear(method, layer, x, bias=None):
        y = linear(method, layer, x, bias)
        stem, _, leaf = method.prefix.rpartition(".")
        parts = [reference(f"{stem}.{part}").to(x.device)(x) for part in FUSED_MODULES.get(leaf, (leaf,))]
        record(method.prefix, y, torch.cat(parts, -1))
        return y

    def checked_experts(method, layer, x, topk_weights, topk_ids, *shared, **named):
        y = experts(method, layer, x, topk_weights, topk_ids, *shared, **named)
        expected, names = torch.zeros(x.shape), names_of(layer)
        for number in topk_ids.unique().tolist():
            gate, down, up = (reference(f"{method.prefix}.{number}.{names[shard]}") for shard in sorted(names))
            tokens, slots = (topk_ids == number).nonzero(as_tuple=True)
            gate_up = torch.cat((gate(x[tokens]), up(x[tokens])), -1)
            routed = down(activate_experts(layer, gate_up)).float()
            expected[tokens] += routed * topk_weights[tokens, slots, None]
        record(method.prefix, y, expected.to(x.dtype))
        return y

    SliderQuantLinearMethod.apply, SliderQuantMoEMethod.apply = checked_linear, checked_experts
    try:
        yield errors
    finally:
        SliderQuantLinearMethod.apply, SliderQuantMoEMethod.apply = linear, experts


def start_error(model: str | Path, **engine_args) -> str:
    """The message with which vLLM refuses a model; empty when it does not."""
    from vllm import LLM

    try:
        LLM(str(model), enforce_eager=True, max_model_len=256, **engine_args)
    except Exception as error:
        return str(error)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--engine-args", type=json.loads, default={})
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    torch.save(score(args.model, **args.engine_args).logprobs, args.output)


if __name__ == "__main__":
    main()
