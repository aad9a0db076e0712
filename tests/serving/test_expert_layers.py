"""The routed experts of one block, without an engine: which scheme they get, what is refused, how ranks share them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.common import relative_error
from sliderquant_vllm import ops
from sliderquant_vllm.checkpoint import Linear
from sliderquant_vllm.format import (
    ActivationScheme,
    FormatError,
    LinearScheme,
    OnlineHadamard,
    Override,
    QuantizationConfig,
    WeightScheme,
)
from sliderquant_vllm.packing import dequantize, pack_linear
from tests.helpers import assert_one_line_with, round_to_nearest

pytest.importorskip("vllm")

from sliderquant_vllm import compat
from sliderquant_vllm.config import SliderQuantConfig
from sliderquant_vllm.moe import SliderQuantMoEMethod

PREFIX = "model.layers.0.mlp.experts"
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 4, 2, 64, 128
SIZES = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}


@pytest.fixture
def experts_of(monkeypatch):
    """``experts_of(scheme, ...)``: the routed experts that vLLM builds for one of ``ranks``."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    def build(
        weights: WeightScheme,
        activations=None,
        rank: int = 0,
        ranks: int = 1,
        expert_parallel: bool = False,
        dummy: bool = False,
        settings=None,
        change=lambda vllm_config: None,
        **fields,
    ):
        monkeypatch.setattr("vllm.model_executor.layers.fused_moe.config.get_tensor_model_parallel_rank", lambda: rank)
        vllm_config = VllmConfig()
        vllm_config.parallel_config.enable_expert_parallel = expert_parallel
        if dummy:
            vllm_config.load_config.load_format = "dummy"
        change(vllm_config)
        sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
        with set_current_vllm_config(vllm_config):
            runner = FusedMoEFactory(
                **sizes | (settings or {}),
                quant_config=SliderQuantConfig(QuantizationConfig(weights, activations, **fields)),
                tp_size=ranks,
                dp_size=1,
                pcp_size=1,
                prefix=PREFIX,
                params_dtype=torch.bfloat16,
            )
        return runner.routed_experts

    return build


