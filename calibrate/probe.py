"""Times what a run consists of: the real functions on random weights and hidden states of the model's shapes."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from calibrate.blocks import CalibrationBlock
from calibrate.costs import Costs
from calibrate.export import Writer
from calibrate.memory import active_linears
from calibrate.methods.awq import EXPONENTS
from calibrate.methods.d2quant import ROUNDS
from calibrate.methods.gptq import BLOCK, Factor, compensated_weight, factorize
from calibrate.model import Model
from calibrate.parallel import Gradients
from calibrate.products import rough_gradients
from calibrate.quantizer import weight_bounds
from calibrate.recipe import Recipe
from calibrate.reconstruct import backward, parameter_groups, take_step
from calibrate.start import SHRINKS, InputStatistics, search_bounds
from sliderquant_vllm.format import BLOCK_CODES, WeightScheme
from sliderquant_vllm.shards import WEIGHTS_FILE, write_index, write_shard

LONG = 0.25  # seconds: what takes longer is called once
SHORTLY, CAREFULLY = 0.1, 1.0  # seconds during which anything else is called over and over
WEIGHTS = 48 << 20  # a block with more is timed with fewer experts, inner channels and heads
LINEAR = 16 << 20  # a linear with more is timed with fewer rows
PRODUCTS = 18 << 30  # active weights times tokens of the longest sample that is timed
FACTORED, MOMENT = 1536, 6144  # input channels up to which factors and second moments are timed
SHORT, FEWEST, CONTEXT = 128, 192, 512  # tokens
ROWS = 2048  # of the embedding


def measure(model: Model, checkpointing: bool, directory: Path | None = None) -> Costs:
    """Time the units on random data, on the model's device; takes seconds and reads no weights of the model.

    Args:
        directory: on the file system that a run would write to; nothing is left there. By default that of the system.
    """
    with tempfile.TemporaryDirectory(dir=directory) as folder, torch.no_grad():
        return _Bench(model, Path(folder), checkpointing).costs()


class _Bench:
    """Times a model of one block like those of the real one, and tells the costs of a real block."""

    def __init__(self, model: Model, directory: Path, checkpointing: bool):
        self.model, self.recipe, self.directory = model, model.recipe, directory
        self.checkpointing = checkpointing
        self.index = usual_block(model)
        self.probe = Model(_write_probe(model, self.index, directory), _recipe_of(model, self.index), model.device)
        active = [_numel(each, at, active_linears(each, at)) for each, at in ((model, self.index), (self.probe, 0))]
        whole = [_numel(each, at, each.layouts[at].linears) for each, at in ((model, self.index), (self.probe, 0))]
        self.active, self.per_token, self.per_weight = active[0], active[0] / active[1], whole[0] / whole[1]

    def costs(self) -> Costs:
        probe, shard = self.probe, self.directory / "shard"
        build, block = self.first(lambda: probe.block(0))
        sample, step = self.learning(block)
        prepare = self.seconds(lambda: block.prepare(1.0))
        forward = self.per_sample(block, lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True))
        state = self.seconds(lambda: write_shard(shard, block.state()))
        stream = state / shard.stat().st_size
        writer = Writer(probe, self.directory)
        finish = self.seconds(lambda: (block.prepare(1.0), writer.block(0, block)))
        written = self.directory / writer.file(0)
        digest = self.seconds(lambda: write_index(self.directory, [written.name])) / written.stat().st_size
        outer = self.seconds(lambda: write_shard(shard, probe.embedding_tensors()))
        statistics, start = self.starting() if self.recipe.needs_start else (0.0, 0.0)
        return Costs(
            build=build * self.per_weight,
            prepare=prepare * self.per_weight,
            forward=forward,
            statistics=statistics,
            start=start,
            sample=sample,
            step=step * self.per_weight,
            head=forward * self.model.config.vocab_size * self.model.config.hidden_size / self.active,
            state=state * self.per_weight,
            stream=stream,
            finish=finish * self.per_weight,
            outer=outer / (probe.config.vocab_size * probe.config.hidden_size),
            digest=digest,
        )

    def first(self, run: Callable[[], Any], calls: int = 1) -> tuple[float, Any]:
        """Seconds of so many calls, and what the last one returns."""
        self._wait()
        started = time.perf_counter()
        for _ in range(calls):
            result = run()
        self._wait()
        return time.perf_counter() - started, result

    def seconds(self, run: Callable[[], object], carefully: bool = False) -> float:
        """Of a call: the first one where it is long, otherwise the mean of some behind it."""
        once, _ = self.first(run)
        if once > LONG and self.model.device.type == "cpu":
            return once
        calls = math.ceil((CAREFULLY if carefully else SHORTLY) / max(once, 1e-6))
        return self.first(run, calls)[0] / calls

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.model.device)

    def hidden(self, tokens: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Hidden states of a sample and their position embeddings."""
        return self.random(1, tokens, self.probe.config.hidden_size), self.probe.position_embeddings(tokens)

    def per_sample(self, run: Callable[[Tensor, tuple], object], attention: Callable[[Tensor], object]) -> float:
        """Of a sample of the recipe's length, from shorter ones where it would take long.

        Args:
            run: of hidden states [1, seqlen, hidden] and their position embeddings.
            attention: of [1, heads, seqlen, head_dim]; its share grows with the square of the length.
        """
        seqlen = self.recipe.seqlen
        many = min(seqlen, max(PRODUCTS // self.active, FEWEST))
        each, token = line(
            *((n, self.seconds(partial(run, *self.hidden(n)), carefully=True)) for n in (many // 2, many))
        )
        found = each * self.per_weight + token * seqlen * self.per_token
        if seqlen > many:
            context = min(seqlen, CONTEXT)
            heads = self.random(1, self.model.config.num_attention_heads, context, self.model.head.signs.numel())
            found += self.seconds(partial(attention, heads)) / context**2 * seqlen * (seqlen - many)
        return found

    @torch.enable_grad()
    @rough_gradients()
    def learning(self, block: CalibrationBlock) -> tuple[float, float]:
        """A sample forward and backward, and what else a step takes."""
        if not any(True for _ in block.learned()):
            return 0.0, 0.0
        optimizer = torch.optim.AdamW(parameter_groups([block], self.recipe, 1e-3), weight_decay=0.0, fused=True)
        short = self.hidden(SHORT)

        def sample(hidden: Tensor, positions: tuple) -> float:
            return backward([block], hidden, hidden, 1, positions, self.checkpointing)

        def attention(x: Tensor) -> None:
            if self.checkpointing:
                with torch.no_grad():  # as the first time, which keeps nothing
                    functional.scaled_dot_product_attention(x, x, x, is_causal=True)
            functional.scaled_dot_product_attention(*[x.requires_grad_()] * 3, is_causal=True).sum().backward()

        for _, value in block.learned():
            value.grad = torch.zeros_like(value)
        optimizer.step()  # the first one makes the moments
        whole = self.seconds(lambda: take_step([block], 1.0, starmap(sample, [short]), optimizer), carefully=True)
        block.prepare(1.0)
        gradients = Gradients([block])
        rest = max(whole - self.seconds(partial(sample, *short), carefully=True), 0.0)
        found = self.per_sample(sample, attention), rest
        gradients.backward()
        return found

    def starting(self) -> tuple[float, float]:
        """Statistics of a sample for the linears of a block, and their initial values."""
        recipe, layout, active = self.recipe, self.model.layouts[self.index], active_linears(self.model, self.index)
        config = self.model.quantization_config()
        moment, linear, factor = cache(self.moment), cache(self.linear), cache(self.factor)
        statistics = start = 0.0
        for site in layout.sites:
            for path in site.linears:
                scheme = config.scheme_for(f"model.layers.{self.index}.{path}")
                if scheme is None:
                    continue
                rows, columns = _shape(self.model, self.index, path)
                each, token = moment(columns)
                if path == site.linears[0]:
                    statistics += each + token * recipe.seqlen * (path in active)
                    if recipe.rounding_start == "gptq":
                        start += factor(columns)
                search, codes = linear(rows, columns, scheme.weights)
                start += search + codes
                if recipe.scale_start == "awq":
                    start += len(EXPONENTS) * (search / len(SHRINKS) + token * rows)
                if recipe.dual_scale and path in layout.writers[1:]:
                    factors = 2 if recipe.rounding_start == "gptq" else 1
                    start += ROUNDS * (search + codes + factors * factor(columns) + 6 * token * rows)
        return statistics, start

    def moment(self, columns: int) -> tuple[float, float]:
        """What adding inputs to their second moment takes every time, and for every token."""
        timed, many = min(columns, MOMENT), min(self.recipe.seqlen, SHORT)
        statistics = InputStatistics(self.random(timed, timed).double(), self.random(timed))
        points = ((n, self.seconds(partial(statistics.add, self.random(n, timed)))) for n in (many // 2, many))
        each, token = line(*points)
        return each * (columns / timed) ** 2, token * (columns / timed) ** 2

    def linear(self, rows: int, columns: int, scheme: WeightScheme) -> tuple[float, float]:
        """Ranges and codes of a linear."""
        timed = min(rows, max(LINEAR // columns, 1))
        weight = self.random(timed, columns)
        bounds, importance = weight_bounds(weight, scheme), torch.ones_like(weight[0])
        search = codes = 0.0
        if self.recipe.range_start == "search":
            few = SHRINKS[:3]
            search = self.seconds(lambda: search_bounds(weight, importance, scheme, few)) / len(few) * len(SHRINKS)
        if self.recipe.rounding_start == "gptq":
            order, upper = torch.arange(columns, device=weight.device), torch.eye(columns, device=weight.device)
            compensate = partial(compensated_weight, weight, bounds, Factor(order, upper), scheme)
            around, once = (self.seconds(partial(compensate, at)) for at in ((), (columns // 2 // BLOCK * BLOCK,)))
            codes = around + max(once - around, 0.0) * math.ceil(columns / BLOCK)
        return search * rows / timed, codes * rows / timed

    def factor(self, columns: int) -> float:
        """GPTQ's factor of a second moment; the work grows with the third power."""
        timed = min(columns, FACTORED)
        inputs = self.random(timed, timed)
        return self.seconds(partial(factorize, inputs.T @ inputs)) * (columns / timed) ** 3


def line(few: tuple[float, float], many: tuple[float, float]) -> tuple[float, float]:
    """Offset and slope through two points; neither is negative however noisy they are."""
    slope = min(max((many[1] - few[1]) / (many[0] - few[0]), 0.0), many[1] / many[0])
    return many[1] - slope * many[0], slope


def usual_block(model: Model) -> int:
    """The first block of the most frequent kind: of one layout, and with the same linears quantized."""
    kinds = [(layout, _plain(model, index)) for index, layout in enumerate(model.layouts)]
    return kinds.index(Counter(kinds).most_common(1)[0][0])


def _plain(model: Model, index: int) -> tuple[str, ...]:
    """The linears of a block that stay in 16 bits."""
    return tuple(path for path in model.layouts[index].linears if f"model.layers.{index}.{path}" not in model.quantized)


def _recipe_of(model: Model, index: int) -> Recipe:
    """A model's recipe, for one whose only block is to be quantized like this one."""
    return replace(model.recipe, ignore=("lm_head", *(f"model.layers.0.{path}" for path in _plain(model, index))))


def _shape(model: Model, index: int, path: str) -> torch.Size:
    return model.skeleton.model.layers[index].get_submodule(path).weight.shape


def _numel(model: Model, index: int, paths: Iterable[str]) -> int:
    return sum(_shape(model, index, path).numel() for path in paths)


def _write_probe(model: Model, index: int, directory: Path) -> Path:
    """A model of one such block with random weights, of the real shapes as far as ``WEIGHTS`` allows."""
    settings = model.config.to_dict()
    settings |= {
        "num_hidden_layers": 1,
        "vocab_size": min(settings["vocab_size"], ROWS),
        "pad_token_id": None,
        "head_dim": model.head.signs.numel(),
        "tie_word_embeddings": False,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][index : index + 1]
    if model.layouts[index].experts:
        settings |= {"mlp_only_layers": [], "decoder_sparse_step": 1}
    (directory / "config.json").write_text(json.dumps(_smaller(settings, model, index)))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    noise = torch.randn(1 << 20).mul_(0.02).to(model.dtype)
    tensors = {name: _filled(noise, value.shape) for name, value in skeleton.state_dict().items()}
    write_shard(directory / WEIGHTS_FILE, tensors)
    return directory


def _smaller(settings: dict, model: Model, index: int) -> dict:
    """Settings with fewer experts, inner channels and heads, until a block has at most ``WEIGHTS``."""
    layout, found = model.layouts[index], dict(settings)
    attention = _numel(model, index, (layout.query, layout.key, layout.value, layout.output))
    inner = _numel(model, index, layout.linears) - attention
    experts = [key for key in ("num_experts", "num_local_experts") if layout.experts and found.get(key)]
    sizes = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    channels = [key for key in sizes if found.get(key)]
    heads = ["num_attention_heads", "num_key_value_heads"]
    fewest = 4 * found.get("num_experts_per_tok", 1)
    narrowest = 2 * max(BLOCK_CODES, model.recipe.weights.group_size)
    while attention + inner > WEIGHTS:
        if experts and all(found[key] % 2 == 0 and found[key] >= fewest for key in experts):
            halved, inner = experts, inner // 2
        elif inner >= attention and all(found[key] % narrowest == 0 for key in channels):
            halved, inner = channels, inner // 2
        elif all(found[key] % 2 == 0 for key in heads):
            halved, attention = heads, attention // 2
        else:
            break
        found |= {key: found[key] // 2 for key in halved}
    return found


def _filled(noise: Tensor, shape: torch.Size) -> Tensor:
    """A tensor filled with values over and over; with ones where it is a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=noise.dtype)
    return noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape)
