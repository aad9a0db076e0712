"""Safetensors shards and their index: reading headers, checking them against the index, writing.

Either one ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names, whose
``metadata.sha256`` maps each shard to its digest. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sliderquant_vllm.format import FormatError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a shard says of one tensor; a ``dtype`` that ``DTYPES`` lacks is kept by name."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    nbytes: int


class Reader:
    """Lazy access to the tensors of a directory: headers are read at once, data on demand.

    Raises FormatError when a shard is missing, damaged, or at odds with the index.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        index_path = self.directory / INDEX_FILE
        if index_path.exists():
            index = read_json(index_path)
            weight_map = _string_map(index_path, "weight_map", index.get("weight_map"))
            files = sorted(set(weight_map.values()))
            metadata = index.get("metadata")
            digests = metadata.get("sha256", {}) if isinstance(metadata, dict) else {}
            self.sha256 = _string_map(index_path, "metadata.sha256", digests)
        else:
            weight_map, files, self.sha256 = None, [WEIGHTS_FILE], {}
            # An engine without an index loads every shard that it finds.
            for path in self.directory.glob("*.safetensors"):
                if path.name != WEIGHTS_FILE:
                    raise FormatError(f"{index_path}: missing beside {path.name}; copy it, or remove the other shards")
        self.headers: dict[str, TensorHeader] = {}
        for file in files:
            self._read_headers(file)
        if weight_map is not None:
            self._compare_with_index(weight_map)

    def _read_headers(self, file: str) -> None:
        path = self.directory / file
        # An index is data from elsewhere: a name such as ../../x must not reach outside the directory.
        if Path(file).name != file:
            raise FormatError(f"{self.directory / INDEX_FILE}: expected plain file names, found {file!r}")
        if not path.is_file():
            raise FormatError(f"{path}: the shard is missing; copy or download it again")
        try:
            found = _headers(path)
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{path}: no readable safetensors file ({_one_line(error)}); it is truncated or damaged: "
                "copy or download it again"
            ) from None
        for name, header in found.items():
            if name in self.headers:
                raise FormatError(f"{name}: found in both {self.headers[name].file} and {file}; remove one")
            self.headers[name] = header

    def _compare_with_index(self, weight_map: Mapping[str, str]) -> None:
        for name, file in weight_map.items():
            held = self.headers.get(name)
            if held is None or held.file != file:
                raise FormatError(
                    f"{name}: {INDEX_FILE} places it in {file}, found {held.file if held else 'nowhere'}; "
                    "copy or download the checkpoint again"
                )
        if unlisted := set(self.headers) - set(weight_map):
            name = min(unlisted)
            raise FormatError(
                f"{name}: {self.headers[name].file} holds it, {INDEX_FILE} does not name it; "
                "copy or download the checkpoint again"
            )

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU.

        It maps its file for as long as it lives. An open shard would keep all that was ever read of it in memory.
        """
        [(_, tensor)] = self.tensors([name])
        return tensor

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read small tensors, file by file: each is opened once, which takes time with the number of its tensors."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.headers[name].file, []).append(name)
        for file, held in by_file.items():
            path, name = self.directory / file, held[0]
            try:
                with safe_open(path, framework="pt") as shard:
                    for name in held:
                        yield name, shard.get_tensor(name)
            except (SafetensorError, OSError, RuntimeError) as error:  # the last one: too little memory to map the file
                raise FormatError(
                    f"{path}: {name} cannot be read ({_one_line(error)}); copy or download the file again"
                ) from None

    def modules(self) -> dict[str, dict[str, TensorHeader]]:
        """Module name -> last component of the tensor name -> header."""
        modules: dict[str, dict[str, TensorHeader]] = {}
        for name, header in self.headers.items():
            module, _, suffix = name.rpartition(".")
            modules.setdefault(module, {})[suffix] = header
        return modules

    def check_digests(self) -> None:
        """Compare every shard with the SHA-256 in the index, where there is one."""
        files = {header.file for header in self.headers.values()}
        for file, expected in self.sha256.items():
            if file not in files:
                raise FormatError(f"{INDEX_FILE}: metadata.sha256 names {file}, weight_map does not; copy it again")
            if (digest := _sha256(self.directory / file)) != expected:
                raise FormatError(
                    f"{self.directory / file}: expected sha256 {expected}, found {digest}; the file is "
                    "damaged: copy or download it again"
                )


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file, whole or not at all, and on the disk when this returns."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        storages = [tensor.untyped_storage() for tensor in kept.values()]
        shared = Counter(storage.data_ptr() for storage in storages)
        for (name, tensor), storage in zip(kept.items(), storages, strict=True):
            if shared[storage.data_ptr()] > 1 or storage.nbytes() != tensor.nbytes:
                kept[name] = tensor.clone()  # safetensors refuses tensors that share memory
        save_file(kept, partial, metadata={"format": "pt"})
        # save_file makes files that only their owner can read; a server often runs as another user.
        partial.chmod(path.parent.stat().st_mode & 0o666)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        what = f"{path}: cannot be written ({_one_line(error)})"
        raise OSError(int(number[1]) if number else errno.EIO, what) from None
    finally:
        partial.unlink(missing_ok=True)


def shard_name(number: int, total: int) -> str:
    """File name of a shard, counted from 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def write_index(directory: Path, files: Iterable[str]) -> None:
    """Write the index of shards that lie in a directory, with their digests.

    Raises:
        FormatError: a tensor name comes twice, or no tensor comes at all.
    """
    weight_map: dict[str, str] = {}
    digests, total = {}, 0
    for file in files:
        for name, header in _headers(directory / file).items():
            if name in weight_map:
                raise FormatError(f"{name}: expected one tensor of this name, found two; rename one")
            weight_map[name] = file
            total += header.nbytes
        digests[file] = _sha256(directory / file)
    if not weight_map:
        raise FormatError(f"{directory}: expected tensors to write, found none")
    index = {"metadata": {"total_size": total, "sha256": digests}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FormatError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); check the path of the checkpoint") from None
    except ValueError as error:
        raise FormatError(f"{path}: no valid JSON ({_one_line(error)}); copy or download it again") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(content).__name__}; copy it again")
    return content


def is_complete(directory: Path) -> bool:
    """Whether all shards of a directory lie there already."""
    if not (index := directory / INDEX_FILE).exists():
        return (directory / WEIGHTS_FILE).exists()
    weight_map = _string_map(index, "weight_map", read_json(index).get("weight_map"))
    return all((directory / file).exists() for file in set(weight_map.values()))


def _headers(path: Path) -> dict[str, TensorHeader]:
    """What a shard holds. Raises SafetensorError or OSError."""
    found = {}
    with safe_open(path, framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118 - a safe_open handle is not iterable
            view = shard.get_slice(name)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            dtype = DTYPES.get(dtype, dtype)
            width = dtype.itemsize if isinstance(dtype, torch.dtype) else 1
            found[name] = TensorHeader(path.name, shape, dtype, torch.Size(shape).numel() * width)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _string_map(path: Path, key: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(entry, str) for entry in value.values()):
        raise FormatError(f"{path}: expected {key!r} to map names to strings; copy or download it again")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