def checkpoint(layer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(tensors of all experts by name within the layer, dequantized weight of each matrix)"""
    torch.manual_seed(0)
    tensors, dense = {}, {}
    for number in range(EXPERTS):
        for name, size in SIZES.items():
            scheme = layer.quant_method.schemes["w2" if name == "down_proj" else "w13"].weights
            codes, scale, zero_point = round_to_nearest(torch.randn(size), scheme)
            packed = pack_linear(codes, scale, zero_point, scheme)
            tensors |= {f"{number}.{name}.{suffix}": tensor for suffix, tensor in packed.items()}
            dense[f"{number}.{name}"] = dequantize(codes, scale, zero_point, scheme)
    return tensors, dense


def load(layer, tensors) -> None:
    for _ in layer.load_weights(tensors.items()):
        pass


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, topk_weights, topk_ids)"""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    weights, ids = scores.topk(TOP_K)
    return torch.randn(tokens, HIDDEN, generator=generator).bfloat16(), weights, ids.to(torch.int32)


def exact(dense, x, topk_weights, topk_ids) -> torch.Tensor:
    y = torch.zeros(x.shape)
    for token, (weights, ids) in enumerate(zip(topk_weights, topk_ids.tolist(), strict=True)):
        for weight, number in zip(weights, ids, strict=True):
            gate, up, down = (dense[f"{number}.{name}"] for name in SIZES)
            inner = torch.nn.functional.silu(gate @ x[token].float()) * (up @ x[token].float())
            y[token] += weight * (down @ inner)
    return y


SCHEMES = [
    {"weights": WeightScheme(4, 32)},
    {"weights": WeightScheme(3, symmetric=True)},
    {"weights": WeightScheme(2, 64), "overrides": (Override(r"re:.*down_proj", WeightScheme(8)),)},
    {"weights": WeightScheme(8), "activations": ActivationScheme(8)},
]


@pytest.mark.parametrize("tokens", [0, 1, 7, 100])
@pytest.mark.parametrize("fields", SCHEMES)
def test_against_the_dequantized_experts(experts_of, fields, tokens):
    layer = experts_of(**fields)
    tensors, dense = checkpoint(layer)
    load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    assert all(type(parameter) is torch.nn.Parameter for parameter in layer.parameters())
    inputs = routing(tokens)
    y = layer.quant_method.apply(layer, *inputs)
    assert y.dtype == torch.bfloat16 and y.shape == (tokens, HIDDEN)
    if tokens:
        assert relative_error(y, exact(dense, *inputs)) < (2e-2 if "activations" in fields else 6e-3)


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tensor", "expert"])
@pytest.mark.parametrize("fields", SCHEMES)
def test_ranks_add_up(experts_of, fields, expert_parallel):
    inputs, total = routing(9), 0
    for rank in range(2):
        layer = experts_of(**fields, rank=rank, ranks=2, expert_parallel=expert_parallel)
        assert layer.local_num_experts == (EXPERTS // 2 if expert_parallel else EXPERTS)
        tensors, dense = checkpoint(layer)
        load(layer, tensors)
        layer.quant_method.process_weights_after_loading(layer)
        total = total + layer.quant_method.apply(layer, *inputs).float()
    assert relative_error(total, exact(dense, *inputs)) < (2e-2 if "activations" in fields else 6e-3)


def test_ranks_that_end_between_groups(experts_of):
    with pytest.raises(FormatError) as caught:
        experts_of(WeightScheme(4, 128), ranks=2, ignore=(), settings={"hidden_size": 128})
    words = [PREFIX, "down_proj [128, 128] (W4A16 group 128 asymmetric)", "over tensor_parallel_size 2"]
    assert_one_line_with(caught, [*words, "[128, 64]", "group_size 128", "a smaller", "--enable-expert-parallel"])


def expert_layer(**fields) -> tuple[SliderQuantConfig, torch.nn.Module]:
    """A config, and a layer that vLLM has only begun to build."""
    layer = compat.RoutedExperts.__new__(compat.RoutedExperts)
    torch.nn.Module.__init__(layer)
    names = {"ckpt_gate_proj_name": "gate_proj", "ckpt_up_proj_name": "up_proj", "ckpt_down_proj_name": "down_proj"}
    layer.__dict__.update(names, moe_config=SimpleNamespace(num_logical_experts=EXPERTS))
    return SliderQuantConfig(QuantizationConfig(WeightScheme(4), **fields)), layer


def test_schemes_of_experts():
    down = Override(r"re:.*experts\.\d+\.down_proj", WeightScheme(8))
    config, layer = expert_layer(overrides=(down,), online_hadamard=(OnlineHadamard(down.match, 64),))
    method = config.get_quant_method(layer, PREFIX)
    assert isinstance(method, SliderQuantMoEMethod)
    expected = {"w13": LinearScheme(WeightScheme(4)), "w2": LinearScheme(WeightScheme(8), hadamard_block_size=64)}
    assert method.schemes == expected


@pytest.mark.parametrize("ignored", [r"re:.*\.experts\..*", r"re:model\.layers\.0\..*"])
def test_experts_that_stay_in_16_bits(ignored):
    config, layer = expert_layer(ignore=(ignored,))
    assert config.get_quant_method(layer, PREFIX) is None


DISAGREEING = {
    "one expert in 16 bits": (
        {"ignore": (r"re:.*experts\.2\..*",)},
        [f"and 3 others: W4A16 asymmetric, but {PREFIX}.2.gate_proj, {PREFIX}.2.up_proj: 16-bit; make", "'ignore'"],
    ),
    "the first one in 16 bits": ({"ignore": (r"re:.*experts\.0\..*",)}, ["0.up_proj: 16-bit, but", "W4A16"]),
    "other bits": (
        {"overrides": (Override(f"{PREFIX}.3.down_proj", WeightScheme(8)),)},
        ["2.down_proj: W4A16 asymmetric", "3.down_proj: W8A16 asymmetric", "'overrides'"],
    ),
    "one rotated": (
        {"online_hadamard": (OnlineHadamard(f"{PREFIX}.1.up_proj", 32),)},
        ["1.up_proj: W4A16 asymmetric, Hadamard 32", "'online_hadamard'"],
    ),
    "downs in 16 bits": ({"ignore": (r"re:.*down_proj",)}, ["down_proj: 16-bit", "all matrices", "'ignore'"]),
    "added bias": ({"added_bias": (r"re:.*experts.*",)}, ["without an added bias", "quantize the model again"]),
}


@pytest.mark.parametrize("fields, words", DISAGREEING.values(), ids=DISAGREEING)
def test_experts_that_disagree(fields, words):
    config, layer = expert_layer(**fields)
    with pytest.raises(FormatError) as caught:
        config.get_quant_method(layer, PREFIX)
    assert_one_line_with(caught, [PREFIX, *words])


def test_an_older_vllm(monkeypatch):
    monkeypatch.setattr(compat, "SERVES_EXPERTS", False)
    config, layer = expert_layer()
    with pytest.raises(FormatError, match=rf"{PREFIX}: quantized experts need vLLM 0.32.*'ignore'"):
        config.get_quant_method(layer, PREFIX)
    config, layer = expert_layer(ignore=(r"re:.*\.experts\..*",))
    assert config.get_quant_method(layer, PREFIX) is None


def test_more_experts_than_the_config_describes():
    config, layer = expert_layer()
    config.linears = {f"{PREFIX}.{EXPERTS}.up_proj": Linear(LinearScheme(WeightScheme(4)), 32, 32, 0)}
    with pytest.raises(FormatError, match=rf"experts: config.json describes 4 experts.*{PREFIX}\.4\.up_proj; put"):
        config.get_quant_method(layer, PREFIX)


def test_int8_activations_need_scales_per_channel(experts_of, monkeypatch):
    monkeypatch.setattr(compat, "serving_options", lambda: compat.OPTIONS | {"int8_activations": True})
    layer = experts_of(WeightScheme(4))
    assert {scheme.activations for scheme in layer.quant_method.schemes.values()} == {ActivationScheme(8)}
    with pytest.raises(ValueError, match=rf"int8_activations: {PREFIX}.*group_size.*--group-size -1"):
        experts_of(WeightScheme(4, 32))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"activation": "swigluoai"}, ["one of the activations silu, gelu, gelu_tanh", "found swigluoai"]),
        ({"swiglu_limit": 7.0}, ["silu with limit 7.0"]),
        ({"has_bias": True}, ["whose experts have no bias"]),
        ({"apply_router_weight_on_input": True, "top_k": 1}, ["router weights", "on their input"]),
    ],
)
def test_architectures_that_are_not_served(experts_of, settings, words):
    with pytest.raises(FormatError) as caught:
        experts_of(WeightScheme(4), settings=settings)
    assert_one_line_with(caught, [PREFIX, *words, "add 're:.*\\.experts\\..*' to 'ignore'"])


