"""The linears and norms of a decoder block that learns."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from calibrate import products
from calibrate.experts import routing
from calibrate.quantizer import (
    fake_quantize_activation,
    fake_quantize_weight,
    quantized_channels,
    weight_bounds,
)
from calibrate.recipe import Recipe
from sliderquant_vllm.format import LinearScheme

SCALE_FLOOR = 1e-2


class CalibrationLinear(nn.Module):
    """A linear that computes with its 16-bit weight or with the fake-quantized one that its block prepared.

    The quantized weight is ``Q(weight * in_scale + lora_b @ lora_a / rank + offset * step)`` over the range
    ``bounds * clip``; with a scale of the output channels all of it is divided by that.

    Calibrated: ``bounds`` fp32 [2, N, G], the range at the start, and ``clip`` of the same shape, a factor on it;
    ``lora_a`` [rank, K] and ``lora_b`` [N, rank]; ``offset`` [N, K], in steps of the range at the start.

    Args:
        linear: of torch, or a router of transformers.
    """

    def __init__(self, linear: nn.Module, scheme: LinearScheme | None, recipe: Recipe, generator: torch.Generator):
        super().__init__()
        self.scheme = scheme
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        bias = getattr(linear, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.product = products.linear if isinstance(linear, nn.Linear) else routing(linear)
        self.lora_a = self.lora_b = self.offset = None
        self.input_is_quantized = False
        self.hadamard: int | None = None  # block size
        self.computed: tuple[Tensor, Tensor | None, int] | None = None
        self.together: Together | None = None
        if scheme is None:
            return
        self.register_buffer("bounds", weight_bounds(self.weight, scheme.weights))
        self.clip = nn.Parameter(torch.ones_like(self.bounds), requires_grad=recipe.learns("clip"))
        if recipe.learns("lora"):
            out_features, in_features = self.weight.shape
            lora_a = torch.empty(recipe.lora_rank, in_features)
            nn.init.kaiming_uniform_(lora_a, a=5**0.5, generator=generator)
            self.lora_a = nn.Parameter(lora_a.to(self.weight.device))
            self.lora_b = nn.Parameter(self.weight.new_zeros(out_features, recipe.lora_rank))
        if recipe.has_offset:
            self.offset = nn.Parameter(torch.zeros_like(self.weight), requires_grad=recipe.learns("rounding"))

    def step(self) -> Tensor:
        """Distance of neighbouring codes at the start, fp32 [N, G]."""
        return (self.bounds[0] - self.bounds[1]) / self.scheme.weights.max_code

    def effective(self, in_scale: Tensor | None, out_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias after channel scaling, low-rank adaptation and offset: what is quantized.

        Args:
            in_scale: [K] the input was divided by it; out_scale: [N] the output is to be divided by it.
        """
        weight, bias = self.weight, self.bias
        if in_scale is not None:
            weight = weight * in_scale
        if self.lora_a is not None:
            weight = torch.addmm(weight, self.lora_b, self.lora_a, alpha=1 / self.lora_a.shape[0])
        if self.offset is not None:
            step = self.step()
            if step.shape[1] == 1:
                weight = torch.addcmul(weight, self.offset, step)
            else:
                weight = weight + (self.offset.unflatten(1, (step.shape[1], -1)) * step.unsqueeze(2)).flatten(1)
        if out_scale is not None:
            weight = weight / out_scale.unsqueeze(1)
            bias = None if bias is None else bias / out_scale
        return weight, bias

    def range(self, out_scale: Tensor | None) -> Tensor:
        """Upper and lower bound of what is quantized, [2, N, G]."""
        bounds = self.bounds * self.clip
        return bounds if out_scale is None else bounds / out_scale.view(1, -1, 1)

    @torch.no_grad()
    def recenter(self, in_scale: Tensor | None) -> None:
        """Move every weight half way to the value of its code; codes stay.

        Straight-through learning leaves many weights at the edge of two codes, where any further step flips them
        (Nagel et al., arXiv 2203.11086).
        """
        if self.offset is None:
            return
        weight, _ = self.effective(in_scale, None)
        values = fake_quantize_weight(weight, self.range(None), self.scheme.weights, weight.shape[1])
        step = self.step().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(2)
        moved = (values - weight).unflatten(1, (step.shape[1], -1)) / step
        # What lies beyond the range has clipped to its code and is far from any edge.
        self.offset += torch.where(moved.abs() <= 0.5, moved / 2, 0).flatten(1)

    def prepare(self, in_scale: Tensor | None, out_scale: Tensor | None, ratio: float) -> None:
        """Compute the fake-quantized weight that the following forward calls use; at ratio 0 nothing is quantized."""
        weight, bias = self.effective(in_scale, out_scale)
        channels = 0
        if self.scheme is not None and ratio:
            channels = quantized_channels(ratio, weight.shape[1], self.scheme.weights)
            weight = fake_quantize_weight(weight, self.range(out_scale), self.scheme.weights, channels)
        self.computed = (weight, bias, channels)

    def transform_input(self, x: Tensor) -> Tensor:
        return x if self.hadamard is None else products.hadamard(x.float(), self.hadamard)

    def quantize_input(self, x: Tensor) -> Tensor:
        x = self.transform_input(x)
        if self.computed is None or not self.computed[2] or self.scheme.activations is None:
            return x
        return fake_quantize_activation(x.float(), self.scheme.activations, self.computed[2])

    def forward(self, x: Tensor) -> Tensor:
        if self.together is not None and self.together.computed is not None:
            return self.together.output(self, x)
        x = x if self.input_is_quantized else self.quantize_input(x)
        weight, bias = (self.weight, self.bias) if self.computed is None else self.computed[:2]
        return self.product(x, weight, bias)


