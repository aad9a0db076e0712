"""Mixtures of experts: experts made of linears, named as on the hub, in place of the library's fused ones."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from calibrate.layouts import BlockLayout

logger = logging.getLogger(__name__)

Part = tuple[int | slice, ...]

# An expert is starved below so many tokens per input channel of its gate, or of its down.
GATE_TOKENS, DOWN_TOKENS = 1 / 2, 1 / 8


class Expert(nn.Module):
    """A gated MLP, [tokens, hidden] -> the same, whose linears bear the names of the checkpoint.

    Args:
        names: of gate, up and down.
        fused: the library's experts, with ``down_proj`` [experts, hidden, intermediate].
    """

    def __init__(self, names: tuple[str, str, str], fused: nn.Module):
        super().__init__()
        self.names, self.act_fn = names, fused.act_fn
        hidden, intermediate = fused.down_proj.shape[1:]
        sizes = ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
        for name, size in zip(names, sizes, strict=True):
            self.add_module(name, nn.Linear(*size, bias=False, device=fused.down_proj.device))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class Experts(nn.ModuleList):
    """The routed experts of a block; called as the library's are.

    Attributes:
        tokens: int64 [experts] on the CPU, how many tokens each got when they were last counted.
        starved: bool [experts] on the CPU, those that got too few for statistics of their own.
        is_counting: whether tokens are counted now, see ``counting``.
        quantize_input: quantizes the tokens once for all experts; None where every linear does it for itself.
    """

    def __init__(self, layout: BlockLayout, fused: nn.Module):
        leaves = (tuple(path.rpartition(".")[2] for path in mlp) for mlp in layout.routed)
        super().__init__(Expert(names, fused) for names in leaves)
        self.register_buffer("tokens", torch.zeros(len(self), dtype=torch.int64, device="cpu"), persistent=False)
        self.register_buffer("starved", torch.zeros(len(self), dtype=torch.bool, device="cpu"), persistent=False)
        self.is_counting = False
        self.quantize_input: Callable[[Tensor], Tensor] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden], the experts of each token and their weights [tokens, k] -> [tokens, hidden]."""
        if self.quantize_input is not None:
            hidden_states = self.quantize_input(hidden_states)
        chosen = top_k_index.flatten()
        tokens = torch.bincount(chosen, minlength=len(self)).cpu()
        if self.is_counting:
            self.tokens += tokens
        order = chosen.argsort(stable=True)
        rows = (order // top_k_index.shape[1]).split(tokens.tolist())
        weights = top_k_weights.flatten()[order].unsqueeze(1).split(tokens.tolist())
        output = torch.zeros_like(hidden_states)
        for expert, row, weight in zip(self, rows, weights, strict=True):
            if len(row):
                output.index_add_(0, row, (expert(hidden_states[row]) * weight).to(output.dtype))
        return output


def split_experts(layer: nn.Module, layout: BlockLayout) -> dict[str, tuple[str, Part]]:
    """Replace the fused experts of a decoder layer of transformers, in place; ``state_dict`` then has the hub's names.

    Returns:
        Tensor -> where transformers itself keeps it: the name of a tensor, and which part of that it is. Those that
        it keeps under the same name are left out.
    """
    if not layout.experts:
        return {}
    moe, name = layer.mlp, layout.experts.rpartition(".")[0]
    kept: dict[str, tuple[str, Part]] = {}
    if name != "mlp":
        kept = {f"{name}.{key}": (f"mlp.{key}", ()) for key in moe.state_dict() if not key.startswith("experts.")}
        del layer.mlp
        layer.add_module(name, moe)
        layer.__dict__["mlp"] = moe  # its forward calls it so; a submodule has one name only
    intermediate = moe.experts.down_proj.shape[2]
    gate, up = slice(intermediate), slice(intermediate, None)
    for number, mlp in enumerate(layout.routed):
        kept[f"{mlp.gate}.weight"] = ("mlp.experts.gate_up_proj", (number, gate))
        kept[f"{mlp.up}.weight"] = ("mlp.experts.gate_up_proj", (number, up))
        kept[f"{mlp.down}.weight"] = ("mlp.experts.down_proj", (number,))
    moe.experts = Experts(layout, moe.experts)
    return kept


def routing(router: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]:
    """The forward of the library's router as a function of (x, weight, bias), as ``functional.linear`` is one."""

    def route(x: Tensor, weight: Tensor, bias: Tensor | None):
        return functional_call(router, {"weight": weight}, (x,))

    return route


@contextlib.contextmanager
def counting(experts: Experts | None) -> Iterator[None]:
    """Count anew how many tokens each expert gets while the context lasts; does nothing for a dense block."""
    if experts is None:
        yield
        return
    experts.tokens.zero_()
    experts.is_counting = True
    try:
        yield
    finally:
        experts.is_counting = False


class Statistics(Protocol):
    """What inputs of a linear are known by: ``calibrate.start.InputStatistics``."""

    moment: Tensor
    largest: Tensor
    tokens: int


def support_starved(experts: Experts, layout: BlockLayout, found: dict[str, Statistics]) -> None:
    """Fill up the statistics of experts that got few tokens, in place, and mark them as starved.

    A gate or up that saw fewer than K/2 tokens gets the block's average token for those that it lacks. Tried on
    clusters of a trained model's tokens, at 2 and 4 bits: up to K/2 tokens the output error on unseen ones is lower
    than with those alone or with the average alone; beyond, those alone are best. The input of a down resembles that
    of no other expert, so what it lacks of K/8 tokens is taken for uncorrelated channels of equal energy; without any
    token that is rounding to nearest within searched ranges.

    Args:
        found: linear -> statistics of its input, of all gates or of all downs.
    """
    gates = [found[mlp.gate] for mlp in layout.routed if mlp.gate in found]
    downs = [found[mlp.down] for mlp in layout.routed if mlp.down in found]
    if gates:
        # Every token is in the moments of the same number of experts.
        average = sum(seen.moment for seen in gates) / sum(seen.tokens for seen in gates)
    for number, seen in enumerate(gates):
        lacking = GATE_TOKENS * len(seen.moment) - seen.tokens
        if lacking > 0:
            experts.starved[number] = True
            seen.moment += lacking * average
    for number, seen in enumerate(downs):
        lacking = DOWN_TOKENS * len(seen.moment) - seen.tokens
        if lacking > 0:
            experts.starved[number] = True
            energy = seen.moment.diagonal().mean().item() / max(seen.tokens, 1)
            seen.moment.diagonal().add_(lacking * (energy or 1.0))
            seen.largest.clamp_(min=seen.largest.mean().item() or 1.0)


def warn_starved(experts: Experts, name: str) -> None:
    """Name the starved experts of a block in one warning, if there are any."""
    if experts.starved.any():
        numbers = experts.starved.nonzero().flatten().tolist()
        listed = ", ".join(f"{number} ({experts.tokens[number]})" for number in numbers)
        logger.warning(
            "%s: %d of %d experts got too few tokens for statistics of their own and lean on the block's; take more "
            "samples or text of more kinds. Experts (tokens): %s",
            *(name, len(numbers), len(experts), listed),
        )


def token_table(states: Mapping[int, Mapping[str, Tensor]]) -> str:
    """Markdown: the tokens that the experts of every block got, as block states tell; empty for a dense model.

    Args:
        states: block -> its state, ``CalibrationBlock.state``.
    """
    rows = []
    for index, state in sorted(states.items()):
        for name, tokens in state.items():
            if name.endswith(".experts.tokens"):
                few = (tokens == 0) | state[name.removesuffix("tokens") + "starved"]
                listed = ", ".join(f"{number} ({tokens[number]})" for number in few.nonzero().flatten().tolist())
                rows.append(f"| {index} | {tokens.min()} | {tokens.median()} | {tokens.max()} | {listed} |")
    if not rows:
        return ""
    return "\n".join(("| block | fewest | median | most | starved experts (tokens) |", "|---|---|---|---|---|", *rows))


def name_pattern(path: str) -> str:
    """A regular expression of a module name that leaves the number of an expert open."""
    return re.sub(r"(?<=\\.experts\\.)\d+", lambda number: r"\d+", re.escape(path))
