"""Estimated sensitivities against those measured on a trained model, and allocations against brute force."""

import argparse
import itertools
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from calibrate import allocation
from calibrate.allocation import allocate, block_sensitivities, sensitivities, units
from calibrate.data import token_stream
from calibrate.errors import UserError
from calibrate.layouts import BlockLayout, Mlp
from calibrate.model import Model
from calibrate.quantizer import fake_quantize_weight, weight_bounds
from calibrate.recipe import Recipe
from sliderquant_vllm.format import ActivationScheme, WeightScheme
from tests.calibrate.models import write_random_model

TINY_LLAMA = Path(__file__).parents[2] / "assets" / "tiny-llama"
TOKENS = torch.arange(3 * 24).view(3, 24) * 7 % 96


def make(directory, **recipe) -> Model:
    return Model(directory, Recipe(**{"weights": WeightScheme(4), "seqlen": 24} | recipe), torch.device("cpu"))


def round_in_place(block, paths, scheme) -> None:
    for path in paths:
        weight = block.linears[path].weight
        weight.data = fake_quantize_weight(weight, weight_bounds(weight, scheme), scheme, weight.shape[1])


def best_by_brute_force(scores, sizes, average_bits) -> float:
    budget = average_bits * sum(sizes.values()) + 1e-9
    sums = [
        sum(scores[unit][bits] for unit, bits in zip(scores, chosen, strict=True))
        for chosen in itertools.product(*scores.values())
        if sum(sizes[unit] * bits for unit, bits in zip(scores, chosen, strict=True)) <= budget
    ]
    return min(sums)


@st.composite
def instances(draw):
    """Scores that fall with the width, as they should, or do not; sizes with and without a common divisor."""
    unit = st.lists(st.floats(0, 10), min_size=4, max_size=4)
    drawn = draw(st.lists(st.tuples(unit, st.booleans(), st.integers(1, 40)), min_size=1, max_size=5))
    scores, sizes = {}, {}
    for number, (values, falling, size) in enumerate(drawn):
        scores[str(number)] = dict(zip((2, 3, 4, 8), sorted(values, reverse=True) if falling else values, strict=True))
        sizes[str(number)] = size
    return scores, sizes


def evaluate(scores, sizes, chosen) -> tuple[float, float]:
    """Sum of scores, and bits in all."""
    return sum(scores[u][b] for u, b in chosen.items()), sum(sizes[u] * b for u, b in chosen.items())


@settings(max_examples=150, deadline=None)
@given(instance=instances(), average_bits=st.integers(20, 80).map(lambda tenths: tenths / 10))
def test_an_allocation_is_the_best_one_within_the_budget(instance, average_bits):
    scores, sizes = instance
    total, bits = evaluate(scores, sizes, allocate(scores, sizes, average_bits))
    assert bits <= average_bits * sum(sizes.values()) + 1e-9
    assert total == pytest.approx(best_by_brute_force(scores, sizes, average_bits))


@settings(max_examples=50, deadline=None)
@given(instance=instances(), steps=st.sampled_from((50, allocation.MAX_STEPS)))
def test_more_budget_is_never_worse_even_in_coarse_steps(instance, steps):
    scores, sizes = instance
    before = float("inf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MAX_STEPS", steps)
        for tenths in range(20, 81, 5):
            total, bits = evaluate(scores, sizes, allocate(scores, sizes, tenths / 10))
            assert bits * 10 <= tenths * sum(sizes.values())
            assert total <= before * (1 + 1e-12)
            before = total


