import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.tiny_text import BOS, EOS, find_files, make_tokenizer, read_documents, split
from tools.train_tiny import (
    Options,
    Stopped,
    batch_at,
    learning_rate,
    main,
    perplexity,
    steps_per_epoch,
    train,
)

SHAPE = dict(hidden=32, intermediate=64, blocks=2, heads=2, kv_heads=1, vocab=300, seqlen=32, batch_size=4)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(12):
        lines = (f"def function_{index}_{line}(value):\n    return value + {line * index}\n" for line in range(30))
        (folder / f"module_{index}.py").write_text("".join(lines))
    return folder


def make_options(text: Path, **changes) -> Options:
    return Options(text=(str(text),), **{**SHAPE, "steps": 20, "lr": 5e-3, "warmup": 4, "val_fraction": 0.2, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_learns_and_loads(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    result = train(make_options(text), out)
    assert len(result.losses) == 20
    assert result.losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert result.losses[-1] < 0.8 * result.losses[0]

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 2
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == (BOS, 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (EOS, 1)
    source = "def naïve(x):\n\treturn '→'\n"
    assert tokenizer.decode(tokenizer(source)["input_ids"]) == source
    assert f"| held-out perplexity | {result.perplexity:.2f} (" in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text"]

    _, held_out = split(read_documents(find_files([str(text)]), seed=0), 0.2)
    ids = np.concatenate([[0, *tokenizer(document)["input_ids"], 1] for document in held_out])
    assert perplexity(model.float(), ids) == pytest.approx(result.perplexity, rel=1e-4)


def test_stopped_run_continues_to_the_same_weights(text: Path, tmp_path: Path) -> None:
    train(make_options(text), tmp_path / "whole")
    with pytest.raises(Stopped, match="after step 10 of 20"):
        train(make_options(text), tmp_path / "parts", stop=lambda step: step == 10)
    assert not (tmp_path / "parts").exists()
    resumed = train(make_options(text), tmp_path / "parts")
    assert len(resumed.losses) == 10
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_killed_run_continues_from_its_last_checkpoint(text: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(step: int) -> bool:
        if step == 7:
            raise Killed
        return False

    train(make_options(text), tmp_path / "whole")
    with pytest.raises(Killed):
        train(make_options(text), tmp_path / "parts", checkpoint_minutes=0, stop=kill)
    (tmp_path / ".parts.training" / "checkpoint.pt.partial").write_bytes(b"half a checkpoint")
    (tmp_path / ".parts.training" / "model").mkdir()
    assert len(train(make_options(text), tmp_path / "parts").losses) == 13
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_terminated_process_says_how_to_continue(text: Path, tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SHAPE.items()]
    command = [sys.executable, "-m", "tools.train_tiny", "--device=cpu", "--steps=1000000", *flags]
    command += [f"--output-dir={tmp_path / 'model'}", "--text", str(text)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    ready = tmp_path / ".model.training" / "options.json"
    while not ready.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command continues" in errors
    assert (ready.parent / "checkpoint.pt").exists()


def test_time_budget_ends_with_a_model(text: Path, tmp_path: Path) -> None:
    result = train(make_options(text, steps=1_000_000), tmp_path / "model", budget_minutes=0.02)
    assert 0 < len(result.losses) < 1_000_000
    assert (tmp_path / "model" / "config.json").exists()


def test_other_options_do_not_continue_a_run(text: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(make_options(text), tmp_path / "model", stop=lambda step: step == 1)
    with pytest.raises(ValueError, match=r"begun with lr=0\.005, now it is 0\.1"):
        train(make_options(text, lr=0.1), tmp_path / "model")


def test_epoch_visits_every_window_once() -> None:
    options = Options(text=(), seqlen=8, batch_size=3)
    ids = np.arange(1000, dtype=np.uint16)
    steps = steps_per_epoch(len(ids), options)
    for epoch in range(3):
        firsts = [int(row[0]) for step in range(steps) for row in batch_at(epoch * steps + step, ids, options)]
        assert len(set(firsts)) == len(firsts) == 3 * steps
        assert {(b - a) % 8 for a in firsts for b in firsts} == {0}
        assert len(firsts) * 8 >= 1000 - 8 * (3 + 2)


@pytest.mark.parametrize("tokens", [25, 26, 30, 33])
def test_one_batch_of_text_is_enough(tokens: int) -> None:
    options = Options(text=(), seqlen=8, batch_size=3)
    for step in range(20):
        assert batch_at(step, np.arange(tokens, dtype=np.uint16), options).shape == (3, 9)


def test_learning_rate() -> None:
    options = Options(text=(), lr=1.0, warmup=4)
    assert [learning_rate(step, 104, 0.0, options) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(4, 104, 0.0, options) == 1.0
    assert learning_rate(54, 104, 0.0, options) == pytest.approx(0.55)
    assert learning_rate(104, 104, 0.0, options) == pytest.approx(0.1)
    assert learning_rate(5, 104, 0.5, options) == pytest.approx(0.55)


def test_validation_is_whole_files_and_no_copies(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text("word " * 10 + str(index % 10))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("pass")
    documents = read_documents(find_files([str(tmp_path)]), seed=3)
    assert len(documents) == 10
    training, validation = split(documents, 0.2)
    assert len(validation) == 2
    assert sorted(training + validation) == sorted(documents)
    assert len(split(documents, 0.001)[1]) == 1
    assert split(documents, 0.0) == (documents, [])
    with pytest.raises(ValueError, match="2 or more different files"):
        split(documents[:1], 0.1)


def test_tokenizer_needs_enough_text() -> None:
    with pytest.raises(ValueError, match="expected 1000 tokens, this text gives"):
        make_tokenizer(["a few words"], 1000)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "no-such-folder"], "no file or folder matches 'no-such-folder'"),
        (["--blocks", "0"], "--blocks: expected 1 or more, found 0"),
        (["--hidden", "100", "--heads", "8"], "--hidden: expected a multiple of 2 * 8 heads, found 100"),
        (["--kv-heads", "3"], "--heads: expected a multiple of 3 KV heads, found 4"),
        (["--vocab", "100"], "--vocab: expected 258 or more, found 100"),
        (["--val-fraction", "1"], "--val-fraction: expected 0 to 1, 1 excluded, found 1.0"),
        (["--time-budget-minutes", "0"], "--time-budget-minutes: expected more than 0, found 0.0"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert main(["--output-dir", str(tmp_path / "model"), "--device", "cpu", *flags]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_existing_output_is_kept(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        train(make_options(text), text)
    assert len(list(text.iterdir())) == 12


def test_too_little_text(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 4 windows of 100000 tokens"):
        train(make_options(text, seqlen=100_000), tmp_path / "model")
