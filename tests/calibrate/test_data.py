import json

import pytest
import torch
from transformers import AutoTokenizer

from calibrate.data import calibration_samples, fingerprint, local_files, read_texts, token_stream
from calibrate.errors import UserError
from tests.helpers import TINY_LLAMA


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


def test_every_kind_of_file_gives_the_same_tokens(tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ["import os\n", "def f(x):\n    return x\n"]
    (tmp_path / "a.txt").write_text("".join(texts))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"content": texts}), tmp_path / "c.parquet")
    streams = [token_stream(tokenizer, str(tmp_path / name)) for name in ("b.jsonl", "c.parquet")]
    assert torch.equal(*streams)
    assert tokenizer.decode(streams[0]) == tokenizer.decode(token_stream(tokenizer, str(tmp_path / "a.txt")))


def test_directories_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.py", "a.txt", "sub/c.md", "weights.bin"):
        (tmp_path / name).write_text("x")
    assert [file.name for file in local_files(str(tmp_path))] == ["a.txt", "b.py", "c.md"]
    assert [file.name for file in local_files(str(tmp_path / "*.py"))] == ["b.py"]
    assert [file.name for file in local_files(str(tmp_path / "**" / "*.md"))] == ["c.md"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert [file.name for file in local_files(str(tmp_path / "a[1].txt"))] == ["a[1].txt"]


def test_samples_are_distinct_and_follow_the_seed(tokenizer, text_file):
    first = calibration_samples(tokenizer, str(text_file), 8, 64, seed=0)
    assert first.shape == (8, 64) and first.dtype == torch.int64
    assert len({tuple(row.tolist()) for row in first}) == 8
    assert torch.equal(first, calibration_samples(tokenizer, str(text_file), 8, 64, seed=0))
    assert fingerprint(first) != fingerprint(calibration_samples(tokenizer, str(text_file), 8, 64, seed=1))


def test_too_few_tokens_gives_the_count(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("import os")
    with pytest.raises(UserError, match=r"at least 2 x 64 = 128 tokens, found \d+; give more text or lower"):
        calibration_samples(tokenizer, str(tmp_path / "short.txt"), 2, 64, 0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "  \n", "no text in it"),
        ("bad.jsonl", '{"text": "x"}\n{nonsense\n', "bad.jsonl:2: no valid JSON"),
        (
            "other.jsonl",
            '{"body": "x"}\n',
            r"other.jsonl:1: expected a string field 'text' or 'content', found \['body'\]",
        ),
        ("bad.parquet", "nonsense", "bad.parquet: no readable parquet"),
        ("weights.bin", "\0\1", "weights.bin: a binary file"),
    ],
)
def test_unusable_files_are_named(tokenizer, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        token_stream(tokenizer, str(tmp_path / name))


def test_text_that_is_not_utf8_does_not_stop_a_run(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert list(read_texts(tmp_path / "latin.txt")) == ["caf�"]
