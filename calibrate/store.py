"""What a calibration knows so far: in memory, or in the directory of a run that survives the death of its process."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from calibrate import parallel
from calibrate.activations import Activations
from calibrate.errors import UserError
from sliderquant_vllm.checkpoint import put_in_place
from sliderquant_vllm.shards import write_shard

State = dict[str, Tensor]
SAMPLED_VALUES = 64  # of every tensor, in a fingerprint of the weights


class Store:
    """States of the blocks by their index, in memory; nothing survives the process."""

    survives = False

    def __init__(self):
        self.states: dict[int, State] = {}
        self.position: dict[str, Any] | None = None

    def state(self, index: int) -> State | None:
        return self.states.get(index)

    def put_state(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Keep a copy of a block's state, on the CPU."""
        self.states[index] = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    def put_stream(self, name: str, activations: Activations) -> None:
        """Keep hidden states for whoever goes on after a commit."""

    def load_stream(self, name: str, into: Activations) -> None:
        raise KeyError(name)

    def tensors(self, name: str) -> State:
        raise KeyError(name)

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep whatever else going on after a commit takes."""

    def drop_tensors(self, name: str) -> None:
        """Forget them, if there are any."""

    def drop_state(self, index: int, keep: Collection[str] = ()) -> None:
        """Forget a block that is written already, but for the tensors of some names; in memory it stays."""

    def commit(self, position: Mapping[str, Any]) -> None:
        """From here on a run goes on behind this position, with what was put until now."""


def partial_directory(output: Path) -> Path:
    """Where a run that is to become this directory keeps what it has."""
    return output.parent / f".{output.name}.partial"


def parent_of(output: Path) -> Path:
    """The directory, perhaps some levels up, that an output would be made in."""
    return next(parent for parent in output.parents if parent.exists())


def takes_files(directory: Path) -> bool:
    """Whether it is one, and may be written to."""
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)


def _aside(output: Path) -> Path:
    """Where the folder of a run waits while its checkpoint is put in place."""
    return partial_directory(output).with_suffix(".run")


def discard_leftovers(output_dir: Path) -> None:
    """Delete what lies beside a finished checkpoint if the process that put it in place died then."""
    output = Path(output_dir).resolve()
    if output.exists() and not partial_directory(output).exists() and any(_leftovers(output)):
        with contextlib.suppress(BlockingIOError):
            lock = _Lock(output)
            _discard(output)
            lock.release()


def _leftovers(output: Path) -> Iterator[Path]:
    """Besides the folder of the run, the checkpoint that was replaced."""
    yield from (path for path in (_aside(output), *output.parent.glob(f".{output.name}.old-*")) if path.exists())


def _discard(output: Path) -> None:
    for path in _leftovers(output):
        _remove(path)


class _Lock:
    """Held by one run per output. Its file lies beside the output, since everything else is renamed or deleted.

    Raises:
        BlockingIOError: another process holds it.
    """

    def __init__(self, output: Path):
        self.path = partial_directory(output).with_suffix(".lock")
        while True:
            self._file = self.path.open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                    return
            self._file.close()  # whoever held it before has deleted the file

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        self._file.close()


class RunDirectory(Store):
    """A directory beside the output that becomes the checkpoint, with a folder of everything needed to go on.

    Files never change once written. ``run.json`` names those that count and is replaced last, so whenever the process
    dies there is one consistent position to go on from. One run at a time may use it; of its ranks the first one
    writes states and position, and each its own hidden states. When all is done the folder is set aside, and deleted
    once the checkpoint is in place.

    Args:
        output_dir: of the finished checkpoint.
        fingerprint: what must be the same for a run to go on: recipe, weights, samples, versions.
        restart: throw away what an earlier run left.

    Raises:
        UserError: another process is at work on this output, or an unfinished run or another rank has another
            fingerprint.
    """

    survives = True

    def __init__(self, output_dir: Path, fingerprint: Mapping[str, Any], restart: bool):
        super().__init__()
        self.target = Path(output_dir).resolve()
        self.directory = partial_directory(self.target)
        self.folder = self.directory / "run"
        self.fingerprint = json.loads(json.dumps(fingerprint))  # as it reads back
        self.files: dict[str, str] = {}
        self.serial = 0
        for number, other in enumerate(parallel.from_all(self.fingerprint)):
            if changes := differences(self.fingerprint, other):
                raise UserError(
                    f"torchrun: process {number} started otherwise than process {parallel.rank()}: "
                    f"{'; '.join(changes)}; give all processes the same files and versions"
                )
        self._leads = parallel.rank() == 0
        if self._leads:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = _Lock(self.target)
            except BlockingIOError:
                raise UserError(
                    f"--output-dir {output_dir}: another calibration is writing there; wait for it, or choose another"
                ) from None
            self._take_back()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._resume(restart)
        self.position, self.files, self.serial = parallel.from_first((self.position, self.files, self.serial))

    def _take_back(self) -> None:
        """Bring back the folder that a run had set aside when it died; behind a finished one it is a leftover."""
        aside = _aside(self.target)
        if aside.exists() and self.directory.exists() and not self.folder.exists():
            os.rename(aside, self.folder)
        _remove(aside)

    def _resume(self, restart: bool) -> None:
        manifest = self.folder / "run.json"
        kept: dict[str, Any] = {}
        if manifest.exists() and not restart:
            try:
                kept = json.loads(manifest.read_text())
                before, self.position, self.files = kept["fingerprint"], kept["position"], kept["files"]
                self.serial = kept["serial"]
            except (ValueError, KeyError) as error:
                raise UserError(f"{manifest}: damaged ({error!r}); start over with --restart") from None
            if changes := differences(before, self.fingerprint):
                raise UserError(
                    f"{self.directory}: an unfinished run that was started otherwise: {'; '.join(changes)}. Start it "
                    "as before to go on with it, or pass --restart to start over"
                )
        else:
            manifest.unlink(missing_ok=True)  # first: nothing may go on from it without the rest
            for path in self.directory.iterdir():
                if path != self.folder:
                    _remove(path)
        self._sweep()

    def _sweep(self) -> None:
        """Delete what no committed position needs."""
        needed = {"run.json", *self.files.values()} if self.position is not None else set()
        for path in self.folder.iterdir():
            if path.name not in needed:
                _remove(path)
        for path in self.directory.glob(".*.partial"):
            _remove(path)

    def _new_file(self, name: str) -> Path:
        self.serial += 1
        self.files[name] = f"{name}-{self.serial}"
        return self.folder / self.files[name]

    def state(self, index: int) -> State | None:
        name = f"block-{index}"
        return self.tensors(name) if name in self.files else None

    def put_state(self, index: int, state: Mapping[str, Tensor]) -> None:
        self.put_tensors(f"block-{index}", state)

    def tensors(self, name: str) -> State:
        path = self.folder / self.files[name]
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        path = self._new_file(name)
        if self._leads:
            write_shard(path, tensors)
        parallel.wait()

    def drop_tensors(self, name: str) -> None:
        self.files.pop(name, None)

    def put_stream(self, name: str, activations: Activations) -> None:
        for number in range(parallel.world()):
            path = self._new_file(f"{name}-{number}")
            if number == parallel.rank():
                activations.save(path)
        parallel.wait()

    def load_stream(self, name: str, into: Activations) -> None:
        path = self.folder / self.files[f"{name}-{parallel.rank()}"]
        try:
            into.load(path)
        except FileNotFoundError as error:
            raise _unreadable(path, error) from None

    def drop_state(self, index: int, keep: Collection[str] = ()) -> None:
        state = self.state(index) if keep else None
        self.drop_tensors(f"block-{index}")
        if kept := {name: value for name, value in (state or {}).items() if name.rpartition(".")[2] in keep}:
            self.put_state(index, kept)

    def commit(self, position: Mapping[str, Any]) -> None:
        self.position = dict(position)
        if self._leads:
            self._write_manifest()
            self._sweep()
        parallel.wait()

    def _write_manifest(self) -> None:
        content = {
            "fingerprint": self.fingerprint,
            "position": self.position,
            "files": self.files,
            "serial": self.serial,
        }
        partial = self.folder / "run.json.partial"
        with partial.open("w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / "run.json")
        folder = os.open(self.folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def close(self) -> None:
        """Let go of the directory; one that holds no position yet is removed."""
        if self._leads:
            if self.position is None:
                shutil.rmtree(self.directory, ignore_errors=True)
            self._lock.release()

    def complete(self, overwrite: bool) -> None:
        """Turn the directory into the finished checkpoint. Raises OSError where it cannot, and the run can go on."""
        aside = _aside(self.target)
        os.rename(self.folder, aside)
        try:
            put_in_place(self.directory, self.target, overwrite)
        except OSError:
            os.rename(aside, self.folder)
            raise
        _discard(self.target)


@contextlib.contextmanager
def run_directory(output_dir: Path, fingerprint: Mapping[str, Any], restart: bool) -> Iterator[RunDirectory]:
    """A ``RunDirectory`` for the length of a block, closed afterwards whatever happens."""
    run = RunDirectory(output_dir, fingerprint, restart)
    try:
        yield run
    finally:
        run.close()


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """What changed between two JSON values, one line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys((*before, *now))
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if before == now else [f"{where} was {json.dumps(before)}, is {json.dumps(now)}"]


def weights_fingerprint(reader) -> str:
    """SHA-256 of names, shapes, dtypes and a sample of the values of every tensor; reads a few pages of each."""
    digest = hashlib.sha256()
    for name, header in sorted(reader.headers.items()):
        values = reader.tensor(name).flatten()
        sample = values[:: max(len(values) // SAMPLED_VALUES, 1)].contiguous()
        digest.update(f"{name} {header.shape} {header.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: expected what the run left there, cannot read it ({error}); start over with --restart")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
