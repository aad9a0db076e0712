"""The linear method: loading, splitting and loading anew, without an engine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common import relative_error
from sliderquant_vllm import references
from sliderquant_vllm.checkpoint import Linear
from sliderquant_vllm.format import (
    ActivationScheme,
    FormatError,
    LinearScheme,
    OnlineHadamard,
    QuantizationConfig,
    WeightScheme,
)
from sliderquant_vllm.packing import dequantize, pack_linear
from tests.helpers import assert_one_line_with, round_to_nearest

pytest.importorskip("vllm")

from sliderquant_vllm.config import SliderQuantConfig
from sliderquant_vllm.linear import SliderQuantLinearMethod

ATTENTION = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    "scheme, rank_inputs, inputs, rank_outputs, words",
    [
        (WeightScheme(4, 128), 64, 128, [128], ["group_size 128", "64 input channels", "tensor_parallel_size 1"]),
        (WeightScheme(3), 80, 160, [128], ["80 input channels", "multiple of 32", "tensor_parallel_size 1 or 5"]),
        (WeightScheme(4), 128, 128, [128, 4, 4], ["part 1", "4 zero points of 4 bits", "a smaller"]),
        (
            LinearScheme(WeightScheme(4), hadamard_block_size=128),
            192,
            384,
            [128],
            ["(W4A16 asymmetric, Hadamard 128)", "block_size 128", "192 input", "with tensor_parallel_size 1 or 3"],
        ),
    ],
    ids=str,
)
def test_ranks_that_end_between_words_groups_or_blocks(scheme, rank_inputs, inputs, rank_outputs, words):
    scheme = LinearScheme(scheme) if isinstance(scheme, WeightScheme) else scheme
    method = SliderQuantLinearMethod(scheme, f"{ATTENTION}.o_proj")
    with pytest.raises(FormatError) as caught:
        method.create_weights(SimpleNamespace(tp_size=2), rank_inputs, rank_outputs, inputs, 128, torch.bfloat16)
    expected = [f"{ATTENTION}.o_proj", "over tensor_parallel_size 2", f"[128, {inputs}]", "serve with", *words]
    assert_one_line_with(caught, expected)


@pytest.fixture
def as_rank(monkeypatch):
    """``as_rank(rank, size)``: layers are built for this one of so many ranks."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    def become(rank: int, size: int) -> None:
        for module in (parameter, linear):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    return become


@pytest.fixture
def single_rank(as_rank):
    from vllm.config import VllmConfig, set_current_vllm_config

    as_rank(0, 1)
    vllm_config = VllmConfig()
    with set_current_vllm_config(vllm_config):
        yield vllm_config


def qkv_layer(scheme: WeightScheme, bias: bool = False, linears: dict[str, Linear] | None = None, **fields):
    from vllm.model_executor.layers.linear import QKVParallelLinear

    quantization = SliderQuantConfig(QuantizationConfig(scheme, **fields))
    quantization.linears = linears or {}
    return QKVParallelLinear(64, 32, 2, 1, bias=bias, quant_config=quantization, prefix=f"{ATTENTION}.qkv_proj")


def load(layer, scheme: WeightScheme, without: tuple[str, str] | None = None, change=lambda tensors: None):
    """Give a layer what a checkpoint holds, as vLLM does; returns the dequantized weight, its bias of any kind last."""
    dense = []
    for part, rows in (("q", 64), ("k", 32), ("v", 32)):
        codes, scale, zero_point = round_to_nearest(torch.randn(rows, 64), scheme)
        tensors = pack_linear(codes, scale, zero_point, scheme)
        biases = {name: torch.randn(rows) for name in ("bias", "added_bias") if getattr(layer, name, None) is not None}
        bias = sum(biases.values(), torch.zeros(rows))
        dense.append(torch.cat((dequantize(codes, scale, zero_point, scheme), bias[:, None]), 1))
        tensors |= biases
        change(tensors)
        for name, tensor in tensors.items():
            if (part, name) != without and hasattr(layer, name):
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, tensor, part)
    return torch.cat(dense)


