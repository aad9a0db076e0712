"""Hidden states of all calibration samples, on the device, on the host or on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where hidden states are kept between their uses.

    kind: "device"; "host", in pinned memory; or "disk", in a file without a name in ``directory``, which vanishes with
    the process however that ends. dtype: in which they are kept. checkpointing: those inside of a block are not kept
    for its gradients, but computed again from its inputs.
    """

    device: torch.device
    kind: str = "device"
    directory: Path | None = None
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False


class Activations:
    """[nsamples, seqlen, hidden], read and written as fp32 in batches of samples."""

    def __init__(self, shape: Iterable[int], place: Place):
        self.shape, self.place = torch.Size(shape), place
        self._file = None
        if place.kind == "disk":
            self._file = tempfile.TemporaryFile(dir=place.directory)  # noqa: SIM115 - lives as long as this
            os.posix_fallocate(self._file.fileno(), 0, max(len(self) * self._sample_bytes, 1))
        elif place.kind == "host":
            self._data = torch.empty(self.shape, dtype=self.place.dtype, pin_memory=place.device.type == "cuda")
        else:
            self._data = torch.empty(self.shape, dtype=self.place.dtype, device=place.device)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def _sample_bytes(self) -> int:
        return self.place.dtype.itemsize * self.shape[1:].numel()

    def read(self, samples: slice) -> Tensor:
        """Samples on the device, fp32 [samples, seqlen, hidden]."""
        return self._delivered(self._staged(samples))

    def _delivered(self, staged: Tensor) -> Tensor:
        return staged.to(self.place.device, non_blocking=True).float()

    def _staged(self, samples: slice) -> Tensor:
        """Samples where the copy to the device starts."""
        if self._file is None:
            return self._data[samples]
        numbers = range(*samples.indices(len(self)))
        shape, pin = (len(numbers), *self.shape[1:]), self.place.device.type == "cuda"
        values = torch.empty(shape, dtype=self.place.dtype, pin_memory=pin)
        for row, number in zip(values, numbers, strict=True):
            self._exactly(os.preadv, row, number)
        return values

    def write(self, first: int, values: Tensor) -> None:
        """Replace the samples from ``first`` on."""
        if self._file is None:
            self._data[first : first + len(values)].copy_(values)
        else:
            for number, row in enumerate(values.to("cpu", self.place.dtype).contiguous(), first):
                self._exactly(os.pwritev, row, number)

    def _exactly(self, operation, row: Tensor, number: int) -> None:
        """Read or write a whole sample, in as many pieces as the system makes of it."""
        buffer, offset = _bytes(row), number * self._sample_bytes
        while buffer:
            done = operation(self._file.fileno(), [buffer], offset)
            if not done:
                raise OSError(f"{self.place.directory}: hidden states kept there can no longer be read")
            buffer, offset = buffer[done:], offset + done

    def batches(self, places: Iterable[slice]) -> Iterator[Tensor]:
        """``read`` of each, the next one fetched in the background while the last one is used."""
        if self.place.kind == "device":
            yield from map(self.read, places)
            return
        with ThreadPoolExecutor(1) as background:
            ahead = None
            for place in places:
                current, ahead = ahead, background.submit(self._staged, place)
                if current is not None:
                    yield self._delivered(current.result())
            if ahead is not None:
                yield self._delivered(ahead.result())

    def consecutive(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """All samples in order, ``size`` at a time, each batch with its place."""
        places = [slice(first, min(first + size, len(self))) for first in range(0, len(self), size)]
        return zip(places, self.batches(places), strict=True)

    def clone(self) -> Activations:
        other = Activations(self.shape, self.place)
        for place, values in self.consecutive(1):
            other.write(place.start, values)
        return other

    def save(self, path: Path) -> None:
        """Write all samples to a file, as raw bytes."""
        with path.open("wb") as file:
            for number in range(len(self)):
                file.write(_bytes(self._staged(slice(number, number + 1)).cpu().contiguous()))
            file.flush()
            os.fsync(file.fileno())

    def load(self, path: Path) -> None:
        """Read what ``save`` wrote. Raises OSError where it does not fit."""
        expected, found = len(self) * self._sample_bytes, path.stat().st_size
        if found != expected:
            raise OSError(f"{path}: expected {expected} bytes of hidden states, found {found}; start with --restart")
        with path.open("rb") as file:
            for number in range(len(self)):
                row = torch.frombuffer(bytearray(file.read(self._sample_bytes)), dtype=self.place.dtype)
                self.write(number, row.view(1, *self.shape[1:]))


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy()).cast("B")