def test_coarse_steps_cost_little():
    """Sizes of a 7B model, made to have nothing in common."""
    sizes = {str(number): (3, 1, 5, 3)[number % 4] * 16_000_000 + number for number in range(128)}
    scores = {unit: {bits: (7 * int(unit) % 31 + 1) * 4.0**-bits for bits in (2, 3, 4, 8)} for unit in sizes}
    total, bits = evaluate(scores, sizes, allocate(scores, sizes, 3.0))
    assert 2.99 < bits / sum(sizes.values()) <= 3
    rounded = {unit: size // 16_000_000 for unit, size in sizes.items()}
    exact, _ = evaluate(scores, rounded, allocate(scores, rounded, 3.0))
    assert total == pytest.approx(exact, rel=5e-3)


def test_a_decimal_average_is_taken_at_its_word():
    sizes = dict.fromkeys("abcdefghij", 10)
    scores = {unit: {2: 1.0, 3: 0.5} for unit in sizes}
    assert list(allocate(scores, sizes, 2.3).values()).count(3) == 3  # 2.3 * 100 < 230 in floating point


def test_ties_take_fewer_bits_and_always_the_same():
    scores = {"a": {2: 1.0, 3: 0.5}, "b": {2: 1.0, 3: 0.5}, "c": {2: 1.0, 3: 1.0}}
    assert allocate(scores, dict.fromkeys(scores, 1), 3.0) == {"a": 3, "b": 3, "c": 2}
    assert allocate(scores, dict.fromkeys(scores, 1), 2.4) == {"a": 3, "b": 2, "c": 2}


def test_units_take_only_widths_that_they_have_scores_for():
    scores = {"a": {2: 1.0, 4: 0.1}, "b": {2: 1.0, 3: 0.4, 4: 0.2}}
    assert allocate(scores, {"a": 1, "b": 1}, 3.0, (2, 3, 4)) == {"a": 4, "b": 2}
    with pytest.raises(UserError, match=r"a: can have none of the widths \[3\]; add one of \[2, 4\]"):
        allocate(scores, {"a": 1, "b": 1}, 3.0, (3,))


@pytest.mark.parametrize("average_bits", [1.9, 4.5, float("nan"), float("inf")])
def test_an_average_out_of_reach_is_refused(average_bits):
    scores = {"a": {2: 1.0, 4: 0.1}}
    with pytest.raises(UserError, match=rf"--average-bits {average_bits}: expected from 2 to 4, .*\[2, 4\].*choose"):
        allocate(scores, {"a": 7}, average_bits, (2, 4))


def test_units_are_what_is_served_as_one_matrix_product():
    assert units(BlockLayout()) == {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj": ("self_attn.o_proj",),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    }
    experts = BlockLayout(mlps=tuple(Mlp(*(f"mlp.experts.{n}.{part}_proj" for part in Mlp._fields)) for n in (0, 1)))
    assert list(units(experts).items())[2:] == [
        ("mlp.experts.gate_up_proj", tuple(f"mlp.experts.{n}.{part}_proj" for n in (0, 1) for part in ("gate", "up"))),
        ("mlp.experts.down_proj", ("mlp.experts.0.down_proj", "mlp.experts.1.down_proj")),
    ]


def sensitivity_in_one_graph(model, draws, block_index, paths, scheme) -> float:
    """The same estimate, written with the whole model in one autograd graph."""
    generator = torch.Generator().manual_seed(0)
    position_embeddings = model.position_embeddings(TOKENS.shape[1])
    squares = 0.0
    for tokens in TOKENS:
        states = [model.embed(tokens[None]).requires_grad_()]
        for index in range(model.blocks):
            states.append(model.block(index)(states[-1], position_embeddings))
        log_probs = model.head_module()(states[-1])[0].log_softmax(-1)
        labels = torch.multinomial(log_probs.detach().exp(), draws, replacement=True, generator=generator)
        block = model.block(block_index)
        round_in_place(block, paths, scheme)
        with torch.no_grad():
            change = block(states[block_index], position_embeddings) - states[block_index + 1]
        for label in labels.T:
            log_prob = log_probs.gather(1, label[:, None]).sum()
            (gradient,) = torch.autograd.grad(log_prob, states[block_index + 1], retain_graph=True)
            squares += (gradient * change).sum(-1).square().sum().item()
    return squares / (2 * draws * TOKENS.numel())


@pytest.mark.parametrize("recipe", [{}, {"rotate": True, "activations": ActivationScheme(4), "learn_scale": True}])
def test_streaming_gives_what_one_graph_gives(tmp_path, recipe):
    model = make(write_random_model(tmp_path / "model", "qwen2"), batch_size=2, **recipe)
    found = sensitivities(model, TOKENS, draws=2)
    assert list(found.scores)[:2] == ["model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"]
    assert len(found.scores) == 12 and set(found.blocks.values()) == {0, 1, 2}
    for index, name, bits in ((0, "self_attn.qkv_proj", 3), (1, "mlp.down_proj", 2), (2, "mlp.gate_up_proj", 4)):
        unit, paths = f"model.layers.{index}.{name}", units(model.layouts[index])[name]
        expected = sensitivity_in_one_graph(model, 2, index, paths, WeightScheme(bits))
        assert found.scores[unit][bits] == pytest.approx(expected, rel=1e-4)
        assert found.linears[unit] == tuple(f"model.layers.{index}.{path}" for path in paths)
        block = model.block(index)
        assert found.sizes[unit] == sum(block.linears[path].weight.numel() for path in paths)


def test_the_seed_decides_and_blocks_come_one_by_one(tmp_path, monkeypatch):
    model = make(write_random_model(tmp_path / "model", "llama"))
    alive, most, done = weakref.WeakSet(), [], []
    load = model.block

    def counted(index):
        block = load(index)
        alive.add(block)
        most.append(len(alive))
        return block

    first = sensitivities(model, TOKENS, choices=(2, 4))
    monkeypatch.setattr(model, "block", counted)
    assert sensitivities(model, TOKENS, choices=(4, 2), on_block=done.append) == first
    assert max(most) == 1 and done == [2, 1, 0]
    assert sensitivities(model, TOKENS, choices=(2, 4), seed=1) != first


def test_what_stays_in_16_bits_or_cannot_have_a_width_is_left_out(tmp_path):
    directory = write_random_model(tmp_path / "model", "llama", hidden_size=64, intermediate_size=168)
    ignore = ("lm_head", "re:.*down_proj", "re:.*layers.2.self_attn.o_proj")
    found = sensitivities(make(directory, ignore=ignore), TOKENS)
    assert not any("down_proj" in unit for unit in found.scores)
    assert "model.layers.2.self_attn.o_proj" not in found.scores
    assert set(found.scores["model.layers.1.self_attn.o_proj"]) == {2, 3, 4, 8}
    assert set(found.scores["model.layers.1.mlp.gate_up_proj"]) == {4, 8}  # zero points of 168 rows in whole words
    assert set(block_sensitivities(found)[2]) == {4, 8}
    assert min(allocate(found.scores, found.sizes, 3.5).values()) < 4


def test_scores_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    model = make(write_random_model(tmp_path / "model", "llama"))
    monkeypatch.setattr(allocation, "_label_gradients", lambda *_: torch.full((3, 1, 24, 96), torch.inf))
    with pytest.raises(UserError, match="model.layers.2.mlp.down_proj: its sensitivity is not finite; check"):
        sensitivities(model, TOKENS)


@torch.no_grad()
def outputs(model, tokens, bits_of) -> torch.Tensor:
    """Log-probabilities with the weights of each linear rounded to ``bits_of(name)``, or not where that is None."""
    states, position_embeddings = model.embed(tokens), model.position_embeddings(tokens.shape[1])
    for index in range(model.blocks):
        block = model.block(index)
        for path in block.linears:
            if bits := bits_of(f"{block.name}.{path}"):
                round_in_place(block, (path,), WeightScheme(bits))
        states = block(states, position_embeddings)
    return model.head_module()(states).log_softmax(-1)


def divergence(reference, changed) -> float:
    """KL in nats per token."""
    return functional.kl_div(changed, reference, reduction="sum", log_target=True).item() / reference[..., 0].numel()


def rank_correlation(first, second) -> float:
    ranks = torch.tensor([first, second]).argsort(1).argsort(1).double()
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.fixture(scope="module")
def trained():
    """The trained model, tokens to measure on, other tokens to check with, and the sensitivities."""
    model = make(TINY_LLAMA, seqlen=64, batch_size=8)
    tokens, others = token_stream(model.tokenizer, argparse.__file__, limit=1024)[:1024].view(2, 8, 64)
    return model, tokens, others, sensitivities(model, tokens, draws=4)


def test_estimates_agree_with_what_rounding_one_unit_does(trained):
    model, tokens, _, found = trained
    reference = outputs(model, tokens, lambda name: None)
    estimated, measured = {2: [], 3: [], 4: [], 8: []}, {2: [], 3: [], 4: [], 8: []}
    for unit in (unit for unit, index in found.blocks.items() if index in (0, 6, 11)):
        for bits in estimated:
            rounded = dict.fromkeys(found.linears[unit], bits)
            estimated[bits].append(found.scores[unit][bits])
            measured[bits].append(divergence(reference, outputs(model, tokens, rounded.get)))
    for bits in estimated:
        assert rank_correlation(estimated[bits], measured[bits]) > 0.9
        torch.testing.assert_close(torch.tensor(estimated[bits]), torch.tensor(measured[bits]), rtol=0.3, atol=0)


def test_first_and_last_blocks_are_the_most_sensitive(trained):
    by_block = block_sensitivities(trained[3])
    assert list(by_block) == list(range(12))
    for bits in (2, 3, 4):
        assert set(sorted(by_block, key=lambda index: by_block[index][bits])[-3:]) == {0, 10, 11}


def test_mixed_widths_beat_uniform_ones_on_other_text(trained):
    model, _, others, found = trained
    widths = allocate(found.scores, found.sizes, 3.0)
    assert set(widths.values()) == {2, 3, 4}
    mixed = {path: widths[unit] for unit, paths in found.linears.items() for path in paths}
    reference = outputs(model, others, lambda name: None)
    changes = {kind: outputs(model, others, of) for kind, of in (("mixed", mixed.get), ("uniform", lambda name: 3))}
    kl = {kind: divergence(reference, changed) for kind, changed in changes.items()}
    assert kl["mixed"] < 0.85 * kl["uniform"]
    predicted = sum(found.scores[unit][bits] for unit, bits in widths.items())
    assert kl["mixed"] == pytest.approx(predicted, rel=0.3)
