"""Model families: which linears, norms and scaling pairs a decoder block has. A family is one row of ``FAMILIES``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Mlp(NamedTuple):
    """One gated MLP: the only one of a dense block, or one expert."""

    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    @property
    def pair(self) -> str:
        """Name of the scaling pair between ``up`` and ``down``; no dots, since it names a parameter."""
        return f"up_down_{self.up}".replace(".", "_")


class Site(NamedTuple):
    """Linears that read the same activations, and the scaling pair that feeds them."""

    pair: str
    linears: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Module names inside a decoder block of the pre-norm, gated-MLP kind.

    Attributes:
        mlps: one of a dense block; every expert of a mixture, the routed ones in their order, then a shared one.
        routers: linears behind the MLP norm that are never quantized.
        experts: the module that holds the routed experts, empty in a dense block.
    """

    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    mlps: tuple[Mlp, ...] = (Mlp(),)
    routers: tuple[str, ...] = ()
    experts: str = ""

    @property
    def routed(self) -> tuple[Mlp, ...]:
        """The experts that a router chooses from."""
        return tuple(mlp for mlp in self.mlps if self.experts and mlp.up.startswith(f"{self.experts}."))

    @property
    def fused_experts(self) -> tuple[tuple[str, ...], ...]:
        """Linears of all routed experts that are served as one matrix product each."""
        gates_and_ups = tuple(path for mlp in self.routed for path in (mlp.gate, mlp.up))
        return gates_and_ups, tuple(mlp.down for mlp in self.routed)

    @property
    def sites(self) -> tuple[Site, ...]:
        """In the order of the forward pass."""
        return (
            Site("attention_norm", (self.query, self.key, self.value)),
            Site("value_output", (self.output,)),
            *(Site("mlp_norm", (mlp.gate, mlp.up)) for mlp in self.mlps),
            *(Site(mlp.pair, (mlp.down,)) for mlp in self.mlps),
        )

    @property
    def linears(self) -> tuple[str, ...]:
        """Those that are quantized, in the order of the forward pass."""
        return tuple(path for site in self.sites for path in site.linears)

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """Norm -> the linears that read it, and with them the residual stream."""
        gates_and_ups = tuple(path for mlp in self.mlps for path in (mlp.gate, mlp.up))
        return {
            self.attention_norm: (self.query, self.key, self.value),
            self.mlp_norm: (*gates_and_ups, *self.routers),
        }

    @staticmethod
    def head_norms(layer) -> tuple[str, ...]:
        """Norms of every query head and of every key head, if a decoder layer of transformers has them."""
        return ("self_attn.q_norm", "self_attn.k_norm") if hasattr(layer.self_attn, "q_norm") else ()

    @property
    def writers(self) -> tuple[str, ...]:
        """The linears that write the residual stream."""
        return (self.output, *(mlp.down for mlp in self.mlps))


def dense(config, index: int) -> BlockLayout:
    """The layout of a block with one MLP; ``config`` is the model's, ``index`` the block's."""
    return BlockLayout()


def mixture(config, index: int) -> BlockLayout:
    """The layout of a block with routed experts, or of one that a mixture of Qwen keeps dense."""
    is_dense = index in config.mlp_only_layers or (index + 1) % config.decoder_sparse_step
    if is_dense or not config.num_experts:
        return dense(config, index)
    stems, routers = [f"mlp.experts.{number}" for number in range(config.num_experts)], ("mlp.gate",)
    if getattr(config, "shared_expert_intermediate_size", 0):
        stems.append("mlp.shared_expert")
        routers = (*routers, "mlp.shared_expert_gate")
    mlps = tuple(Mlp(f"{stem}.gate_proj", f"{stem}.up_proj", f"{stem}.down_proj") for stem in stems)
    return BlockLayout(mlps=mlps, routers=routers, experts="mlp.experts")


def mixtral(config, index: int) -> BlockLayout:
    stems = [f"block_sparse_moe.experts.{number}" for number in range(config.num_local_experts)]
    mlps = tuple(Mlp(f"{stem}.w1", f"{stem}.w3", f"{stem}.w2") for stem in stems)
    return BlockLayout(mlps=mlps, routers=("block_sparse_moe.gate",), experts="block_sparse_moe.experts")


# Names are those of checkpoints on the hub: ``calibrate.experts`` gives the modules of transformers the same.
FAMILIES: dict[str, Callable[..., BlockLayout]] = {
    "llama": dense,
    "mistral": dense,
    "qwen2": dense,
    "qwen3": dense,
    "qwen2_moe": mixture,
    "qwen3_moe": mixture,
    "mixtral": mixtral,
}
