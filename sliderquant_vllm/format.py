"""The checkpoint format, version 1: the schema of ``quantization_config`` and its validation.

The tensors of a linear stand in ``sliderquant_vllm.packing``. Imports the standard library only.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT_VERSION = 1
QUANT_METHOD = "sliderquant"
WEIGHT_BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (4, 8)
GROUP_SIZES = (-1, 32, 64, 128)
HADAMARD_BLOCK_SIZES = tuple(2**power for power in range(1, 13))
# What the kernels take: input channels in whole blocks (csrc/layout.h), sums within int32 (csrc/binding/products.cpp).
BLOCK_CODES = 32
MAX_SUM, MAX_ACTIVATION_CODE = 2**31 - 1, 255

# Modules that a serving engine runs as one matrix product: their parts must share one scheme.
FUSED_MODULES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# The same of all experts of a block, NAME.experts.NUMBER.MATRIX.
EXPERT_MATRICES = (("gate_proj", "up_proj"), ("down_proj",), ("w1", "w3"), ("w2",))


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
    """The whole scheme of one linear.

    Attributes:
        activations: None is weight-only.
        hadamard_block_size: the weight takes its input transformed in blocks of so many channels; None is as it comes.
        added_bias: the checkpoint adds a bias where the architecture has none.
    """

    weights: WeightScheme
    activations: ActivationScheme | None = None
    hadamard_block_size: int | None = None
    added_bias: bool = False

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
        if self.hadamard_block_size is not None and in_features % self.hadamard_block_size:
            return (
                f"block_size {self.hadamard_block_size} of 'online_hadamard' does not divide its {in_features} "
                "input channels"
            )
        return self.weights.shape_problem(out_features, in_features)

    def __str__(self) -> str:
        bits = f"W{self.weights.bits}A{self.activations.bits if self.activations else 16}"
        group = "" if self.weights.group_size == -1 else f" group {self.weights.group_size}"
        rotation = "" if self.hadamard_block_size is None else f", Hadamard {self.hadamard_block_size}"
        bias = ", added bias" if self.added_bias else ""
        return f"{bits}{group} {'symmetric' if self.weights.symmetric else 'asymmetric'}{rotation}{bias}"


def matches(pattern: str, name: str) -> bool:
    """Whether a module name is the pattern, or matches it whole where the pattern starts with ``re:``."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return pattern == name


def parts_of(name: str, fused: Mapping[str, Iterable[str]] = FUSED_MODULES) -> list[str]:
    """The names in the checkpoint of the parts of a served module; its own name where it is not fused."""
    stem, _, leaf = name.rpartition(".")
    return [f"{stem}.{part}".lstrip(".") for part in fused.get(leaf, (leaf,))]


@dataclass(frozen=True, slots=True)
class Override:
    """Another scheme for the linears whose name matches; the first match wins."""

    match: str
    weights: WeightScheme
    activations: ActivationScheme | None = None

    def __post_init__(self):
        LinearScheme(self.weights, self.activations)


@dataclass(frozen=True, slots=True)
class OnlineHadamard:
    """The linears whose name matches compute ``W h(x)``; the first match wins.

    ``h`` multiplies every run of ``block_size`` consecutive input channels by the orthonormal Walsh-Hadamard matrix
    in Sylvester's order, before the input is quantized: ``sliderquant_vllm.ops.hadamard``.
    """

    match: str
    block_size: int

    def __post_init__(self):
        _require_choice("block_size", self.block_size, HADAMARD_BLOCK_SIZES)

    @classmethod
    def from_dict(cls, where: str, fields: Mapping) -> OnlineHadamard:
        _require_keys(where, fields, ("match", "block_size"))
        with _place(where):
            return cls(**fields)


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The ``quantization_config`` object of config.json."""

    weights: WeightScheme
    activations: ActivationScheme | None = None
    online_hadamard: tuple[OnlineHadamard, ...] = ()
    added_bias: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: tuple[Override, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        LinearScheme(self.weights, self.activations)
        for where, pattern in self.patterns():
            if not isinstance(pattern, str):
                raise FormatError(f"{where}: expected a name or a 're:' pattern, found {pattern!r}")
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise FormatError(f"{where}: {pattern!r} is no valid pattern: {error}") from None

    def patterns(self) -> Iterator[tuple[str, str]]:
        """(field, pattern) of everything that names modules."""
        yield from (("ignore", pattern) for pattern in self.ignore)
        yield from (("overrides", override.match) for override in self.overrides)
        yield from (("online_hadamard", rotated.match) for rotated in self.online_hadamard)
        yield from (("added_bias", pattern) for pattern in self.added_bias)

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
        optional = ("online_hadamard", "added_bias", "ignore", "overrides", "calibration")
        _require_keys(where, fields, required, optional)
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
                online_hadamard=tuple(
                    OnlineHadamard.from_dict(f"online_hadamard[{index}]", entry)
                    for index, entry in enumerate(_list(fields, "online_hadamard"))
                ),
                added_bias=tuple(_list(fields, "added_bias")),
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
            "online_hadamard": [asdict(rotated) for rotated in self.online_hadamard],
            "added_bias": list(self.added_bias),
            "ignore": list(self.ignore),
            "overrides": [asdict(override) for override in self.overrides],
            "calibration": dict(self.calibration),
        }

    def scheme_for(self, name: str) -> LinearScheme | None:
        """The scheme of the linear of this module name, None where it stays in 16 bits."""
        if any(matches(pattern, name) for pattern in self.ignore):
            return None
        own = next((override for override in self.overrides if matches(override.match, name)), self)
        rotated = next((entry for entry in self.online_hadamard if matches(entry.match, name)), None)
        return LinearScheme(
            own.weights,
            own.activations,
            hadamard_block_size=rotated.block_size if rotated else None,
            added_bias=any(matches(pattern, name) for pattern in self.added_bias),
        )

    def scheme_for_fused(self, name: str, fused: Mapping[str, Iterable[str]] = FUSED_MODULES) -> LinearScheme | None:
        """The scheme of a module that may be a fused one. Raises FormatError where its parts disagree.

        Args:
            name: module name in the serving engine, such as ``model.layers.0.self_attn.qkv_proj``.
            fused: last component of a fused module -> last components of its parts in the checkpoint.
        """
        return self.common_scheme(name, parts_of(name, fused))

    def common_scheme(self, name: str, parts: Iterable[str]) -> LinearScheme | None:
        """The scheme of linears that run as one matrix product ``name``. Raises FormatError where they disagree."""
        schemes: dict[LinearScheme | None, list[str]] = {}
        for part in parts:
            schemes.setdefault(self.scheme_for(part), []).append(part)
        if len(schemes) > 1:
            found = ", but ".join(f"{_few(parts)}: {scheme or '16-bit'}" for scheme, parts in schemes.items())
            raise FormatError(
                f"{name}: its parts run as one matrix product and need one scheme, found {found}; "
                "make the patterns of 'ignore', 'overrides', 'online_hadamard' and 'added_bias' treat them alike"
            )
        return next(iter(schemes))


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


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
