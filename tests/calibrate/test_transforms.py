import pytest
import torch

from calibrate.transforms import Rotation, cosine_matrix, walsh_hadamard


@pytest.mark.parametrize("size", [1, 3, 7, 15])
def test_cosine_matrix_is_orthonormal(size):
    matrix = cosine_matrix(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))


def test_walsh_hadamard_is_orthonormal_and_flat():
    matrix = walsh_hadamard(torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64, dtype=torch.float64))
    assert matrix.abs().unique().numel() == 1
    with pytest.raises(ValueError, match="power of 2"):
        walsh_hadamard(torch.zeros(12))


@pytest.mark.parametrize("size", [32, 96, 128, 3584, 5632 // 8, 18944 // 37])
def test_rotation_is_orthogonal_and_spreads_an_outlier(size):
    rotation = Rotation.random(size, seed=3)
    matrix = rotation.apply(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert matrix.abs().max() <= 1.5 / size**0.5


def test_left_rotation_is_the_transpose_on_the_other_side():
    rotation = Rotation.random(96, seed=0)
    matrix = rotation.apply(torch.eye(96, dtype=torch.float64))
    weight = torch.randn(96, 40, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply_left(weight), matrix.T @ weight)
    torch.testing.assert_close(rotation.apply_left(weight[:, 0]), matrix.T @ weight[:, 0])


def test_rotation_depends_on_the_seed():
    assert not torch.equal(Rotation.random(64, 0).signs, Rotation.random(64, 1).signs)
