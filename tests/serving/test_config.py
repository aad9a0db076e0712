"""The quantization config, layer by layer, without an engine."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sliderquant_vllm.checkpoint import Linear, validate_checkpoint
from sliderquant_vllm.format import (
    ActivationScheme,
    FormatError,
    LinearScheme,
    OnlineHadamard,
    Override,
    QuantizationConfig,
    WeightScheme,
)
from tests.helpers import TINY_LLAMA, assert_one_line_with, write_rtn_checkpoint

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


def test_a_model_that_is_not_quantized():
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.weight_utils import get_quant_config

    asked = {"quantization": "sliderquant", "quantization_config": None, "hf_config": None, "hf_overrides": {}}
    with pytest.raises(FormatError) as caught:
        get_quant_config(SimpleNamespace(model=str(TINY_LLAMA), revision=None, **asked), LoadConfig())
    assert_one_line_with(caught, ["config.json: expected a 'quantization_config'", "none", "'python -m calibrate'"])


def test_headers_of_a_hub_id_that_is_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / "0123"
    write_rtn_checkpoint(TINY_LLAMA, snapshot, WeightScheme(4), max_shard_bytes=10**6)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    found = config()
    found.maybe_update_config("someone/model", hf_config=None, revision=None)
    assert len(found.linears) == 84
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    for name, revision in (
        ("someone/model", None),
        ("someone/model", "other"),
        ("someone/else", None),
        ("a:b/c", None),
    ):
        found = config()
        found.maybe_update_config(name, hf_config=None, revision=revision)
        assert found.linears == {}


def test_methods_by_layer():
    linear = layer_of(compat.LinearBase, output_size=256, input_size=128)
    method = config().get_quant_method(linear, f"{ATTENTION}.qkv_proj")
    assert isinstance(method, SliderQuantLinearMethod)
    ignoring = config(ignore=("lm_head", rf"re:{ATTENTION}\..*"))
    assert isinstance(ignoring.get_quant_method(linear, f"{ATTENTION}.qkv_proj"), compat.UnquantizedLinearMethod)
    assert config().get_quant_method(layer_of(compat.ParallelLMHead), "lm_head") is None
    assert config().get_quant_method(torch.nn.Module(), "") is None


@pytest.mark.parametrize(
    "activations, asked, warnings", [(None, "1", 1), (None, "0", 0), (ActivationScheme(8), "1", 0)]
)
def test_results_that_depend_on_the_batch(monkeypatch, activations, asked, warnings):
    said = []
    monkeypatch.setattr(compat.logger, "warning_once", said.append)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", asked)
    linear = layer_of(compat.LinearBase, output_size=128, input_size=128)
    config(activations=activations).get_quant_method(linear, f"{ATTENTION}.o_proj")
    assert len(said) == warnings
    assert all("VLLM_BATCH_INVARIANT" in message and "quantized activations" in message for message in said)


def test_a_draft_model_has_the_names_of_its_checkpoint_and_no_options(monkeypatch):
    monkeypatch.setattr(compat, "serving_options", lambda: compat.OPTIONS | {"int8_activations": True})
    name = f"{ATTENTION}.o_proj"
    rotated = config(online_hadamard=(OnlineHadamard(name, 64),), added_bias=(name,))
    rotated.linears = {name: Linear(LinearScheme(WeightScheme(4)), 128, 128, 0)}
    linear = layer_of(compat.LinearBase, output_size=128, input_size=128)
    method = rotated.get_quant_method(linear, f"draft_model.{name}")
    assert method.scheme == LinearScheme(WeightScheme(4), hadamard_block_size=64, added_bias=True)
    assert method.biases == {name: False}
    assert rotated.get_quant_method(layer_of(compat.ParallelLMHead), "draft_model.lm_head") is None
    assert rotated.get_quant_method(linear, name).scheme.activations == ActivationScheme(8)


ADAPTER = {"lora_config": SimpleNamespace()}
MADE_FOR_IT = {"additional_config": {"sliderquant": {"made_for_this_checkpoint": True}}}


@pytest.mark.parametrize(
    "recipe, asked, words",
    [
        ({"rotate": True}, ADAPTER, ["--enable-lora", "(rotate)", "with --no-rotate,", '"made_for_this_checkpoint"']),
        ({"equalize": "all", "scale_start": "awq"}, ADAPTER, ["equalize, scale_start", "--equalize off --scale-start"]),
        ({"learn_scale": True, "epochs": 10}, ADAPTER, ["(learn_scale)"]),
        ({"dual_scale": True}, ADAPTER, ["(dual_scale)"]),
        ({"rotate": True, "equalize": "all"}, {"enable_prompt_embeds": True}, ["--enable-prompt-embeds", "(rotate)"]),
        ({"rotate": True}, {"runner_type": "pooling"}, ["--runner pooling"]),
        ({"rotate": True}, {"method": "eagle3"}, ["--speculative-config method eagle3"]),
        ({"rotate": True}, {}, []),
        ({"rotate": True}, {"method": "ngram"}, []),
        ({"equalize": "outliers"}, {"method": "eagle3"}, []),
        ({"learn_scale": True, "epochs": 0, "equalize": "off", "scale_start": "ones"}, ADAPTER, []),
        ({"rotate": True}, ADAPTER | MADE_FOR_IT, []),
        (None, ADAPTER, []),
    ],
)
def test_what_was_made_for_other_channels(monkeypatch, recipe, asked, words):
    fields = {"lora_config": None, "additional_config": {}, "enable_prompt_embeds": False, "runner_type": "generate"}
    asked = fields | asked
    vllm_config = SimpleNamespace(
        lora_config=asked["lora_config"],
        additional_config=asked["additional_config"],
        model_config=SimpleNamespace(**asked),
        speculative_config=SimpleNamespace(method=asked["method"]) if "method" in asked else None,
    )
    monkeypatch.setattr(compat, "get_current_vllm_config_or_none", lambda: vllm_config)
    calibrated = config(calibration={"recipe": recipe} if recipe else {})
    linear = layer_of(compat.LinearBase, output_size=128, input_size=128)
    calibrated.get_quant_method(linear, f"draft_model.{ATTENTION}.o_proj")
    if not words:
        calibrated.get_quant_method(linear, f"{ATTENTION}.o_proj")
        return
    with pytest.raises(ValueError) as caught:
        calibrated.get_quant_method(linear, f"{ATTENTION}.o_proj")
    assert_one_line_with(caught, words)


def test_fused_parts_that_disagree():
    linear = layer_of(compat.LinearBase, output_size=256, input_size=128)
    with pytest.raises(FormatError, match="need one scheme"):
        config(ignore=(f"{ATTENTION}.k_proj",)).get_quant_method(linear, f"{ATTENTION}.qkv_proj")


def test_an_output_layer_must_be_ignored():
    with pytest.raises(FormatError, match="add 'lm_head' to 'ignore'"):
        config(ignore=()).get_quant_method(layer_of(compat.ParallelLMHead), "lm_head")


def test_exact_names_follow_the_names_of_the_served_model():
    mapper = SimpleNamespace(apply_list=lambda names: [f"language.{name}" for name in names])
    renamed = config(
        ignore=("lm_head", "re:.*x"),
        overrides=(Override("a.b", WeightScheme(2)),),
        online_hadamard=(OnlineHadamard("a.b", 64), OnlineHadamard("re:.*c", 32)),
        added_bias=("a.b", "re:.*d"),
    )
    renamed.apply_vllm_mapper(mapper)
    assert renamed.checkpoint.ignore == ("language.lm_head", "re:.*x")
    assert renamed.checkpoint.overrides[0].match == "language.a.b"
    assert [entry.match for entry in renamed.checkpoint.online_hadamard] == ["language.a.b", "re:.*c"]
    assert renamed.checkpoint.added_bias == ("language.a.b", "re:.*d")


@pytest.mark.parametrize(
    "part, fields",
    [
        ("o_proj", {"in_features": 64}),
        ("o_proj", {"out_features": 64}),
        ("k_proj", {"in_features": 64}),
        ("k_proj", {"out_features": 128}),
    ],
)
def test_a_config_of_another_model(tmp_path, part, fields):
    quantized = write_rtn_checkpoint(TINY_LLAMA, tmp_path / "model", WeightScheme(4))
    found = config()
    found.linears = dict(validate_checkpoint(quantized).linears)
    name = f"{ATTENTION}.{part}"
    found.linears[name] = replace(found.linears[name], **fields)
    fused, width = ("qkv_proj", 256) if part == "k_proj" else (part, 128)
    linear = layer_of(compat.LinearBase, output_size=width, input_size=128)
    with pytest.raises(FormatError, match=rf"{fused}: config.json describes \[{width}, 128\].*(64|320)"):
        found.get_quant_method(linear, f"{ATTENTION}.{fused}")
