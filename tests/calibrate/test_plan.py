"""What a dry run tells is what a run then does, takes and says; and it tells every problem at once."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from calibrate import end_to_end, memory, probe
from calibrate.activations import Place
from calibrate.cli import main, parse_arguments, recipe_from
from calibrate.layouts import FAMILIES
from calibrate.memory import Budget, host_memory
from calibrate.model import Model
from calibrate.plan import (
    RANKS,
    duration,
    kinds,
    linear_bytes,
    make_plan,
    ranges,
    run_bytes,
    split_lines,
    split_problem,
)
from calibrate.store import RunDirectory
from sliderquant_vllm.format import ActivationScheme, LinearScheme, WeightScheme
from sliderquant_vllm.packing import pack_linear
from sliderquant_vllm.shards import Reader
from tests.calibrate.test_costs import RUNS

CPU = torch.device("cpu")


@pytest.fixture
def roughly(monkeypatch):
    """Estimates of times are not looked at."""
    monkeypatch.setattr(probe, "SHORTLY", 1e-3)
    monkeypatch.setattr(probe, "CAREFULLY", 1e-3)


@pytest.fixture
def argv(tmp_path, source, text_file):
    flags = {"model": source, "dataset": text_file, "output-dir": tmp_path / "out", "nsamples": 4, "seqlen": 32}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def snapshot(directory) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


def test_a_dry_run_writes_nothing_and_reads_no_weights(tmp_path, source, argv, roughly, monkeypatch, capsys):
    before, read = snapshot(tmp_path), Reader.tensor

    def tensor(reader, name):
        assert reader.directory != source, f"read {name}"
        return read(reader, name)

    monkeypatch.setattr(Reader, "tensor", tensor)
    assert main([*argv, "--w4a16", "--epochs", "2", "--dry-run"]) == 0
    assert snapshot(tmp_path) == before
    output = capsys.readouterr().out
    assert re.search(r"mlp.down_proj +96 x 160 +0-2 +W4A16 asymmetric +8\.\d kB +yes +no +no +no", output)
    assert "3 windows of 2 epochs, 100% of the input channels: 0 0-1 2" in output
    assert (
        "TP 2: mlp.down_proj: a rank's part is [96, 80], and its 80 input channels are not a multiple of 32" in output
    )
    assert "on this machine" in output and "all together" in output


def test_only_the_first_of_several_ranks_prints(argv, roughly, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main([*argv, "--dry-run"]) == 0
    assert capsys.readouterr() == ("", "")


def test_every_problem_is_told_at_once(tmp_path, argv, roughly, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    flags = ["--w4a16", "--group-size", "64", "--ignore", "nowhere", "re:.*q_proj", "re:.*up_proj"]
    flags += ["--nsamples", "99999", "--max-host-memory", "1MB", "--dry-run"]
    assert main([*argv, *flags]) == 2
    output, errors = capsys.readouterr()
    lines = errors.strip().splitlines()
    assert all(line.startswith("calibrate: error: ") for line in lines)
    for words in (
        "out exists already; choose another directory, or pass --overwrite",
        "--ignore nowhere: matches no linear",
        r"layers\.0\.self_attn\.qkv_proj: its parts run as one matrix product",
        r"layers\.0\.mlp\.gate_up_proj: its parts run as one matrix product",
        r"k_proj \(group_size 64 does not divide its 96 .*mlp.down_proj \(group_size 64 does not divide its 160",
        "--max-host-memory: 0.00 GB are too little for one block",
        "expected at least 99999 x 32",
    ):
        assert sum(bool(re.search(words, line)) for line in lines) == 1, (words, lines)
    assert len(lines) == 7
    assert "16-bit" in output and "all together" not in output


def test_problems_that_leave_no_plan_are_told_together(tmp_path, capsys):
    argv = ["--model", str(tmp_path / "nowhere"), "--scheme", "W5A16", "--device", "abacus", "--dry-run"]
    assert main(argv) == 2
    output, errors = capsys.readouterr()
    assert not output and len(errors.strip().splitlines()) == 3
    assert "found 'W5A16'" in errors and "--device abacus" in errors and "was not downloaded before" in errors


def test_too_little_disk_is_a_problem(argv, roughly, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main([*argv, "--w4a16", "--preset", "fast", "--dry-run"]) == 2
    assert re.search(r"disk of .*: expected \d.* MB, found 1.0 kB; free some space", capsys.readouterr().err)


MODELS = {
    "Llama-2-7B": ("llama", {}),
    "Llama-3-8B": ("llama", {"intermediate_size": 14336, "num_key_value_heads": 8}),
    "Qwen2.5-7B": (
        "qwen2",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
    ),
}
GROUPS, WHOLE = LinearScheme(WeightScheme(4, 128)), LinearScheme(WeightScheme(4), ActivationScheme(4))


@pytest.mark.parametrize(
    ("name", "scheme", "expected"),
    [
        ("Llama-2-7B", GROUPS, {4: {"down_proj": "128 does not divide its 2752"}, 8: {"down_proj": "its 1376"}}),
        ("Llama-2-7B", WHOLE, {}),
        (
            "Llama-2-7B",
            replace(WHOLE, hadamard_block_size=128),
            {4: {"down_proj": "'online_had"}, 8: {"down_proj": ""}},
        ),
        ("Llama-3-8B", GROUPS, {}),
        ("Llama-3-8B", replace(WHOLE, hadamard_block_size=512), {8: {"down_proj": "512 of"}}),
        ("Qwen2.5-7B", WHOLE, {8: {"q_proj": "28 heads are not a multiple of 8", "o_proj": "28 heads"}}),
        (
            "Qwen2.5-7B",
            GROUPS,
            {8: {"q_proj": "28 heads", "o_proj": "28 heads", "down_proj": "128 does not divide its 2368"}},
        ),
        ("Qwen2.5-7B", None, {8: {"q_proj": "28 heads", "o_proj": "28 heads"}}),
    ],
)
def test_tensor_parallelism_of_known_models(name, scheme, expected):
    model_type, changes = MODELS[name]
    config = AutoConfig.for_model(
        model_type, **{"num_hidden_layers": 1, "vocab_size": 32, "pad_token_id": None} | changes
    )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    model = SimpleNamespace(config=config, skeleton=skeleton, layouts=[FAMILIES[model_type](config, 0)])
    rotated = {"mlp.down_proj"}
    for ranks in RANKS:
        found = {}
        for path in model.layouts[0].linears:
            own = scheme if scheme is None or path in rotated else replace(scheme, hadamard_block_size=None)
            if problem := split_problem(model, 0, path, own, ranks):
                found[path.rpartition(".")[2]] = problem
        assert found.keys() == expected.get(ranks, {}).keys(), ranks
        for path, words in expected.get(ranks, {}).items():
            assert words in found[path]


def test_linears_with_one_reason_are_told_together(source):
    model = Model(source, recipe_from(parse_arguments(["--model", "x", "--w4a16", "--seqlen", "8"])), CPU)
    lines = split_lines(kinds(model))
    assert lines[0] == "tensor parallelism that can serve it: 1"
    assert lines[3].startswith(
        "TP 8: self_attn.q_proj, self_attn.o_proj: its 4 heads are not a multiple of 8; mlp.gate"
    )


def test_heads_that_neither_divide_nor_are_divided(source):
    model = Model(source, recipe_from(parse_arguments(["--model", "x", "--w4a16", "--seqlen", "8"])), CPU)
    model.config.num_key_value_heads = 3
    assert "its 3 heads neither divide 4" in split_problem(model, 0, "self_attn.k_proj", None, 4)


@pytest.mark.parametrize("scheme", [WeightScheme(3, 32), WeightScheme(2), WeightScheme(8, 64, True)], ids=str)
def test_bytes_of_a_linear_are_those_that_are_packed(scheme):
    groups = scheme.groups(192)
    dtype = torch.float32 if scheme.group_size == -1 else torch.bfloat16
    zero_point = None if scheme.symmetric else torch.zeros(64, groups, dtype=torch.uint8)
    packed = pack_linear(
        torch.zeros(64, 192, dtype=torch.uint8), torch.ones(64, groups, dtype=dtype), zero_point, scheme
    )
    assert linear_bytes(LinearScheme(scheme), 64, 192) == sum(tensor.nbytes for tensor in packed.values())


ESTIMATE_AND_RUN = r"""
import json, re, sys, time
from calibrate import probe
from calibrate.cli import main, parse_arguments
from calibrate.plan import make_plan

