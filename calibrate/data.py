"""Calibration tokens: from local text, or from a dataset of the hub."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from calibrate.errors import UserError, first_line

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet", ".md", ".py")
TEXT_FIELDS = ("text", "content")
PIECE = 1 << 22  # characters of a plain file that are tokenized at a time


def local_files(dataset: str) -> list[Path]:
    """The files that a path, a directory or a glob names, sorted; empty if nothing local has that name."""
    path = Path(dataset).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    return sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())


def read_texts(file: Path) -> Iterator[str]:
    """The texts of one file: rows of .jsonl and .parquet; anything else is plain text, in large pieces."""
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield _text_field(json.loads(line), f"{file}:{number}")
                    except json.JSONDecodeError as error:
                        raise UserError(f"{file}:{number}: no valid JSON ({error}); mend or drop the line") from None
    elif file.suffix == ".parquet":
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                for batch in table.iter_batches():
                    for row in batch.to_pylist():
                        yield _text_field(row, str(file))
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file}: no readable parquet file ({error})") from None
    else:
        with file.open(encoding="utf-8", errors="replace") as text:
            while piece := text.read(PIECE):
                if "\0" in piece:
                    raise UserError(f"{file}: a binary file; expected text, .jsonl or .parquet")
                yield piece


def _text_field(row: object, where: str) -> str:
    for field in TEXT_FIELDS:
        if isinstance(row, dict) and isinstance(row.get(field), str):
            return row[field]
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise UserError(f"{where}: expected a string field {' or '.join(map(repr, TEXT_FIELDS))}, found {found}")


def hub_texts(dataset: str, split: str, flag: str) -> Iterator[str]:
    """Texts of one split of a hub dataset, "owner/name" or "owner/name:config"."""
    import datasets

    name, _, config = dataset.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for row in rows:
            yield _text_field(row, f"dataset {dataset}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{flag} {dataset}: neither a local file, directory or glob, nor a dataset that the hub gave "
            f"({first_line(error)}); name local text, for example {flag} 'texts/*.txt'"
        ) from None


def token_stream(
    tokenizer, dataset: str, limit: int | None = None, split: str = "train", flag: str = "--dataset"
) -> Tensor:
    """Token ids of all texts, one after the other: int64 [T].

    Args:
        tokenizer: a Hugging Face tokenizer.
        dataset: a local path, directory or glob, or a hub dataset id.
        limit: stop reading once there are so many tokens.
        split: of a hub dataset; local text has none.
        flag: that named it, for errors.
    """
    files = local_files(dataset)
    texts = (text for file in files for text in read_texts(file)) if files else hub_texts(dataset, split, flag)
    pieces: list[Tensor] = []
    total = 0
    for text in texts:
        if text.strip():
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            pieces.append(torch.tensor(ids, dtype=torch.int64))
            total += len(ids)
            if limit is not None and total >= limit:
                break
    if not total:
        raise UserError(f"{flag} {dataset}: no text in it; expected files with some, of {', '.join(TEXT_SUFFIXES)}")
    return torch.cat(pieces)


def calibration_samples(tokenizer, dataset: str, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """Distinct stretches of the token stream at random places: int64 [nsamples, seqlen].

    Raises:
        UserError: fewer tokens than ``nsamples * seqlen``.
    """
    # Some slack gives the seed something to choose from without reading a corpus to its end.
    stream = token_stream(tokenizer, dataset, limit=16 * nsamples * seqlen)
    available = len(stream) // seqlen
    if available < nsamples:
        raise UserError(
            f"--dataset {dataset}: expected at least {nsamples} x {seqlen} = {nsamples * seqlen} tokens, found "
            f"{len(stream)}; give more text or lower --nsamples or --seqlen"
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(0, len(stream) - available * seqlen + 1, (1,), generator=generator))
    stretches = stream[offset : offset + available * seqlen].view(available, seqlen)
    return stretches[torch.randperm(available, generator=generator)[:nsamples]].contiguous()


def fingerprint(samples: Tensor) -> str:
    """SHA-256 of the samples, to tell two calibrations apart."""
    return hashlib.sha256(samples.cpu().numpy().tobytes()).hexdigest()
