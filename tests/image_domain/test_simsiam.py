"""Claims about SimSiam: its value by hand, where the gradient stops, what a collapse looks like."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aligndet.image_domain.simsiam import SimSiam
from aligndet.models.backbones import build_backbone
from tests.scenes import views_of


def model() -> SimSiam:
    return SimSiam(build_backbone("resnet18", width=0.125, norm="batch", frozen_stages=0), projection=13, bottleneck=7)


def test_value_and_gradient_are_those_of_detached_targets() -> None:
    simsiam = model().train()
    view1, view2 = views_of((0, 0, 0, 0, 0), size=64)
    losses = simsiam(view1, view2)
    assert set(losses) == {"similarity"}
    ours = torch.autograd.grad(losses["similarity"], list(simsiam.parameters()))

    first, second = simsiam._projections(view1), simsiam._projections(view2)
    p1, p2 = (F.normalize(simsiam.predictor(z), dim=1) for z in (first, second))
    z1, z2 = (F.normalize(z, dim=1).detach() for z in (first, second))
    expected = -((p1 * z2).sum(dim=1).mean() + (p2 * z1).sum(dim=1).mean()) / 2
    theirs = torch.autograd.grad(expected, list(simsiam.parameters()))
    assert torch.allclose(losses["similarity"], expected, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    assert any(gradient.abs().sum() > 0 for gradient in ours)


def test_views_are_interchangeable_and_equal_views_reach_the_minimum() -> None:
    simsiam = model().train()
    view1, view2 = views_of((0, 0, 0), size=64)
    assert torch.allclose(simsiam(view1, view2)["similarity"], simsiam(view2, view1)["similarity"], atol=1e-6)
    simsiam.predictor = nn.Sequential(nn.Identity())
    assert simsiam(view1, view1)["similarity"].item() == pytest.approx(-1, abs=1e-5)


def test_spread_tells_a_collapse() -> None:
    simsiam = model().train()
    view, _ = views_of((0,) * 17, size=64)
    assert 0.7 < simsiam.spread(view) < 1.3
    simsiam.projector = nn.Sequential(nn.Linear(simsiam.backbone.channels[-1], 13))
    with torch.no_grad():
        simsiam.projector[0].weight.zero_()
    assert simsiam.spread(view) == pytest.approx(0, abs=1e-5)


def test_one_image_has_no_batch_statistics() -> None:
    view1, view2 = views_of((0,), size=64)
    with pytest.raises(ValueError, match="at least 2 images per rank and pass, got 1"):
        model()(view1, view2)
