"""Mixtures of experts calibrate like dense models: the function is kept, starved experts come through, names fit."""

import json
import logging
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.cells import Silent
from calibrate.errors import UserError
from calibrate.experts import counting, token_table
from calibrate.export import export
from calibrate.methods import compose
from calibrate.model import Model
from calibrate.pipeline import calibrate
from sliderquant_vllm.checkpoint import validate_checkpoint
from sliderquant_vllm.format import ActivationScheme, FormatError, WeightScheme
from sliderquant_vllm.packing import dequantize, unpack_linear
from sliderquant_vllm.shards import Reader
from tests.calibrate.models import write_random_model
from tests.calibrate.test_model import TOKENS, make, relative_change, run

CPU = torch.device("cpu")
FAMILIES = [
    ("qwen3_moe", {}),
    ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": True}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("mixtral", {}),
    ("qwen2_moe", {}),
]


def samples(count: int = 6, seqlen: int = 32) -> torch.Tensor:
    return torch.randint(0, 96, (count, seqlen), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=lambda value: str(value))
def test_rotation_and_scaling_preserve_the_function(tmp_path, family, changes, fused):
    directory = write_random_model(tmp_path / "model", family, fused, **changes)
    assert any(name.endswith("experts.down_proj") for name in make(directory).reader.headers) == fused
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(TOKENS).logits
    assert relative_change(run(make(directory)), reference) < 1e-6

    # Learned values far from their start; no linear is quantized, so only the scaling acts.
    model = make(
        directory,
        equalize="all",
        rotate=True,
        epochs=1,
        learn_scale=True,
        kv_bits=8,
        activations=ActivationScheme(4),
        ignore=("re:.*",),
    )

    def spread(block):
        block.kv_scheme = None
        for scale in block.scales.values():
            scale.uniform_(0.2, 5)

    scaled = run(model, ratio=1.0, change=spread)
    assert relative_change(run(model), reference) < 1e-5
    assert relative_change(scaled, reference) < 1e-5
    assert not torch.equal(scaled, reference)


@torch.no_grad()
def test_experts_do_as_those_of_transformers_and_count_their_tokens(tmp_path):
    directory = write_random_model(tmp_path / "model", "mixtral", num_local_experts=6)
    model = make(directory)
    ours = model.block(1).experts
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).model.layers[1].mlp.experts
    hidden, chosen = torch.randn(5, 96), torch.tensor([[0, 5], [5, 2], [2, 0], [5, 0], [0, 2]])
    weights = torch.rand(5, 2)
    with counting(ours):
        output = ours(hidden, chosen, weights)
    assert relative_change(output, theirs(hidden, chosen, weights)) < 1e-6
    assert ours.tokens.tolist() == [4, 0, 3, 0, 0, 3]
    ours(hidden, chosen, weights)
    assert ours.tokens.sum() == 10, "counts only when asked"


