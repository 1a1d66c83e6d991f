"""The loss that takes the place of classification while there are no labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from aligndet.structures import IGNORED

POSITIVES = ("keys", "both")
REDUCTIONS = ("boxes", "queries", "sum")


@record_function("contrast")
def box_contrastive_loss(
    query: Tensor,
    query_ids: Tensor,
    key: Tensor,
    key_ids: Tensor,
    *,
    temperature: float,
    chunk: int | None = None,
    positives: str = "keys",
    own_keys: bool = False,
    reduction: str = "boxes",
) -> Tensor:
    """Pull together the embeddings of one box in two views, push all others apart.

    A query is positive with every key of its id. Its negatives are the queries and keys of other ids, background
    included. With ``s(a, b) = cos(a, b) / temperature`` a positive pair (q, k) costs

        -log( exp s(q, k) / (exp s(q, k) + sum_n exp s(q, n)) ).

    Costs are averaged over the pairs of a box, then over boxes, so that a box with a thousand points weighs no more
    than a box with one. A box without a positive pair costs nothing: one that only one of the two sets has, unless
    ``positives`` or ``own_keys`` find it some.

    Args:
        query: float [N, D], online embeddings of any length; they carry the gradient.
        query_ids: int64 [N], id of the box of each query; BACKGROUND is a negative of all, IGNORED takes no part.
        key: float [M, D], momentum embeddings of any length; constants.
        key_ids: int64 [M], the same numbering: equal ids are the same box.
        temperature: positive, divides cosine similarities.
        chunk: queries handled at once. Memory is then O(chunk (N + M)) instead of O(N (N + M)), the result is the same,
            and similarities are computed once more in the backward pass.
        positives: "keys", or "both": the other queries of its id are positives of a query too, as constants.
        own_keys: a box that has queries but no keys takes its queries as keys, themselves included and with gradient
            on both sides, as the reference does; otherwise it costs nothing.
        reduction: "boxes" as above; "queries" averages the pairs of each query, then queries; "sum" adds up all pairs
            (equation 4 to the letter).

    Returns:
        Scalar >= 0 in float32 (float64 for float64 inputs), also under autocast. Exactly 0 with zero gradients when
        there is no positive pair.

    Raises:
        ValueError: shapes disagree, or ``temperature`` or ``chunk`` is not positive, or an unknown word.

    Source:
        AlignDet (arXiv:2307.11077), equations 3 and 4, with the reduction of the authors' code (method section 2.6).
        There a box without keys is compared with its own queries; here it is left out.
    """
    _check(query, query_ids, key, key_ids, temperature, chunk)
    if positives not in POSITIVES or reduction not in REDUCTIONS:
        raise ValueError(f"want positives in {POSITIVES}, reduction in {REDUCTIONS}, got {positives!r}, {reduction!r}")
    if own_keys and positives == "both":
        raise ValueError("own_keys: a box without keys has its queries as positives already with positives='both'")
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        taking_part = (query_ids != IGNORED).nonzero().squeeze(1)
        query, query_ids = F.normalize(query[taking_part].to(dtype), dim=1), query_ids[taking_part]
        kept = key_ids != IGNORED
        key, key_ids = F.normalize(key[kept].detach().to(dtype), dim=1), key_ids[kept]
        others = _Others(
            torch.cat([query.detach(), key]),
            torch.cat([query_ids, key_ids]),
            len(query),
            positives == "both",
            query if own_keys else None,
            temperature,
        )
        pairs = _pairs_of(others)  # [N]
        parts = []
        # Background has no positives and costs nothing: it is only compared with.
        for rows in pairs.nonzero().squeeze(1).split(chunk or max(1, len(query))):
            if chunk is None or not torch.is_grad_enabled():
                parts.append(_cost_per_query(query[rows], rows, others))
            else:
                parts.append(checkpoint(_cost_per_query, query[rows], rows, others, use_reentrant=False))
        costs = torch.cat(parts)  # [n], summed over the positives of a query
        taken = pairs.nonzero().squeeze(1)
        return _reduced(costs, pairs[taken].to(dtype), query_ids[taken], reduction) + 0.0 * query.sum()


@dataclass(frozen=True)
class _Others:
    """All that queries are compared with.

    Attributes:
        vectors: [N + M, D], constants: the queries, then the keys.
        ids: int64 [N + M].
        queries: N.
        both: whether queries are positives of other queries.
        live: [N, D], the queries with their gradient, where boxes without keys take them as keys; else None.
        temperature: divides similarities.
    """

    vectors: Tensor
    ids: Tensor
    queries: int
    both: bool
    live: Tensor | None
    temperature: float


def _cost_per_query(query: Tensor, rows: Tensor, others: _Others) -> Tensor:
    """The costs of each query's pairs, summed: [n]. ``rows`` int64 [n] says which queries they are."""
    ids = others.ids[rows]
    similarity = (query / others.temperature) @ others.vectors.T  # [n, N + M]
    same = ids[:, None] == others.ids
    wanted = same & (ids >= 0)[:, None]
    if others.both:
        wanted.scatter_(1, rows[:, None], False)  # a query is no positive of itself
    else:
        wanted = wanted[:, others.queries :]
    row, column = wanted.nonzero(as_tuple=True)  # [P] each: the positive pairs
    attraction = similarity[row, column if others.both else column + others.queries]
    if others.live is not None:
        lonely = (ids >= 0) & ~torch.isin(ids, others.ids[others.queries :])
        own_row, own = (same[:, : others.queries] & lonely[:, None]).nonzero(as_tuple=True)
        row = torch.cat([row, own_row])
        attraction = torch.cat([attraction, (query[own_row] * others.live[own]).sum(dim=1) / others.temperature])
    # In place, since this matrix is what the loss needs memory for; the positives have been taken out before.
    # A query without any negative: its rejection is -inf, its cost log(1 + exp -inf) = 0.
    rejection = similarity.masked_fill_(same, -torch.inf).logsumexp(dim=1)  # [n]
    difference = rejection[row] - attraction
    # Not softplus, which cuts corners above 20.
    costs = torch.logaddexp(difference, difference.new_zeros(()))
    return costs.new_zeros(len(query)).index_add(0, row, costs)


def _pairs_of(others: _Others) -> Tensor:
    """How many positives each query has: int64 [N]."""
    query_ids, key_ids = others.ids[: others.queries], others.ids[others.queries :]
    keys, own = _equal(key_ids, query_ids), _equal(query_ids, query_ids)
    pairs = keys + own - 1 if others.both else keys
    if others.live is not None:
        pairs = torch.where(keys == 0, pairs + own, pairs)
    return torch.where(query_ids >= 0, pairs, 0)


def _equal(values: Tensor, wanted: Tensor) -> Tensor:
    """How many of ``values`` equal each of ``wanted``: int64."""
    ordered = values.sort().values
    return torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)


def _reduced(costs: Tensor, pairs: Tensor, query_ids: Tensor, reduction: str) -> Tensor:
    if reduction == "sum":
        return costs.sum()
    if reduction == "queries":
        return (costs / pairs).sum() / max(1, len(costs))
    boxes, box = query_ids.unique(return_inverse=True)  # box: [N] in 0 .. len(boxes) - 1
    totals = costs.new_zeros(len(boxes)).index_add(0, box, costs)
    counts = costs.new_zeros(len(boxes)).index_add(0, box, pairs)
    return (totals / counts).sum() / max(1, len(boxes))


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
