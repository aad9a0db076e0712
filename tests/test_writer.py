"""Writing checkpoint directories: shards that stream, and a directory that appears whole or not at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch

from sliderquant_vllm.checkpoint import staging_directory, validate_checkpoint, write_shards
from sliderquant_vllm.format import FormatError
from sliderquant_vllm.shards import INDEX_FILE, Reader


def test_shards_stream_and_respect_their_size(tmp_path):
    held = {f"t{i}": torch.full((1000,), float(i)) for i in range(10)}
    written = []

    def tensors():
        for name, tensor in held.items():
            written.append(len(list(tmp_path.glob("shard-*"))))
            yield name, tensor

    write_shards(tmp_path, tensors(), max_shard_bytes=12_000)
    assert written == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [*(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)), INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 40_000
    reader = Reader(tmp_path)
    reader.check_digests()
    assert set(reader.headers) == set(held)
    assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in held.items())


def test_shards_hold_views_shared_and_reused_tensors_and_one_larger_than_a_shard(tmp_path):
    base = torch.arange(64.0).reshape(8, 8)
    buffer = torch.zeros(4)

    def tensors():
        yield "transposed", base.T
        yield "slice", base[:, 2:4]
        yield "again", base
        for i in range(3):
            yield f"buffer{i}", buffer.fill_(i)
        yield "large", torch.ones(10_000)

    write_shards(tmp_path, tensors(), max_shard_bytes=1_000)
    reader = Reader(tmp_path)
    assert torch.equal(reader.tensor("transposed"), base.T)
    assert torch.equal(reader.tensor("slice"), base[:, 2:4])
    assert torch.equal(reader.tensor("again"), base)
    assert [reader.tensor(f"buffer{i}").tolist() for i in range(3)] == [[i] * 4 for i in range(3)]
    assert reader.headers["large"].shape == (10_000,)


def test_the_writer_refuses_nothing_and_one_name_twice(tmp_path):
    with pytest.raises(FormatError, match="found none"):
        write_shards(tmp_path, [])
    with pytest.raises(FormatError, match="a: expected one tensor"):
        write_shards(tmp_path, [("a", torch.ones(1)), ("a", torch.ones(1))])


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path):
    with staging_directory(tmp_path / "model") as staging:
        write_shards(staging, [("a", torch.ones(1))])
        (staging / "config.json").write_text("{}")
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1


def test_staging_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(KeyboardInterrupt), staging_directory(target) as staging:
        (staging / "config.json").write_text("{}")
        assert not target.exists()
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    with staging_directory(target) as staging:
        (staging / "config.json").write_text("1")
    assert [path.name for path in target.parent.iterdir()] == ["model"]


OURS = '{"quantization_config": {"quant_method": "sliderquant"}}'


def test_staging_replaces_a_model_only_when_told(tmp_path):
    target = tmp_path / "model"
    for content, overwrite in ((OURS, False), (OURS + " ", True)):
        with staging_directory(target, overwrite) as staging:
            (staging / "config.json").write_text(content)
    with pytest.raises(FileExistsError, match="exists already"), staging_directory(target):
        pass
    assert (target / "config.json").read_text() == OURS + " "
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_staging_never_replaces_what_is_no_model(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="not a model"), staging_directory(tmp_path / "home", True):
        pass
    (tmp_path / "home" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileExistsError, match="not a model made here"), staging_directory(tmp_path / "home", True):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="not a model"), staging_directory(tmp_path / "file", True):
        pass


def test_staging_keeps_the_old_model_when_the_new_one_fails(tmp_path):
    target = tmp_path / "model"
    with staging_directory(target) as staging:
        (staging / "config.json").write_text(OURS)
    with pytest.raises(RuntimeError), staging_directory(target, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
        raise RuntimeError
    assert (target / "config.json").read_text() == OURS
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path):
    script = """
import os, signal, sys, torch
from sliderquant_vllm.checkpoint import staging_directory, write_shards

def tensors():
    for i in range(8):
        yield f"t{i}", torch.ones(1000)
    os.kill(os.getpid(), signal.SIGKILL)

with staging_directory(sys.argv[1]) as staging:
    write_shards(staging, tensors(), max_shard_bytes=8000)
"""
    target = tmp_path / "model"
    process = subprocess.run([sys.executable, "-c", script, str(target)], timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    partial = next(tmp_path.glob(".model.partial-*"))
    assert not list(partial.glob("*.safetensors"))
    with pytest.raises(FormatError):
        validate_checkpoint(partial)