def with_lora(*target_modules: str):
    def change(vllm_config):
        from vllm.config.lora import LoRAConfig

        vllm_config.lora_config = LoRAConfig(target_modules=list(target_modules) or None)

    return change


def with_all2all(backend: str):
    return lambda vllm_config: setattr(vllm_config.parallel_config, "all2all_backend", backend)


@pytest.mark.parametrize(
    "change, words",
    [
        (with_lora(), ["--enable-lora; serve without it", "--lora-target-modules"]),
        (with_lora("o_proj", "experts"), ["--enable-lora"]),
        (with_all2all("passthrough"), ["expected --all2all-backend allgather_reducescatter, found passthrough; serve"]),
    ],
    ids=["adapters", "adapters of experts", "all2all"],
)
def test_flags_that_are_not_served(experts_of, change, words):
    with pytest.raises(FormatError) as caught:
        experts_of(WeightScheme(4), change=change, ranks=2, expert_parallel=True)
    assert_one_line_with(caught, [PREFIX, *words])
    assert "ignore" not in str(caught.value)


def test_adapters_of_other_modules(experts_of):
    experts_of(WeightScheme(4), change=with_lora("o_proj"))


@pytest.mark.parametrize("mode, refused", [("FULL_AND_PIECEWISE", True), ("PIECEWISE", True), ("NONE", False)])
def test_graphs_without_native_kernels(experts_of, monkeypatch, mode, refused):
    from vllm.config import CUDAGraphMode

    monkeypatch.setattr(compat, "current_platform", SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True))
    monkeypatch.setattr(ops, "is_native", lambda device: device != "cuda")

    def change(vllm_config):
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode[mode]

    if not refused:
        experts_of(WeightScheme(4), change=change)
        return
    with pytest.raises(FormatError) as caught:
        experts_of(WeightScheme(4), change=change)
    assert_one_line_with(caught, [PREFIX, "CUDA graphs; serve with --enforce-eager, or build the kernels"])


