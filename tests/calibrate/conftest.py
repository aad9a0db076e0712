import argparse
import shutil
from pathlib import Path

import pytest
import torch

from tests.calibrate.models import write_random_model
from tests.helpers import TINY_LLAMA


@pytest.fixture
def text_file(tmp_path) -> Path:
    """Enough real text for small calibrations: this interpreter's argparse module."""
    path = tmp_path / "text.txt"
    path.write_text(Path(argparse.__file__).read_text())
    return path


@pytest.fixture
def source(tmp_path):
    """A random model with a tokenizer."""
    model = write_random_model(tmp_path / "model", "llama", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, model)
    return model


@pytest.fixture(autouse=True)
def one_thread():
    """Small models gain nothing from more threads, and lose a lot where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
