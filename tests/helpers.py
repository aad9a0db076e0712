"""Small checkpoints for tests: round-to-nearest quantization, and the 16-bit model of the same numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from sliderquant_vllm import ops, references
from sliderquant_vllm.checkpoint import read_config, staging_directory
from sliderquant_vllm.format import (
    ActivationScheme,
    LinearScheme,
    OnlineHadamard,
    Override,
    QuantizationConfig,
    WeightScheme,
)
from sliderquant_vllm.packing import dequantize, pack_linear, unpack_linear
from sliderquant_vllm.shards import Reader, shard_name, write_index, write_shard

TINY_LLAMA = Path(__file__).parents[1] / "assets" / "tiny-llama"
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
# What the mixtures of experts have besides the fields of dense models.
OF_FAMILY = {
    "qwen3_moe": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 192},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128},
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def assert_one_line_with(caught, words):
    """What every error message must be, and the words that this one must hold."""
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"


def round_to_nearest(
    weight: torch.Tensor, scheme: WeightScheme
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize over the range of each group: [N, K] -> codes uint8 [N, K], scale fp32 [N, G], zero_point."""
    groups = weight.float().unflatten(1, (scheme.groups(weight.shape[1]), -1))
    if scheme.symmetric:
        scale = groups.abs().amax(2) / (scheme.max_code - scheme.symmetric_zero_point)
        zero_point = torch.full_like(scale, scheme.symmetric_zero_point)
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = (high - low) / scheme.max_code
        zero_point = torch.round(-low / scale)
    codes = torch.round(groups / scale[..., None]) + zero_point[..., None]
    codes = codes.clamp(0, scheme.max_code).flatten(1).to(torch.uint8)
    return codes, scale, None if scheme.symmetric else zero_point.to(torch.uint8)


def write_rtn_checkpoint(
    model_dir: str | Path,
    out_dir: str | Path,
    weights: WeightScheme,
    activations: ActivationScheme | None = None,
    overrides: tuple[Override, ...] = (),
    online_hadamard: tuple[OnlineHadamard, ...] = (),
    added_bias: tuple[str, ...] = (),
    ignore: tuple[str, ...] = ("lm_head",),
    scale_dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 10**9,
) -> Path:
    """Quantize every linear of a model directory by rounding; added biases are random, the other tensors copied."""
    config = QuantizationConfig(weights, activations, online_hadamard, added_bias, ignore, overrides)
    reader, generator = Reader(model_dir), torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in reader.headers:
            module, _, suffix = name.rpartition(".")
            tensor, scheme = reader.tensor(name), config.scheme_for(module)
            if suffix != "weight" or tensor.dim() != 2 or module.endswith("embed_tokens") or scheme is None:
                yield name, tensor
                continue
            if scheme.hadamard_block_size is not None:
                tensor = references.hadamard(tensor.float(), scheme.hadamard_block_size)
            codes, scale, zero_point = round_to_nearest(tensor, scheme.weights)
            packed = pack_linear(codes, scale.to(scale_dtype), zero_point, scheme.weights)
            yield from ((f"{module}.{key}", value) for key, value in packed.items())
            if scheme.added_bias:
                yield f"{module}.added_bias", torch.randn(len(tensor), generator=generator) * 0.3

    return _write_model(model_dir, out_dir, tensors(), config, max_shard_bytes)


def write_dequantized(
    quantized_dir: str | Path, out_dir: str | Path, dtype: torch.dtype = torch.bfloat16, **config_fields
) -> Path:
    """The 16-bit model whose weights are those of a quantized checkpoint, rounded to ``dtype``.

    ``config_fields`` of config.json change; added biases need an architecture that has biases there.
    """
    _, config = read_config(quantized_dir)
    reader = Reader(quantized_dir)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for module, headers in reader.modules().items():
            held = {suffix: reader.tensor(f"{module}.{suffix}".lstrip(".")) for suffix in headers}
            if "weight_packed" in held:
                scheme = config.scheme_for(module)
                codes, scale, zero_point = unpack_linear(held, scheme.weights)
                weight = dequantize(codes, scale.float(), zero_point, scheme.weights)
                if scheme.hadamard_block_size is not None:
                    weight = references.hadamard(weight, scheme.hadamard_block_size)
                held = {key.removeprefix("added_"): held[key] for key in held if not key.startswith("weight_")}
                held["weight"] = weight.to(dtype)
            yield from ((f"{module}.{suffix}".lstrip("."), tensor) for suffix, tensor in held.items())

    return _write_model(quantized_dir, out_dir, tensors(), None, **config_fields)


