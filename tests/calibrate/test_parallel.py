import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from benchmarks.common import relative_error
from calibrate import parallel
from calibrate.errors import UserError
from calibrate.model import Model
from calibrate.parallel import Gradients, Share
from calibrate.recipe import Recipe
from calibrate.store import RunDirectory
from sliderquant_vllm.format import ActivationScheme, WeightScheme
from tests.calibrate.models import write_random_model
from tests.calibrate.test_resume import in_child, shards
from tests.helpers import TINY_LLAMA


def shares(monkeypatch, world, samples, batch_size) -> list[Share]:
    monkeypatch.setattr(parallel, "world", lambda: world)
    found = []
    for rank in range(world):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        found.append(Share(samples, batch_size))
    return found


@pytest.mark.parametrize(("samples", "batch_size"), [(12, 4), (13, 3), (2, 8), (7, 1)])
def test_batches_are_the_same_however_many_ranks_there_are(monkeypatch, samples, batch_size):
    (alone,) = shares(monkeypatch, 1, samples, batch_size)
    expected = alone.shuffled(torch.Generator().manual_seed(3))
    assert sorted(number for numbers, _ in expected for number in numbers) == list(range(samples))
    assert all(len(numbers) == size for numbers, size in expected)
    for world in (2, 3):
        spread = shares(monkeypatch, world, samples, batch_size)
        batches = [share.shuffled(torch.Generator().manual_seed(3)) for share in spread]
        for step, (numbers, size) in enumerate(expected):
            found = [int(share.numbers[n]) for share, own in zip(spread, batches, strict=True) for n in own[step][0]]
            assert sorted(found) == sorted(numbers)
            assert all(own[step][1] == size for own in batches)


def test_work_is_equal_where_the_batch_divides(monkeypatch):
    spread = shares(monkeypatch, 2, 16, 4)
    for share in spread:
        assert [len(numbers) for numbers, _ in share.shuffled(torch.Generator())] == [2] * 4


def test_processes_without_samples_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 8)
    parallel.check_work(128, 8)
    for samples, batch_size in ((128, 3), (4, 16)):
        with pytest.raises(UserError, match=f"8 processes cannot share the {min(samples, batch_size)} samples"):
            parallel.check_work(samples, batch_size)


def test_processes_that_start_otherwise_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "from_all", lambda value: [value, value | {"weights_sha256": "b"}])
    with pytest.raises(UserError, match='process 1 started otherwise .* weights_sha256 was "a", is "b"'):
        RunDirectory(tmp_path / "out", {"weights_sha256": "a"}, restart=False)
    assert not list(tmp_path.iterdir())


class Toy:
    """Prepares a weight from a parameter that two of its uses share."""

    def __init__(self):
        self.scale = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
        self.prepared = [self.scale * 5, self.scale**2]

    def cut(self):
        self.leaves = [value.detach().requires_grad_() for value in self.prepared]
        return [([(get_gradient_edge(value), 2)], leaf) for value, leaf in zip(self.prepared, self.leaves, strict=True)]


def test_gradients_of_samples_add_up_and_reach_the_parameters():
    toy = Toy()
    gradients = Gradients([toy])
    for factor in (1.0, 10.0):
        (factor * (toy.leaves[0] + toy.leaves[1])).sum().backward()
    assert all(leaf.grad is None for leaf in toy.leaves), "only the sums are kept"
    gradients.backward()
    assert torch.equal(toy.scale.grad, 11 * (5 + 2 * toy.scale.detach()))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral"])
def test_parameters_get_the_gradients_that_one_graph_gives_them(tmp_path, family):
    """Linears that read one input are one product behind the cut: with and without biases, norms of heads, experts."""
    directory = write_random_model(tmp_path / "model", family, num_hidden_layers=1)
    learns = {"epochs": 1, "learn_scale": True, "learn_clip": True, "learn_rounding": True}
    recipe = Recipe(weights=WeightScheme(4), activations=ActivationScheme(4), seqlen=24, **learns)
    block = Model(directory, recipe, torch.device("cpu")).block(0)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2, 1, 24, 96 if family != "qwen2" else 128, generator=generator)
    positions = Model(directory, recipe, torch.device("cpu")).position_embeddings(24)
    learned = dict(block.learned())
    assert any(name.startswith("scales.") for name in learned)
    block.prepare(1.0)
    sum(block(sample, positions).square().mean() for sample in samples).backward()
    expected = {name: value.grad for name, value in learned.items()}
    for value in learned.values():
        value.grad = None
    block.prepare(1.0)
    gradients = Gradients([block])
    assert all(together.computed is not None for together in block.together)
    for sample in samples:
        block(sample, positions).square().mean().backward()
    gradients.backward()
    for name, value in learned.items():
        assert relative_error(value.grad, expected[name]) < 1e-5, name


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_processes_write_what_one_writes(tmp_path, text_file):
    model = write_random_model(tmp_path / "model", "llama", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, model)
    argv = ["--model", str(model), "--w3a16", "--preset", "best", "--dataset", str(text_file), "--seqlen", "32"]
    argv += ["--nsamples", "7", "--batch-size", "3", "--epochs", "2", "--end-to-end-epochs", "1"]
    assert in_child([*argv, "--output-dir", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "calibrate"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, *argv, "--output-dir", str(tmp_path / "two")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("wrote and checked") == 1
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    assert not list(tmp_path.glob(".*"))
