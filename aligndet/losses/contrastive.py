"""The loss that takes the place of classification while there are no labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aligndet.structures import IGNORED


def box_contrastive_loss(
    query: Tensor,
    query_ids: Tensor,
    key: Tensor,
    key_ids: Tensor,
    *,
    temperature: float,
    chunk: int | None = None,
) -> Tensor:
    """Pull together the embeddings of one box in two views, push all others apart.

    A query is positive with every key of its id. Its negatives are the queries and keys of other ids, background
    included. With ``s(a, b) = cos(a, b) / temperature`` a positive pair (q, k) costs

        -log( exp s(q, k) / (exp s(q, k) + sum_n exp s(q, n)) ).

    Costs are averaged over the pairs of a box, then over boxes, so that a box with a thousand points weighs no more
    than a box with one. A box that only one of the two sets has costs nothing.

    Args:
        query: float [N, D], online embeddings of any length; they carry the gradient.
        query_ids: int64 [N], id of the box of each query; BACKGROUND is a negative of all, IGNORED takes no part.
        key: float [M, D], momentum embeddings of any length; constants.
        key_ids: int64 [M], the same numbering: equal ids are the same box.
        temperature: positive, divides cosine similarities.
        chunk: queries handled at once. Memory is then O(chunk (N + M)) instead of O(N (N + M)), the result is the same,
            and similarities are computed once more in the backward pass.

    Returns:
        Scalar >= 0 in float32 (float64 for float64 inputs), also under autocast. Exactly 0 with zero gradients when no
        box is in both sets.

    Raises:
        ValueError: shapes disagree, or ``temperature`` or ``chunk`` is not positive.

    Source:
        AlignDet (arXiv:2307.11077), equations 3 and 4, with the reduction of the authors' code (method section 2.6).
        There a box without keys is compared with its own queries; here it is left out.
    """
    _check(query, query_ids, key, key_ids, temperature, chunk)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        taking_part = (query_ids != IGNORED).nonzero().squeeze(1)
        query, query_ids = F.normalize(query[taking_part].to(dtype), dim=1), query_ids[taking_part]
        kept = key_ids != IGNORED
        key, key_ids = F.normalize(key[kept].detach().to(dtype), dim=1), key_ids[kept]
        others = torch.cat([query.detach(), key])  # [N + M, D]
        other_ids = torch.cat([query_ids, key_ids])

        step = chunk or max(1, len(query))
        costs = query.new_zeros(len(query))
        parts = []
        for first in range(0, len(query), step):
            rows = slice(first, first + step)
            arguments = (query[rows], query_ids[rows], others, other_ids, len(key), temperature)
            if chunk is None or not torch.is_grad_enabled():
                parts.append(_cost_per_query(*arguments))
            else:
                parts.append(checkpoint(_cost_per_query, *arguments, use_reentrant=False))
        costs = torch.cat(parts) if parts else costs  # [N], summed over the positives of a query

        pairs = _keys_of(query_ids, key_ids)  # [N]
        boxes, box = query_ids.unique(return_inverse=True)  # box: [N] in 0 .. len(boxes) - 1
        totals = costs.new_zeros(len(boxes)).index_add(0, box, costs)
        counts = costs.new_zeros(len(boxes)).index_add(0, box, pairs.to(dtype))
        # Boxes without a pair have total 0, and so does the loss when no box has one: no host synchronisation needed.
        means = totals / counts.clamp(min=1)
        return means.sum() / (counts > 0).sum().clamp(min=1) + 0.0 * query.sum()


def _cost_per_query(
    query: Tensor, query_ids: Tensor, others: Tensor, other_ids: Tensor, keys: int, temperature: float
) -> Tensor:
    """The costs of each query's pairs, summed: [n]; 0 without positives. The last ``keys`` of ``others`` are keys."""
    similarity = (query / temperature) @ others.T  # [n, N + M]
    same = query_ids[:, None] == other_ids
    first = len(others) - keys
    row, column = (same[:, first:] & (query_ids[:, None] >= 0)).nonzero(as_tuple=True)  # [P] each: the positive pairs
    attraction = similarity[:, first:][row, column]
    # In place, since this matrix is what the loss needs memory for; the positives have been taken out before.
    # A query without any negative: its rejection is -inf, its cost log(1 + exp -inf) = 0.
    rejection = similarity.masked_fill_(same, -torch.inf).logsumexp(dim=1)  # [n]
    difference = rejection[row] - attraction
    # Not softplus, which cuts corners above 20.
    costs = torch.logaddexp(difference, difference.new_zeros(()))
    return costs.new_zeros(len(query)).index_add(0, row, costs)


def _keys_of(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """How many keys each query is positive with: int64 [N]."""
    ordered = key_ids.sort().values
    low = torch.searchsorted(ordered, query_ids)
    high = torch.searchsorted(ordered, query_ids, right=True)
    return torch.where(query_ids >= 0, high - low, 0)


def _check(
    query: Tensor, query_ids: Tensor, key: Tensor, key_ids: Tensor, temperature: float, chunk: int | None
) -> None:
    if query.ndim != 2 or key.ndim != 2 or query.shape[1] != key.shape[1]:
        raise ValueError(f"want query [N, D] and key [M, D], got {list(query.shape)} and {list(key.shape)}")
    if query_ids.shape != query.shape[:1] or key_ids.shape != key.shape[:1]:
        raise ValueError(f"want one id per row, got {list(query_ids.shape)} and {list(key_ids.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
