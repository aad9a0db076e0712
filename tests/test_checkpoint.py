"""Checkpoint directories: every way in which one can be broken, and the command line that finds it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sliderquant_vllm import shards
from sliderquant_vllm.__main__ import main
from sliderquant_vllm.checkpoint import read_config, validate_checkpoint
from sliderquant_vllm.format import FormatError, OnlineHadamard, Override, WeightScheme
from sliderquant_vllm.shards import INDEX_FILE, Reader
from tests.helpers import TINY_LLAMA, edit_config, write_dequantized, write_random_model, write_rtn_checkpoint

MLP = "model.layers.5.mlp"
DOWN = f"{MLP}.down_proj"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """W4 per channel, asymmetric; down_proj W3 in groups of 128, rotated, with a bias; in several shards."""
    return write_rtn_checkpoint(
        TINY_LLAMA,
        tmp_path_factory.mktemp("checkpoint") / "pristine",
        WeightScheme(4),
        overrides=(Override("re:.*down_proj", WeightScheme(3, 128)),),
        online_hadamard=(OnlineHadamard("re:.*down_proj", 128),),
        added_bias=("re:.*down_proj",),
        max_shard_bytes=10**6,
    )


@pytest.fixture
def checkpoint(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def index_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / INDEX_FILE).read_text())


def shard_of(checkpoint: Path, name: str) -> Path:
    return checkpoint / index_of(checkpoint)["weight_map"][name]


def edit_index(checkpoint: Path, edit) -> None:
    index = index_of(checkpoint)
    edit(index)
    (checkpoint / INDEX_FILE).write_text(json.dumps(index))


def edit_tensors(checkpoint: Path, name: str, edit, indexed: bool = True) -> None:
    """Apply ``edit`` to the tensors of the shard that holds ``name``; the index is kept true on request."""
    shard = shard_of(checkpoint, name)
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard)

    def update(index):
        held = {key: file for key, file in index["weight_map"].items() if file != shard.name}
        index["weight_map"] = held | dict.fromkeys(tensors, shard.name)
        del index["metadata"]["sha256"]

    if indexed:
        edit_index(checkpoint, update)


def error_of(checkpoint: Path, data: bool = False) -> str:
    with pytest.raises(FormatError) as caught:
        validate_checkpoint(checkpoint, data=data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_error(checkpoint: Path, *words: str, data: bool = False) -> None:
    message = error_of(checkpoint, data)
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"


@pytest.mark.parametrize("data", [False, True])
def test_a_sound_checkpoint(pristine, data):
    summary = validate_checkpoint(pristine, data=data)
    assert len(summary.linears) == 12 * 7
    assert str(summary.linears[DOWN].scheme) == "W3A16 group 128 asymmetric, Hadamard 128, added bias"
    assert not summary.linears[DOWN].has_bias
    assert (summary.linears[DOWN].out_features, summary.linears[DOWN].in_features) == (128, 384)
    assert len(index_of(pristine)["metadata"]["sha256"]) > 2


def test_no_file_is_opened_for_each_of_its_tensors(pristine, monkeypatch):
    opened = []
    monkeypatch.setattr(shards, "safe_open", lambda path, **named: opened.append(path) or safe_open(path, **named))
    validate_checkpoint(pristine, data=True)
    # For its header, the sizes of its linears, their scales and biases.
    assert len(opened) <= 4 * len(set(opened))


def test_the_quantized_numbers_are_those_of_the_format(pristine, tmp_path):
    original, dequantized = Reader(TINY_LLAMA), Reader(write_dequantized(pristine, tmp_path / "16bit"))
    assert set(original.headers) == {name for name in dequantized.headers if not name.endswith("down_proj.bias")}
    for name in original.headers:
        before, after = original.tensor(name).float(), dequantized.tensor(name).float()
        error = (after - before).norm() / before.norm()
        assert error == 0 if "proj" not in name else 0.02 < error < 0.35, name


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["config.json", "cannot be read", "check the path"]),
        ("{", ["config.json", "JSON", "copy"]),
        ("[]", ["config.json", "object", "list"]),
        ("{}", ["config.json", "quantization_config", "python -m calibrate"]),
        ('{"quantization_config": {"quant_method": "awq"}}', ["config.json", "sliderquant", "awq"]),
    ],
)
def test_broken_config_files(checkpoint, content, words):
    path = checkpoint / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert_error(checkpoint, *words)
    with pytest.raises(FormatError):
        read_config(checkpoint)


def test_unknown_version(checkpoint):
    edit_config(checkpoint, format_version=99)
    assert_error(checkpoint, "config.json", "format_version", "reads 1", "99", "install")


def test_truncated_shard(checkpoint):
    shard = shard_of(checkpoint, f"{DOWN}.weight_packed")
    shard.write_bytes(shard.read_bytes()[:-5])
    assert_error(checkpoint, shard.name, "truncated or damaged", "copy or download")


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 4096, b"\x80\x02}q\x00." * 100])
def test_garbage_instead_of_a_header(checkpoint, content):
    shard = shard_of(checkpoint, f"{DOWN}.weight_packed")
    shard.write_bytes(content)
    assert_error(checkpoint, shard.name, "truncated or damaged")


def test_missing_shard(checkpoint):
    shard = shard_of(checkpoint, f"{DOWN}.weight_packed")
    shard.unlink()
    assert_error(checkpoint, shard.name, "missing", "copy or download")


def test_missing_index(checkpoint):
    (checkpoint / INDEX_FILE).unlink()
    assert_error(checkpoint, INDEX_FILE, "missing", "model-0000")


def test_no_weights_at_all(checkpoint):
    for path in checkpoint.glob("model*"):
        path.unlink()
    assert_error(checkpoint, "model.safetensors", "missing")


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda index: index.pop("weight_map"), ["weight_map"]),
        (lambda index: index.update(weight_map=[]), ["weight_map"]),
        (lambda index: index["metadata"].update(sha256="x"), ["metadata.sha256"]),
        (
            lambda index: index["weight_map"].update({"model.norm.weight": "../../elsewhere.safetensors"}),
            ["plain file names", "../../elsewhere.safetensors"],
        ),
        (
            lambda index: index["weight_map"].update({"model.absent.weight": "model-00001-of-00003.safetensors"}),
            ["model.absent.weight", "model-00001-of-00003.safetensors", "nowhere"],
        ),
        (
            lambda index: index["weight_map"].pop("model.norm.weight"),
            ["model.norm.weight", "does not name it"],
        ),
    ],
)
def test_broken_index(checkpoint, edit, words):
    edit_index(checkpoint, edit)
    assert_error(checkpoint, *words)


def test_a_tensor_in_two_shards(checkpoint):
    name = f"{DOWN}.weight_packed"
    other = next(path for path in sorted(checkpoint.glob("*.safetensors")) if path != shard_of(checkpoint, name))
    tensors = load_file(other) | {name: torch.zeros(128, 36, dtype=torch.int32)}
    save_file(tensors, other)
    assert_error(checkpoint, name, "both", other.name)


def replaced(suffix: str, value):
    def edit(tensors):
        tensors[f"{DOWN}.{suffix}"] = value(tensors[f"{DOWN}.{suffix}"])

    return edit


TENSOR_ERRORS = {
    "wrong dtype": (
        replaced("weight_packed", lambda t: t.short()),
        ["weight_packed", "int32 [128, 36]", "I16"],
    ),
    "wrong scale dtype": (
        replaced("weight_scale", lambda t: t.half()),
        ["weight_scale", "bfloat16 or float32 [128, 3]", "float16 [128, 3]"],
    ),
    "wrong shape": (
        replaced("weight_packed", lambda t: t[:, :24].clone()),
        ["weight_packed", "[128, 36]", "[128, 384] as W3A16 group 128 asymmetric", "[128, 24]"],
    ),
    "too few scales": (
        replaced("weight_scale", lambda t: t[:, :1].clone()),
        ["weight_scale", "[128, 3]", "[128, 1]"],
    ),
    "wrong zero points": (
        replaced("weight_zero_point", lambda t: t.T.contiguous()),
        ["weight_zero_point", "[12, 3]", "[3, 12]"],
    ),
    "wrong sizes": (
        replaced("weight_shape", lambda t: torch.tensor([128, 256])),
        ["weight_packed", "[128, 24]", "[128, 36]"],
    ),
    "impossible sizes": (
        replaced("weight_shape", lambda t: torch.tensor([128, -384])),
        ["weight_shape", "positive", "-384"],
    ),
    "ragged sizes": (
        replaced("weight_shape", lambda t: torch.tensor([128, 380])),
        [DOWN, "128", "380", "W3"],
    ),
    "missing scale": (lambda tensors: tensors.pop(f"{DOWN}.weight_scale"), ["weight_scale", "found nothing"]),
    "missing codes": (lambda tensors: tensors.pop(f"{DOWN}.weight_packed"), ["weight_packed", "nothing"]),
    "missing shape": (lambda tensors: tensors.pop(f"{DOWN}.weight_shape"), ["weight_shape", "nothing"]),
    "missing zero points": (
        lambda tensors: tensors.pop(f"{DOWN}.weight_zero_point"),
        ["weight_zero_point", "found nothing"],
    ),
    "plain weight beside codes": (
        lambda tensors: tensors.update({f"{DOWN}.weight": torch.zeros(128, 384)}),
        [f"{DOWN}.weight", "found this one too"],
    ),
    "unknown companion": (
        lambda tensors: tensors.update({f"{DOWN}.weight_g_idx": torch.zeros(384, dtype=torch.int32)}),
        ["weight_g_idx", "found this one too"],
    ),
    "wrong bias": (
        lambda tensors: tensors.update({f"{MLP}.up_proj.bias": torch.zeros(3)}),
        [f"{MLP}.up_proj.bias", "[384]", "[3]"],
    ),
    "wrong added bias": (replaced("added_bias", lambda t: t[:3].clone()), ["added_bias", "[128]", "[3]"]),
    "missing added bias": (
        lambda tensors: tensors.pop(f"{DOWN}.added_bias"),
        ["added_bias", "added bias", "found nothing"],
    ),
    "added bias beside a bias": (
        lambda tensors: tensors.update({f"{DOWN}.bias": torch.zeros(128)}),
        [f"{DOWN}.added_bias", "only where", f"{DOWN}.bias", "add the one to the other"],
    ),
    "added bias that the config does not name": (
        lambda tensors: tensors.update({f"{MLP}.up_proj.added_bias": torch.zeros(384)}),
        [f"{MLP}.up_proj.added_bias", "'added_bias' names no", "correct"],
    ),
    "added bias of a layer in 16 bits": (
        lambda tensors: tensors.update({"lm_head.added_bias": torch.zeros(2048)}),
        ["lm_head.added_bias", "'added_bias' names no"],
    ),
    "packed although ignored": (
        lambda tensors: tensors.update({"lm_head.weight_packed": torch.zeros(2048, 16, dtype=torch.int32)}),
        ["lm_head.weight_packed", "ignore"],
    ),
    "16 bits although not ignored": (
        lambda tensors: tensors.update({"model.extra": torch.zeros(1), "model.router.weight": torch.zeros(4, 128)}),
        ["model.router.weight", "weight_packed", "W4A16", "ignore"],
    ),
}


@pytest.mark.parametrize("edit, words", TENSOR_ERRORS.values(), ids=TENSOR_ERRORS)
def test_broken_tensors(checkpoint, edit, words):
    edit_tensors(checkpoint, f"{DOWN}.weight_packed", edit)
    assert_error(checkpoint, *words)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_bad_scales_are_found_in_the_data(checkpoint, value):
    def edit(tensors):
        tensors[f"{DOWN}.weight_scale"][3, 1] = value

    edit_tensors(checkpoint, f"{DOWN}.weight_scale", edit)
    validate_checkpoint(checkpoint)
    assert_error(checkpoint, f"{DOWN}.weight_scale", "above 0", str(value), "[3, 1]", data=True)


def test_bad_biases_are_found_in_the_data(checkpoint):
    edit_tensors(checkpoint, f"{DOWN}.added_bias", lambda tensors: tensors[f"{DOWN}.added_bias"][5].fill_(torch.nan))
    validate_checkpoint(checkpoint)
    assert_error(checkpoint, f"{DOWN}.added_bias", "finite", "[5]", data=True)


def test_a_flipped_byte_is_found_by_its_digest(checkpoint):
    shard = shard_of(checkpoint, f"{DOWN}.weight_packed")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    validate_checkpoint(checkpoint)
    assert_error(checkpoint, shard.name, "sha256", "damaged", data=True)


def test_a_digest_of_no_shard(checkpoint):
    edit_index(checkpoint, lambda index: index["metadata"]["sha256"].update({"x.safetensors": "0"}))
    assert_error(checkpoint, "metadata.sha256", "x.safetensors", data=True)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"weights": {"bits": 4, "group_size": -1, "symmetric": True}}, ["weight_zero_point", "symmetric"]),
        (
            {"weights": {"bits": 8, "group_size": -1, "symmetric": False}},
            ["weight_packed", ", 32] for [", "] as W8A16", ", 16] in model-"],
        ),
        ({"ignore": ["lm_head", "re:.*up_proj"]}, ["up_proj", "ignore"]),
        ({"ignore": []}, ["lm_head.weight", "lm_head.weight_packed"]),
        ({"overrides": []}, ["down_proj", "W4A16"]),
        ({"online_hadamard": [{"match": "re:.*downproj", "block_size": 128}]}, ["online_hadamard", "re:.*downproj"]),
        ({"online_hadamard": [{"match": "re:.*", "block_size": 256}]}, [".0.mlp", "'online_hadamard'", "256", "384"]),
        ({"added_bias": ["re:.*down_proj", "lm_head"]}, ["added_bias", "'lm_head'", "none"]),
        ({"added_bias": []}, ["down_proj.added_bias", "'added_bias' names no"]),
    ],
)
def test_a_config_that_tells_of_other_tensors(checkpoint, fields, words):
    edit_config(checkpoint, **fields)
    assert_error(checkpoint, *words)


@pytest.mark.parametrize(
    "fields, found",
    [
        ({"overrides": (Override(f"{MLP}.up_proj", WeightScheme(8)),)}, "W8A16"),
        ({"online_hadamard": (OnlineHadamard(f"{MLP}.up_proj", 64),)}, "W4A16 asymmetric, Hadamard 64"),
        ({"added_bias": (f"{MLP}.up_proj",)}, "W4A16 asymmetric, added bias"),
    ],
)
def test_fused_parts_that_disagree(tmp_path, fields, found):
    checkpoint = write_rtn_checkpoint(TINY_LLAMA, tmp_path / "checkpoint", WeightScheme(4), **fields)
    assert_error(checkpoint, f"{MLP}.gate_up_proj", "W4A16", found, "need one scheme")


def test_experts_that_disagree(tmp_path):
    experts = "model.layers.1.block_sparse_moe.experts"
    checkpoint = write_rtn_checkpoint(
        write_random_model(tmp_path / "parent", "mixtral"),
        tmp_path / "checkpoint",
        WeightScheme(4),
        overrides=(Override(r"re:.*experts\.\d+\.w2", WeightScheme(8)), Override(f"{experts}.3.w3", WeightScheme(2))),
    )
    found = f"and 12 others: W4A16 asymmetric, but {experts}.3.w3: W2A16 asymmetric"
    assert_error(checkpoint, f"{experts}: its parts run as one matrix product", found, "'overrides'")


def test_nothing_quantized(tmp_path):
    checkpoint = write_rtn_checkpoint(TINY_LLAMA, tmp_path / "checkpoint", WeightScheme(4), ignore=("re:.*",))
    assert_error(checkpoint, "expected quantized linears", "none")


def test_one_file_without_an_index(checkpoint):
    tensors = {}
    for path in sorted(checkpoint.glob("model-*")):
        tensors |= load_file(path)
        path.unlink()
    (checkpoint / INDEX_FILE).unlink()
    save_file(tensors, checkpoint / "model.safetensors")
    assert len(validate_checkpoint(checkpoint, data=True).linears) == 84


def test_command_line(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main([str(checkpoint)]) == 0
    table = capsys.readouterr().out
    assert "W3A16 group 128 asymmetric, Hadamard 128, added bias" in table
    assert "W4A16 asymmetric" in table
    assert "3.359" in table  # 3 bits, 32 + 3 in every 128 weights, 32 in every 384, and weight_shape
    shard_of(checkpoint, f"{DOWN}.weight_packed").unlink()
    assert main([str(checkpoint), str(TINY_LLAMA)]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 2
    assert all(line.startswith("error: ") for line in captured.err.splitlines())
