"""Python face of the native ops: loading them, and shapes for torch.compile.

All ops live in the namespace ``sliderquant`` and have one schema on every device. Without the native library
those of ``references`` are registered under the same names, so callers never ask which of the two runs.

Tensors at this boundary (M tokens, N output channels, K input channels, G groups):
    x        bf16 or fp16 [M, K], unit stride along K
    w_packed codes in kernel layout, from ``repack``; opaque but for its size
    scale    fp32 [G, N], zero uint8 [G, N] (None when symmetric): transposed against the checkpoint, so that
             neighbouring output channels of one group are neighbours in memory
    bias     fp32 [N] or None
Grouped ops take those of E experts, each with a leading dimension of E, and the rows of x in the order of experts.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from pathlib import Path

import torch

from sliderquant_vllm import references
from sliderquant_vllm.packing import unpack_codes

logger = logging.getLogger(__name__)

SCHEMAS = {
    "wna16_gemm": "(Tensor x, Tensor w_packed, Tensor scale, Tensor? zero, Tensor? bias, int bits, "
    "int group_size) -> Tensor",
    "quantize_per_token": "(Tensor x, int bits, bool symmetric, int block_size=1) -> (Tensor, Tensor, Tensor, Tensor)",
    "rms_norm_quantize": "(Tensor x, Tensor? residual, Tensor weight, float epsilon, int bits, bool symmetric, "
    "int block_size=1) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "silu_mul_quantize": "(Tensor x, int bits, bool symmetric, int block_size=1) -> (Tensor, Tensor, Tensor, Tensor)",
    "hadamard": "(Tensor x, int block_size) -> Tensor",
    "w4a4_gemm": "(Tensor codes, Tensor sa, Tensor za, Tensor row_sum, Tensor w_packed, Tensor sw, "
    "Tensor? zw, Tensor col_sum, Tensor? bias, int weight_bits, ScalarType out_dtype) -> Tensor",
    "wna16_gemm_grouped": "(Tensor x, Tensor offsets, Tensor w_packed, Tensor scale, Tensor? zero, Tensor? bias, "
    "int bits, int group_size) -> Tensor",
    "w4a4_gemm_grouped": "(Tensor codes, Tensor sa, Tensor za, Tensor row_sum, Tensor offsets, Tensor w_packed, "
    "Tensor sw, Tensor? zw, Tensor col_sum, Tensor? bias, int weight_bits, ScalarType out_dtype) -> Tensor",
}

CPU_OPS = ("repack", "column_sums", "fake_quantize_weight", "fake_quantize_weight_backward")

_library: torch.library.Library | None = None
_reference_keys: set[str] = set()


def load() -> None:
    """Make ``torch.ops.sliderquant`` available; idempotent. ``SLIDERQUANT_NATIVE=0``: references.

    Raises:
        RuntimeError: SLIDERQUANT_ISA names kernels that this machine and build cannot run, or the native library is
            older than this file.
    """
    global _library
    if _library is not None:
        return
    serving = {name: getattr(references, name) for name in SCHEMAS}
    native = Path(__file__).parent / "_C.abi3.so"
    if native.exists() and os.environ.get("SLIDERQUANT_NATIVE", "1") != "0":
        host().isa()  # a wrong SLIDERQUANT_ISA fails here, not in the first forward pass
        torch.ops.load_library(str(native))
        if missing := [name for name in (*SCHEMAS, *CPU_OPS) if not _has_kernel(name, "CPU")]:
            raise RuntimeError(
                f"{native}: expected CPU kernels of every op, found none of {', '.join(missing)}; it is older than the "
                "Python code: build it again with 'pip install --no-build-isolation -e .'"
            )
        library = torch.library.Library("sliderquant", "FRAGMENT")
    else:
        library = torch.library.Library("sliderquant", "DEF")
        for name, schema in SCHEMAS.items():
            library.define(name + schema)
    for key in ("CPU", "CUDA"):
        if not _has_kernel("wna16_gemm", key):
            _reference_keys.add(key)
        for name, reference in serving.items():
            if not _has_kernel(name, key):
                library.impl(name, reference, key)
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"sliderquant::{name}", fake, lib=library)
    _library = library  # last: a failure midway leaves nothing that passes for loaded


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sliderquant::{name}", key)


def is_native(device: torch.device | str) -> bool:
    """Whether native kernels serve tensors of this device; warns once per device type where they do not."""
    load()
    key = torch.device(device).type.upper()
    if key in _reference_keys:
        _warn_reference(key)
    return key not in _reference_keys


@functools.cache
def _warn_reference(key: str) -> None:
    logger.warning(
        "sliderquant: no native %s kernels in this installation, the slow pure-torch reference serves "
        "instead; build them with 'pip install --no-build-isolation -e .' in the source tree%s",
        key,
        " on a machine with nvcc" if key == "CUDA" else "",
    )


@functools.cache
def host():
    """The native helper module: what the CPU can do, and the index functions of the layouts."""
    return importlib.import_module("sliderquant_vllm._host")


def repack(weight_packed: torch.Tensor, bits: int, activation_bits: int = 16) -> torch.Tensor:
    """Turn checkpoint packing into the layout that the kernels of the tensor's device read.

    Args:
        weight_packed: int32 [N, K * bits / 32].
        bits: bits per code.
        activation_bits: 16 for ``wna16_gemm``, less for ``w4a4_gemm``.

    Returns:
        An opaque tensor on the same device. The references read checkpoint packing itself.
    """
    if not is_native(weight_packed.device):
        return weight_packed.contiguous()
    return torch.ops.sliderquant.repack(weight_packed.contiguous(), bits, activation_bits)


def column_sums(weight_packed: torch.Tensor, bits: int) -> torch.Tensor:
    """``sum_k code[n, k]`` of checkpoint packing: int32 [N]."""
    if is_native("cpu") and weight_packed.device.type == "cpu":
        return torch.ops.sliderquant.column_sums(weight_packed.contiguous(), bits)
    # Some rows at a time: unpacking takes tens of bytes per code.
    parts = [unpack_codes(rows, bits).sum(1, dtype=torch.int32) for rows in weight_packed.split(4096)]
    return torch.cat(parts)


def fake_quantize_weight(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, max_code: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to its grid: ``(code - zero) * scale`` with ``code = clamp(rint(weight / scale + zero), 0, max)``.

    Args:
        weight: fp32 [N, K]; scale, zero: fp32 [N, G].

    Returns:
        fp32 [N, K], and int16 [N, K] for ``fake_quantize_weight_backward``: how far each weight was moved, in steps of
        the grid and as far as one, times references.ERROR_ONE.
    """
    if is_native("cpu") and weight.device.type == "cpu":
        return torch.ops.sliderquant.fake_quantize_weight(weight.contiguous(), scale, zero, max_code)
    return references.fake_quantize_weight(weight, scale, zero, max_code)


