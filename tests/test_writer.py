"""Writing checkpoint directories: shards that stream, and a directory that appears whole or not at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch

from sliderquant_vllm.checkpoint import staging_directory, validate_checkpoint
from sliderquant_vllm.format import FormatError
from sliderquant_vllm.shards import INDEX_FILE, Reader, shard_name, write_index, write_shard
from tests.helpers import write_shards


def test_shards_and_their_index_read_back(tmp_path):
    held = {f"t{i}": torch.full((1000,), float(i)) for i in range(4)}
    files = [shard_name(number, 2) for number in (1, 2)]
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, names in zip(files, (["t0", "t1", "t2"], ["t3"]), strict=True):
        write_shard(tmp_path / file, {name: held[name] for name in names})
    write_index(tmp_path, files)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 16_000
    reader = Reader(tmp_path)
    reader.check_digests()
    assert set(reader.headers) == set(held)
    assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in held.items())


def test_a_shard_holds_views_and_shared_tensors(tmp_path):
    base = torch.arange(64.0).reshape(8, 8)
    held = {"transposed": base.T, "slice": base[:, 2:4], "again": base}
    write_shard(tmp_path / "model.safetensors", held)
    reader = Reader(tmp_path)
    assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in held.items())


def test_the_index_refuses_nothing_and_one_name_twice(tmp_path):
    with pytest.raises(FormatError, match="found none"):
        write_index(tmp_path, [])
    for file in ("a.safetensors", "b.safetensors"):
        write_shard(tmp_path / file, {"x": torch.ones(1)})
    with pytest.raises(FormatError, match="x: expected one tensor"):
        write_index(tmp_path, ["a.safetensors", "b.safetensors"])


def test_a_shard_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "model.safetensors"
    write_shard(path, {"x": torch.ones(1)})
    limit = """
import resource, sys, torch
from pathlib import Path
from sliderquant_vllm.shards import write_shard
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_shard(Path(sys.argv[1]), {"x": torch.zeros(1_000_000)})
except OSError as error:
    sys.exit(str(error))
"""
    process = subprocess.run([sys.executable, "-c", limit, str(path)], capture_output=True, text=True, timeout=120)
    assert process.returncode == 1 and "model.safetensors" in process.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert Reader(tmp_path).tensor("x").tolist() == [1]


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
from sliderquant_vllm.checkpoint import staging_directory
from sliderquant_vllm.shards import write_shard

with staging_directory(sys.argv[1]) as staging:
    write_shard(staging / "model.safetensors", {"t": torch.ones(1000)})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    target = tmp_path / "model"
    process = subprocess.run([sys.executable, "-c", script, str(target)], timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(FormatError):
        validate_checkpoint(next(tmp_path.glob(".model.partial-*")))
