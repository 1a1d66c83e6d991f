"""Principal components and k-means of many rows that need not fit in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Rows first .. last - 1 as float [n, D], on the device that does the work.
Rows = Callable[[int, int], Tensor]


def principal_components(parts: Iterable[Tensor], dimensions: int) -> tuple[Tensor, Tensor]:
    """Mean and the directions of largest variance of rows that come in parts.

    Args:
        parts: float [n_i, C] each; gone through once, summed in float64.
        dimensions: most directions.

    Returns:
        float32 [C] and [C, d] with orthonormal columns, largest variance first, each with its largest entry positive;
        d is ``dimensions``, or C or the number of rows where these are smaller.

    Raises:
        ValueError: there is no row, or ``dimensions`` is not positive.
    """
    if dimensions < 1:
        raise ValueError(f"dimensions: want at least 1, got {dimensions}")
    number, total, products = 0, None, None
    for part in parts:
        part = part.double()
        number += len(part)
        total = part.sum(dim=0) if total is None else total + part.sum(dim=0)
        products = part.T @ part if products is None else products + part.T @ part
    if total is None or products is None or not number:
        raise ValueError("principal components: want at least one row")
    mean = total / number
    covariance = products / number - mean[:, None] * mean
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : min(dimensions, number)]
    signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    return mean.float(), (vectors * signs).float()


def spread_centres(sample: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """First centres of k-means: each the next row drawn in proportion to its squared distance from those before.

    Args:
        sample: float [n, D].
        generator: of the CPU, on every device, so that a seed means the same everywhere.

    Returns:
        [clusters, D]; rows of ``sample``, equal ones only where it has fewer different ones.

    Raises:
        ValueError: fewer rows than clusters.

    Source:
        k-means++, Arthur and Vassilvitskii (SODA 2007).
    """
    if not 1 <= clusters <= len(sample):
        raise ValueError(f"clusters: want 1 .. {len(sample)}, the number of rows, got {clusters}")
    centres = [sample[int(torch.randint(len(sample), (1,), generator=generator))]]
    nearest = (sample - centres[0]).square().sum(dim=1)
    for _ in range(clusters - 1):
        # By hand instead of multinomial, which takes at most 2^24 rows.
        sums = nearest.double().cumsum(0)
        place = float(torch.rand(1, generator=generator, dtype=torch.float64)) * float(sums[-1])
        row = min(int(torch.searchsorted(sums, torch.tensor(place, device=sums.device), right=True)), len(sample) - 1)
        centres.append(sample[row])
        nearest = torch.minimum(nearest, (sample - sample[row]).square().sum(dim=1))
    return torch.stack(centres)


def assign_nearest(rows: Rows, number: int, centres: Tensor, chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, the first of equal ones, and the squared distance: int64 and float [number]."""
    labels, distances = [], []
    for first in range(0, number, chunk):
        distance = _distances(rows(first, min(first + chunk, number)), centres)
        value, label = distance.min(dim=1)
        labels.append(label)
        distances.append(value)
    return torch.cat(labels), torch.cat(distances)


def improve(rows: Rows, number: int, centres: Tensor, chunk: int = 65536) -> tuple[Tensor, float]:
    """One step of k-means: centres become the means of the rows nearest to them.

    A centre without rows takes the row that is farthest from its own centre (the next one takes the second, ...).

    Returns:
        The new centres, and the mean squared distance of rows from the old ones, which never rises.

    Source:
        Lloyd (1982). Sums by a matrix product, which repeats to the last bit on a GPU too.
    """
    sums, counts = torch.zeros_like(centres, dtype=torch.float64), centres.new_zeros(len(centres), dtype=torch.float64)
    total = 0.0
    far, far_distance = centres[:0], centres.new_zeros(0)
    for first in range(0, number, chunk):
        part = rows(first, min(first + chunk, number))
        value, label = _distances(part, centres).min(dim=1)
        member = torch.zeros(len(centres), len(part), device=part.device).scatter_(0, label[None], 1.0)
        sums += (member @ part).double()
        counts += member.sum(dim=1).double()
        total += float(value.double().sum())
        far, far_distance = torch.cat([far, part]), torch.cat([far_distance, value])
        best = far_distance.topk(min(len(centres), len(far))).indices
        far, far_distance = far[best], far_distance[best]
    moved = (sums / counts.clamp(min=1)[:, None]).to(centres.dtype)
    empty = (counts == 0).nonzero().squeeze(1)
    moved[empty] = far[: len(empty)]
    return moved, total / max(1, number)


def _distances(rows: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [n, K], at least 0."""
    products = rows @ centres.T
    squares = rows.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1)
    return (squares - 2 * products).clamp(min=0)
