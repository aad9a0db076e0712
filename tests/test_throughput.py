"""The throughput benchmark around the engines: arguments, which models, rounds, report."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from benchmarks import throughput
from sliderquant_vllm.format import ActivationScheme, WeightScheme
from tests.helpers import TINY_LLAMA, edit_config, write_rtn_checkpoint


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    target = tmp_path_factory.mktemp("throughput") / "quantized"
    return write_rtn_checkpoint(TINY_LLAMA, target, WeightScheme(4), ActivationScheme(4))


def test_flags_take_dashes_and_underscores_and_a_no_form():
    arguments = throughput.parse(
        ["--model", "a_b", "--batch_sizes", "2", "4", "--input_len=7", "--no_plot", "--enforce-eager"]
    )
    assert (arguments.model, arguments.batch_sizes, arguments.input_len) == (["a_b"], [2, 4], 7)
    assert (arguments.plot, arguments.enforce_eager) == (False, True)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--model", "required"]),
        (["--model", "x", "--output-len", "1"], ["--output-len", "2 or more"]),
        (["--model", "x", "--batch-sizes", "0"], ["above 0", "'0'"]),
        (["--model", "x", "--batch", "1"], ["--batch"]),
        (["--model", "/absent"], ["/absent/config.json"]),
        (["--model", str(TINY_LLAMA)], ["quantization_config"]),
        (["--model", "QUANTIZED", "--baseline", "/absent"], ["--baseline /absent"]),
    ],
)
def test_errors_are_one_line_and_exit_code_two(quantized, capsys, flags, words):
    assert throughput.main([str(quantized) if flag == "QUANTIZED" else flag for flag in flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message


def test_the_baseline_is_the_parent_unless_named(quantized, tmp_path):
    parent = {"16-bit": str(TINY_LLAMA), "W4A4": str(quantized)}
    assert throughput.find_models([str(quantized)], "auto") == parent
    assert throughput.find_models([str(quantized)], "none") == {"W4A4": str(quantized)}
    assert throughput.find_models([str(quantized)], str(tmp_path)) == parent | {"16-bit": str(tmp_path)}


def test_models_stand_side_by_side_under_names_of_their_own(quantized, tmp_path):
    other, stock = tmp_path / "other", tmp_path / "stock"
    shutil.copytree(quantized, other)
    stock.mkdir()
    (stock / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    models = throughput.find_models([str(quantized), str(other), str(stock)], "none")
    assert models == {"W4A4": str(quantized), "W4A4 other": str(other), "gptq 4-bit": str(stock)}
    with pytest.raises(throughput.UserError, match="named twice"):
        throughput.find_models([str(quantized), str(other), str(other)], "none")


def test_a_parent_that_is_not_known(tmp_path, capsys):
    quantized = write_rtn_checkpoint(TINY_LLAMA, tmp_path / "quantized", WeightScheme(4))
    edit_config(quantized, calibration={})
    assert throughput.main(["--model", str(quantized)]) == 2
    assert "--baseline" in capsys.readouterr().err


def test_models_take_turns_and_medians_are_reported(quantized, tmp_path, monkeypatch, capsys):
    calls = []

    def measured(job, log):
        calls.append(log.stem)
        rate = 10.0 * len(calls) * (3 if log.stem == "W4A4" else 1)
        return {"1": {"prefill": [rate, rate, rate], "decode": [rate / 2] * 3}}

    monkeypatch.setattr(throughput, "measure_apart", measured)
    monkeypatch.setattr(throughput, "machine", dict)
    output = tmp_path / "out"
    assert throughput.main(["--model", str(quantized), "--output-dir", str(output), "--batch-sizes", "1"]) == 0
    assert calls == ["16-bit", "W4A4", "16-bit", "W4A4"]
    report = json.loads((output / "throughput.json").read_text())
    assert report["tokens_per_second"]["16-bit"]["1"] == {"prefill": 20.0, "decode": 10.0}
    assert report["tokens_per_second"]["W4A4"]["1"] == {"prefill": 90.0, "decode": 45.0}
    assert report["settings"]["rounds"] == 2
    assert (output / "throughput.png").stat().st_size > 5000
    assert "4.50x" in capsys.readouterr().out


def test_the_table_of_many_models_is_whole_in_a_file(quantized, tmp_path, monkeypatch, capsys):
    others = [str(shutil.copytree(quantized, tmp_path / f"other-{number}")) for number in range(4)]
    rates = {"1": {"prefill": [1234.5], "decode": [67.8]}}
    monkeypatch.setattr(throughput, "measure_apart", lambda job, log: rates)
    monkeypatch.setattr(throughput, "machine", dict)
    flags = ["--model", str(quantized), *others, "--output-dir", str(tmp_path / "out"), "--no-plot"]
    assert throughput.main(flags) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert printed.count("1,234.5") == 6


@pytest.fixture
def engine_clock(monkeypatch):
    """vLLM replaced by a clock: ``engine_clock(seconds of each generation)`` gives what ``measure`` returns."""
    started = {}

    def measure(durations: list[float]):
        clock, durations = [0.0], iter(durations)

        class Engine:
            def __init__(self, model, **arguments):
                started.update(arguments)
                self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 8))

            def generate(self, prompts, sampling, use_tqdm):
                clock[0] += next(durations)

        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=dict))
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
        settings = {"dtype": "bfloat16", "tensor_parallel_size": 1, "gpu_memory_utilization": 0.5}
        lengths = {"batch_sizes": [2], "input_len": 10, "output_len": 5, "repeats": 2, "enforce_eager": True}
        return throughput.measure({"model": "m"} | settings | lengths), started

    return measure


def test_samples_and_those_that_say_nothing(engine_clock):
    rates, arguments = engine_clock([9.0, 1.0, 3.0, 2.0, 2.0])
    assert rates == {"2": {"prefill": [20.0], "decode": [4.0]}}
    assert arguments["max_num_batched_tokens"] == 20
    with pytest.raises(throughput.UserError, match="batch size 2: .*5 tokens.*--repeats"):
        engine_clock([9.0, 1.0, 1.0, 2.0, 1.5])


def test_a_failed_engine_is_reported_with_its_cause(tmp_path, monkeypatch):
    log = tmp_path / "W4A4.log"

    def failing(command, stdout, **_):
        stdout.write(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, the context is too long [type=value_error, input_value=...]\n"
            "RuntimeError: Engine core initialization failed.\n"
        )
        stdout.flush()
        return throughput.subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(throughput.subprocess, "run", failing)
    with pytest.raises(throughput.UserError) as caught:
        throughput.measure_apart({"model": "m"}, log)
    assert "(the context is too long)" in str(caught.value)
    assert str(log) in str(caught.value)
