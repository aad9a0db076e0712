"""The quality benchmark: its commands, what it keeps and computes again, and its tables."""

from __future__ import annotations

import argparse
import inspect
import json
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks import cells, quality, quality_report, suites
from calibrate import cli
from calibrate.evaluate import Reference, compare, perplexity
from calibrate.methods import METHODS, PRESETS
from calibrate.model import Model
from calibrate.pipeline import Calibrated
from calibrate.recipe import DATA, Recipe
from sliderquant_vllm.format import ActivationScheme, WeightScheme
from tests.helpers import TINY_LLAMA, write_random_model

SETTINGS = suites.Settings((str(TINY_LLAMA),), ("W2A16", "W4A4"), suites.BASES, "c.txt", "e.txt", 4, 32, epochs=2)
FOUND = {
    "quality": {"e.txt": {"perplexity": 22.0, "full_precision": 20.0, "divergence": 0.1}},
    "cpu_seconds": 1.0,
    "wall_seconds": 2.0,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts as the flags that name them, a few thousand tokens to calibrate and a few hundred to evaluate."""
    folder = tmp_path_factory.mktemp("texts")
    source = inspect.getsource(argparse)
    (folder / "calibration.txt").write_text(source[:40_000])
    (folder / "evaluation.txt").write_text(source[-1500:])
    return ["--calibration", str(folder / "calibration.txt"), "--evaluation", str(folder / "evaluation.txt")]


def run(output, texts, *flags) -> int:
    small = ["--models", str(TINY_LLAMA), "--nsamples", "2", "--seqlen", "32", "--threads", "1"]
    return quality.main([*small, *texts, "--output-dir", str(output), *flags])


def kept(output) -> list[dict]:
    return json.loads((output / "quality.json").read_text())["cells"]


def test_of_repeated_flags_the_last_one_counts():
    assert cells.merged("--a 1 --b 2 3 --rotate", ["--no-rotate", "--a", "4"]) == (
        *("--b", "2", "3", "--no-rotate"),
        *("--a", "4"),
    )
    assert cells.merged("--ignore 're:a b'") == ("--ignore", "re:a b")


def test_schemes_may_name_a_group_size():
    assert cells.scheme_flags("w3a16g128") == ("--scheme", "W3A16", "--group-size", "128")
    assert cells.scheme_flags("W4A4") == ("--scheme", "W4A4")


def test_every_decision_of_the_recipe_is_part_of_the_ablation():
    flags = {token for change in suites.CHANGES for token in change.flags.split() if token.startswith("--")}
    named = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}
    named |= {"weights"} if {"group_size", "symmetric"} <= named else set()
    decisions = {
        each.name for each in fields(Recipe) if each.metadata.get("group") != DATA and each.name not in suites.AXES
    }
    assert decisions <= named, f"no line in CHANGES for {sorted(decisions - named)}"


def test_every_change_is_a_recipe_of_its_own():
    planned = suites.ablation(SETTINGS)
    for scheme in SETTINGS.schemes:
        for base in suites.BASES:
            of_base = [cell for cell in planned if (cell.scheme, cell.group) == (scheme, base)]
            recipes = [str(suites.recipe_of(cell.flags)) for cell in of_base]
            assert of_base[0].row == suites.BASE_ROW
            assert recipes.count(recipes[0]) == 1
            assert len({cell.row for cell in of_base}) == len(of_base) > 25
    rows = {(cell.scheme, cell.group): cell.row for cell in planned if "learn-clip" in cell.row}
    assert set(rows.values()) == {"--no-learn-clip"}


def test_a_change_takes_the_other_choices():
    recipe = suites.recipe_of(("--model", "m", *cells.scheme_flags("W3A16"), "--kv-bits", "8", "--rotate"))
    change = suites.Change("--kv-bits * --rotate *")
    assert suites.resolved(change, recipe) == ["--kv-bits 16 --no-rotate", "--kv-bits 4 --no-rotate"]
    assert suites.resolved(suites.Change("--average-bits {bits}.25"), recipe) == ["--average-bits 3.25"]


def test_a_learning_rate_is_halved_and_doubled_where_it_is_used():
    base = ("--model", "m", *cells.scheme_flags("W3A16"), "--method", "sliderquant")
    halved = suites.resolved(suites.Change("--lr-clip *"), suites.recipe_of(base))
    assert halved == ["--lr-clip 0.00025", "--lr-clip 0.001"]
    assert suites.resolved(suites.Change("--lr-scale *"), suites.recipe_of(base)) == []
    assert suites.resolved(suites.Change("--lr-end-to-end *"), suites.recipe_of(base)) == []
    best = suites.recipe_of((*base, "--preset", "best"))
    assert suites.resolved(suites.Change("--lr-end-to-end *"), best) == ["--lr-end-to-end 0.5", "--lr-end-to-end 2"]


def test_epochs_are_for_methods_that_have_windows():
    settings = suites.Settings(("m",), ("W4A4",), suites.METHODS, "c", "e", 4, 32, epochs=7)
    with_epochs = {cell.row for cell in suites.methods(settings) if "--epochs" in cell.flags}
    assert with_epochs == {"omniquant", "sliderquant:default", "sliderquant:paper"}
    own = {cell.row for cell in suites.methods(settings) if "--nsamples" not in cell.flags}
    assert own == set(suites.OWN_SAMPLES) == {"sliderquant:best"}
    assert {name.partition(":")[0] for name in suites.METHODS} == set(METHODS)
    assert {name.partition(":")[2] for name in suites.METHODS} - {""} == set(PRESETS)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--methods", "gptq", "magic"], ["--methods", "'magic'", "sliderquant:best"]),
        (["--methods", "gptq:fast"], ["--methods", "'gptq:fast'"]),
        (["--schemes", "4bit"], ["--schemes", "'4bit'", "W3A16g128"]),
        (["--schemes", "W5A16"], ["--scheme", "'W5A16'"]),
        (["--models", "/absent"], ["/absent", "hub"]),
        (["--seqlen", "9999"], ["--seqlen 9999"]),
        (["--nsamples", "9999"], ["9999 x 32"]),
        (["--nsamples", "0"], ["--nsamples", "'0'"]),
        (["--threads", "-1"], ["--threads"]),
        (["--evaluation", "EMPTY"], ["EMPTY", "no text"]),
        (["--suite", "sensitivity", "--methods", "rtn"], ["--methods", "leave it out"]),
        (["--only", "lora"], ["--only", "--suite ablation"]),
        (["--suite", "ablation", "--only", "magic"], ["--only", "'magic'"]),
    ],
)
def test_errors_are_one_line_and_exit_code_two(tmp_path, texts, capsys, monkeypatch, flags, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("\n")
    assert run(tmp_path / "out", texts, *flags) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message


def test_a_damaged_file_of_results_is_not_overwritten(tmp_path, texts, capsys):
    (tmp_path / "quality.json").write_text("{")
    assert run(tmp_path, texts) == 2
    assert "quality.json" in capsys.readouterr().err
    assert (tmp_path / "quality.json").read_text() == "{"


def test_a_cell_is_what_its_command_gives(tmp_path, texts, capsys):
    flags = ["--methods", "rtn", "sliderquant:default", "--schemes", "W4A4", "--epochs", "1"]
    assert run(tmp_path, texts, *flags) == 0
    printed = capsys.readouterr().out
    rtn, learned = kept(tmp_path)
    threads, *command = shlex.split(learned["command"])
    assert (threads, command[:3]) == ("OMP_NUM_THREADS=1", ["python", "-m", "calibrate"])
    assert cli.main([*command[3:], "--output-dir", str(tmp_path / "quantized")]) == 0
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    expected = config["quantization_config"]["calibration"]["perplexity"]
    (figures,) = learned["quality"].values()
    assert figures["perplexity"] == pytest.approx(expected["quantized"], rel=1e-6)
    assert figures["full_precision"] == pytest.approx(expected["16-bit"], rel=1e-6)
    assert 0 < figures["divergence"] < next(iter(rtn["quality"].values()))["divergence"]
    text = (tmp_path / "quality.md").read_text()
    assert rtn["command"] in text and learned["command"] in text
    assert f"{figures['perplexity']:.3f}" in text and f"{figures['perplexity']:.3f}" in printed
    assert (tmp_path / "quality.png").stat().st_size > 5000


def test_a_run_that_was_stopped_goes_on_and_only_what_changed_is_computed_again(tmp_path, texts, monkeypatch, capsys):
    calls = []

    def measured(argv, progress):
        calls.append(argv[argv.index("--method") + 1])
        if calls[-1] == "gptq" and len(calls) == 2:
            raise KeyboardInterrupt
        return FOUND

    monkeypatch.setattr(quality, "measure", measured)
    flags = ["--methods", "rtn", "gptq", "awq", "--schemes", "W4A16", "--no-plot"]
    assert run(tmp_path, texts, *flags) == 130
    (only,) = kept(tmp_path)
    assert "--method rtn" in only["command"]
    assert run(tmp_path, texts, *flags) == 0
    assert calls == ["rtn", "gptq", "gptq", "awq"]
    assert run(tmp_path, texts, *flags) == 0
    assert len(calls) == 4
    monkeypatch.setattr(cells, "code_version", lambda: "other")
    assert run(tmp_path, texts, *flags, "--methods", "awq") == 0
    assert calls[4:] == ["awq"]
    assert len(kept(tmp_path)) == 3
    assert list(tmp_path.glob("*.partial")) == []
    assert "+10.0%" in capsys.readouterr().out


def test_what_cannot_be_is_shown_with_its_reason(tmp_path, texts, monkeypatch, capsys):
    def measured(argv, progress):
        if "awq" in argv:
            raise cells.UserError("--method awq: no | such thing")
        return FOUND

    monkeypatch.setattr(quality, "measure", measured)
    assert run(tmp_path, texts, "--methods", "awq", "rtn", "--schemes", "W4A16") == 0
    text = (tmp_path / "quality.md").read_text()
    assert "| awq | - | - | - | - | - |" in text
    assert "- awq: --method awq: no | such thing" in text
    assert "no | such thing" in " ".join(capsys.readouterr().out.split())


def test_several_seeds_give_mean_and_spread(tmp_path, texts, monkeypatch):
    def measured(argv, progress):
        figures = {"perplexity": 20.0 + int(argv[argv.index("--seed") + 1]), "full_precision": 20.0, "divergence": 0.1}
        return FOUND | {"quality": {"e.txt": figures}}

    monkeypatch.setattr(quality, "measure", measured)
    assert run(tmp_path, texts, "--methods", "rtn", "--schemes", "W4A16", "--seeds", "1", "3", "3") == 0
    assert len(kept(tmp_path)) == 2
    text = (tmp_path / "quality.md").read_text()
    assert "| rtn | 22.000 ± 1.414 | +10.0% ± 7.1% | 0.1000 | 1.0 | 2.0 |" in text
    assert "[1, 3]" in text


def test_the_ablation_names_what_was_changed(tmp_path, texts, monkeypatch):
    def measured(argv, progress):
        figures = {"perplexity": 23.0 if "--no-rotate" in argv else 22.0, "full_precision": 20.0, "divergence": 0.1}
        return FOUND | {"quality": {"e.txt": figures}}

    monkeypatch.setattr(quality, "measure", measured)
    monkeypatch.setattr(suites, "CHANGES", (suites.Change("--rotate * --no-online-hadamard"),))
    assert run(tmp_path, texts, "--suite", "ablation", "--schemes", "W4A4") == 0
    text = (tmp_path / "ablation.md").read_text()
    assert text.count("| --no-rotate --no-online-hadamard | 23.000 |") == len(suites.BASES)
    assert text.count(f"| {suites.BASE_ROW} | 22.000 |") == len(suites.BASES)
    assert (tmp_path / "ablation.png").exists()


def test_rows_of_the_ablation_can_be_chosen(tmp_path, texts, monkeypatch):
    commands = []
    monkeypatch.setattr(quality, "measure", lambda argv, progress: commands.append(argv) or FOUND)
    flags = ("--suite", "ablation", "--schemes", "W4A4", "--methods", "sliderquant:default", "--no-plot")
    assert run(tmp_path, texts, *flags, "--only", "lora-rank", "batch-size 8") == 0
    base, *changed = commands
    assert [set(argv) - set(base) for argv in changed] == [{"--lora-rank", "4"}, {"--batch-size", "8"}]


def test_sensitivities_estimated_and_measured(tmp_path, texts):
    model = write_random_model(tmp_path / "model", "llama")
    flags = ["--models", str(model), "--suite", "sensitivity", "--schemes", "W2A16"]
    assert run(tmp_path, texts, *flags) == 0
    *measured, estimated = kept(tmp_path)
    assert list(estimated["estimate"]) == ["0", "1", "2"]
    assert estimated["estimate"]["0"]["2"] > estimated["estimate"]["0"]["4"] > 0
    apart = [next(iter(cell["quality"].values()))["divergence"] for cell in measured]
    assert len(apart) == 5  # the first block alone is also the first of the first ones
    assert max(apart[:3]) < apart[-1]
    assert "--ignore" not in measured[-1]["command"]
    assert "estimated KL" in (tmp_path / "sensitivity.md").read_text()
    assert (tmp_path / "sensitivity.png").stat().st_size > 5000


def test_the_texts_that_are_at_hand_are_different_ones(tmp_path):
    calibration, evaluation = cells.default_texts(tmp_path)
    assert Path(calibration).read_text()[:2000] != Path(evaluation).read_text()[:2000]
    before = cells.fingerprint(evaluation)
    assert before != cells.fingerprint(calibration) != calibration
    assert cells.fingerprint("some/hub:id") == "some/hub:id"


def test_comparison_is_the_divergence_of_all_next_tokens():
    recipe = Recipe(weights=WeightScheme(4), activations=ActivationScheme(4), seqlen=24)
    model = Model(TINY_LLAMA, recipe, torch.device("cpu"))
    stream = torch.arange(2 * 24 + 5) * 37 % 2048
    found = compare(model, stream, 24, Calibrated())
    assert found.perplexity == pytest.approx(perplexity(model, stream, 24, Calibrated()), rel=1e-6)
    assert found.full_precision == pytest.approx(perplexity(model, stream, 24), rel=1e-6)

    # What another recipe's basis gave serves as well.
    rotated = Model(TINY_LLAMA, replace(recipe, rotate=True), torch.device("cpu"))
    again = compare(model, stream, 24, Calibrated(), Reference.of(rotated, stream, 24))
    assert again == pytest.approx(found, rel=1e-4)

    windows, head = stream[:48].view(2, 24), model.head_module()
    logits = []
    with torch.no_grad():
        for ratio in (0.0, 1.0):
            hidden = model.embed(windows)
            for index in range(model.blocks):
                block = model.block(index)
                block.prepare(ratio)
                hidden = block(hidden, model.position_embeddings(24))
            logits.append(head(hidden)[:, :-1].double().log_softmax(-1).flatten(0, 1))
    expected = functional.kl_div(logits[1], logits[0], reduction="batchmean", log_target=True)
    assert found.divergence == pytest.approx(expected.item(), rel=1e-3)


def test_figures_as_people_read_them():
    figure = quality_report.Figure
    assert quality_report.shown("perplexity", figure(12.3456, 0)) == "12.346"
    assert quality_report.shown("perplexity", figure(123456.0, 0)) == "1.23e+05"
    assert quality_report.shown("excess", figure(-0.012, 0.5)) == "-1.2% ± 50.0%"
    assert quality_report.shown("wall_seconds", figure(1.26, 0.5)) == "1.3"
