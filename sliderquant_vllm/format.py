"""The checkpoint format, version 1: config schema, bit packing, validation. Imports torch only.

Bit packing: the codes of one row form a little-endian bit stream in which code ``k`` occupies bits
``[bits*k, bits*k + bits)``, stored as int32 words. For 2, 4 and 8 bits this is byte for byte the
``pack-quantized`` layout of compressed-tensors; for 3 bits it wastes nothing.

Dequantization, the one formula: ``w[n, k] = (code[n, k] - zero_point[n, g]) * scale[n, g]`` with
``g = k // group_size`` (0 when per channel); symmetric means ``zero_point = 2**(bits - 1)``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

FORMAT_VERSION = 1
QUANT_METHOD = "sliderquant"
WEIGHT_BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (4, 8)
GROUP_SIZES = (-1, 32, 64, 128)
# What the kernels take: input channels in whole blocks (csrc/layout.h), integer sums within int32 (csrc/register.cpp).
BLOCK_CODES = 32
MAX_SUM, MAX_ACTIVATION_CODE = 2**31 - 1, 255
SCALE_DTYPES = (torch.bfloat16, torch.float32)

# Modules that a serving engine runs as one matrix product: their parts must share one scheme.
FUSED_MODULES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class FormatError(ValueError):
    """A checkpoint or its config departs from the format; the message names what, where and the remedy."""


def _require_keys(where: str, found: Mapping, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    if not isinstance(found, Mapping):
        raise FormatError(f"{where}: expected an object, found {found!r}")
    required = set(required)
    if missing := required - set(found):
        raise FormatError(f"{where}: missing field(s) {sorted(missing)}; write the checkpoint again")
    if unknown := set(found) - required - set(optional):
        raise FormatError(
            f"{where}: unknown field(s) {sorted(unknown)}; this version knows {sorted(required | set(optional))}"
        )


def _require_choice(where: str, value: Any, choices: Iterable) -> None:
    choices = tuple(choices)
    if value not in choices or type(value) not in {type(choice) for choice in choices}:
        raise FormatError(f"{where}: expected one of {list(choices)}, found {value!r}")


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How the weight of a linear is quantized. ``group_size`` -1 is one scale per output channel."""

    bits: int
    group_size: int = -1
    symmetric: bool = False

    def __post_init__(self):
        _require_choice("weights.bits", self.bits, WEIGHT_BITS)
        _require_choice("weights.group_size", self.group_size, GROUP_SIZES)
        _require_choice("weights.symmetric", self.symmetric, (True, False))

    @classmethod
    def from_dict(cls, where: str, fields: Mapping) -> WeightScheme:
        _require_keys(where, fields, ("bits", "group_size", "symmetric"))
        return cls(**fields)

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def symmetric_zero_point(self) -> int:
        return 2 ** (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Number of scales per output channel, G."""
        return 1 if self.group_size == -1 else in_features // self.group_size

    def shape_problem(self, out_features: int, in_features: int) -> str | None:
        """Why a weight [out_features, in_features] cannot be stored and served under this scheme, or None."""
        # Blocks fill whole 32-bit words at every width.
        if in_features % BLOCK_CODES:
            return f"its {in_features} input channels are not a multiple of {BLOCK_CODES}"
        if self.group_size != -1 and in_features % self.group_size:
            return f"group_size {self.group_size} does not divide its {in_features} input channels"
        if not self.symmetric and out_features * self.bits % 32:
            return f"{out_features} zero points of {self.bits} bits do not fill whole 32-bit words"
        return None


@dataclass(frozen=True, slots=True)
class ActivationScheme:
    """How the input of a linear is quantized at run time: ``x[m, k] ~ (a[m, k] - za[m]) * sa[m]``."""

    bits: int
    symmetric: bool = False
    dynamic: bool = True
    granularity: str = "token"

    def __post_init__(self):
        _require_choice("activations.bits", self.bits, ACTIVATION_BITS)
        _require_choice("activations.symmetric", self.symmetric, (True, False))
        _require_choice("activations.dynamic", self.dynamic, (True,))
        _require_choice("activations.granularity", self.granularity, ("token",))

    @classmethod
    def from_dict(cls, where: str, fields: Mapping | None) -> ActivationScheme | None:
        if fields is None:
            return None
        _require_keys(where, fields, ("bits", "symmetric", "dynamic", "granularity"))
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class LinearScheme:
    """The whole scheme of one linear; ``activations`` None is weight-only."""

    weights: WeightScheme
    activations: ActivationScheme | None = None

    def __post_init__(self):
        if self.activations is not None and self.weights.group_size != -1:
            raise FormatError(
                f"weights.group_size: expected -1 (per channel) beside quantized activations, found "
                f"{self.weights.group_size}; the integer kernels take one scale per output channel"
            )

    def shape_problem(self, out_features: int, in_features: int) -> str | None:
        """Why a linear [out_features, in_features] cannot be stored and served under this scheme, or None."""
        limit = MAX_SUM // (MAX_ACTIVATION_CODE * self.weights.max_code)
        if self.activations is not None and in_features > limit:
            return (
                f"its {in_features} input channels are more than the {limit} of which {self.weights.bits}-bit integer "
                "sums stay within int32"
            )
        return self.weights.shape_problem(out_features, in_features)

    def __str__(self) -> str:
        bits = f"W{self.weights.bits}A{self.activations.bits if self.activations else 16}"
        group = "" if self.weights.group_size == -1 else f" group {self.weights.group_size}"
        return f"{bits}{group} {'symmetric' if self.weights.symmetric else 'asymmetric'}"


def matches(pattern: str, name: str) -> bool:
    """Whether a module name is the pattern, or matches it whole where the pattern starts with ``re:``."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return pattern == name


@dataclass(frozen=True, slots=True)
class Override:
    """Another scheme for the linears whose name matches; the first match wins."""

    match: str
    weights: WeightScheme
    activations: ActivationScheme | None = None

    def __post_init__(self):
        LinearScheme(self.weights, self.activations)

    @property
    def scheme(self) -> LinearScheme:
        return LinearScheme(self.weights, self.activations)


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The ``quantization_config`` object of config.json."""

    weights: WeightScheme
    activations: ActivationScheme | None = None
    online_hadamard: tuple = ()
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: tuple[Override, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        LinearScheme(self.weights, self.activations)
        if self.online_hadamard:
            found = list(self.online_hadamard)
            raise FormatError(f"online_hadamard: this version expects [], found {found!r}; install a newer version")
        for pattern in (*self.ignore, *(override.match for override in self.overrides)):
            if not isinstance(pattern, str):
                raise FormatError(f"ignore/overrides: expected a name or a 're:' pattern, found {pattern!r}")
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise FormatError(f"ignore/overrides: {pattern!r} is no valid pattern: {error}") from None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantizationConfig:
        """Validate the JSON object. Raises FormatError that names the field, what was expected and found."""
        where = "quantization_config"
        if not isinstance(fields, Mapping):
            raise FormatError(f"{where}: expected an object, found {fields!r}")
        if (method := fields.get("quant_method")) != QUANT_METHOD:
            raise FormatError(f"{where}.quant_method: expected {QUANT_METHOD!r}, found {method!r}")
        if (version := fields.get("format_version")) != FORMAT_VERSION or isinstance(version, bool):
            raise FormatError(
                f"{where}.format_version: this version reads {FORMAT_VERSION}, found {version!r}; "
                "install the version of sliderquant-vllm that wrote it, or quantize the model again"
            )
        required = ("quant_method", "format_version", "weights", "activations")
        _require_keys(where, fields, required, ("online_hadamard", "ignore", "overrides", "calibration"))
        with _place(where):
            activations = ActivationScheme.from_dict("activations", fields["activations"])
            overrides = []
            for index, entry in enumerate(_list(fields, "overrides")):
                place = f"overrides[{index}]"
                _require_keys(place, entry, ("match", "weights"), ("activations",))
                with _place(place):
                    own = activations
                    if "activations" in entry:
                        own = ActivationScheme.from_dict("activations", entry["activations"])
                    weights = WeightScheme.from_dict("weights", entry["weights"])
                    overrides.append(Override(entry["match"], weights, own))
            calibration = fields.get("calibration", {})
            if not isinstance(calibration, Mapping):
                raise FormatError(f"calibration: expected an object, found {calibration!r}")
            return cls(
                weights=WeightScheme.from_dict("weights", fields["weights"]),
                activations=activations,
                online_hadamard=tuple(_list(fields, "online_hadamard")),
                ignore=tuple(_list(fields, "ignore")),
                overrides=tuple(overrides),
                calibration=calibration,
            )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, with every field spelled out."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "weights": asdict(self.weights),
            "activations": asdict(self.activations) if self.activations else None,
            "online_hadamard": list(self.online_hadamard),
            "ignore": list(self.ignore),
            "overrides": [asdict(override) for override in self.overrides],
            "calibration": dict(self.calibration),
        }

    def scheme_for(self, name: str) -> LinearScheme | None:
        """The scheme of the linear of this module name, None where it stays in 16 bits."""
        if any(matches(pattern, name) for pattern in self.ignore):
            return None
        for override in self.overrides:
            if matches(override.match, name):
                return override.scheme
        return LinearScheme(self.weights, self.activations)

    def scheme_for_fused(self, name: str, fused: Mapping[str, Iterable[str]] = FUSED_MODULES) -> LinearScheme | None:
        """The scheme of a module that may be a fused one. Raises FormatError where its parts disagree.

        Args:
            name: module name in the serving engine, such as ``model.layers.0.self_attn.qkv_proj``.
            fused: last component of a fused module -> last components of its parts in the checkpoint.
        """
        stem, _, leaf = name.rpartition(".")
        parts = [f"{stem}.{part}".lstrip(".") for part in fused.get(leaf, (leaf,))]
        schemes = {part: self.scheme_for(part) for part in parts}
        if len(set(schemes.values())) > 1:
            found = ", ".join(f"{part}: {scheme or '16-bit'}" for part, scheme in schemes.items())
            raise FormatError(
                f"{name}: its parts run as one matrix product and need one scheme, found {found}; "
                "make the patterns of 'ignore' and 'overrides' treat them alike"
            )
        return schemes[parts[0]]


@contextlib.contextmanager
def _place(where: str) -> Iterator[None]:
    """Say in which object a faulty field stands."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{where}.{error}") from None


def _list(fields: Mapping, key: str) -> list:
    value = fields.get(key, [])
    if not isinstance(value, list | tuple):
        raise FormatError(f"{key}: expected a list, found {value!r}")
    return list(value)


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
    _require_choice("bits", bits, WEIGHT_BITS)
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
