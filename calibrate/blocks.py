"""A decoder block that learns: the layer of transformers itself, with its linears and norms replaced.

Attention, rotary embedding and activation stay the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint

from calibrate import products
from calibrate.activations import Activations
from calibrate.experts import Experts
from calibrate.layouts import BlockLayout
from calibrate.modules import SCALE_FLOOR, CalibrationLinear, CalibrationNorm, Together
from calibrate.quantizer import quantize_weight
from calibrate.recipe import Recipe
from sliderquant_vllm.format import ActivationScheme, LinearScheme


class CalibrationBlock(nn.Module):
    """One decoder block with everything that is calibrated about it.

    Args:
        layer: decoder layer of transformers, weights fp32.
        layout: the names of its parts.
        name: module name in the checkpoint, such as ``model.layers.3``.
        schemes: linear -> scheme, None for one that stays in 16 bits.
        recipe: what is learned.
        seed: of the random part of the initial values.
        hadamard: linear -> block size of the online Hadamard before it; its weight has taken it up already.
    """

    def __init__(
        self,
        layer: nn.Module,
        layout: BlockLayout,
        name: str,
        schemes: dict[str, LinearScheme | None],
        recipe: Recipe,
        seed: int,
        hadamard: dict[str, int],
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layer, self.layout, self.name = layer.requires_grad_(False), layout, name
        self.linears: dict[str, CalibrationLinear] = {}
        for path in (*layout.linears, *layout.routers):
            linear = CalibrationLinear(layer.get_submodule(path), schemes.get(path), recipe, generator)
            linear.hadamard = hadamard.get(path)
            self.linears[path] = linear
            layer.set_submodule(path, linear)
        dense = [(layout.mlps[0].gate, layout.mlps[0].up)] if self.experts is None else []
        read_together = ((layout.query, layout.key, layout.value), *dense)
        self.together = [Together([self.linears[path] for path in paths]) for paths in read_together]
        if self.experts is not None and schemes[layout.mlps[0].gate] is not None:
            # The router needs 16 bits, so the norm cannot quantize; each expert would, for every token that it gets.
            gates_and_ups = [self.linears[path] for path in layout.fused_experts[0]]
            self.experts.quantize_input = gates_and_ups[0].quantize_input
            for linear in gates_and_ups:
                linear.input_is_quantized = True
        self.norms: dict[str, CalibrationNorm] = {}
        for path, readers in layout.readers.items():
            read_by = [self.linears[reader] for reader in readers]
            shifted = recipe.correction and path == layout.mlp_norm and all(map(schemes.get, readers))
            self.norms[path] = CalibrationNorm(layer.get_submodule(path), read_by, shifted, recipe)
            layer.set_submodule(path, self.norms[path])
        for path in layout.head_norms(layer):
            self.norms[path] = CalibrationNorm(layer.get_submodule(path), [], False, recipe)
            layer.set_submodule(path, self.norms[path])
        self.scales = nn.ParameterDict()
        if recipe.has_scales:
            device = self.linears[layout.output].weight.device
            for pair, size in self._scale_sizes(hadamard).items():
                self.scales[pair] = nn.Parameter(torch.ones(size, device=device), recipe.learns("scale"))
        self.kv_scheme = None
        if recipe.kv_bits != 16:
            self.kv_scheme = ActivationScheme(recipe.kv_bits)
            if recipe.has_scales:
                heads = 1 if layout.head_norms(layer) else self.key_heads
                size = (heads, self.layer.self_attn.head_dim // 2)
                self.scales["query_key"] = nn.Parameter(torch.ones(size, device=device), recipe.learns("scale"))

    @property
    def experts(self) -> Experts | None:
        """The routed experts; None in a dense block."""
        return self.layer.get_submodule(self.layout.experts) if self.layout.experts else None

    def _scale_sizes(self, hadamard: dict[str, int]) -> dict[str, int]:
        """Scaling pair -> number of channels. A pair with a transform between its two linears cannot be scaled."""
        linears, layout = self.linears, self.layout
        sizes = {
            "attention_norm": linears[layout.query].weight.shape[1],
            "mlp_norm": linears[layout.mlps[0].gate].weight.shape[1],
            "value_output": linears[layout.value].weight.shape[0],
        }
        for mlp in layout.mlps:
            if mlp.down not in hadamard:
                sizes[mlp.pair] = linears[mlp.down].weight.shape[1]
        return sizes

    def channel_scales(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Linear or norm -> (in_scale, out_scale)."""
        layout = self.layout
        alpha = {pair: value.clamp(min=SCALE_FLOOR) for pair, value in self.scales.items()}
        attention, mlp, value = map(alpha.get, ("attention_norm", "mlp_norm", "value_output"))
        scales = {
            layout.attention_norm: (None, attention),
            layout.mlp_norm: (None, mlp),
            layout.query: (attention, None),
            layout.key: (attention, None),
            layout.value: (attention, value),
            layout.output: (self.per_query_head(value), None),
        }
        for router in layout.routers:
            scales[router] = (mlp, None)
        for each in layout.mlps:
            up = alpha.get(each.pair)
            scales |= {each.gate: (mlp, None), each.up: (mlp, up), each.down: (up, None)}
        scales |= dict.fromkeys(layout.head_norms(self.layer), (None, None))
        if "query_key" in alpha:
            # Equal on the two halves of every rotary pair: only so it commutes with the rotary embedding.
            key = alpha["query_key"].repeat(1, 2).flatten()
            if norms := layout.head_norms(self.layer):
                scales |= dict(zip(norms, ((None, 1 / key), (None, key)), strict=True))
            else:
                scales[layout.query] = (attention, 1 / self.per_query_head(key))
                scales[layout.key] = (attention, key)
        return scales

    @property
    def key_heads(self) -> int:
        return self.linears[self.layout.value].weight.shape[0] // self.layer.self_attn.head_dim

    def per_query_head(self, scale: Tensor | None) -> Tensor | None:
        """Repeat a scale of the value or key channels for every query head that shares them."""
        if scale is None:
            return None
        query_heads = self.linears[self.layout.output].weight.shape[1] // self.layer.self_attn.head_dim
        return scale.view(self.key_heads, -1).repeat_interleave(query_heads // self.key_heads, 0).flatten()

    def learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and value of every learned parameter."""
        return ((name, value) for name, value in self.named_parameters() if value.requires_grad)

    def _calibrated(self) -> Iterator[tuple[str, Tensor]]:
        kinds = ("bounds", "clip", "lora_a", "lora_b", "offset", "gain", "shift", "tokens", "starved")
        for name, value in (*self.named_parameters(), *self.named_buffers()):
            if name.startswith("scales.") or name.rpartition(".")[2] in kinds:
                yield name, value

    def state(self) -> dict[str, Tensor]:
        """All that calibration decided, as it is held here: not a copy."""
        return {name: value.detach() for name, value in self._calibrated()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, value in self._calibrated():
            value.copy_(state[name])

    @torch.no_grad()
    def recenter(self) -> None:
        """``CalibrationLinear.recenter`` of every linear."""
        scales = self.channel_scales()
        for path, linear in self.linears.items():
            linear.recenter(scales[path][0])

    def prepare(self, ratio: float, only: Collection[str] | None = None) -> None:
        """Fake-quantize every weight, or only those named, once for the forward calls until the next ``prepare``."""
        scales = self.channel_scales()
        for path, linear in self.linears.items():
            linear.prepare(*scales[path], ratio if only is None or path in only else 0)
        for path, norm in self.norms.items():
            norm.prepare(scales[path][1])
        for together in self.together:
            together.set(None)
        self.layer.self_attn.kv_scheme = self.kv_scheme  # read by calibrate.attention

    def cut(self) -> list[tuple[list[tuple[GradientEdge, int]], Tensor]]:
        """Replace all that was prepared by leaves, so that many forward and backward passes share one quantization.

        Returns:
            A leaf that now stands for what was prepared, and before it whose gradients its own consists of, one below
            the other: where each takes it, and how many rows.
        """
        pairs = []

        def same(value: Tensor) -> Tensor:
            return value

        def leaf(values: list[Tensor], change: Callable[[Tensor], Tensor] = same) -> Tensor:
            edges = [(get_gradient_edge(value), len(value)) for value in values]
            changed = [change(value.detach()) for value in values]
            leaf = (changed[0] if len(changed) == 1 else torch.cat(changed)).requires_grad_()
            pairs.append((edges, leaf))
            return leaf

        def single(value: Tensor | None, change: Callable[[Tensor], Tensor] = same) -> Tensor | None:
            return value if value is None or not value.requires_grad else leaf([value], change)

        joined = set()
        for together in self.together:
            weights = [linear.computed[0] for linear in together.linears]
            if all(weight.requires_grad for weight in weights):
                together.set(leaf(weights, products.factor))
                joined |= set(together.linears)
        for linear in self.linears.values():
            weight, bias, channels = linear.computed
            if linear in joined:
                weight = None  # those below each other replace it
            else:
                weight = single(weight, products.factor if linear.product is products.linear else same)
            linear.computed = (weight, single(bias), channels)
        for norm in self.norms.values():
            norm.computed = tuple(map(single, norm.computed))
        return pairs

    def release(self) -> None:
        """Forget what was prepared: forward calls are in 16 bits again."""
        for part in (*self.linears.values(), *self.norms.values()):
            part.computed = None
        for together in self.together:
            together.set(None)
        self.layer.self_attn.kv_scheme = None

    def forward(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """fp32 [batch, seqlen, hidden] -> the same; causal, no padding. Matrix products in bf16 on a GPU."""
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=hidden.is_cuda):
            return self.layer(hidden, attention_mask=None, position_embeddings=position_embeddings).float()

    @torch.no_grad()
    def fold_gains(self, dtype: torch.dtype) -> None:
        """Move gains and scales of the norms into their weights, as they are served: in this dtype.

        What is quantized then computes with exactly these weights; in 16 bits the block is no longer what it was.
        """
        scales = self.channel_scales()
        for path, norm in self.norms.items():
            scale = torch.ones_like(norm.gain) if scales[path][1] is None else scales[path][1]
            norm.norm.weight.copy_((norm.norm.weight * (norm.gain / scale)).to(dtype))
            norm.gain.copy_(scale)

    @torch.no_grad()
    def quantized(self) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], dict[str, Tensor]]:
        """What is exported.

        Returns:
            Quantized linears: path -> (codes uint8 [N, K], scale [N, G], zero_point uint8 [N, G]); and the other
            tensors of the block by their names, fp32: norms, biases, weights left in 16 bits.
        """
        scales = self.channel_scales()
        self.prepare(ratio=1.0)
        replaced = (*self.linears, *self.norms)
        others = {
            name: value
            for name, value in self.layer.state_dict().items()
            if not name.startswith(tuple(f"{path}." for path in replaced))
        }
        shifts = {}
        for path, norm in self.norms.items():
            others[f"{path}.weight"], shift = norm.computed
            if shift is not None:
                shifts |= dict.fromkeys(self.layout.readers[path], shift)
        codes = {}
        for path, linear in self.linears.items():
            weight, bias = linear.effective(*scales[path])
            if path in shifts:
                shift = linear.computed[0] @ shifts[path]
                bias = shift if bias is None else bias + shift
            if bias is not None:
                others[f"{path}.bias" if linear.bias is not None else f"{path}.added_bias"] = bias
            if linear.scheme is None:
                others[f"{path}.weight"] = weight
            else:
                bounds = linear.range(scales[path][1])
                codes[path] = quantize_weight(weight, bounds, linear.scheme.weights)
        return codes, others


def run_through(
    blocks: Iterable[CalibrationBlock], hidden: Tensor, position_embeddings: tuple, checkpointing: bool
) -> Tensor:
    """Hidden states behind the last block, for gradients; ``Place`` says what checkpointing is."""
    for block in blocks:
        if checkpointing:
            hidden = checkpoint(block, hidden, position_embeddings, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = block(hidden, position_embeddings)
    return hidden


@torch.no_grad()
def run_in_place(block: CalibrationBlock, hidden: Activations, position_embeddings: tuple, batch_size: int = 1) -> None:
    """Replace hidden states by the block's outputs.

    Sample by sample, unless told otherwise: the last bit of a matrix product depends on its shape.
    """
    for place, batch in hidden.consecutive(batch_size):
        hidden.write(place.start, block(batch, position_embeddings))
