"""Every transform leaves the 16-bit function as it was; every damaged model is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import calibrate.model
from calibrate import transforms
from calibrate.errors import UserError
from calibrate.hub import resolve_model
from calibrate.model import EMBEDDING, HEAD, NORM, Model
from calibrate.recipe import Recipe
from sliderquant_vllm.format import ActivationScheme, FormatError, WeightScheme
from tests.calibrate.models import write_random_model

FAMILIES = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {}),
]
TOKENS = torch.arange(2 * 24).view(2, 24) * 7 % 96


def make(directory, **recipe) -> Model:
    settings = {"weights": WeightScheme(4), "seqlen": 24} | recipe
    return Model(directory, Recipe(**settings), torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # with and without an odd factor in the hidden size
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_rotated_in_pieces_to_the_same_bits(tmp_path, monkeypatch, family, tied):
    model = make(write_random_model(tmp_path / "model", family, tie_word_embeddings=tied), rotate=True)
    found, fold = [], transforms.fold_norm
    for module in (transforms, calibrate.model):
        monkeypatch.setattr(module, "CHUNK", 20 * model.config.hidden_size)
    whole = model.stream.apply(fold(model.read(NORM), model.read(EMBEDDING if tied else HEAD)))

    def counted(norm, rows):
        found.append(len(rows))
        return fold(norm, rows)

    monkeypatch.setattr(calibrate.model, "fold_norm", counted)
    norm, head = model.head_module()
    assert torch.equal(head.weight, whole) and torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert found == [20, 20, 20, 20, 16]


@torch.no_grad()
def run(model: Model, ratio: float | None = None, change=lambda block: None) -> torch.Tensor:
    hidden = model.embed(TOKENS)
    for index in range(model.blocks):
        block = model.block(index)
        change(block)
        if ratio is not None:
            block.prepare(ratio)
        hidden = block(hidden, model.position_embeddings(TOKENS.shape[1]))
    return model.head_module()(hidden)


def relative_change(output: torch.Tensor, reference: torch.Tensor) -> float:
    return ((output.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=lambda value: str(value))
def test_streaming_rotation_and_scaling_preserve_the_function(tmp_path, family, changes):
    directory = write_random_model(tmp_path / "model", family, **changes)
    assert len(list(directory.glob("*.safetensors"))) > 1
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(TOKENS).logits
    assert relative_change(run(make(directory)), reference) < 2e-6

    # Learned values far from their start; no linear is quantized, so only the scaling acts.
    everything = ("re:.*",)
    model = make(
        directory,
        equalize="all",
        rotate=True,
        kv_bits=4,
        epochs=1,
        learn_scale=True,
        activations=ActivationScheme(4),
        ignore=everything,
        lora_rank=0,
    )

    def spread(block):
        assert "query_key" in block.scales
        block.kv_scheme = None  # only the scale in front of the cache, not its rounding
        for scale in block.scales.values():
            scale.uniform_(0.2, 5)

    scaled = run(model, ratio=1.0, change=spread)
    assert relative_change(run(model), reference) < 1e-5
    assert relative_change(scaled, reference) < 1e-5
    assert not torch.equal(scaled, reference)


def test_folded_gains_make_the_served_norm_exact(tmp_path):
    model = make(write_random_model(tmp_path / "model", "llama"), scale_start="awq")
    block = model.block(0)
    with torch.no_grad():
        block.scales["attention_norm"].uniform_(0.5, 2)
    block.fold_gains(torch.bfloat16)
    _, others = block.quantized()
    norm = others["input_layernorm.weight"]
    assert torch.equal(norm, norm.bfloat16().float())


def test_unquantized_linears_are_exported_as_they_are(tmp_path):
    directory = write_random_model(tmp_path / "model", "qwen2")
    model = make(directory, ignore=("lm_head", "re:.*down_proj"))
    codes, others = model.block(1).quantized()
    assert "mlp.down_proj" not in codes and "mlp.up_proj" in codes
    assert torch.equal(others["mlp.down_proj.weight"], model.read("model.layers.1.mlp.down_proj.weight"))
    assert torch.equal(others["self_attn.q_proj.bias"], model.read("model.layers.1.self_attn.q_proj.bias"))
    expected = {f"model.layers.1.{name}" for name in others} | {f"model.layers.1.{path}.weight" for path in codes}
    assert expected == {name for name in model.reader.headers if name.startswith("model.layers.1.")}


def test_ignoring_one_part_of_a_fused_module_is_refused(tmp_path):
    directory = write_random_model(tmp_path / "model", "llama")
    with pytest.raises(FormatError, match=r"qkv_proj.*one scheme"):
        make(directory, ignore=("re:.*q_proj",)).check_schemes()


@pytest.mark.parametrize(
    ("ignore", "words"),
    [("down_proj", "matches no linear; they are named like model.layers.0"), ("re:.*", "leaves no")],
)
def test_patterns_that_cannot_be_meant_are_refused(tmp_path, ignore, words):
    directory = write_random_model(tmp_path / "model", "llama")
    with pytest.raises(UserError, match=words):
        make(directory, ignore=("lm_head", ignore)).check_schemes()


def test_limits_of_the_model_are_named(tmp_path):
    directory = write_random_model(tmp_path / "model", "llama")
    with pytest.raises(UserError, match="--seqlen 512: beyond the 256 positions"):
        make(directory, seqlen=512)
    with pytest.raises(UserError, match="gives token 96, its embedding has 96"):
        make(directory).embed(torch.tensor([[96]]))


def test_group_size_that_does_not_divide_names_the_layers(tmp_path):
    directory = write_random_model(tmp_path / "model", "llama")
    with pytest.raises(UserError, match=r"mlp.down_proj \(group_size 64 does not divide its 160.*blocks 0, 1, 2"):
        make(directory, weights=WeightScheme(4, 64)).check_schemes()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("shape", r"up_proj.weight: expected shape \[160, 96\].*found \[96, 160\]"),
        ("dtype", "up_proj.weight: expected bf16, fp16 or fp32, found torch.int32"),
        ("missing", "up_proj.weight is missing"),
        ("truncated", r"model.safetensors: .*truncated or damaged"),
        ("nan", "up_proj.weight: found NaN or infinite weights"),
        ("quantized", "already quantized"),
        ("family", "model_type 'gpt2' is not supported"),
        ("config", "config.json cannot be read"),
        ("type", "config.json cannot be read"),
        ("activation", "no model can be made from config.json"),
        ("no blocks", "no model can be made from config.json"),
        ("no weights", "shard is missing"),
    ],
)
def test_damaged_models_are_refused_by_name(tmp_path, damage, words):
    directory = write_random_model(tmp_path / "model", "llama", num_hidden_layers=1)
    tensors = {}
    for shard in directory.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (directory / "model.safetensors.index.json").unlink()
    weights, config_file = directory / "model.safetensors", directory / "config.json"
    config = json.loads(config_file.read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    if damage == "shape":
        tensors[name] = tensors[name].T.contiguous()
    elif damage == "dtype":
        tensors[name] = tensors[name].int()
    elif damage == "missing":
        del tensors[name]
    elif damage == "nan":
        tensors[name][3, 4] = torch.nan
    elif damage == "quantized":
        config["quantization_config"] = {"quant_method": "awq"}
    elif damage in ("family", "type", "activation", "no blocks"):
        config |= {
            "family": {"model_type": "gpt2"},
            "type": {"hidden_size": "big"},
            "activation": {"hidden_act": "nonsense"},
            "no blocks": {"num_hidden_layers": 0},
        }[damage]
    save_file(tensors, weights)
    config_file.write_text("{" if damage == "config" else json.dumps(config))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    with pytest.raises((UserError, FormatError), match=words) as error:
        make(directory).block(0)
    assert "\n" not in str(error.value)


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="without config.json"):
        resolve_model(str(tmp_path))