time.perf_counter = time.process_time
probe.CAREFULLY = 0.3
plan = make_plan(parse_arguments(sys.argv[1:]))
began = time.process_time()
code = main(sys.argv[1:])
seconds = time.process_time() - began
peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
memory = plan.needs["host memory"][0]
print(json.dumps({"seconds": seconds, "peak": peak, "phases": plan.phases, "memory": memory, "disk": plan.checkpoint}))
sys.exit(code)
"""


def test_an_estimate_is_about_what_a_run_takes(tmp_path, argv):
    """Times are one thread's on a processor, whatever else runs on the machine."""
    argv = [*argv, "--w4a4", "--nsamples", "16", "--seqlen", "128", "--epochs", "6"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", ESTIMATE_AND_RUN, *argv], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert found["seconds"] / 2 < sum(found["phases"].values()) < found["seconds"] * 2, found
    assert 0.7 < found["memory"] / found["peak"] < 1.3, found
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written == pytest.approx(found["disk"], rel=0.05)


@pytest.mark.parametrize("name", ["fast", "two sweeps", "end to end"])
def test_disk_of_a_run_is_enough_and_not_much_more(tmp_path, argv, name, monkeypatch):
    monkeypatch.setattr(end_to_end, "KEEP_SECONDS", 0)
    monkeypatch.setattr(end_to_end, "KEEP_SHARE", math.inf)
    arguments = parse_arguments([*argv, *RUNS[name]])
    model = Model(arguments.model, recipe_from(arguments), CPU)
    estimate, sizes = run_bytes(model, Place(CPU), kinds(model)), [0]
    sweep = RunDirectory._sweep

    def measured(run):
        sizes.append(sum(path.stat().st_size for path in run.folder.iterdir()))
        sweep(run)

    monkeypatch.setattr(RunDirectory, "_sweep", measured)
    assert main([*argv, *RUNS[name]]) == 0
    small = 40_000 * model.blocks  # headers, gains of norms, run.json
    assert 0.5 * max(sizes) - small < estimate
    assert max(sizes) < estimate + small


def test_ranges_and_durations():
    assert [ranges(each) for each in ([], [3], [0, 0, 1, 2, 2, 5, 7, 8])] == ["", "3", "0-2, 5, 7-8"]
    assert [duration(each) for each in (0.34, 41, 75, 3700)] == ["0.3 s", "41 s", "1 min 15 s", "1 h 1 min"]


def test_memory_is_compared_with_what_a_run_may_take(argv, roughly):
    fast, more = [*argv, "--w4a16", "--preset", "fast"], 10 * host_memory("MemTotal")
    for flags, allowed in (
        ([], Budget.of(CPU, None, None).host),
        (["--max-host-memory", "1GB"], 10**9),
        (["--max-host-memory", f"{more}"], host_memory("MemTotal")),
    ):
        assert make_plan(parse_arguments([*fast, *flags])).needs["host memory"][1] == allowed


def test_a_tuning_beyond_what_it_may_take_is_a_problem(argv, roughly, monkeypatch, capsys):
    monkeypatch.setattr(memory, "tuning_bytes", lambda *_, **__: 10**9)
    flags = ["--w2a16", "--preset", "best", "--seqlen", "32", "--nsamples", "4", "--max-host-memory", "1GB"]
    assert main([*argv, *flags, "--dry-run"]) == 2
    assert "--end-to-end-epochs 3, with all 3 blocks at once, which takes about 1.51 GB" in capsys.readouterr().err


def test_a_block_that_is_ignored_is_not_the_one_that_is_timed(source, tmp_path, roughly):
    first = r"re:model\.layers\.0\..*"
    flags = ["--model", "x", "--w4a16", "--preset", "fast", "--nsamples", "2", "--seqlen", "8"]
    recipe = recipe_from(parse_arguments([*flags, "--ignore", first, "re:.*o_proj"]))
    model = Model(source, recipe, CPU)
    bench = probe._Bench(model, tmp_path, checkpointing=False)
    assert bench.index == 1 and bench.probe.schemes(0) == model.schemes(1)


def test_writing_is_timed_where_the_output_goes(tmp_path, argv, roughly, monkeypatch):
    """Or, said clearly, elsewhere."""
    folders, write = set(), probe.write_shard

    def written(path, tensors):
        folders.add(path.parent.parent)
        write(path, tensors)

    monkeypatch.setattr(probe, "write_shard", written)
    flags = [*argv, "--w4a16", "--preset", "fast", "--output-dir"]
    plan = make_plan(parse_arguments([*flags, str(tmp_path / "new" / "out")]))
    assert folders == {tmp_path} and not plan.notes
    folders.clear()
    (file := tmp_path / "file").touch()
    plan = make_plan(parse_arguments([*flags, str(file / "out")]))
    assert folders == {Path(tempfile.gettempdir())}
    assert f"{file} cannot be written to: the time for writing is that of {tempfile.gettempdir()}" in plan.notes


def test_attention_of_long_samples_is_computed_again_too(source, roughly, tmp_path, monkeypatch):
    flags = ["--model", "x", "--w4a16", "--epochs", "1", "--nsamples", "2", "--seqlen", "8"]
    model, calls = Model(source, recipe_from(parse_arguments(flags)), CPU), {}
    attend = functional.scaled_dot_product_attention

    def counted(*args, **settings):
        calls[checkpointing] += 1
        return attend(*args, **settings)

    def per_sample(run, attention):
        monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
        with torch.enable_grad():
            attention(torch.randn(1, 2, 8, 4))
        monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
        return 1.0

    for checkpointing in (False, True):
        calls[checkpointing] = 0
        bench = probe._Bench(model, tmp_path, checkpointing)
        monkeypatch.setattr(bench, "per_sample", per_sample)
        bench.learning(bench.probe.block(0))
    assert calls == {False: 1, True: 2}
