"""The quantization config and the linear method, layer by layer, without an engine."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sliderquant_vllm.checkpoint import validate_checkpoint
from sliderquant_vllm.format import FormatError, Override, QuantizationConfig, WeightScheme
from tests.helpers import TINY_LLAMA, write_rtn_checkpoint

pytest.importorskip("vllm")

from sliderquant_vllm import compat, plugin
from sliderquant_vllm.config import SliderQuantConfig
from sliderquant_vllm.linear import SliderQuantLinearMethod

ATTENTION = "model.layers.0.self_attn"


def layer_of(kind: type, **attributes) -> torch.nn.Module:
    """A layer that vLLM has only begun to build: a quantization config sees no more of it."""
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    layer.__dict__.update(attributes)
    return layer


def config(**fields) -> SliderQuantConfig:
    return SliderQuantConfig(QuantizationConfig(WeightScheme(4), **fields))


def test_registration_can_be_repeated():
    from vllm.model_executor.layers.quantization import get_quantization_config

    for _ in range(3):
        plugin.register()
    assert get_quantization_config("sliderquant") is SliderQuantConfig


def test_the_config_travels_to_other_processes(tmp_path):
    original = config(overrides=(Override("a.b", WeightScheme(2)),))
    original.maybe_update_config(str(write_rtn_checkpoint(TINY_LLAMA, tmp_path / "model", WeightScheme(4))))
    copy = pickle.loads(pickle.dumps(original))
    assert copy.checkpoint == original.checkpoint
    assert len(copy.linears) == 84


def test_methods_by_layer():
    linear = layer_of(compat.LinearBase, output_size=256, input_size=128)
    method = config().get_quant_method(linear, f"{ATTENTION}.qkv_proj")
    assert isinstance(method, SliderQuantLinearMethod)
    ignoring = config(ignore=("lm_head", rf"re:{ATTENTION}\..*"))
    assert isinstance(ignoring.get_quant_method(linear, f"{ATTENTION}.qkv_proj"), compat.UnquantizedLinearMethod)
    assert config().get_quant_method(layer_of(compat.ParallelLMHead), "lm_head") is None
    assert config().get_quant_method(torch.nn.Module(), "") is None


def test_fused_parts_that_disagree():
    linear = layer_of(compat.LinearBase, output_size=256, input_size=128)
    with pytest.raises(FormatError, match="need one scheme"):
        config(ignore=(f"{ATTENTION}.k_proj",)).get_quant_method(linear, f"{ATTENTION}.qkv_proj")


def test_an_output_layer_must_be_ignored():
    with pytest.raises(FormatError, match="add 'lm_head' to 'ignore'"):
        config(ignore=()).get_quant_method(layer_of(compat.ParallelLMHead), "lm_head")


def test_experts_must_be_ignored():
    experts = layer_of(compat.RoutedExperts)
    with pytest.raises(FormatError, match=r"mixtures of experts.*\.experts\\\..*ignore"):
        config().get_quant_method(experts, "model.layers.0.mlp.experts")
    ignoring = config(ignore=("lm_head", r"re:.*\.experts\..*"))
    assert ignoring.get_quant_method(experts, "model.layers.0.mlp.experts") is None


def test_exact_names_follow_the_names_of_the_served_model():
    mapper = SimpleNamespace(apply_list=lambda names: [f"language.{name}" for name in names])
    renamed = config(ignore=("lm_head", "re:.*x"), overrides=(Override("a.b", WeightScheme(2)),))
    renamed.apply_vllm_mapper(mapper)
    assert renamed.checkpoint.ignore == ("language.lm_head", "re:.*x")
    assert renamed.checkpoint.overrides[0].match == "language.a.b"


@pytest.mark.parametrize(
    "part, fields", [("o_proj", {"in_features": 64}), ("o_proj", {"out_features": 64}), ("k_proj", {"in_features": 64})]
)
def test_a_config_of_another_model(tmp_path, part, fields):
    quantized = write_rtn_checkpoint(TINY_LLAMA, tmp_path / "model", WeightScheme(4))
    found = config()
    found.linears = dict(validate_checkpoint(quantized).linears)
    name = f"{ATTENTION}.{part}"
    found.linears[name] = replace(found.linears[name], **fields)
    fused, width = ("qkv_proj", 256) if part == "k_proj" else (part, 128)
    linear = layer_of(compat.LinearBase, output_size=width, input_size=128)
    with pytest.raises(FormatError, match=rf"{fused}: config.json describes \[{width}, 128\].*64"):
        found.get_quant_method(linear, f"{ATTENTION}.{fused}")


@pytest.mark.parametrize(
    "weights, rank_inputs, rank_outputs, words",
    [
        (WeightScheme(4, 128), 64, [128], ["group_size 128", "64 input channels"]),
        (WeightScheme(3), 80, [128], ["80 input channels of 3 bits"]),
        (WeightScheme(4), 128, [128, 4, 4], ["part 1", "4 zero points of 4 bits"]),
    ],
)
def test_ranks_that_end_between_words_or_groups(weights, rank_inputs, rank_outputs, words):
    method = SliderQuantLinearMethod(config().checkpoint.scheme_for("a"), f"{ATTENTION}.o_proj")
    method.scheme = replace(method.scheme, weights=weights)
    with pytest.raises(FormatError) as caught:
        method.create_weights(
            SimpleNamespace(tp_size=2), rank_inputs, rank_outputs, 2 * rank_inputs, 128, torch.bfloat16
        )
    message = str(caught.value)
    for word in [f"{ATTENTION}.o_proj", "tensor_parallel_size 2", f"[128, {2 * rank_inputs}]", *words]:
        assert word in message
    assert "serve with a smaller tensor_parallel_size" in message
    assert "\n" not in message


def test_a_part_that_was_never_loaded():
    method = SliderQuantLinearMethod(config().checkpoint.scheme_for("a"), f"{ATTENTION}.o_proj")
    layer = torch.nn.Module()
    layer.weight_packed = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.int32), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(torch.tensor([[1.0]] * 7 + [[torch.nan]]))
    with pytest.raises(FormatError, match=r"o_proj: .*missing or NaN.*python -m sliderquant_vllm"):
        method.process_weights_after_loading(layer)
