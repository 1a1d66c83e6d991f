"""Images, labels, proposals and the views made of them."""

from aligndet.data.annotations import Annotations
from aligndet.data.coco import load_coco
from aligndet.data.formats import load_annotations
from aligndet.data.proposals import ProposalFile, open_proposals, write_proposals
from aligndet.data.selective_search import filter_proposals, selective_search
from aligndet.data.synthetic import make_scenes

__all__ = [
    "Annotations",
    "ProposalFile",
    "filter_proposals",
    "load_annotations",
    "load_coco",
    "make_scenes",
    "open_proposals",
    "selective_search",
    "write_proposals",
]