def test_padded_experts_are_refused(experts_of, monkeypatch):
    monkeypatch.setattr(SliderQuantMoEMethod, "maybe_roundup_sizes", lambda method, hidden, inner, *others: (96, inner))
    with pytest.raises(FormatError, match=rf"{PREFIX}: expected experts as wide as the model, found 64 .* to 96; add"):
        experts_of(WeightScheme(4))


def test_other_devices_are_refused(experts_of, monkeypatch):
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_name="xpu")
    monkeypatch.setattr(compat, "current_platform", platform)
    with pytest.raises(FormatError, match=rf"{PREFIX}: quantized experts are served on CPUs and CUDA GPUs, found xpu"):
        experts_of(WeightScheme(4))


@pytest.mark.parametrize("name", ["2.up_proj.weight_packed", "3.down_proj.weight_zero_point"])
def test_a_tensor_that_is_not_in_the_checkpoint(experts_of, name):
    layer = experts_of(WeightScheme(4))
    tensors, _ = checkpoint(layer)
    del tensors[name]
    load(layer, tensors)
    with pytest.raises(FormatError) as caught:
        layer.quant_method.process_weights_after_loading(layer)
    assert_one_line_with(caught, [f"{PREFIX}.{name}: expected a tensor", "found none", "python -m sliderquant_vllm"])


def test_scales_that_are_not_finite(experts_of):
    layer = experts_of(WeightScheme(4))
    tensors, _ = checkpoint(layer)
    tensors["2.up_proj.weight_scale"][5] = torch.nan
    load(layer, tensors)
    with pytest.raises(FormatError, match=rf"{PREFIX}\.2: expected finite .* weight_scale of gate_proj and up_proj"):
        layer.quant_method.process_weights_after_loading(layer)


def test_tensors_of_another_size(experts_of):
    layer = experts_of(WeightScheme(4), settings={"intermediate_size": 2 * INTERMEDIATE})
    tensors, _ = checkpoint(layer)
    with pytest.raises(FormatError) as caught:
        load(layer, tensors)
    words = [f"{PREFIX}.0.gate_proj.weight_packed: config.json describes [256, 8], the checkpoint holds [128, 8]"]
    assert_one_line_with(caught, [*words, "put the config.json beside it"])


def test_random_weights_need_no_checkpoint(experts_of):
    layer = experts_of(WeightScheme(4), dummy=True)
    layer.quant_method.process_weights_after_loading(layer)


def reload(layer, tensors) -> None:
    """Load anew as vLLM does."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(layer)
    load(layer, tensors)
    finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.bfloat16))


@pytest.mark.parametrize("fields", SCHEMES)
def test_weights_can_be_loaded_anew(experts_of, fields):
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    layer = experts_of(**fields)
    record_metadata_for_reloading(layer)
    tensors, dense = checkpoint(layer)
    load(layer, tensors | {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if "packed" in name})
    layer.quant_method.process_weights_after_loading(layer)
    served = layer.w13_weight_packed
    reload(layer, tensors)
    assert layer.w13_weight_packed is served
    inputs = routing(5)
    assert relative_error(layer.quant_method.apply(layer, *inputs), exact(dense, *inputs)) < 2e-2


@pytest.mark.parametrize("dummy", [False, True], ids=["loaded", "dummy"])
def test_a_tensor_that_is_missing_when_weights_are_loaded_anew(experts_of, dummy):
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    layer = experts_of(WeightScheme(4), dummy=dummy)
    record_metadata_for_reloading(layer)
    tensors, _ = checkpoint(layer)
    if not dummy:
        load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    reload(layer, tensors)
    name = "2.up_proj.weight_scale"
    del tensors[name]
    with pytest.raises(FormatError, match=rf"{PREFIX}\.{name}: expected a tensor in the checkpoint, found none"):
        reload(layer, tensors)
