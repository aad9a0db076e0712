import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer

from calibrate.cli import main, parse_arguments, recipe_from
from calibrate.data import token_stream
from calibrate.evaluate import text_windows
from calibrate.export import Writer, check_block
from calibrate.model import Model
from calibrate.pipeline import Calibrated
from sliderquant_vllm.checkpoint import read_config, validate_checkpoint
from sliderquant_vllm.format import FormatError
from sliderquant_vllm.shards import Reader
from tests.calibrate.models import write_random_model
from tests.helpers import TINY_LLAMA, reference_logprobs

SMALL = ["--nsamples", "4", "--seqlen", "32", "--epochs", "2", "--stages", "0.5", "1", "--shallow", "1", "--deep", "1"]


def recipe(*argv):
    return recipe_from(parse_arguments(["--model", "x", *argv]))


def test_short_forms_and_both_spellings_are_the_same():
    assert recipe("--w4a4") == recipe("--scheme", "w4a4")
    assert recipe("--w4a16", "--group_size", "128") == recipe("--w4a16", "--group-size=128")
    assert recipe("--w4a16", "--no_learn_clip") == recipe("--w4a16", "--no-learn-clip")


def test_defaults_follow_the_scheme():
    w4a4, w2a16 = recipe("--w4a4"), recipe("--w2a16")
    assert w4a4.online_hadamard and not w2a16.online_hadamard
    paper = recipe("--w4a4", "--preset", "paper")
    assert paper.learn_scale and paper.epochs == 20 and paper.stages == (0.5, 1.0)
    assert recipe("--w2a16", "--preset", "paper").epochs == 60
    assert not recipe("--w2a16", "--no-rotate").rotate
    assert recipe("--w4a16", "--stages", "0.25", "1").stages == (0.25, 1.0)
    assert recipe("--w4a16", "--average-bits", "3.5").average_bits == 3.5
    assert not recipe("--w4a4", "--method", "rtn").rotate


@pytest.mark.parametrize("scheme", ["W4A4", "W4A16", "W3A16", "W2A16", "W8A8"])
def test_a_checkpoint_holds_what_was_calibrated(tmp_path, text_file, scheme):
    output = tmp_path / "out"
    argv = [
        "--model",
        str(TINY_LLAMA),
        "--scheme",
        scheme,
        "--dataset",
        str(text_file),
        "--output-dir",
        str(output),
    ]
    assert main([*argv, *SMALL, "--eval-dataset", __file__]) == 0
    validate_checkpoint(output, data=True)
    _, config = read_config(output)
    assert config.calibration["model"] == str(TINY_LLAMA)
    assert len(list(output.glob("*.safetensors"))) > 1
    for name in ("tokenizer.json", "generation_config.json", "README.md"):
        assert (output / name).is_file()
    card = (output / "README.md").read_text()
    assert "of tiny-llama\n" in card and str(TINY_LLAMA) not in card and "base_model" not in card

    # The checkpoint, computed as a server would, is as good as calibration said. Inputs that differ by 1e-6 move a
    # perplexity by 0.2% where activations have 4 bits: one code that falls the other way reaches all behind it.
    stream = token_stream(AutoTokenizer.from_pretrained(output), __file__)
    logprobs = reference_logprobs(output, text_windows(stream, 32).tolist(), torch.float32)
    said = config.calibration["perplexity"]["quantized"]
    assert logprobs.mean().neg().exp().item() == pytest.approx(said, rel=1e-2 if scheme == "W4A4" else 2e-3)


def test_too_little_text_to_evaluate_on_is_refused_before_any_work(tmp_path, text_file, capsys):
    (tmp_path / "short.txt").write_text("def f():")
    argv = ["--model", str(TINY_LLAMA), "--w4a16", "--dataset", str(text_file), "--output-dir", str(tmp_path / "out")]
    assert main([*argv, *SMALL, "--eval-dataset", str(tmp_path / "short.txt")]) == 2
    assert "evaluation text: expected at least 32 tokens" in capsys.readouterr().err
    assert not list(tmp_path.glob(".out*"))


