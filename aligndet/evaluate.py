"""Measuring detections, by the names that a library user imports; ``aligndet.engine.evaluate`` has the code."""

from aligndet.engine.evaluate import METRICS, coco_metrics, evaluate_detector, load_predictions, save_predictions

__all__ = ["METRICS", "coco_metrics", "evaluate_detector", "load_predictions", "save_predictions"]
