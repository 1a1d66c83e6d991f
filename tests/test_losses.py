"""Claims about the losses, against hand calculations, naive loops and torchvision."""

import math

import pytest
import torch
import torchvision
from torch import Tensor

from aligndet.losses import box_contrastive_loss, centerness_of, iou_loss, sigmoid_focal_loss
from aligndet.structures import BACKGROUND, IGNORED
from tests import reference
from tests.counting import Counting


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n, m, width = (int(torch.randint(low, 17, (), generator=generator)) for low in (0, 0, 2))
    ids = torch.tensor([IGNORED, BACKGROUND, 0, 3, 5, 1 << 33])
    query_ids = ids[torch.randint(0, 6, (n,), generator=generator)]
    key_ids = ids[torch.randint(0, 6, (m,), generator=generator)]
    query = torch.randn(n, width, generator=generator, dtype=torch.float64).requires_grad_()
    key = torch.randn(m, width, generator=generator, dtype=torch.float64).requires_grad_()
    return query, query_ids, key, key_ids


@pytest.mark.parametrize("chunk", [None, 1, 3, 1000])
def test_contrastive_equals_the_double_loop_with_gradients(chunk: int | None) -> None:
    with_pairs = 0
    for seed in range(60):
        query, query_ids, key, key_ids = random_case(seed)
        temperature = (0.07, 0.5, 2.0)[seed % 3]
        loss = box_contrastive_loss(query, query_ids, key, key_ids, temperature=temperature, chunk=chunk)
        naive = reference.box_contrastive_loss(query, query_ids.tolist(), key, key_ids.tolist(), temperature)
        assert abs(loss - naive) < 1e-12
        (ours,) = torch.autograd.grad(loss, query)
        (theirs,) = torch.autograd.grad(naive, query)
        assert (ours - theirs).abs().max().item() < 1e-12 if query.numel() else True
        with_pairs += naive.item() > 0
    assert with_pairs > 20, "the cases are not all trivial"


def test_contrastive_runs_as_many_operators_for_150_boxes_as_for_2() -> None:
    """Method section 8.18: the reference loops over boxes in Python."""
    query, key, found = torch.randn(300, 16).requires_grad_(), torch.randn(400, 16), []
    for boxes in (2, 150):
        with Counting() as counting:
            box_contrastive_loss(query, torch.arange(300) % boxes, key, torch.arange(400) % boxes, temperature=0.5)
        found.append(counting.operators)
    assert found[0] == found[1] < 150, "as many, and not one for each of 150 boxes"


def test_contrastive_holds_similarities_and_no_copies_of_embeddings() -> None:
    """Method section 8.17: the reference keeps some N M D floats for backward, this N (N + M), in chunks (N + M) D."""
    n, m, width = 200, 300, 64
    query, key = torch.randn(n, width).requires_grad_(), torch.randn(m, width)
    ids = (torch.arange(n) % 50, torch.arange(m) % 50)
    kept, largest = [], []
    for chunk in (None, 10):
        saved: dict[int, int] = {}

        def pack(value: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), Counting() as counting:
            loss = box_contrastive_loss(query, ids[0], key, ids[1], temperature=0.5, chunk=chunk)
        loss.backward()
        kept.append(sum(saved.values()))
        largest.append(counting.largest)
    assert largest == [n * (n + m), (n + m) * width]
    matrix, rows = 4 * n * (n + m), 4 * (n + m) * width
    assert kept[0] < 2 * matrix + 4 * rows < 4 * n * m * width / 8
    assert kept[1] < 4 * rows < kept[0]


