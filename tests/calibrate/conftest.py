import argparse
from pathlib import Path

import pytest
import torch


@pytest.fixture
def text_file(tmp_path) -> Path:
    """Enough real text for small calibrations: this interpreter's argparse module."""
    path = tmp_path / "text.txt"
    path.write_text(Path(argparse.__file__).read_text())
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Small models gain nothing from more threads, and lose a lot where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