class Together:
    """Linears that read one input, all of them whenever one does: while they learn they are one matrix product.

    Attributes:
        computed: weights that lie below each other, in the dtype of their product; None where every linear is a product
            of its own.
    """

    def __init__(self, linears: list[CalibrationLinear]):
        self.linears = linears
        self.computed: Tensor | None = None
        self._input: Tensor | None = None
        self._outputs: dict[CalibrationLinear, Tensor] = {}
        for linear in linears:
            linear.together = weakref.proxy(self)  # or weights would wait for the garbage collector

    def set(self, computed: Tensor | None) -> None:
        self.computed, self._input, self._outputs = computed, None, {}

    def output(self, linear: CalibrationLinear, x: Tensor) -> Tensor:
        if x is not self._input or linear not in self._outputs:
            quantized = x if linear.input_is_quantized else linear.quantize_input(x)
            rows = [each.weight.shape[0] for each in self.linears]
            self._input = x
            self._outputs = dict(zip(self.linears, products.linears(quantized, self.computed, rows), strict=True))
        output, bias = self._outputs.pop(linear), linear.computed[1]
        if not self._outputs:
            self._input = None  # nothing is held beyond the last reader
        return output if bias is None else output + bias


class CalibrationNorm(nn.Module):
    """A norm with a gain, whose output is shifted, divided by a channel scale, and quantized once for all its readers.

    The readers run as one matrix product when served, so they have one scheme. With a router among them, which
    reads 16 bits, everyone quantizes its own input.

    Calibrated: ``gain`` fp32 [hidden], a factor on the norm's weight that end-to-end tuning may learn; ``shift`` of the
    same shape, added behind the norm and served as a bias of its readers (D2Quant's deviation-aware correction, arXiv
    2602.02546), None where there is none.
    """

    def __init__(self, norm: nn.Module, readers: list[CalibrationLinear], shifted: bool, recipe: Recipe):
        super().__init__()
        self.norm = norm
        self.computed: tuple[Tensor, Tensor | None] | None = None  # weight and shift, behind gain and channel scale
        self.gain = nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)
        self.shift = None
        if shifted:
            self.shift = nn.Parameter(torch.zeros_like(norm.weight), requires_grad=recipe.learns("shift"))
        self._quantizer = None
        if readers and all(reader.scheme is not None for reader in readers):
            self._quantizer = [readers[0]]  # in a list: not a submodule of the norm
            for reader in readers:
                reader.input_is_quantized = True

    def forward(self, x: Tensor) -> Tensor:
        if self.computed is None:
            x = self.norm(x)
        else:
            x = products.rms_norm(x.float(), *self.computed, self.norm.variance_epsilon)
        return x if self._quantizer is None else self._quantizer[0].quantize_input(x)

    def prepare(self, scale: Tensor | None) -> None:
        """Compute what acts on the normalized tokens, for the following forward calls."""
        gain, shift = (value if value is None or scale is None else value / scale for value in (self.gain, self.shift))
        self.computed = (self.norm.weight * gain, shift)