def test_the_final_check_notices_one_wrong_code(tmp_path, text_file):
    output = tmp_path / "out"
    argv = ["--model", str(TINY_LLAMA), "--w4a16", "--method", "rtn", "--dataset", str(text_file)]
    assert main([*argv, *SMALL, "--output-dir", str(output)]) == 0
    model = Model(TINY_LLAMA, recipe_from(parse_arguments(argv)), torch.device("cpu"))
    block, shard = Calibrated().finished_block(model, 5), output / Writer(model, output).file(5)
    check_block(shard, block)
    data = bytearray(shard.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = header["model.layers.5.mlp.up_proj.weight_packed"]["data_offsets"][0]
    data[8 + int.from_bytes(data[:8], "little") + start] ^= 1
    shard.write_bytes(data)
    with pytest.raises(FormatError, match="layers.5.mlp.up_proj: read back, its weights differ"):
        check_block(shard, block)


def test_a_rotated_model_with_tied_embeddings_is_untied(tmp_path, text_file):
    source = write_random_model(tmp_path / "model", "llama", vocab_size=2048, tie_word_embeddings=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((TINY_LLAMA / name).read_bytes())
    for flag, tied in (("--rotate", False), ("--no-rotate", True)):
        output = tmp_path / flag
        argv = [
            "--model",
            str(source),
            "--w8a8",
            flag,
            "--dataset",
            str(text_file),
            "--output-dir",
            str(output),
        ]
        argv[2:3] = ["--scheme", "W8A8"]
        assert main([*argv, *SMALL]) == 0
        raw, _ = read_config(output)
        assert raw["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in Reader(output).headers) is not tied


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "{tmp}/nowhere", "--w4a4"], "nowhere: no such directory"),
        (["--model", "{tmp}", "--w4a4"], "without config.json"),
        (["--w4a4"], "--model"),
        (["--model", "{tiny}"], "--scheme: expected one"),
        (["--model", "{tiny}", "--scheme", "W5A16"], "found 'W5A16'"),
        (["--model", "{tiny}", "--w4a4", "--scheme", "W4A16"], "not allowed with"),
        (["--model", "{tiny}", "--w4a16", "--group-size", "48"], "--group-size: expected one of"),
        (["--model", "{tiny}", "--w4a16", "--nsamples", "many"], "invalid int value"),
        (["--model", "{tiny}", "--w4a16", "--dataset", "{tmp}/empty.txt"], "no text in it"),
        (["--model", "{tiny}", "--w4a16", "--dataset", "{text}", "--nsamples", "999"], "at least 999 x 2048"),
        (["--model", "{tiny}", "--w4a16", "--output-dir", "{tmp}"], "pass --overwrite"),
        (["--model", "{tiny}", "--w4a16", "--output-dir", "{tmp}/damaged", "--overwrite"], "is not overwritten"),
        (["--model", "{tiny}", "--w4a16", "--device", "abacus"], "--device abacus: expected auto, cpu, cuda"),
        (["--model", "{tiny}", "--w4a16", "--output-dir", "{tiny}", "--overwrite"], "holds the model to be quantized"),
        (["--model", "{tiny}", "--w4a16", "--output-dir", "{text}/out"], "not a directory that can be written to"),
        (["--model", "{damaged}", "--w4a16", "--dataset", "{text}"], "truncated or damaged"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_leaves_nothing(tmp_path, text_file, argv, words, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    output = tmp_path / "out"
    damaged = shutil.copytree(TINY_LLAMA, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((TINY_LLAMA / "model.safetensors").read_bytes()[:-1])
    known = {"tmp": tmp_path, "tiny": TINY_LLAMA, "text": text_file, "damaged": damaged}
    argv = [argument.format(**known) for argument in argv]
    if "--output-dir" not in argv:
        argv += ["--output-dir", str(output)]
    before = sorted(tmp_path.iterdir())
    assert main(argv) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and message.startswith("calibrate: error: ")
    assert re.search(words, message), message
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_checkpoint_is_replaced_only_when_asked(tmp_path, text_file, capsys):
    output = tmp_path / "out"
    argv = ["--model", str(TINY_LLAMA), "--w4a16", "--method", "rtn", "--dataset", str(text_file), *SMALL]
    argv += ["--output-dir", str(output)]
    assert main(argv) == 0
    assert main(argv) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main([*argv, "--overwrite", "--symmetric"]) == 0
    assert read_config(output)[1].weights.symmetric
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_nothing_half_written(tmp_path, text_file, how):
    argv = [
        "--model",
        str(TINY_LLAMA),
        "--w4a16",
        "--dataset",
        str(text_file),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    run = subprocess.Popen(
        [sys.executable, "-m", "calibrate", *argv, "--nsamples", "4", "--seqlen", "32", "--epochs", "500"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # Where the tests run in the background of a shell, children inherit that an interrupt is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in run.stderr:
        if "12 blocks" in line:
            break
    time.sleep(0.5)
    run.send_signal(how)
    run.communicate(timeout=60)
    assert run.returncode == 128 + how
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("module", ["calibrate", "benchmarks.calibration", "benchmarks.quality"])
def test_huge_pages_are_asked_for_before_torch_is_imported(module):
    """Torch reads it while it is imported; benchmarks measure what the command does."""
    code = """
import os, runpy, sys

class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("torch finds", os.environ.get("THP_MEM_ALLOC_ENABLE"))

module = sys.argv[1]
sys.meta_path.insert(0, Watch)
sys.argv = [module, "--help"]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    import torch
"""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", code, module]
    output = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    assert "torch finds 1" in output and "torch finds None" not in output
