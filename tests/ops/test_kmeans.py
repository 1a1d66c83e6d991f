"""Claims about principal components and k-means, against numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from aligndet.ops.kmeans import assign_nearest, improve, principal_components, spread_centres


def blobs(clusters: int, each: int, width: int, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    centres = 10 * torch.randn(clusters, width, generator=generator)
    labels = torch.arange(clusters).repeat_interleave(each)
    return centres[labels] + spread * torch.randn(len(labels), width, generator=generator), labels


def test_components_are_those_of_numpy() -> None:
    rows = (
        torch.randn(53, 7, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 4, 3, 2, 1, 0.5, 0.1]) + 3
    )
    mean, components = principal_components(rows.split(11), 5)
    centred = rows.double().numpy() - rows.double().numpy().mean(axis=0)
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(mean.numpy(), rows.numpy().mean(axis=0), atol=1e-5)
    assert components.shape == (7, 5)
    for direction, wanted in zip(components.T.numpy(), vectors, strict=False):
        assert abs(abs(direction @ wanted) - 1) < 1e-5
        assert direction[np.abs(direction).argmax()] > 0
    variances = ((rows - mean) @ components).var(dim=0, correction=0)
    assert np.allclose(variances.numpy(), values[:5] ** 2 / 53, rtol=1e-4)
    assert principal_components([rows[:2]], 5)[1].shape == (7, 2)
    with pytest.raises(ValueError, match="at least one row"):
        principal_components([rows[:0]], 5)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_steps_are_those_of_scipy(chunk: int) -> None:
    rows = torch.randn(211, 5, generator=torch.Generator().manual_seed(2))
    centres = spread_centres(rows, 13, torch.Generator().manual_seed(4))
    costs = []
    moved = centres
    for _ in range(6):
        moved, cost = improve(lambda first, last: rows[first:last], len(rows), moved, chunk)
        costs.append(cost)
    assert costs == sorted(costs, reverse=True)
    theirs, labels = kmeans2(
        rows.numpy().astype(np.float64), centres.numpy().astype(np.float64), iter=6, minit="matrix"
    )
    assert np.allclose(moved.numpy(), theirs, atol=1e-4)
    ours, distances = assign_nearest(lambda first, last: rows[first:last], len(rows), moved, chunk)
    naive = (rows[:, None] - moved).square().sum(dim=2)
    assert torch.equal(ours, naive.argmin(dim=1))
    assert torch.allclose(distances, naive.amin(dim=1), atol=1e-4)
    assert len(labels) == len(ours)


def test_separated_groups_are_found() -> None:
    rows, labels = blobs(17, 19, 11)
    centres = spread_centres(rows, 17, torch.Generator().manual_seed(0))
    for _ in range(3):
        centres, cost = improve(lambda first, last: rows[first:last], len(rows), centres)
    found, _ = assign_nearest(lambda first, last: rows[first:last], len(rows), centres)
    pairs = {(a, b) for a, b in zip(labels.tolist(), found.tolist(), strict=True)}
    assert len(pairs) == 17 and len({b for _, b in pairs}) == 17
    assert cost < 11 * 0.02


def test_a_centre_without_rows_takes_the_farthest_row() -> None:
    rows = torch.tensor([[0.0], [1.0], [2.0], [50.0]])
    centres = torch.tensor([[1.0], [1000.0], [2000.0]])
    moved, _ = improve(lambda first, last: rows[first:last], 4, centres)
    assert moved.tolist() == [[13.25], [50.0], [0.0]] or moved.tolist() == [[13.25], [50.0], [2.0]]


def test_equal_rows_and_too_few_rows() -> None:
    rows = torch.ones(5, 3)
    assert torch.equal(spread_centres(rows, 4, torch.Generator().manual_seed(0)), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"clusters: want 1 \.\. 5"):
        spread_centres(rows, 6, torch.Generator())
