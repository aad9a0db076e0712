"""The tensors of one quantized linear in a checkpoint: bit packing and dequantization. Imports torch only.

Bit packing: the codes of one row form a little-endian bit stream in which code ``k`` occupies bits
``[bits*k, bits*k + bits)``, stored as int32 words. For 2, 4 and 8 bits this is byte for byte the
``pack-quantized`` layout of compressed-tensors; for 3 bits it wastes nothing.

Dequantization, the one formula: ``w[n, k] = (code[n, k] - zero_point[n, g]) * scale[n, g]`` with
``g = k // group_size`` (0 when per channel); symmetric means ``zero_point = 2**(bits - 1)``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sliderquant_vllm.format import WEIGHT_BITS, FormatError, WeightScheme

SCALE_DTYPES = (torch.bfloat16, torch.float32)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned codes along the last dimension.

    Args:
        codes: [..., K] any integer dtype, values in [0, 2**bits - 1].
        bits: 2, 3, 4 or 8; ``K * bits`` must be a multiple of 32.

    Returns:
        int32 [..., K * bits / 32], the little-endian bit stream of each row.
    """
    count = codes.shape[-1]
    if count * bits % 32:
        raise FormatError(f"pack_codes: {count} codes of {bits} bits do not fill whole words")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        found = [int(codes.min()), int(codes.max())]
        raise FormatError(f"pack_codes: expected codes in [0, {2**bits - 1}], found {found}")
    period, words = _period(bits)
    lanes = codes.to(torch.int64).unflatten(-1, (count // period, period))
    packed = torch.zeros(*lanes.shape[:-1], words + 1, dtype=torch.int64, device=codes.device)
    for lane in range(period):
        word, shift = divmod(lane * bits, 32)
        shifted = lanes[..., lane] << shift
        packed[..., word] |= shifted & 0xFFFFFFFF
        packed[..., word + 1] |= shifted >> 32
    return packed[..., :words].flatten(-2).to(torch.int32)


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Invert ``pack_codes``: int32 [..., W] -> uint8 [..., W * 32 / bits]."""
    period, words = _period(bits)
    if packed.shape[-1] % words:
        raise FormatError(f"unpack_codes: {packed.shape[-1]} words are not a whole number of {bits}-bit rows")
    stream = packed.to(torch.int64).unflatten(-1, (packed.shape[-1] // words, words)) & 0xFFFFFFFF
    codes = torch.empty(*stream.shape[:-1], period, dtype=torch.uint8, device=packed.device)
    for lane in range(period):
        word, shift = divmod(lane * bits, 32)
        value = stream[..., word] >> shift
        if shift + bits > 32:
            value = value | (stream[..., word + 1] << (32 - shift))
        codes[..., lane] = value & (2**bits - 1)
    return codes.flatten(-2)


def _period(bits: int) -> tuple[int, int]:
    """Smallest (codes, words) after which the bit stream is at a word boundary again."""
    if bits not in WEIGHT_BITS:
        raise FormatError(f"bits: expected one of {list(WEIGHT_BITS)}, found {bits!r}")
    return (32, bits) if 32 % bits else (32 // bits, 1)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: WeightScheme
) -> torch.Tensor:
    """``(codes - zero_point) * scale``.

    Args:
        codes: [N, K] unsigned.
        scale: [N, G]; the result has its dtype.
        zero_point: [N, G] unsigned, or None when symmetric.

    Returns:
        [N, K] in the dtype of ``scale``.
    """
    groups = scale.shape[1]
    zero = scheme.symmetric_zero_point if zero_point is None else zero_point.to(torch.int32).unsqueeze(-1)
    centred = codes.to(torch.int32).unflatten(1, (groups, -1)) - zero
    return (centred.to(scale.dtype) * scale.unsqueeze(-1)).flatten(1)


def pack_linear(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: WeightScheme
) -> dict[str, torch.Tensor]:
    """The tensors of one linear as they stand in a checkpoint, by suffix.

    Args:
        codes: [N, K] unsigned.
        scale: [N, G] bf16 or fp32.
        zero_point: [N, G] unsigned, None exactly when the scheme is symmetric.
    """
    if (zero_point is None) != scheme.symmetric:
        raise FormatError(f"pack_linear: zero_point must be None exactly for a symmetric scheme, got {scheme}")
    tensors = {
        "weight_packed": pack_codes(codes, scheme.bits).contiguous(),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero_point is not None:
        tensors["weight_zero_point"] = pack_codes(zero_point.T, scheme.bits).T.contiguous()
    return tensors


def unpack_linear(
    tensors: Mapping[str, torch.Tensor], scheme: WeightScheme
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Invert ``pack_linear``: (codes uint8 [N, K], scale [N, G], zero_point uint8 [N, G] or None)."""
    zero_point = tensors.get("weight_zero_point")
    if zero_point is not None:
        zero_point = unpack_codes(zero_point.T, scheme.bits).T
    return unpack_codes(tensors["weight_packed"], scheme.bits), tensors["weight_scale"], zero_point


def expected_tensors(
    scheme: WeightScheme, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Suffix -> (shape, allowed dtypes) of the tensors that a linear must have."""
    groups = scheme.groups(in_features)
    expected = {
        "weight_packed": ((out_features, in_features * scheme.bits // 32), (torch.int32,)),
        "weight_scale": ((out_features, groups), SCALE_DTYPES),
        "weight_shape": ((2,), (torch.int64,)),
    }
    if not scheme.symmetric:
        expected["weight_zero_point"] = ((out_features * scheme.bits // 32, groups), (torch.int32,))
    return expected