def write_random_model(
    out_dir: str | Path,
    family: str,
    tokenizer_dir: str | Path = TINY_LLAMA,
    tied: bool = True,
    seed: int = 0,
    kv_heads: int = 2,
) -> Path:
    """A random model of tiny-llama's sizes, with the tokenizer of a directory; Qwen2 has biases on q, k and v."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": json.loads((Path(tokenizer_dir) / "config.json").read_text())["vocab_size"],
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = AutoConfig.for_model(family, **settings | OF_FAMILY.get(family, {}))
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        # The default initialisation has biases of zero and hidden states that nothing depends on.
        torch.nn.init.normal_(parameter, std=0.5 if name.endswith("bias") else 0.1)
        if name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
    model.save_pretrained(out_dir)
    _copy_tokenizer(tokenizer_dir, out_dir)
    return Path(out_dir)


def write_compressed_tensors(quantized_dir: str | Path, out_dir: str | Path) -> Path:
    """The same files under a config.json that stock vLLM reads: compressed-tensors, pack-quantized."""
    shutil.copytree(quantized_dir, out_dir)
    config, own = read_config(quantized_dir)
    if own.online_hadamard or own.added_bias:
        raise ValueError(f"{quantized_dir}: compressed-tensors knows neither online_hadamard nor added_bias")
    scheme = own.weights
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(own.ignore),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": scheme.bits,
                    "type": "int",
                    "symmetric": scheme.symmetric,
                    "strategy": "channel" if scheme.group_size == -1 else "group",
                    "group_size": None if scheme.group_size == -1 else scheme.group_size,
                },
            }
        },
    }
    (Path(out_dir) / "config.json").write_text(json.dumps(config, indent=2))
    return Path(out_dir)


def edit_config(directory: str | Path, **quantization_fields) -> None:
    """Overwrite fields of the quantization_config of a checkpoint, without checking them."""
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(quantization_fields)
    path.write_text(json.dumps(config, indent=2))


def _write_model(
    model_dir: str | Path,
    out_dir: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    quantization: QuantizationConfig | None,
    max_shard_bytes: int = 10**9,
    **config_fields,
) -> Path:
    config = json.loads((Path(model_dir) / "config.json").read_text())
    config.pop("quantization_config", None)
    config |= config_fields
    if quantization is not None:
        calibration = {"model": str(model_dir)}
        config["quantization_config"] = replace(quantization, calibration=calibration).to_dict()
    with staging_directory(out_dir) as staging:
        write_shards(staging, tensors, max_shard_bytes)
        (staging / "config.json").write_text(json.dumps(config, indent=2))
        _copy_tokenizer(model_dir, staging)
    return Path(out_dir)


def write_shards(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = 10**9) -> None:
    """Write tensors as shards of about so many bytes, and their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors:
        if shards[-1] and sum(value.nbytes for value in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    files = [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    for file, held in zip(files, shards, strict=True):
        write_shard(directory / file, held)
    write_index(directory, files)


def _copy_tokenizer(source: str | Path, target: str | Path) -> None:
    for file in TOKENIZER_FILES:
        if (Path(source) / file).exists():
            shutil.copy(Path(source) / file, target)


class ReferenceLinear(torch.nn.Module):
    """A quantized linear computed by the pure-torch references of the ops."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], scheme: LinearScheme):
        super().__init__()
        self.scheme = scheme
        _, scale, zero_point = unpack_linear(tensors, scheme.weights)
        self.register_buffer("packed", tensors["weight_packed"])
        self.register_buffer("scale", scale.float().T.contiguous())
        self.register_buffer("zero", None if zero_point is None else zero_point.T.contiguous())
        bias = tensors.get("added_bias" if scheme.added_bias else "bias")
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, activations = self.scheme.weights, self.scheme.activations
        rows, block_size = x.flatten(0, -2), self.scheme.hadamard_block_size or 1
        if activations is None:
            if block_size > 1:
                rows = references.hadamard(rows, block_size)
            y = references.wna16_gemm(
                rows, self.packed, self.scale, self.zero, self.bias, weights.bits, weights.group_size
            )
        else:
            y = references.w4a4_gemm(
                *references.quantize_per_token(rows, activations.bits, activations.symmetric, block_size),
                self.packed,
                self.scale[0],
                None if self.zero is None else self.zero[0],
                ops.column_sums(self.packed, weights.bits),
                self.bias,
                weights.bits,
                x.dtype,
            )
        return y.unflatten(0, x.shape[:-1])


@torch.inference_mode()
def reference_logprobs(
    quantized_dir: str | Path, prompts: list[list[int]], dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Log-probabilities of all tokens but the first of each prompt, by transformers and the op references."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = json.loads((Path(quantized_dir) / "config.json").read_text())
    fields.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).to(dtype).eval()
    _, config = read_config(quantized_dir)
    reader = Reader(quantized_dir)
    for module, headers in reader.modules().items():
        tensors = {suffix: reader.tensor(f"{module}.{suffix}") for suffix in headers}
        if "weight_packed" in tensors:
            model.set_submodule(module, ReferenceLinear(tensors, config.scheme_for(module)))
        else:
            model.get_submodule(module).load_state_dict(tensors)
    logprobs = model(torch.tensor(prompts)).logits[:, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(prompts)[:, 1:, None]).flatten()