def fake_quantize_weight_backward(
    grad: torch.Tensor, error: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight-through gradient of ``fake_quantize_weight``, 0 where a weight was moved by more than half a step.

    Args:
        grad: fp32 [N, K]; error: int16 [N, K].

    Returns:
        fp32 [N, K], and the sums over every group, fp32 [3, N, G]: of ``grad`` above the largest code, below the
        smallest, and of ``grad`` times how far the weight was moved, in steps, in between.
    """
    if is_native("cpu") and grad.device.type == "cpu":
        return torch.ops.sliderquant.fake_quantize_weight_backward(grad.contiguous(), error, groups)
    return references.fake_quantize_weight_backward(grad, error, groups)


def wna16_gemm(x, w_packed, scale, zero, bias, bits: int, group_size: int) -> torch.Tensor:
    """``x @ dequantize(w).T + bias``: [M, N] in the dtype of x, accumulated in fp32."""
    return torch.ops.sliderquant.wna16_gemm(x, w_packed, scale, zero, bias, bits, group_size)


def quantize_per_token(x, bits: int, symmetric: bool, block_size: int = 1) -> tuple[torch.Tensor, ...]:
    """Dynamic quantization of each row over its own range, which always includes 0.

    Computed in fp32, bit for bit the same everywhere: asymmetric ``scale = (max - min) / (2**bits - 1)``,
    ``zero = rint(-min / scale)``; symmetric ``scale = max|x| / (2**(bits-1) - 1)``, ``zero = 2**(bits-1)``;
    ``code = clamp(rint(x / scale) + zero, 0, 2**bits - 1)``. A row of zeros gets scale 1.

    Args:
        block_size: above 1, x is transformed before as ``hadamard`` has it, without rounding in between.

    Returns:
        codes uint8 [M, K], scale fp32 [M], zero int32 [M], row_sum int32 [M] (the sum of the row's codes).
    """
    return torch.ops.sliderquant.quantize_per_token(x, bits, symmetric, block_size)


def rms_norm_quantize(
    x, residual, weight, epsilon: float, bits: int, symmetric: bool, block_size: int = 1
) -> tuple[torch.Tensor, ...]:
    """``quantize_per_token`` of what vLLM's RMSNorm makes of ``x + residual``, in one pass.

    Rounded as there: the sum is fp32, its multiple by ``1 / sqrt(mean of squares + epsilon)`` is rounded to the dtype
    of x before the weight and behind it. The kernels add squares in another order than torch: a value half-way between
    two 16-bit floats may go to the other one, and its code with it.

    Args:
        residual: like x, or None for the norm of x alone.
        weight: [K] in the dtype of x.

    Returns:
        codes uint8 [M, K], scale fp32 [M], zero int32 [M], row_sum int32 [M], and ``x + residual`` in the dtype of x,
        the residual of the next layer; [0, K] without a residual.
    """
    return torch.ops.sliderquant.rms_norm_quantize(x, residual, weight, epsilon, bits, symmetric, block_size)


def silu_mul_quantize(x, bits: int, symmetric: bool, block_size: int = 1) -> tuple[torch.Tensor, ...]:
    """``quantize_per_token`` of what vLLM's SiluAndMul makes of x, in one pass.

    Rounded as there, to the dtype of x: ``silu(gate)``, and its product with ``up``. The kernels have another
    exponential than torch: a value half-way between two 16-bit floats may go to the other one, and its code with it.

    Args:
        x: [M, 2 * K], all gates before all ups.

    Returns:
        codes uint8 [M, K], scale fp32 [M], zero int32 [M], row_sum int32 [M].
    """
    return torch.ops.sliderquant.silu_mul_quantize(x, bits, symmetric, block_size)


def hadamard(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Multiply every run of ``block_size`` channels by the orthonormal Walsh-Hadamard matrix in Sylvester's order.

    ``x.unflatten(-1, (-1, block_size)) @ H / sqrt(block_size)``: its own inverse, and no value grows beyond the
    2-norm of its run. Computed in fp32 and rounded once, to the dtype of x.

    Args:
        x: [..., K], bf16, fp16 or fp32, with K a multiple of ``block_size``, a power of 2.

    Returns:
        [..., K] in the dtype of x.

    Raises:
        RuntimeError: ``block_size`` is no power of 2, or does not divide K.
    """
    return torch.ops.sliderquant.hadamard(x, block_size)


def w4a4_gemm(codes, sa, za, row_sum, w_packed, sw, zw, col_sum, bias, weight_bits: int, out_dtype) -> torch.Tensor:
    """Integer matrix product of quantized activations and weights of any width (W4A4, W4A8, W8A8, ...).

    ``y = sa * sw * (sum_k a*w - za * col_sum - zw * row_sum + K * za * zw) + bias``, the bracket exact in
    integers.

    Args:
        codes, sa, za, row_sum: as ``quantize_per_token`` returns them.
        w_packed: from ``repack`` with ``activation_bits`` of 8 or less.
        sw: fp32 [N]; zw: uint8 [N] or None when symmetric; col_sum: int32 [N] from ``column_sums``.

    Returns:
        [M, N] of out_dtype.
    """
    return torch.ops.sliderquant.w4a4_gemm(
        codes, sa, za, row_sum, w_packed, sw, zw, col_sum, bias, weight_bits, out_dtype
    )


def wna16_gemm_grouped(x, offsets, w_packed, scale, zero, bias, bits: int, group_size: int) -> torch.Tensor:
    """``wna16_gemm`` with a weight per expert: the rows [offsets[e], offsets[e + 1]) of x meet expert e.

    Args:
        offsets: int32 [E + 1], rising from 0 to at most M; on GPUs, which would have to be waited for, unchecked.
        w_packed: of all experts, stacked; so are scale [E, G, N], zero and bias.

    Returns:
        [M, N] in the dtype of x; rows from offsets[E] on are 0.
    """
    return torch.ops.sliderquant.wna16_gemm_grouped(x, offsets, w_packed, scale, zero, bias, bits, group_size)


def w4a4_gemm_grouped(
    codes, sa, za, row_sum, offsets, w_packed, sw, zw, col_sum, bias, weight_bits: int, out_dtype
) -> torch.Tensor:
    """``w4a4_gemm`` with a weight per expert, as ``wna16_gemm_grouped`` has them; sw, zw and col_sum are [E, N]."""
    return torch.ops.sliderquant.w4a4_gemm_grouped(
        codes, sa, za, row_sum, offsets, w_packed, sw, zw, col_sum, bias, weight_bits, out_dtype
    )


def _fake_wna16_gemm(x, w_packed, scale, zero, bias, bits, group_size):
    return x.new_empty(x.shape[0], scale.shape[1])


def _fake_quantize_per_token(x, bits, symmetric, block_size=1):
    rows = x.shape[0]
    integers = functools.partial(x.new_empty, rows, dtype=torch.int32)
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(rows, dtype=torch.float32),
        integers(),
        integers(),
    )


def _fake_rms_norm_quantize(x, residual, weight, epsilon, bits, symmetric, block_size=1):
    total = x.new_empty(0 if residual is None else x.shape[0], x.shape[1])
    return *_fake_quantize_per_token(x, bits, symmetric), total


def _fake_silu_mul_quantize(x, bits, symmetric, block_size=1):
    return _fake_quantize_per_token(x[:, : x.shape[1] // 2], bits, symmetric)


def _fake_hadamard(x, block_size):
    return x.new_empty(x.shape)


def _fake_w4a4_gemm(codes, sa, za, row_sum, w_packed, sw, zw, col_sum, bias, weight_bits, out_dtype):
    return sw.new_empty(codes.shape[0], sw.shape[0], dtype=out_dtype)


def _fake_wna16_gemm_grouped(x, offsets, w_packed, scale, zero, bias, bits, group_size):
    return x.new_empty(x.shape[0], scale.shape[2])


def _fake_w4a4_gemm_grouped(codes, sa, za, row_sum, offsets, w_packed, sw, zw, col_sum, bias, weight_bits, out_dtype):
    return sw.new_empty(codes.shape[0], sw.shape[1], dtype=out_dtype)


_FAKES = {
    "wna16_gemm": _fake_wna16_gemm,
    "quantize_per_token": _fake_quantize_per_token,
    "rms_norm_quantize": _fake_rms_norm_quantize,
    "silu_mul_quantize": _fake_silu_mul_quantize,
    "hadamard": _fake_hadamard,
    "w4a4_gemm": _fake_w4a4_gemm,
    "wna16_gemm_grouped": _fake_wna16_gemm_grouped,
    "w4a4_gemm_grouped": _fake_w4a4_gemm_grouped,
}