def with_ones(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x.float(), (0, 1), value=1.0)


@pytest.mark.parametrize("scheme", [WeightScheme(4, 32), WeightScheme(3, symmetric=True)], ids=str)
def test_loaded_tensors_become_kernel_tensors_of_the_same_name(single_rank, scheme):
    layer = qkv_layer(scheme)
    dense = load(layer, scheme)
    layer.quant_method.process_weights_after_loading(layer)
    assert all(type(parameter) is torch.nn.Parameter for parameter in layer.parameters())
    assert {"weight_packed", "weight_scale"} <= dict(layer.named_parameters()).keys()
    x = torch.randn(5, 64).to(torch.bfloat16)
    assert relative_error(layer.quant_method.apply(layer, x), with_ones(x) @ dense.T) < 5e-3


@pytest.mark.parametrize("rank", [0, 1])
def test_an_added_bias_is_split_as_its_part_is(single_rank, as_rank, rank):
    as_rank(rank, 2)
    scheme = WeightScheme(4)
    layer = qkv_layer(scheme, added_bias=(f"re:{ATTENTION}.*",))
    dense = load(layer, scheme)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, 64).to(torch.bfloat16)
    # One of the two query heads each, and both the only key and value head.
    mine = torch.cat((dense[32 * rank : 32 * rank + 32], dense[64:]))
    assert relative_error(layer.quant_method.apply(layer, x), with_ones(x) @ mine.T) < 5e-3


@pytest.mark.parametrize("activations", [None, ActivationScheme(8)], ids=["A16", "A8"])
def test_ranks_that_split_inputs_rotate_their_own_and_add_the_bias_once(single_rank, as_rank, activations):
    from vllm.model_executor.layers.linear import RowParallelLinear

    scheme, name = WeightScheme(4), f"{ATTENTION}.o_proj"
    codes, scale, zero_point = round_to_nearest(torch.randn(64, 192), scheme)
    bias, x = torch.randn(64) * 30, torch.randn(5, 192).to(torch.bfloat16)
    quantization = QuantizationConfig(scheme, activations, (OnlineHadamard(name, 32),), (name,))
    total = 0
    for rank in range(2):
        as_rank(rank, 2)
        layer = RowParallelLinear(192, 64, bias=False, quant_config=SliderQuantConfig(quantization), prefix=name)
        for key, tensor in (pack_linear(codes, scale, zero_point, scheme) | {"added_bias": bias}).items():
            parameter = getattr(layer, key)
            parameter.weight_loader(parameter, tensor)
        layer.quant_method.process_weights_after_loading(layer)
        total += layer.quant_method.apply(layer, x[:, 96 * rank : 96 * rank + 96]).float()
    rotated = references.hadamard(x.float(), 32)
    expected = rotated @ dequantize(codes, scale, zero_point, scheme).T + bias
    assert relative_error(total, expected) < 5e-3


HELD = {f"{ATTENTION}.{part}": Linear(LinearScheme(WeightScheme(4)), 64, 64, 0) for part in ("q_proj", "k_proj")}
BIASED = {name: replace(linear, has_bias=True) for name, linear in HELD.items()}


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"linears": BIASED}, ["q_proj.bias", "has no bias here", "found one", "added_bias"]),
        ({"linears": HELD, "bias": True}, ["q_proj.bias", "has a bias here", "found none"]),
        ({"bias": True, "added_bias": ("re:.*",)}, ["qkv_proj.added_bias", "only where", "found one", "'bias'"]),
    ],
)
def test_biases_that_the_architecture_and_the_checkpoint_see_differently(single_rank, arguments, words):
    scheme = WeightScheme(4)
    layer = qkv_layer(scheme, **arguments)
    load(layer, scheme)
    with pytest.raises(FormatError) as caught:
        layer.quant_method.process_weights_after_loading(layer)
    assert_one_line_with(caught, [ATTENTION, *words])


