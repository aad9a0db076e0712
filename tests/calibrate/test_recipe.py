import pytest

from calibrate.errors import UserError
from calibrate.recipe import Recipe, parse_scheme
from sliderquant_vllm.format import ActivationScheme, WeightScheme


@pytest.mark.parametrize(
    ("text", "weight_bits", "activations"),
    [
        ("W4A16", 4, None),
        ("w2a16", 2, None),
        ("W4A4", 4, ActivationScheme(4)),
        ("W8A8", 8, ActivationScheme(8)),
    ],
)
def test_schemes(text, weight_bits, activations):
    assert parse_scheme(text, -1, False) == (WeightScheme(weight_bits), activations)


@pytest.mark.parametrize("text", ["W5A16", "W4A2", "int4", "", "W4A4x", "4"])
def test_unknown_scheme_names_the_known_ones(text):
    with pytest.raises(UserError, match=r"W\{2,3,4,8\}A\{4,8,16\}"):
        parse_scheme(text, -1, False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "magic"}, "--method: expected one of sliderquant"),
        ({"epochs": 0}, "--epochs: expected at least 1"),
        ({"epochs": 1}, "each of the 2 stages"),
        ({"nsamples": 0}, "--nsamples"),
        ({"stages": (0.5,)}, "end with 1"),
        ({"stages": (1.0, 0.5)}, "growing"),
        ({"stages": (0.0, 1.0)}, "above 0"),
        ({"stage_order": "sideways"}, "outer, inner"),
        ({"lora_rank": -1}, "--lora_rank"),
        ({"learn_scale": True}, "weight-only"),
        ({"stride": 3}, "stride"),
        ({"lr_clip": -1.0}, "--lr_clip: expected a finite number"),
        ({"lr_lora": float("nan")}, "--lr_lora: expected a finite number"),
        ({"seed": 2**40}, "--seed"),
        ({"seqlen": 1}, "--seqlen: expected at least 2"),
        ({"activations": ActivationScheme(4), "weights": WeightScheme(4, 128)}, "group_size"),
    ],
)
def test_bad_recipes_say_what_to_change(changes, words):
    with pytest.raises(UserError, match=words):
        Recipe(**{"weights": WeightScheme(4)} | changes)


@pytest.mark.parametrize(
    ("epochs", "stages", "expected"),
    [(10, (0.5, 1.0), [5, 5]), (5, (0.5, 1.0), [2, 3]), (7, (0.25, 0.5, 1.0), [2, 2, 3]), (4, (1.0,), [4])],
)
def test_epochs_are_split_over_the_stages(epochs, stages, expected):
    assert Recipe(weights=WeightScheme(4), epochs=epochs, stages=stages).stage_epochs() == expected
