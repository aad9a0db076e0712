"""Safetensors shards and their index: reading headers, checking them against the index, writing.

Either one ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names, whose
``metadata.sha256`` maps each shard to its digest. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
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
        self._shards: dict[str, Any] = {}
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
            self._shards[file] = shard = safe_open(path, framework="pt")
            for name in shard.keys():  # noqa: SIM118 - a safe_open handle is not iterable
                if name in self.headers:
                    raise FormatError(f"{name}: found in both {self.headers[name].file} and {file}; remove one")
                view = shard.get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                dtype = DTYPES.get(dtype, dtype)
                width = dtype.itemsize if isinstance(dtype, torch.dtype) else 1
                self.headers[name] = TensorHeader(file, shape, dtype, torch.Size(shape).numel() * width)
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{path}: no readable safetensors file ({_one_line(error)}); it is truncated or damaged: "
                "copy or download it again"
            ) from None

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
        """Read one tensor to the CPU."""
        return self._shards[self.headers[name].file].get_tensor(name)

    def modules(self) -> dict[str, dict[str, TensorHeader]]:
        """Module name -> last component of the tensor name -> header."""
        modules: dict[str, dict[str, TensorHeader]] = {}
        for name, header in self.headers.items():
            module, _, suffix = name.rpartition(".")
            modules.setdefault(module, {})[suffix] = header
        return modules

    def check_digests(self) -> None:
        """Compare every shard with the SHA-256 in the index, where there is one."""
        for file, expected in self.sha256.items():
            if file not in self._shards:
                raise FormatError(f"{INDEX_FILE}: metadata.sha256 names {file}, weight_map does not; copy it again")
            if (digest := _sha256(self.directory / file)) != expected:
                raise FormatError(
                    f"{self.directory / file}: expected sha256 {expected}, found {digest}; the file is "
                    "damaged: copy or download it again"
                )


def write_shards(
    directory: str | Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write tensors as ``model-0000i-of-0000n.safetensors`` and their index.

    Consumes the iterable as it goes: no more than ``max_shard_bytes`` (or one larger tensor) is held.

    Raises:
        FormatError: a tensor name comes twice, or no tensor comes at all.
    """
    directory = Path(directory)
    names: list[list[str]] = []
    digests: list[str] = []
    total = pending_bytes = 0
    pending: dict[str, torch.Tensor] = {}
    seen: set[str] = set()

    def flush() -> None:
        path = directory / f"shard-{len(names)}.partial"
        save_file(pending, path, metadata={"format": "pt"})
        # save_file makes files that only their owner can read; a server often runs as another user.
        path.chmod(directory.stat().st_mode & 0o666)
        digests.append(_sha256(path, sync=True))
        names.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if name in seen:
            raise FormatError(f"{name}: expected one tensor of this name, found two; rename one")
        seen.add(name)
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            pending_bytes = 0
        # A copy, because safetensors refuses tensors that share memory, and the caller may reuse his.
        pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
    if pending:
        flush()
    if not names:
        raise FormatError(f"{directory}: expected tensors to write, found none")

    files = [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    for i, file in enumerate(files):
        os.rename(directory / f"shard-{i}.partial", directory / file)
    index = {
        "metadata": {"total_size": total, "sha256": dict(zip(files, digests, strict=True))},
        "weight_map": {name: file for file, held in zip(files, names, strict=True) for name in held},
    }
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


def _sha256(path: Path, sync: bool = False) -> str:
    with path.open("rb+" if sync else "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _string_map(path: Path, key: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(entry, str) for entry in value.values()):
        raise FormatError(f"{path}: expected {key!r} to map names to strings; copy or download it again")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