@pytest.mark.parametrize("positives", ["keys", "both"])
@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize("reduction", ["boxes", "queries", "sum"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_contrastive_variants_equal_the_double_loop(
    positives: str, own_keys: bool, reduction: str, chunk: int | None
) -> None:
    if own_keys and positives == "both":
        return  # a lonely box then counts its queries twice on both sides
    different = 0
    for seed in range(40):
        query, query_ids, key, key_ids = random_case(seed)
        options = {"positives": positives, "own_keys": own_keys, "reduction": reduction}
        loss = box_contrastive_loss(query, query_ids, key, key_ids, temperature=0.5, chunk=chunk, **options)  # type: ignore[arg-type]
        lists = (query, query_ids.tolist(), key, key_ids.tolist(), 0.5)
        naive = reference.box_contrastive_loss(*lists, **options)  # type: ignore[arg-type]
        assert abs(loss - naive) < 1e-11 * max(1.0, naive.item())
        gradients = [torch.autograd.grad(item, query)[0] for item in (loss, naive)]
        assert torch.allclose(*gradients, atol=1e-11)
        different += abs(naive - reference.box_contrastive_loss(*lists)) > 1e-6
    assert different > 5 or options == {"positives": "keys", "own_keys": False, "reduction": "boxes"}
    with pytest.raises(ValueError, match="want positives in"):
        box_contrastive_loss(query, query_ids, key, key_ids, temperature=0.5, positives="some")


def test_contrastive_by_hand() -> None:
    """One query, its key at cosine 1, one negative at cosine 0, temperature 1: log(1 + 1/e)."""
    query = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    key = torch.tensor([[5.0, 0.0], [0.0, 0.1]], dtype=torch.float64)
    loss = box_contrastive_loss(query, torch.tensor([7]), key, torch.tensor([7, BACKGROUND]), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-14)


def test_a_box_with_many_points_weighs_like_a_box_with_one() -> None:
    generator = torch.Generator().manual_seed(2)
    row = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    few = box_contrastive_loss(row, torch.tensor([1, 2]), row.flip(1), torch.tensor([1, 2]), temperature=0.5)
    # Box 1 seven times: its pairs all cost the same as before, but box 2 sees seven copies of its negative.
    many_ids = torch.tensor([1] * 7 + [2])
    many = box_contrastive_loss(
        torch.cat([row[:1].repeat(7, 1), row[1:]]), many_ids, row.flip(1), torch.tensor([1, 2]), temperature=0.5
    )
    naive = reference.box_contrastive_loss(
        torch.cat([row[:1].repeat(7, 1), row[1:]]), many_ids.tolist(), row.flip(1), [1, 2], 0.5
    )
    assert many.item() == pytest.approx(naive.item(), abs=1e-12)
    assert many > few


@pytest.mark.parametrize(
    ("query_ids", "key_ids"),
    [([], []), ([], [3]), ([3], []), ([BACKGROUND, BACKGROUND], [BACKGROUND]), ([3, 4], [5]), ([IGNORED], [IGNORED])],
)
def test_contrastive_is_exactly_zero_with_zero_gradients_without_pairs(
    query_ids: list[int], key_ids: list[int]
) -> None:
    query = torch.randn(len(query_ids), 3, requires_grad=True)
    key = torch.randn(len(key_ids), 3)
    ids = [torch.tensor(values, dtype=torch.int64) for values in (query_ids, key_ids)]
    loss = box_contrastive_loss(query, ids[0], key, ids[1], temperature=0.5)
    loss.backward()
    assert loss.item() == 0
    assert query.grad is not None
    assert not query.grad.any()


def test_contrastive_with_more_than_256_boxes_and_no_gradient_into_keys() -> None:
    ids = torch.arange(307).repeat_interleave(2)
    query = torch.randn(614, 11, dtype=torch.float64, requires_grad=True)
    key = torch.randn(614, 11, dtype=torch.float64, requires_grad=True)
    loss = box_contrastive_loss(query, ids, key, ids.flip(0), temperature=0.5)
    loss.backward()
    assert key.grad is None
    assert query.grad is not None
    assert (query.grad.norm(dim=1) > 0).all(), "boxes beyond the 256th learn too"


def test_contrastive_equals_the_double_loop_with_more_than_256_boxes() -> None:
    generator = torch.Generator().manual_seed(5)
    query_ids, key_ids = torch.arange(257), torch.randperm(263, generator=generator)
    query = torch.randn(257, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    key = torch.randn(263, 5, generator=generator, dtype=torch.float64)
    loss = box_contrastive_loss(query, query_ids, key, key_ids, temperature=0.5)
    (ours,) = torch.autograd.grad(loss, query)
    naive = reference.box_contrastive_loss(query, query_ids.tolist(), key, key_ids.tolist(), 0.5)
    (theirs,) = torch.autograd.grad(naive, query)
    assert abs(loss - naive) < 1e-12
    assert (ours - theirs).abs().max() < 1e-12


def test_contrastive_is_float32_under_autocast() -> None:
    query, ids = torch.randn(5, 7), torch.tensor([0, 1, 2, 3, 4])
    with torch.autocast("cpu", torch.bfloat16):
        loss = box_contrastive_loss(query, ids, query, ids, temperature=0.5)
    assert loss.dtype == torch.float32
    assert loss == box_contrastive_loss(query, ids, query, ids, temperature=0.5)


def test_contrastive_refuses_what_does_not_fit() -> None:
    two, ids = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for arguments, options, message in (
        ((two, ids, torch.zeros(2, 5), ids), {"temperature": 0.5}, "want query"),
        ((two, ids[:1], two, ids), {"temperature": 0.5}, "one id per row"),
        ((two, ids, two, ids), {"temperature": 0.0}, "temperature must be positive"),
        ((two, ids, two, ids), {"temperature": 0.5, "chunk": 0}, "chunk must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            box_contrastive_loss(*arguments, **options)


def test_focal_equals_naive_and_torchvision() -> None:
    scores = torch.randn(13, 5, dtype=torch.float64) * 3
    labels = torch.tensor([0, 4, BACKGROUND, 2, IGNORED, 1, 1, BACKGROUND, 3, 0, 2, IGNORED, 4])
    ours = sigmoid_focal_loss(scores, labels, alpha=0.25, gamma=2.0)
    assert ours.item() == pytest.approx(reference.focal_loss(scores.tolist(), labels.tolist(), 0.25, 2.0), rel=1e-12)
    kept = labels != IGNORED
    truth = (labels[:, None] == torch.arange(5)).double()
    theirs = torchvision.ops.sigmoid_focal_loss(scores[kept], truth[kept], 0.25, 2.0, reduction="sum")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    assert sigmoid_focal_loss(scores[:0], labels[:0]) == 0


def test_iou_loss_equals_torchvision_and_is_bounded() -> None:
    corner = torch.rand(17, 2, dtype=torch.float64) * 20
    first = torch.cat([corner, corner + 5 + torch.rand(17, 2) * 30], dim=1)
    second = first + torch.rand(17, 4, dtype=torch.float64) * 4
    expected = -torchvision.ops.box_iou(first, second).diagonal().log()
    assert torch.allclose(iou_loss(first, second), expected, atol=1e-12)
    apart = iou_loss(first[:1], first[:1] + 1000)
    assert apart.item() == pytest.approx(-math.log(1e-6))
    assert iou_loss(first[:1], first[:1]).item() == pytest.approx(0, abs=1e-12)
    assert iou_loss(first[:0], first[:0]).shape == (0,)


def test_centerness_by_hand() -> None:
    """l, r = 2, 8; t, b = 5, 5: sqrt(2/8 * 1) = 0.5; centre 1; on a side 0."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 3)
    points = torch.tensor([[2.0, 5.0], [5.0, 5.0], [0.0, 3.0]])
    assert centerness_of(points, boxes).tolist() == [0.5, 1.0, 0.0]
