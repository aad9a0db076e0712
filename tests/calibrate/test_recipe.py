import pytest

from calibrate.errors import UserError
from calibrate.methods import METHODS, PRESETS, compose
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
        ({"epochs": -1}, "--epochs: expected at least 0"),
        ({"epochs": 1, "stages": (0.5, 1.0)}, "at least one for each of the 2 stages"),
        ({"nsamples": 0}, "--nsamples"),
        ({"stages": (0.5,)}, "end with 1"),
        ({"stages": (1.0, 0.5)}, "growing"),
        ({"stages": (0.0, 1.0)}, "above 0"),
        ({"stage_order": "sideways"}, "outer, inner"),
        ({"lora_rank": -1}, "--lora-rank"),
        ({"correction": True, "activations": ActivationScheme(4)}, "--correction: for weight-only"),
        ({"learn_shift": True}, "--learn-shift: .* add it"),
        ({"dual_scale": True, "online_hadamard": True}, "--dual-scale: .*choose one of them"),
        ({"average_bits": 35.0}, "--average-bits: expected from 2 to 8, found 35"),
        ({"average_bits": float("nan")}, "--average-bits: expected from 2 to 8, found nan"),
        ({"kv_bits": 5}, "--kv-bits: expected one of 16, 8, 4"),
        ({"stride": 3}, "stride"),
        ({"lr_clip": -1.0}, "--lr-clip: expected a learning rate above 0"),
        ({"lr_lora": float("nan")}, "--lr-lora: expected a learning rate above 0"),
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


@pytest.mark.parametrize("activations", [None, ActivationScheme(4)], ids=["A16", "A4"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_recipe_that_flags_can_change(method, activations):
    recipe = compose(WeightScheme(4), activations, method)
    assert recipe.method == method
    assert compose(WeightScheme(4), activations, method, epochs=7).epochs == 7
    assert bool(recipe.epochs) == (method in ("sliderquant", "omniquant"))


def test_presets_grow_and_belong_to_sliderquant():
    default, fast, best = (compose(WeightScheme(3), preset=preset) for preset in ("default", "fast", "best"))
    assert compose(WeightScheme(3)) == default
    assert not fast.epochs and default.epochs and best.end_to_end_epochs > default.end_to_end_epochs
    for arguments, words in (
        ({"method": "magic"}, "--method: expected one of sliderquant, rtn"),
        ({"preset": "slow"}, "--preset: expected one of " + ", ".join(PRESETS)),
        ({"method": "gptq", "preset": "best"}, "of --method sliderquant; gptq has none"),
    ):
        with pytest.raises(UserError, match=words):
            compose(WeightScheme(4), **arguments)
