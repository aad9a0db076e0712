"""Checkpoint directories: reading and checking one, and putting a new one in place whole or not at all.

A checkpoint directory holds ``config.json`` and the files of ``sliderquant_vllm.shards``. Imports torch and
safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sliderquant_vllm.format import (
    EXPERT_MATRICES,
    FUSED_MODULES,
    QUANT_METHOD,
    FormatError,
    LinearScheme,
    QuantizationConfig,
    matches,
)
from sliderquant_vllm.packing import expected_tensors
from sliderquant_vllm.shards import Reader, TensorHeader, read_json

CONFIG_FILE = "config.json"
NOT_QUANTIZED = (
    "expected a 'quantization_config' object, found none; this is not a quantized model: quantize it with "
    "'python -m calibrate'"
)
BIAS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Linear:
    """One quantized linear [out_features, in_features] and the bytes that it takes in the checkpoint.

    ``has_bias`` tells of the bias that its architecture has, ``scheme.added_bias`` of another.
    """

    scheme: LinearScheme
    out_features: int
    in_features: int
    nbytes: int
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class Summary:
    """What ``validate_checkpoint`` found: quantized linears by module name, and the bytes of all tensors."""

    linears: Mapping[str, Linear]
    nbytes: int


def read_config(directory: str | Path) -> tuple[dict[str, Any], QuantizationConfig]:
    """The whole config.json and its validated ``quantization_config``. Raises FormatError."""
    path = Path(directory) / CONFIG_FILE
    config = read_json(path)
    if "quantization_config" not in config:
        raise FormatError(f"{path}: {NOT_QUANTIZED}")
    try:
        return config, QuantizationConfig.from_dict(config["quantization_config"])
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def validate_checkpoint(directory: str | Path, data: bool = False) -> Summary:
    """Check every linear of a checkpoint against its config.

    Reads headers and the 16 bytes of each ``weight_shape``: seconds for a 70B model. With ``data`` also
    reads every scale and added bias and compares the SHA-256 of the shards.

    Raises:
        FormatError: one line that names the tensor or file, what was expected, what was found, what to do.
    """
    _, config = read_config(directory)
    reader = Reader(directory)
    modules = reader.modules()
    # Only those that are as _check_linear expects: another could be of any size.
    names = (f"{module}.weight_shape" for module in modules)
    names = [name for name in names if name in reader.headers and reader.headers[name].shape == (2,)]
    sizes = {name.rpartition(".")[0]: tensor.tolist() for name, tensor in reader.tensors(names)}
    linears = {}
    for module, tensors in modules.items():
        scheme = config.scheme_for(module)
        quantized = any(suffix.startswith("weight_") for suffix in tensors)
        if "added_bias" in tensors and not (quantized and scheme is not None and scheme.added_bias):
            raise FormatError(
                f"{module}.added_bias: 'added_bias' names no quantized linear {module}, found the tensor in "
                f"{tensors['added_bias'].file}; correct 'quantization_config', or quantize the model again"
            )
        if quantized:
            if scheme is None:
                name = next(suffix for suffix in tensors if suffix.startswith("weight_"))
                raise FormatError(
                    f"{module}.{name}: 'ignore' keeps this module in 16 bits, found a quantized tensor in "
                    f"{tensors[name].file}; take the module out of 'ignore', or quantize the model again"
                )
            linears[module] = _check_linear(module, tensors, scheme, sizes.get(module))
        elif scheme is not None and _is_plain_linear(module, tensors):
            raise FormatError(
                f"{module}.weight: expected {module}.weight_packed ({scheme}), found a 16-bit weight in "
                f"{tensors['weight'].file}; quantize the model again, or name the module in 'ignore'"
            )
    if not linears:
        raise FormatError(f"{directory}: expected quantized linears, found none; quantize the model again")
    _check_fused(config, modules, linears)
    _check_experts(config, modules)
    _check_patterns(config, linears)
    if data:
        reader.check_digests()
        for name, scale in reader.tensors(f"{module}.weight_scale" for module in linears):
            _check_scales(name, scale, reader)
        biased = (module for module, linear in linears.items() if linear.scheme.added_bias)
        for name, bias in reader.tensors(f"{module}.added_bias" for module in biased):
            _check_finite(name, bias, reader)
    return Summary(linears, sum(header.nbytes for header in reader.headers.values()))


def _is_plain_linear(module: str, tensors: Mapping[str, TensorHeader]) -> bool:
    """Embeddings are the only other modules with a matrix, and headers do not tell them from linears."""
    return "weight" in tensors and len(tensors["weight"].shape) == 2 and "embed" not in module.rpartition(".")[2]


def _check_linear(
    module: str, tensors: Mapping[str, TensorHeader], scheme: LinearScheme, sizes: list[int] | None
) -> Linear:
    """``sizes`` is what its weight_shape holds, where that has the shape that it must have."""

    def check(suffix: str, shape: tuple[int, ...], dtypes: Iterable[torch.dtype], because: str) -> None:
        if suffix not in tensors:
            raise FormatError(f"{module}.{suffix}: expected for {scheme}, found nothing; quantize the model again")
        header = tensors[suffix]
        if header.shape != shape or header.dtype not in dtypes:
            raise FormatError(
                f"{module}.{suffix}: expected {' or '.join(map(_name, dtypes))} {list(shape)} for {because}, "
                f"found {_name(header.dtype)} {list(header.shape)} in {header.file}; "
                "correct 'quantization_config', or quantize the model again"
            )

    check("weight_shape", (2,), (torch.int64,), "[out_features, in_features]")
    out_features, in_features = sizes
    if min(sizes) <= 0:
        raise FormatError(f"{module}.weight_shape: expected positive sizes, found {sizes}; copy the checkpoint again")
    if problem := scheme.shape_problem(out_features, in_features):
        raise FormatError(f"{module}: cannot be {scheme}: {problem}; choose another scheme, or add it to 'ignore'")
    expected = expected_tensors(scheme.weights, out_features, in_features)
    for suffix, (shape, dtypes) in expected.items():
        check(suffix, shape, dtypes, f"{sizes} as {scheme}")
    if scheme.added_bias:
        check("added_bias", (out_features,), BIAS_DTYPES, f"{out_features} output channels")
    if "bias" in tensors:
        check("bias", (out_features,), BIAS_DTYPES, f"{out_features} output channels")
        if scheme.added_bias:
            raise FormatError(
                f"{module}.added_bias: expected only where the architecture has no bias, found {module}.bias beside it "
                f"in {tensors['bias'].file}; add the one to the other, or quantize the model again"
            )
    for suffix, header in tensors.items():
        if suffix.startswith("weight") and suffix not in expected:
            raise FormatError(
                f"{module}.{suffix}: {scheme} has only {', '.join(sorted(expected))}, found this one too in "
                f"{header.file}; correct 'quantization_config', or quantize the model again"
            )
    counted = [*expected, "added_bias"] if scheme.added_bias else expected
    nbytes = sum(tensors[suffix].nbytes for suffix in counted)
    return Linear(scheme, out_features, in_features, nbytes, has_bias="bias" in tensors)


def _check_fused(config: QuantizationConfig, modules: Iterable[str], linears: Mapping[str, Linear]) -> None:
    for fused, parts in FUSED_MODULES.items():
        for stem in {module.rpartition(".")[0] for module in modules if module.rpartition(".")[2] in parts}:
            names = [f"{stem}.{part}" for part in parts]
            # Some families have an up_proj and no gate_proj: theirs is not fused.
            if any(name not in modules for name in names) or config.scheme_for_fused(f"{stem}.{fused}") is None:
                continue
            sizes = {name: linears[name].in_features if name in linears else None for name in names}
            if len(set(sizes.values())) > 1:
                raise FormatError(
                    f"{stem}.{fused}: its parts run as one matrix product and need one input size, "
                    f"found {sizes}; quantize the model again"
                )


def _check_experts(config: QuantizationConfig, modules: Iterable[str]) -> None:
    alike = {matrix: matrices for matrices in EXPERT_MATRICES for matrix in matrices}
    blocks: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for module in modules:
        experts, _, matrix = module.rpartition(".")
        stem, _, number = experts.rpartition(".")
        if stem.endswith(".experts") and number.isdecimal() and matrix in alike:
            blocks.setdefault((stem, alike[matrix]), []).append(module)
    for (stem, _), names in blocks.items():
        config.common_scheme(stem, names)


def _check_patterns(config: QuantizationConfig, linears: Iterable[str]) -> None:
    """A slip in a name would leave a rotated weight with an input that is not; no tensor tells of that."""
    for where, pattern in config.patterns():
        if where in ("online_hadamard", "added_bias") and not any(matches(pattern, name) for name in linears):
            raise FormatError(
                f"quantization_config.{where}: expected patterns of quantized linears, found {pattern!r}, which "
                "matches none; correct 'quantization_config', or quantize the model again"
            )


def _check_finite(name: str, bias: torch.Tensor, reader: Reader) -> None:
    bad = ~torch.isfinite(bias)
    if bad.any():
        raise FormatError(
            f"{name}: expected finite numbers, found others at {bad.nonzero().flatten()[:3].tolist()} "
            f"({int(bad.sum())} such) in {reader.headers[name].file}; quantize the model again"
        )


def _check_scales(name: str, scale: torch.Tensor, reader: Reader) -> None:
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise FormatError(
            f"{name}: expected finite scales above 0, found {scale[row, group].item()} at [{row}, {group}] "
            f"({int(bad.sum())} such) in {reader.headers[name].file}; quantize the model again"
        )


@contextlib.contextmanager
def staging_directory(output_dir: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory that becomes ``output_dir`` when the block ends well and vanishes when it does not.

    It lies beside ``output_dir``, so that the final rename is atomic: ``output_dir`` is whole if it exists.

    Raises:
        FileExistsError: ``output_dir`` exists and ``overwrite`` is off, or it is not a model directory.
    """
    target = Path(output_dir).resolve()
    check_replaceable(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    staging.mkdir()
    try:
        yield staging
        put_in_place(staging, target, overwrite)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless ``target`` is free, or holds a quantized model of ours and may be overwritten."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists already; choose another directory, or pass --overwrite")
    try:
        method = read_json(target / CONFIG_FILE)["quantization_config"]["quant_method"]
    except (FormatError, KeyError, TypeError):
        method = None
    if method != QUANT_METHOD:
        raise FileExistsError(f"{target} is not a model made here and is not overwritten; choose another directory")


def put_in_place(staging: Path, target: Path, overwrite: bool) -> None:
    """Rename a directory to what may be an older one of ours. Raises FileExistsError as ``check_replaceable``."""
    check_replaceable(target, overwrite)
    retired = None
    if target.exists():
        retired = target.parent / f".{target.name}.old-{secrets.token_hex(4)}"
        os.rename(target, retired)
    try:
        os.rename(staging, target)
    except OSError:
        if retired is not None:
            os.rename(retired, target)
        raise
    if retired is not None:
        shutil.rmtree(retired, ignore_errors=True)


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
