"""The paper's tables: its figures, the commands beside them, and what is rendered of both."""

from __future__ import annotations

import argparse
import inspect
import json
import shlex

import pytest
from transformers import AutoTokenizer

from benchmarks import paper_report, paper_tables, paper_texts
from benchmarks.cells import Silent, measure
from benchmarks.paper_numbers import entries
from benchmarks.suites import recipe_of
from sliderquant_vllm.checkpoint import read_config, validate_checkpoint
from tests.helpers import TINY_LLAMA

TINY = ["--model-dirs", f"Llama2-13B={TINY_LLAMA}", "--models", "Llama2-13B"]
SMALL = ["--nsamples", "2", "--seqlen", "32", "--epochs", "2"]
FOUND = {
    "quality": {"WikiText2": {"perplexity": 9.0, "full_precision": 5.0, "divergence": 0.1}},
    "cpu_seconds": 1.0,
    "wall_seconds": 2.0,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    source = inspect.getsource(argparse)
    (folder / "calibration.txt").write_text(source[:20_000])
    (folder / "evaluation.txt").write_text(source[-1500:])
    return ["--texts", f"WikiText2={folder / 'evaluation.txt'}", "--calibration", str(folder / "calibration.txt")]


@pytest.fixture
def lm_eval(monkeypatch):
    """lm-eval replaced: what it is told to write, its exit code, and the commands that it was called with."""
    told = argparse.Namespace(results={}, status=0, calls=[])

    def run(command, stdout, stderr):
        told.calls.append(command)
        folder = paper_tables.Path(command[command.index("--output_path") + 1]) / "model"
        folder.mkdir()
        (folder / "results_2026.json").write_text(json.dumps({"results": told.results}))
        return paper_tables.subprocess.CompletedProcess(command, told.status)

    monkeypatch.setattr(paper_tables.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(paper_tables.subprocess, "run", run)
    return told


def planned(*flags):
    arguments = paper_tables.parse(list(flags))
    return paper_tables.jobs(arguments, paper_tables.chosen_entries(arguments)), arguments


def test_the_papers_averages_are_those_of_its_tasks():
    rows: dict[tuple, dict[str, float]] = {}
    for each in entries():
        rows.setdefault((each.table, each.model, each.scheme, each.method), {})[each.column] = each.value
    averaged = {row: figures for row, figures in rows.items() if "Avg" in figures}
    assert len(averaged) == 10 + 31 + 9
    for row, figures in averaged.items():
        tasks = [value for column, value in figures.items() if column in paper_tables.TASKS]
        assert figures["Avg"] == pytest.approx(sum(tasks) / len(tasks), abs=0.011), row


def test_figures_of_the_paper():
    printed = {(e.table, e.model, e.scheme, e.method, e.column): e for e in entries()}
    assert printed[1, "Llama2-7B", "W4A4", "SliderQuant", "WikiText2"].value == 8.34
    assert printed[1, "Qwen2.5-14B", "W2A16", "SliderQuant", "C4"].value == 21.91
    assert printed[1, "Llama2-7B", "W2A16", "GPTQ", "C4"].value is None
    assert printed[1, "Llama3-8B", "W2A16", "QuIP", "C4"].value is None
    assert printed[1, "Llama2-7B", "W2A16", "RTN", "WikiText2"].value == 38000
    assert printed[2, "Qwen2.5-14B", "W4A4", "SliderQuant", "MMLU"].value == 43.5
    assert printed[3, "Llama2-70B", "W4A4", "SliderQuant+", "C4"].value == 5.87
    assert printed[4, "Qwen3-30B-A3B", "W3A16", "OmniQuant", "BoolQ"].value == 86.94
    assert {each.model for each in entries()} == set(paper_tables.MODELS) == set(paper_report.SHAPES)


def test_every_command_is_a_calibration():
    found, _ = planned("--models", "all", "--methods", "all", "--epochs", "4")
    recipes = {(job.model, job.scheme, job.method): recipe_of(job.argv) for job in found if job.argv}
    assert {method for _, _, method in recipes} == {*paper_tables.RECIPES, *paper_tables.OURS}
    cbq = recipes["Llama2-7B", "W2A16", "CBQ"]
    assert (cbq.shallow, cbq.deep, cbq.stages, cbq.learn_scale, cbq.lora_rank) == (0, 0, (1.0,), False, 4)
    plus = recipes["Llama2-7B", "W4A4", "SliderQuant+"]
    assert (plus.rotate, plus.online_hadamard, plus.kv_bits, plus.epochs) == (True, True, 4, 4)
    assert recipes["Llama2-7B", "W4A16", "RTN"].epochs == 0
    grouped, whole = (recipes["Qwen3-30B-A3B", scheme, "SliderQuant"] for scheme in ("W3A16", "W4A4"))
    assert (grouped.weights.group_size, grouped.dataset, grouped.batch_size) == (128, "allenai/c4:en", 1)
    assert (whole.weights.group_size, whole.kv_bits) == (-1, 4)


def test_a_row_of_two_tables_is_one_job_with_the_tasks_of_both():
    found, _ = planned("--models", "Llama2-13B", "--tables", "1", "2", "--methods", "SliderQuant", "--schemes", "W4A4")
    assert [job.method for job in found] == ["-", "SliderQuant"]
    assert found[1].tasks == tuple(paper_tables.TASKS)
    found, _ = planned("--models", "Llama2-13B", "--tables", "1", "--methods", "SliderQuant")
    assert {job.tasks for job in found} == {()}


def test_what_lm_eval_is_asked():
    found, arguments = planned(*TINY, "--tables", "3", "--methods", "SliderQuant+", "--tensor-parallel-size", "2")
    full_precision, quantized = (paper_tables.task_argv(arguments, job) for job in found)
    engine = dict(each.split("=") for each in quantized[quantized.index("--model_args") + 1].split(","))
    assert engine["pretrained"] == "paper/checkpoints/Llama2-13B-W4A4-SliderQuantplus"
    assert (engine["quantization"], engine["tensor_parallel_size"]) == ("sliderquant", "2")
    assert quantized[quantized.index("--tasks") + 1] == "piqa,arc_easy,arc_challenge,hellaswag,winogrande"
    assert f"pretrained={TINY_LLAMA}," in full_precision[3] and "quantization" not in full_precision[3]


def test_a_dry_run_prints_commands_and_sizes_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("calibrate.hub.resolve_model", lambda name: pytest.fail("a download"))
    assert paper_tables.main(["--dry-run", "--models", "Llama2-7B", "--tables", "1", "3", "--methods", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "16-bit weights 13.5 GB, to download" in lines[0] and "W2A16 2.14 GB" in lines[0]
    commands = [line.strip() for line in lines if line.strip().startswith("python -m calibrate")]
    assert len(commands) == len(set(commands)) == 6 + 6 + 7 + 3 * len(paper_tables.OURS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "model, billions",
    [("Llama2-7B", 6.74), ("Llama2-70B", 69.0), ("Llama3-8B", 8.03), ("Qwen2.5-14B", 14.8), ("Qwen3-30B-A3B", 30.5)],
)
def test_sizes_of_the_models(model, billions):
    shape = paper_report.SHAPES[model]
    assert shape.linear_weights + shape.other_weights == pytest.approx(billions * 1e9, rel=0.01)


def test_the_size_of_a_model_that_is_here():
    shape = paper_report.Shape.read(str(TINY_LLAMA))
    held = (TINY_LLAMA / "model.safetensors").stat().st_size
    assert 2 * (shape.linear_weights + shape.other_weights) == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--models", "GPT-2"], ["--models", "'GPT-2'", "Llama2-7B"]),
        (["--methods", "QuIP"], ["--methods", "'QuIP'", "SliderQuant+"]),
        (["--model-dirs", "tiny"], ["--model-dirs", "NAME=PATH"]),
        (["--texts", "PTB=x"], ["--texts", "WikiText2, C4", "PTB"]),
        (["--tables", "2"], ["no row"]),
        (["--tables", "5"], ["--tables"]),
        (["--tables", "3"], ["pip install lm-eval", "--no-tasks"]),
    ],
)
def test_errors_are_one_line_and_exit_code_two(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(paper_tables.importlib.util, "find_spec", lambda name: None)
    assert paper_tables.main(["--output-dir", str(tmp_path), *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    for word in words:
        assert word in message


def test_perplexities_beside_those_of_the_paper_and_no_second_time(tmp_path, texts, monkeypatch, capsys):
    flags = [*TINY, *SMALL, *texts, "--tables", "1", "--schemes", "W4A4", "--methods", "RTN", "SliderQuant"]
    flags += ["--output-dir", str(tmp_path)]
    assert paper_tables.main(flags) == 0
    text = (tmp_path / "paper.md").read_text()
    cells = json.loads((tmp_path / "paper.json").read_text())["cells"]
    rtn, learned = (cell["quality"]["WikiText2"] for cell in cells)
    assert "| W4A4 | SliderQuant | paper | 7.62 | 10.26 |" in text
    assert f"| W4A4 | SliderQuant | here | {learned['perplexity']:.2f} | - |" in text
    assert f"| W4A4 | SliderQuant | difference | {learned['perplexity'] - 7.62:+.2f} | - |" in text
    assert f"| W16A16 | 16-bit | here | {rtn['full_precision']:.2f} | - |" in text
    assert "| W4A4 | CBQ | paper | 8.48 | 11.71 |" in text and "CBQ | here" not in text
    assert "No command here for AffineQuant." in text
    assert not (tmp_path / "checkpoints").exists()
    assert "Table 1: Llama2-13B" in capsys.readouterr().out
    monkeypatch.setattr(paper_tables, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert paper_tables.main(flags) == 0


def test_tasks_run_on_the_checkpoint_that_is_then_removed(tmp_path, texts, monkeypatch, lm_eval):
    written = []

    def measured(argv, progress, streams, write):
        checkpoint = paper_tables.Path(argv[argv.index("--output-dir") + 1])
        checkpoint.mkdir(parents=True)
        written.append((checkpoint, write))
        return FOUND

    monkeypatch.setattr(paper_tables, "measure", measured)
    lm_eval.results = {task: {"acc,none": 0.5, "acc_norm,none": 0.75} for task, _ in paper_tables.TASKS.values()}
    flags = [*TINY, *SMALL, *texts, "--tables", "2", "--methods", "SliderQuant", "sliderquant:best"]
    flags += ["--output-dir", str(tmp_path)]
    assert paper_tables.main(flags) == 0
    assert len(lm_eval.calls) == 3
    assert [(checkpoint.exists(), write) for checkpoint, write in written] == [(False, True)] * 2
    text = (tmp_path / "paper.md").read_text()
    ours = "75.00 | 75.00 | 75.00 | 75.00 | 50.00 | 50.00 | 50.00 | 64.29 |"
    assert f"| W4A4 | SliderQuant | here | {ours}" in text
    assert f"| W4A4 | sliderquant:best | here | {ours}" in text
    assert "| W4A4 | SliderQuant | difference | +3.35 |" in text
    assert "| W16A16 | 16-bit | difference | -5.41 |" in text
    assert paper_tables.main(flags) == 0
    assert len(lm_eval.calls) == 3 and len(written) == 2


def test_tasks_that_fail_leave_a_reason_and_are_tried_again(tmp_path, texts, monkeypatch, lm_eval):
    monkeypatch.setattr(paper_tables, "measure", lambda *_, **__: FOUND)
    lm_eval.status = 1
    flags = [*TINY, *texts, "--tables", "2", "--methods", "SliderQuant", "--output-dir", str(tmp_path)]
    assert paper_tables.main(flags) == 0
    text = (tmp_path / "paper.md").read_text()
    assert "- Llama2-13B W4A4 SliderQuant: lm-eval failed with exit code 1; its log is " in text
    assert "SliderQuant | here" not in text
    lm_eval.status, lm_eval.results = 0, {"piqa": {"acc,none": 0.5}}
    assert paper_tables.main(flags) == 0
    assert "'acc_norm,none'" in (tmp_path / "paper.md").read_text()
    assert len(lm_eval.calls) == 4


def test_differences_as_people_read_them():
    assert paper_report.difference(8.5, 8.34) == "+0.16"
    assert paper_report.difference(100.0, 38000.0) == "0.0026x"
    assert paper_report.difference(None, 1.0) == paper_report.difference(1.0, None) == "-"
    assert paper_report.figure(4.4e6) == "4.4e6"


def test_windows_of_c4_are_drawn_from_documents_that_are_long_enough():
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    documents = ["short", "def f(x):\n    return x\n" * 20, inspect.getsource(inspect)[:3000]]
    tokens = paper_texts.random_windows(documents, tokenizer, seqlen=16, windows=5)
    assert len(tokens) == 5 * 16
    assert tokens == paper_texts.random_windows(documents, tokenizer, seqlen=16, windows=5)
    text = tokenizer.decode(tokens)
    assert "short" not in text


def test_commands_are_what_a_shell_takes(tmp_path):
    found, arguments = planned(
        *TINY, "--tables", "3", "--methods", "SliderQuant+", "--output-dir", str(tmp_path / "a b")
    )
    command = shlex.split(paper_tables.task_command(arguments, found[1]))
    assert command[:3] == ["python", "-m", "lm_eval"]
    assert command[3:] == paper_tables.task_argv(arguments, found[1])


def test_the_checkpoint_that_tasks_run_on_is_the_calibrated_one(tmp_path, texts):
    flags = [*TINY, *SMALL, *texts, "--tables", "1", "--schemes", "W2A16", "--methods", "RTN"]
    found, arguments = planned(*flags, "--output-dir", str(tmp_path))
    job = found[-1]
    measured = measure(job.argv, Silent(), paper_texts.streams(arguments.texts, arguments.seqlen), write=True)
    assert list(measured["quality"]) == ["WikiText2"]
    _, config = read_config(job.checkpoint)
    assert (config.weights.bits, config.calibration["model"]) == (2, str(TINY_LLAMA))
    validate_checkpoint(job.checkpoint, data=True)
