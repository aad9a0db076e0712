"""The pass that joins quantizers and the layers before them: on graphs as vLLM makes them, and in an engine."""

from __future__ import annotations

import functools

import pytest
import torch

from sliderquant_vllm import ops
from sliderquant_vllm.format import ActivationScheme, OnlineHadamard, WeightScheme
from tests.helpers import write_random_model, write_rtn_checkpoint
from tests.serving.engine import fused_score, score

pytest.importorskip("vllm")

from torch.fx.experimental.proxy_tensor import make_fx
from vllm import ir
from vllm.ir.op import enable_torch_wrap
from vllm.model_executor.layers.activation import SiluAndMul

from sliderquant_vllm.fusion import QuantizerFusion

K, EPSILON = 64, 1e-5


def gates(x, *_):
    return ops.quantize_per_token(SiluAndMul.forward_native(x), 4, False, 32)


def norm(x, residual, weight):
    return ops.quantize_per_token(ir.ops.rms_norm(x[:, :K], weight, EPSILON), 8, True)


def add_and_norm(x, residual, weight):
    """As two layers follow each other; the last one's sum is not asked for."""
    y, residual = ir.ops.fused_add_rms_norm(x[:, :K], residual, weight, EPSILON)
    codes, scale, zero, row_sum = ops.quantize_per_token(y, 4, False)
    y = codes.to(x.dtype) * scale.to(x.dtype)[:, None]
    y, residual = ir.ops.fused_add_rms_norm(y, residual, weight, EPSILON)
    return *ops.quantize_per_token(y, 4, False), zero, row_sum, residual


def two_takers(x, residual, weight):
    y = ir.ops.rms_norm(x[:, :K], weight, EPSILON)
    return *ops.quantize_per_token(y, 4, False), y


def other_weight(x, residual, weight):
    return ops.quantize_per_token(ir.ops.rms_norm(x[:, :K], weight.float() + 1, EPSILON), 4, False)


def swapped_gates(x, *_):
    return ops.quantize_per_token(torch.nn.functional.silu(x[:, K:]) * x[:, :K], 4, False)


CASES = {
    gates: {"silu_mul_quantize": 1},
    norm: {"rms_norm_quantize": 1},
    add_and_norm: {"rms_norm_quantize": 2},
    two_takers: {},
    other_weight: {},
    swapped_gates: {},
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["of what it is made", "ops of vLLM's IR"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layer", CASES, ids=lambda layer: layer.__name__)
def test_graphs(monkeypatch, layer, dtype, wrapped):
    from torch._inductor.decomposition import select_decomp_table

    ops.load()
    monkeypatch.setattr(QuantizerFusion, "fused", {})
    # Whole numbers, whose squares add up exactly in every order.
    x, residual = (torch.randint(-9, 10, (5, width)).to(dtype) for width in (2 * K, K))
    weight = torch.randint(1, 4, (K,)).to(dtype)
    with enable_torch_wrap(wrapped), torch.no_grad():
        expected = layer(x, residual, weight)
        graph = make_fx(layer, decomposition_table=select_decomp_table(), tracing_mode="fake")(x, residual, weight)
        QuantizerFusion()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        found = graph(x, residual, weight)
    assert QuantizerFusion.fused == CASES[layer]
    left = [node.target for node in graph.graph.nodes if "quantize_per_token" in str(node.target)]
    assert len(left) == (0 if CASES[layer] else 1)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    if CASES[layer] and layer is not add_and_norm:  # nothing is left of the layer
        assert not any("mul" in str(node.target) and "silu_mul" not in str(node.target) for node in graph.graph.nodes)


def test_the_uuid_is_that_of_the_source():
    assert QuantizerFusion().uuid() == QuantizerFusion().uuid() and len(QuantizerFusion().uuid()) == 64


def test_a_compiled_engine_serves_fused_quantizers(in_engine, tmp_path):
    model = write_random_model(tmp_path / "model", "llama")
    down = (OnlineHadamard(r"re:.*down_proj", 128),)
    quantized = write_rtn_checkpoint(
        model, tmp_path / "quantized", WeightScheme(4), ActivationScheme(8), online_hadamard=down
    )
    engine = functools.partial(in_engine, dtype="float16")
    found, fused = engine(fused_score, quantized, enforce_eager=False)
    # Three blocks: norms before attention and the MLP, and activations before the downs.
    assert fused == {"rms_norm_quantize": 6, "silu_mul_quantize": 3}
    difference = (found.logprobs - engine(score, quantized).logprobs).abs()
    assert difference.mean() < 0.05 and found.logprobs.isfinite().all()