@torch.no_grad()
def test_tokens_are_quantized_once_for_all_experts(tmp_path):
    """The router reads what the norm gives, unquantized; the experts what each of them would quantize itself."""
    model = make(write_random_model(tmp_path / "model", "qwen3_moe"), activations=ActivationScheme(4))
    hidden, positions = model.embed(TOKENS), model.position_embeddings(TOKENS.shape[1])
    once, each = model.block(0), model.block(0)
    each.experts.quantize_input = None
    for path in each.layout.fused_experts[0]:
        each.linears[path].input_is_quantized = False
    seen = []
    once.linears["mlp.gate"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs = []
    for block in (once, each):
        block.prepare(1.0)
        outputs.append(block(hidden, positions))
    assert torch.equal(*outputs)
    assert len(seen[0][0].unique()) > 16


def without_tokens(directory, block: int, expert: int) -> None:
    """Change a router that chooses one expert so that it never takes this one: its logit is the mean of two others."""
    name = f"model.layers.{block}.mlp.gate.weight"
    for shard in directory.glob("*.safetensors"):
        if name in (tensors := load_file(shard)):
            tensors[name][expert] = tensors[name][[0, 1]].mean(0)
            save_file(tensors, shard)


@pytest.mark.parametrize(
    "recipe",
    [
        compose(WeightScheme(3), preset="fast"),
        compose(WeightScheme(4), ActivationScheme(4), preset="default", epochs=1),
        compose(WeightScheme(2), preset="best", epochs=1, end_to_end_epochs=1),
        compose(WeightScheme(3), method="d2quant"),
        compose(WeightScheme(3, 32), method="awq"),
        compose(WeightScheme(4), ActivationScheme(8), method="smoothquant"),
    ],
    ids=lambda recipe: f"{recipe.method}-W{recipe.weights.bits}",
)
def test_an_expert_without_tokens_warns_and_stays_finite(tmp_path, caplog, recipe):
    directory = write_random_model(tmp_path / "model", "qwen3_moe", num_experts_per_tok=1)
    without_tokens(directory, block=1, expert=3)
    model = Model(directory, replace(recipe, seqlen=32, nsamples=32), CPU)
    with caplog.at_level(logging.WARNING):
        calibrated = calibrate(model, samples(32), Silent())
    assert len([message for message in caplog.messages if "model.layers.1: 1 of 4 experts" in message]) == 1
    assert any(message.endswith("Experts (tokens): 3 (0)") for message in caplog.messages)
    assert all(value.isfinite().all() for state in calibrated.states.values() for value in state.values())
    tokens = calibrated.states[1]["layer.mlp.experts.tokens"]
    assert tokens[3] == 0 and tokens.sum() == 32 * 32
    row = token_table(calibrated.states).splitlines()[2 + 1]
    assert row.startswith("| 1 | 0 | ") and row.endswith("| 3 (0) |")
    block = calibrated.finished_block(model, 1)
    block.prepare(1.0)
    for path in ("mlp.experts.3.gate_proj", "mlp.experts.3.down_proj"):
        linear, in_scale = block.linears[path], block.channel_scales()[path][0]
        weight = linear.weight if in_scale is None else linear.weight * in_scale
        assert relative_change(linear.computed[0], weight) < {2: 0.6, 3: 0.3, 4: 0.15}[recipe.weights.bits]


def test_an_expert_that_gets_no_gradient_stays_at_its_start(tmp_path):
    directory = write_random_model(tmp_path / "model", "qwen3_moe", num_experts_per_tok=1)
    without_tokens(directory, block=1, expert=3)
    start = compose(WeightScheme(3), preset="fast", seqlen=32)
    learn = compose(WeightScheme(3), preset="default", seqlen=32, epochs=1)
    started, learned = (calibrate(Model(directory, recipe, CPU), samples(), Silent()) for recipe in (start, learn))
    for expert in range(4):
        name = f"layer.mlp.experts.{expert}.down_proj.offset"
        assert torch.equal(started.states[1][name], learned.states[1][name]) == (expert == 3)


def calibrate_and_export(model, output):
    model.check_schemes()
    calibrated = calibrate(model, samples(12), Silent())
    export(model, calibrated, output, False, {"model": "m", "data_sha256": ""})
    return calibrated


@torch.no_grad()
def served(directory) -> torch.Tensor:
    """Logits of transformers for a weight-only checkpoint, its linears dequantized in place."""
    linears, reader = validate_checkpoint(directory, data=True).linears, Reader(directory)
    tensors = {}
    for module, suffixes in reader.modules().items():
        held = {suffix: reader.tensor(f"{module}.{suffix}") for suffix in suffixes}
        if module in linears:
            scheme = linears[module].scheme.weights
            codes, scale, zero_point = unpack_linear(held, scheme)
            held = {"weight": dequantize(codes, scale.float(), zero_point, scheme)} | {
                suffix: value for suffix, value in held.items() if suffix == "bias"
            }
        tensors |= {f"{module}.{suffix}": value.contiguous() for suffix, value in held.items()}
    plain = directory.parent / "plain"
    plain.mkdir()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(TOKENS).logits


@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
@pytest.mark.parametrize(
    ("family", "weights", "changes"),
    [
        ("qwen3_moe", WeightScheme(4), {"decoder_sparse_step": 2}),
        ("mixtral", WeightScheme(4), {}),
        ("qwen2_moe", WeightScheme(3, 32), {}),
    ],
    ids=["qwen3_moe", "mixtral", "qwen2_moe"],
)
def test_checkpoints_have_the_names_of_the_hub_and_the_function_that_was_calibrated(
    tmp_path, family, weights, changes, fused
):
    hub = Reader(write_random_model(tmp_path / "hub", family, **changes)).headers
    directory = write_random_model(tmp_path / "model", family, fused, **changes)
    model = Model(directory, compose(weights, preset="fast", seqlen=32), CPU)
    output = tmp_path / "quantized"
    calibrated = calibrate_and_export(model, output)
    linears, written = validate_checkpoint(output).linears, Reader(output).headers
    assert {f"{name}.weight" for name in linears} == {
        name for name in hub if re.search(r"(_proj|w[123])\.weight", name)
    }
    assert set(hub) == {re.sub(r"\.weight_(packed|scale|zero_point|shape)$", ".weight", name) for name in written}

    def load(block):
        index = int(block.name.rpartition(".")[2])
        block.load_state(calibrated.states[index])

    # The median token: some take another expert, where the router's 16 bits decide what was almost a tie.
    expected, found = run(model, 1.0, load), served(output)
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.02


def test_only_dense_blocks_of_a_mixture_are_corrected(tmp_path):
    """A shift behind the norm would reach the router, which has no bias to take it up."""
    directory = write_random_model(tmp_path / "model", "qwen3_moe", mlp_only_layers=[1])
    output = tmp_path / "quantized"
    calibrate_and_export(Model(directory, compose(WeightScheme(3), method="d2quant", seqlen=32), CPU), output)
    corrected = {name for name, linear in validate_checkpoint(output).linears.items() if linear.scheme.added_bias}
    assert corrected == {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up")}


def test_one_pattern_names_all_experts(tmp_path):
    directory = write_random_model(tmp_path / "model", "mixtral")
    model = make(directory, rotate=True, online_hadamard=True, activations=ActivationScheme(4))
    model.bits = {f"model.layers.1.block_sparse_moe.experts.{number}.w2": 8 for number in range(4)}
    config = model.quantization_config()
    experts = r"\.block_sparse_moe\.experts\.\d+\.w2"
    assert config.ignore == ("lm_head", r"re:model\.layers\.\d+\.block_sparse_moe\.gate")
    (rotated,) = config.online_hadamard
    assert (rotated.match, rotated.block_size) == (rf"re:model\.layers\.\d+{experts}", 64)
    assert [each.match for each in config.overrides] == [rf"re:model\.layers\.1{experts}"]
    bits = [[scheme.weights.bits for scheme in model.schemes(index).values()] for index in (0, 1)]
    assert set(bits[0]) == {4} and sorted(bits[1]) == [4] * 12 + [8] * 4


@pytest.mark.parametrize(
    ("ignore", "words"),
    [
        (
            r"re:.*experts\.2\..*",
            r"layers\.0\.mlp\.experts: all experts run as one .* need one scheme, found mlp.experts.3",
        ),
        (r"re:.*experts\.\d+\.gate_proj", "experts.0.gate_up_proj: its parts run as one"),
    ],
)
def test_experts_of_a_block_have_one_scheme(tmp_path, ignore, words):
    directory = write_random_model(tmp_path / "model", "qwen3_moe")
    with pytest.raises(FormatError, match=words):
        make(directory, ignore=("lm_head", ignore)).check_schemes()


def test_experts_can_stay_in_16_bits(tmp_path):
    directory = write_random_model(tmp_path / "model", "qwen3_moe")
    ignore = ("lm_head", "re:.*experts.*")
    model = Model(directory, compose(WeightScheme(3), preset="fast", seqlen=32, ignore=ignore), CPU)
    model.check_schemes()
    calibrated = calibrate(model, samples(), Silent())
    codes, others = calibrated.finished_block(model, 0).quantized()
    assert set(codes) == {f"self_attn.{part}_proj" for part in "qkvo"}
    assert "mlp.experts.3.up_proj.weight" in others


def test_a_scheme_that_does_not_fit_names_the_experts_once(tmp_path):
    directory = write_random_model(tmp_path / "model", "qwen3_moe", moe_intermediate_size=96)
    words = r"mlp.experts.\*.down_proj \(group_size 64 does not divide its 96 input channels\) in blocks 0, 1, 2"
    with pytest.raises(UserError, match=words) as error:
        make(directory, weights=WeightScheme(4, 64), ignore=("lm_head", "re:.*(self_attn|gate|up).*")).check_schemes()
    assert str(error.value).count("down_proj") == 1


@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
def test_missing_and_misshapen_experts_are_refused_by_name(tmp_path, fused):
    directory = write_random_model(tmp_path / "model", "qwen3_moe", fused, num_hidden_layers=1)
    config = json.loads((directory / "config.json").read_text())
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    (directory / "config.json").write_text(json.dumps(config | {key: 5}))
    words = r"experts\.\w+_proj: expected shape \[5, " if fused else r"experts\.4\.\w+_proj\.weight is missing"
    with pytest.raises(UserError, match=words):
        make(directory)
