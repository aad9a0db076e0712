"""Decoder-block adapters: which linears, norms and scaling pairs a model family has, and a block that learns.

A family is one row of ``FAMILIES``. ``CalibrationBlock`` wraps the decoder layer of transformers itself, so
attention, rotary embedding and activation are the library's; only linears and norms are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibrate.quantizer import (
    clip_parameters,
    fake_quantize_activation,
    fake_quantize_weight,
    quantize_weight,
    quantized_channels,
)
from calibrate.recipe import Recipe
from calibrate.transforms import Rotation, fold_norm
from sliderquant_vllm.format import LinearScheme

SCALE_FLOOR = 1e-2


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Module names inside a decoder block of the pre-norm, gated-MLP kind."""

    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    @property
    def linears(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """Norm -> the linears that read it, and with them the residual stream."""
        return {self.attention_norm: (self.query, self.key, self.value), self.mlp_norm: (self.gate, self.up)}

    @property
    def writers(self) -> tuple[str, ...]:
        """The linears that write the residual stream."""
        return (self.output, self.down)


FAMILIES: dict[str, BlockLayout] = {name: BlockLayout() for name in ("llama", "mistral", "qwen2", "qwen3")}


def rotate_block(tensors: dict[str, Tensor], layout: BlockLayout, stream: Rotation, head: Rotation) -> None:
    """Fold the norms into their readers and rotate the residual stream and the value heads, in place.

    Args:
        tensors: "module.weight" / "module.bias" of one block, any floating dtype.
        stream: rotation of the hidden size; head: rotation of one attention head.
    """
    head_dim = head.signs.numel()
    for norm, readers in layout.readers.items():
        for name in readers:
            weight = f"{name}.weight"
            tensors[weight] = stream.apply(fold_norm(tensors[f"{norm}.weight"], tensors[weight]))
        tensors[f"{norm}.weight"] = torch.ones_like(tensors[f"{norm}.weight"])
    for name in layout.writers:
        for kind in ("weight", "bias"):
            if (key := f"{name}.{kind}") in tensors:
                tensors[key] = stream.apply_left(tensors[key])
    for kind in ("weight", "bias"):
        if (key := f"{layout.value}.{kind}") in tensors:
            heads = tensors[key].unflatten(0, (-1, head_dim)).movedim(1, -1)
            tensors[key] = head.apply(heads).movedim(-1, 1).flatten(0, 1).contiguous()
    output = f"{layout.output}.weight"
    tensors[output] = head.apply(tensors[output].unflatten(1, (-1, head_dim))).flatten(1)


class CalibrationLinear(nn.Module):
    """A linear that computes with its 16-bit weight or with the fake-quantized one that its block prepared.

    Learned: ``lora_a`` [rank, K], ``lora_b`` [N, rank] and the clipping logits ``clip`` [2, N, G].
    """

    def __init__(self, linear: nn.Linear, scheme: LinearScheme | None, recipe: Recipe, generator: torch.Generator):
        super().__init__()
        self.scheme = scheme
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.lora_a = self.lora_b = self.clip = None
        self.input_is_quantized = False
        self.computed: tuple[Tensor, Tensor | None, int] | None = None
        if scheme is None:
            return
        learns = recipe.method == "sliderquant"
        self.clip = nn.Parameter(
            clip_parameters(self.weight, scheme.weights, learns and recipe.learn_clip),
            requires_grad=learns and recipe.learn_clip,
        )
        if learns and recipe.lora_rank:
            out_features, in_features = self.weight.shape
            lora_a = torch.empty(recipe.lora_rank, in_features)
            nn.init.kaiming_uniform_(lora_a, a=5**0.5, generator=generator)
            self.lora_a = nn.Parameter(lora_a.to(self.weight.device))
            self.lora_b = nn.Parameter(self.weight.new_zeros(out_features, recipe.lora_rank))

    def effective(self, in_scale: Tensor | None, out_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias after channel scaling and low-rank adaptation: what is quantized.

        Args:
            in_scale: [K] the input was divided by it; out_scale: [N] the output is to be divided by it.
        """
        weight, bias = self.weight, self.bias
        if in_scale is not None:
            weight = weight * in_scale
        if out_scale is not None:
            weight = weight / out_scale.unsqueeze(1)
            bias = None if bias is None else bias / out_scale
        if self.lora_a is not None:
            weight = torch.addmm(weight, self.lora_b, self.lora_a, alpha=1 / self.lora_a.shape[0])
        return weight, bias

    def prepare(self, in_scale: Tensor | None, out_scale: Tensor | None, ratio: float) -> None:
        """Compute the fake-quantized weight that the following forward calls use."""
        weight, bias = self.effective(in_scale, out_scale)
        channels = weight.shape[1]
        if self.scheme is not None:
            channels = quantized_channels(ratio, channels, self.scheme.weights)
            weight = fake_quantize_weight(weight, self.clip, self.scheme.weights, channels)
        self.computed = (weight, bias, channels)

    def quantize_input(self, x: Tensor) -> Tensor:
        if self.computed is None or self.scheme is None or self.scheme.activations is None:
            return x
        return fake_quantize_activation(x.float(), self.scheme.activations, self.computed[2])

    def forward(self, x: Tensor) -> Tensor:
        if self.computed is None:
            return functional.linear(x, self.weight, self.bias)
        weight, bias, _ = self.computed
        return functional.linear(x if self.input_is_quantized else self.quantize_input(x), weight, bias)


class CalibrationNorm(nn.Module):
    """A norm whose output is divided by a channel scale and quantized once for all its readers.

    The readers run as one matrix product when served, so they have one scheme.
    """

    def __init__(self, norm: nn.Module, readers: list[CalibrationLinear]):
        super().__init__()
        self.norm = norm
        self.scale: Tensor | None = None
        self._first_reader = [readers[0]]  # in a list: not a submodule of the norm
        for reader in readers:
            reader.input_is_quantized = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self._first_reader[0].quantize_input(x if self.scale is None else x / self.scale)


class CalibrationBlock(nn.Module):
    """One decoder block with everything that SliderQuant learns about it.

    Args:
        layer: decoder layer of transformers, weights fp32.
        layout: the names of its parts.
        name: module name in the checkpoint, such as ``model.layers.3``.
        schemes: linear -> scheme, None for one that stays in 16 bits.
        recipe: what is learned.
        seed: of the random part of the initial values.
    """

    def __init__(
        self,
        layer: nn.Module,
        layout: BlockLayout,
        name: str,
        schemes: dict[str, LinearScheme | None],
        recipe: Recipe,
        seed: int,
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layer, self.layout, self.name = layer.requires_grad_(False), layout, name
        self.linears: dict[str, CalibrationLinear] = {}
        for path in layout.linears:
            self.linears[path] = CalibrationLinear(layer.get_submodule(path), schemes[path], recipe, generator)
            layer.set_submodule(path, self.linears[path])
        self.norms: dict[str, CalibrationNorm] = {}
        for path, readers in layout.readers.items():
            self.norms[path] = CalibrationNorm(layer.get_submodule(path), [self.linears[reader] for reader in readers])
            layer.set_submodule(path, self.norms[path])
        self.scales = nn.ParameterDict()
        if recipe.learn_scale and recipe.method == "sliderquant":
            device = self.linears[layout.down].weight.device
            for pair, size in self._scale_sizes().items():
                self.scales[pair] = nn.Parameter(torch.ones(size, device=device))

    def _scale_sizes(self) -> dict[str, int]:
        """Scaling pair -> number of channels. q <-> k is absent: a scale per output channel commutes with rounding."""
        linears, layout = self.linears, self.layout
        return {
            "attention_norm": linears[layout.query].weight.shape[1],
            "mlp_norm": linears[layout.gate].weight.shape[1],
            "value_output": linears[layout.value].weight.shape[0],
            "up_down": linears[layout.down].weight.shape[1],
        }

    def channel_scales(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Linear or norm -> (in_scale, out_scale)."""
        layout = self.layout
        alpha = {pair: value.clamp(min=SCALE_FLOOR) for pair, value in self.scales.items()}
        attention, mlp, value, up = map(alpha.get, ("attention_norm", "mlp_norm", "value_output", "up_down"))
        return {
            layout.attention_norm: (None, attention),
            layout.mlp_norm: (None, mlp),
            layout.query: (attention, None),
            layout.key: (attention, None),
            layout.value: (attention, value),
            layout.output: (self._per_query_head(value), None),
            layout.gate: (mlp, None),
            layout.up: (mlp, up),
            layout.down: (up, None),
        }

    def _per_query_head(self, value_scale: Tensor | None) -> Tensor | None:
        """Repeat a scale of the value channels for every query head that shares them."""
        if value_scale is None:
            return None
        head_dim = self.layer.self_attn.head_dim
        query_heads = self.linears[self.layout.output].weight.shape[1] // head_dim
        key_heads = value_scale.numel() // head_dim
        return value_scale.view(key_heads, head_dim).repeat_interleave(query_heads // key_heads, 0).flatten()

    def learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and value of every learned parameter."""
        return ((name, value) for name, value in self.named_parameters() if value.requires_grad)

    def learned_state(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.learned()}

    @torch.no_grad()
    def load_learned(self, state: dict[str, Tensor]) -> None:
        for name, value in self.learned():
            value.copy_(state[name])

    def prepare(self, ratio: float) -> None:
        """Fake-quantize every weight once, for the forward calls until the next ``prepare``."""
        scales = self.channel_scales()
        for path, linear in self.linears.items():
            linear.prepare(*scales[path], ratio)
        for path, norm in self.norms.items():
            norm.scale = scales[path][1]

    def forward(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """fp32 [batch, seqlen, hidden] -> the same; causal, no padding. Matrix products in bf16 on a GPU."""
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=hidden.is_cuda):
            return self.layer(hidden, attention_mask=None, position_embeddings=position_embeddings).float()

    @torch.no_grad()
    def snap_scales(self, dtype: torch.dtype) -> None:
        """Move the scales of the norms to where ``norm weight / scale`` is exact in the dtype that is served."""
        for pair, path in (
            ("attention_norm", self.layout.attention_norm),
            ("mlp_norm", self.layout.mlp_norm),
        ):
            if pair in self.scales:
                weight = self.norms[path].norm.weight
                served = (weight / self.scales[pair].clamp(min=SCALE_FLOOR)).to(dtype).float()
                exact = torch.where(served != 0, weight / served, self.scales[pair])
                self.scales[pair].copy_(exact)

    @torch.no_grad()
    def quantized(self) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], dict[str, Tensor]]:
        """What is exported.

        Returns:
            Quantized linears: path -> (codes uint8 [N, K], scale [N, G], zero_point uint8 [N, G]); and the other
            tensors of the block by their names, fp32: norms, biases, weights left in 16 bits.
        """
        scales = self.channel_scales()
        replaced = (*self.linears, *self.norms)
        others = {
            name: value
            for name, value in self.layer.state_dict().items()
            if not name.startswith(tuple(f"{path}." for path in replaced))
        }
        for path, norm in self.norms.items():
            scale = scales[path][1]
            others[f"{path}.weight"] = norm.norm.weight if scale is None else norm.norm.weight / scale
        codes = {}
        for path, linear in self.linears.items():
            weight, bias = linear.effective(*scales[path])
            if bias is not None:
                others[f"{path}.bias"] = bias
            if linear.scheme is None:
                others[f"{path}.weight"] = weight
            else:
                codes[path] = quantize_weight(weight, linear.clip, linear.scheme.weights)
        return codes, others