@pytest.mark.parametrize("part, described, rows, inputs", [("k", 32, 64, 64), ("q", 64, 96, 64), ("v", 32, 32, 128)])
def test_tensors_of_another_size_without_headers(single_rank, part, described, rows, inputs):
    layer, scheme = qkv_layer(WeightScheme(4)), WeightScheme(4)
    packed = pack_linear(*round_to_nearest(torch.randn(rows, inputs), scheme), scheme)["weight_packed"]
    found = rf"qkv_proj, part {part}: config.json describes \[{described}, 64\], .* holds \[{rows}, {inputs}\]; put"
    with pytest.raises(FormatError, match=found):
        layer.weight_packed.weight_loader(layer.weight_packed, packed, part)


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_zero_point", "added_bias"])
def test_a_part_that_is_not_in_the_checkpoint(single_rank, name):
    scheme = WeightScheme(4)
    layer = qkv_layer(scheme, added_bias=("re:.*",))
    load(layer, scheme, without=("k", name))
    found = rf"qkv_proj\.{name}: expected the tensors of 3 parts.*found only q, v; .*python -m sliderquant_vllm"
    with pytest.raises(FormatError, match=found):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("name", ["weight_scale", "added_bias"])
def test_numbers_that_are_not_finite(single_rank, name):
    scheme = WeightScheme(4)
    layer = qkv_layer(scheme, added_bias=("re:.*",))
    load(layer, scheme, change=lambda tensors: tensors[name][0].fill_(torch.nan))
    with pytest.raises(FormatError, match=rf"qkv_proj\.{name}: expected finite.*python -m sliderquant_vllm"):
        layer.quant_method.process_weights_after_loading(layer)


def test_random_weights_need_no_checkpoint(single_rank):
    from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

    scheme = WeightScheme(4)
    with pytest.raises(FormatError, match=r"found none"):
        layer = qkv_layer(scheme)
        layer.quant_method.process_weights_after_loading(layer)
    single_rank.load_config.load_format = "dummy"
    layer = qkv_layer(scheme)
    for parameter in layer.parameters():
        initialize_single_dummy_weight(parameter)
    layer.quant_method.process_weights_after_loading(layer)


def reload(layer, give) -> None:
    """Load anew as vLLM does what ``give`` gives."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(layer)
    give()
    finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "scheme, fields",
    [
        (WeightScheme(4), {}),
        (WeightScheme(4, symmetric=True), {}),
        (WeightScheme(4), {"added_bias": ("re:.*",), "activations": ActivationScheme(8)}),
        (WeightScheme(4), {"bias": True}),
    ],
    ids=["asymmetric", "symmetric", "added bias", "bias"],
)
def test_weights_can_be_loaded_anew(single_rank, scheme, fields):
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    layer = qkv_layer(scheme, **fields)
    record_metadata_for_reloading(layer)
    load(layer, scheme)
    layer.quant_method.process_weights_after_loading(layer)
    served, dense = layer.weight_packed, []
    reload(layer, lambda: dense.append(load(layer, scheme)))
    assert layer.weight_packed is served
    x = torch.randn(5, 64).to(torch.bfloat16)
    assert relative_error(layer.quant_method.apply(layer, x, layer.bias), with_ones(x) @ dense[0].T) < 1e-2


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_part_that_is_missing_when_weights_are_loaded_anew(single_rank, load_format, name):
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    single_rank.load_config.load_format = load_format
    scheme = WeightScheme(4)
    layer = qkv_layer(scheme)
    record_metadata_for_reloading(layer)
    if load_format == "auto":
        load(layer, scheme)
    layer.quant_method.process_weights_after_loading(layer)
    reload(layer, lambda: load(layer, scheme))
    with pytest.raises(FormatError, match=rf"qkv_proj\.{name}: expected the tensors of 3 parts.*found only q, v; "):
        reload(layer, lambda: load(layer, scheme, without=("k", name)))
