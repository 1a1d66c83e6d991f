"""Box layers keep their precision under autocast."""

from __future__ import annotations

import pytest
import torch

from aligndet.models.detr import BoxPredictor as DETRBoxes
from aligndet.models.fcos import BoxPredictor, LinearBoxPredictor


@pytest.mark.parametrize("kind", ["exponential", "linear", "detr"])
def test_boxes_under_bfloat16_have_no_steps_of_their_own(kind: str) -> None:
    """Features of 16 bits and weights that 16 bits hold: what is left is the rounding of the last layer's output.

    It would be up to 2**-9 of an exponent of 5, a factor of 1.01.
    """
    torch.manual_seed(0)
    layer = {"exponential": BoxPredictor(8, 1), "linear": LinearBoxPredictor(8, (8,)), "detr": DETRBoxes(8)}[kind]
    last = layer.layers[-1] if isinstance(layer, DETRBoxes) else layer.convolution
    with torch.no_grad():
        for part in (last.weight, last.bias):
            part.copy_(torch.randn_like(part).bfloat16())
        if isinstance(layer, DETRBoxes):  # the layers before it do round
            for part in layer.layers[:2]:
                part.weight.copy_(torch.eye(8))
                part.bias.zero_()
    features = torch.rand(1, 8, 6, 8).bfloat16()
    given = features if isinstance(layer, DETRBoxes) else [features]
    exact = [item.float() for item in given] if isinstance(given, list) else given.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = layer(given)
    with torch.no_grad():
        expected = layer(exact)
    found, expected = (item[0] if isinstance(item, list) else item for item in (found, expected))
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-5, atol=0)
