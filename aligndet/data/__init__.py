"""Images, labels, proposals and the views made of them."""

from aligndet.data.coco import CocoAnnotations, load_coco
from aligndet.data.proposals import ProposalFile, open_proposals, write_proposals
from aligndet.data.selective_search import filter_proposals, selective_search
from aligndet.data.synthetic import make_scenes

__all__ = [
    "CocoAnnotations",
    "ProposalFile",
    "filter_proposals",
    "load_coco",
    "make_scenes",
    "open_proposals",
    "selective_search",
    "write_proposals",
]
