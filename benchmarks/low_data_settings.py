"""What ``low_data.py`` measures: its data sets, the ways of pre-training that it compares, and its studies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    labelled: int
    steps: int


@dataclass(frozen=True)
class Set:
    """A data set: options of propose and of both trainings, and the rows that are measured; the first one is tuned.

    ``folder`` below that of all data, where it is not the name of the set. ``unlabelled``: folders of images there, for
    pre-training instead of the labelled ones.
    """

    settings: tuple[Setting, ...]
    propose: tuple[str, ...] = ()
    pretrain: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    folder: str | None = None
    unlabelled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Way:
    """A way of pre-training; none where ``pretrain`` is None."""

    pretrain: tuple[str, ...] | None = ()
    finetune: tuple[str, ...] = ()


LARGER = ("data.short_side=[224, 256]", "data.long_side=384")
PERSONS = ("data.eval_short_side=256", "data.classes=[person]")
CELLS = ("--mode", "fast", "--size", "256")
SETS = {
    "bccd": Set((Setting(20, 100), Setting(10, 100), Setting(20, 300)), CELLS),
    "bccd_white": Set(  # of DETR, whose files are for images with few objects: one white cell, seldom more
        (Setting(100, 500), Setting(50, 500), Setting(100, 1000)),
        CELLS,
        finetune=("data.classes=[WBC]",),
        folder="bccd",
    ),
    "coco_by_person": Set(
        (Setting(94, 100), Setting(94, 300)),
        ("--mode", "fast", "--size", "384"),
        pretrain=LARGER,
        finetune=LARGER + PERSONS,
    ),
    "coco_by_masks": Set(  # fewer photographs and a quarter of the pre-training of coco_people
        (Setting(100, 100), Setting(50, 100), Setting(100, 300)),
        ("--mode", "fast", "--size", "384"),
        pretrain=(*LARGER, "optim.steps=300"),
        finetune=LARGER + PERSONS,
    ),
    "coco_people": Set(
        (Setting(100, 100), Setting(50, 100), Setting(100, 300)),
        ("--mode", "fast", "--size", "384"),
        pretrain=LARGER,
        finetune=LARGER + PERSONS,
        folder="coco_by_masks",
        unlabelled=("coco_by_masks/train", "coco_by_person/train"),
    ),
}
RATES = {
    "detr": (1e-4, 3e-4, 6e-4),
    "faster_rcnn": (1e-3, 2e-3, 4e-3),
    "mask_rcnn": (1e-3, 2e-3, 4e-3),
}
# SoCo reads none of these; its backbone learns at the rate that it has in fine-tuning.
SOCO = (
    *("method.candidates=null", "method.scope=null", "method.classification=0", "method.contrast=1"),
    "optim.backbone_lr=0.1",
)
WAYS = {
    "backbone only": Way(None),
    "AlignDet": Way(),
    "contrast only": Way(("method.localization=0",)),
    "boxes only": Way(("method.contrast=0",)),
    "reference": Way(("method.reference_compatible=true",), ("method.reference_compatible=true",)),
    "SoCo": Way(("method.name=soco", *SOCO)),
}
# One setting of the contrast each; the others as in the file of the detector.
CONTRASTS = {
    "weight 1": ("method.contrast=1",),  # as in all files but DETR's, which has 0
    "weight 0.1": ("method.contrast=0.1",),
    "weight 0.3": ("method.contrast=0.3",),
    "temperature 0.1": ("method.temperature=0.1",),
    "temperature 0.2": ("method.temperature=0.2",),
    "half background": ("method.background=0.5",),
    "positives of both views": ("method.positives=both",),
    "256 candidates": ("method.candidates=256",),
    "4096 candidates": ("method.candidates=4096",),
    "4096 candidates, boxes only": ("method.candidates=4096", "method.contrast=0"),
    "all boxes of an image": ("data.proposals_per_image=null",),
    "projection of 64": ("method.embedding=64",),
}
WAYS |= {name: Way(options) for name, options in CONTRASTS.items()}
STUDIES = {
    "main": ("backbone only", "AlignDet"),
    "length": ("backbone only", "AlignDet"),
    "task": ("AlignDet", "contrast only", "boxes only"),
    "contrast": ("AlignDet", "boxes only", *CONTRASTS),
    "peers": ("AlignDet", "reference", "SoCo"),
}
