"""From local text to a byte-level BPE tokenizer and two streams of token ids, for `tools.train_tiny`."""

import contextlib
import glob
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|bos|>", "<|eos|>"  # ids 0 and 1
SUFFIXES = (".py", ".txt")
TOKENIZER_CHARACTERS = 200_000_000  # more text hardly changes the merges and costs memory


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def find_files(patterns: Iterable[str]) -> list[Path]:
    """Files named by paths and globs, and the .py and .txt in folders, installed packages left out."""
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        hits = [path] if path.exists() else [Path(hit) for hit in glob.glob(str(path), recursive=True)]
        if not hits:
            raise ValueError(f"--text: no file or folder matches {pattern!r}; name a file, a folder or a glob")
        for hit in hits:
            if hit.is_file():
                found.add(hit)
                continue
            inside = (file for file in hit.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            found.update(file for file in inside if "site-packages" not in file.relative_to(hit).parts)
    return sorted(found)


def read_documents(files: Iterable[Path], seed: int) -> list[str]:
    """Distinct UTF-8 texts, in an order that depends on nothing but their content and the seed.

    Copies are dropped: one in training would spoil the other in validation.
    """
    documents: dict[bytes, str] = {}
    for path in files:
        with contextlib.suppress(UnicodeDecodeError):
            if text := path.read_text(encoding="utf-8"):
                documents[hashlib.sha256(text.encode()).digest()] = text
    order = sorted(documents)
    random.Random(seed).shuffle(order)
    return [documents[digest] for digest in order]


def split(documents: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Whole documents into (training, validation); validation holds `val_fraction` of the characters."""
    if not val_fraction:
        return documents, []
    if len(documents) < 2:
        raise ValueError(
            f"--text: expected 2 or more different files, to hold one out, found {len(documents)}; "
            "add files or give --val-fraction 0"
        )
    room = val_fraction * sum(map(len, documents))
    train: list[str] = []
    val: list[str] = []
    for document in documents:
        if len(document) <= room:
            room -= len(document)
            val.append(document)
        else:
            train.append(document)
    if not val:
        val.append(train.pop(min(range(len(train)), key=lambda index: len(train[index]))))
    return train, val


def make_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def sample() -> Iterator[str]:
        size = 0
        for document in documents:
            if size > TOKENIZER_CHARACTERS:
                return
            size += len(document)
            yield document

    tokenizer.train_from_iterator(sample(), trainer)
    if (found := tokenizer.get_vocab_size()) < vocab:
        raise ValueError(f"--vocab: expected {vocab} tokens, this text gives {found}; add text or lower --vocab")
    return tokenizer


def write_ids(path: Path, documents: list[str], tokenizer: Tokenizer, progress: Progress) -> None:
    """All documents as one stream of token ids, each between bos and eos."""
    with open(path, "wb") as out:
        for start in progress.track(range(0, len(documents), 256), description=f"tokenize {path.stem}"):
            for encoding in tokenizer.encode_batch_fast(documents[start : start + 256]):
                out.write(np.asarray([0, *encoding.ids, 1], id_type(tokenizer.get_vocab_size())).tobytes())


def id_type(vocab: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab <= 1 << 16 else np.uint32


def prepare(options: dict, work: Path, console: Console) -> tuple[np.ndarray, np.ndarray]:
    """(training ids, validation ids) as memory maps of files in `work`, beside `tokenizer.json`; made once.

    `options` (text, seed, vocab, val_fraction and whatever else must not change) is stored with them. A
    run that finds other options there is refused.
    """
    stored = work / "options.json"
    wanted = json.loads(json.dumps(options))
    if stored.exists():
        found = json.loads(stored.read_text())
        for key in wanted:
            if wanted[key] != found.get(key):
                raise ValueError(
                    f"{work} was begun with {key}={found.get(key)!r}, now it is {wanted[key]!r}; "
                    "give the first value, delete that folder, or choose another --output-dir"
                )
    else:
        shutil.rmtree(work, ignore_errors=True)
        files = find_files(options["text"])
        train, val = split(read_documents(files, options["seed"]), options["val_fraction"])
        console.print(f"{len(files)} files: {len(train)} documents to train on, {len(val)} held out")
        work.mkdir(parents=True)
        with Progress(console=console) as progress:
            task = progress.add_task("train the tokenizer", total=None)
            tokenizer = make_tokenizer(train, options["vocab"])
            progress.update(task, total=1, completed=1)
            tokenizer.save(str(work / "tokenizer.json"))
            tokenizer.encode_special_tokens = True  # "<|eos|>" written in a text is text
            write_ids(work / "train.bin", train, tokenizer, progress)
            write_ids(work / "val.bin", val, tokenizer, progress)
        write_atomically(stored, lambda path: path.write_text(json.dumps(wanted)))  # last: the folder is whole
    return tuple(open_ids(work / name, options["vocab"]) for name in ("train.bin", "val.bin"))


def open_ids(path: Path, vocab: int) -> np.ndarray:
    dtype = id_type(vocab)
    # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
