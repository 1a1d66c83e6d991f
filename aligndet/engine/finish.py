"""What a run leaves behind: exported weights, predictions and metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from aligndet import config as settings
from aligndet.config import Config
from aligndet.engine import checkpoint
from aligndet.engine.best import same_buffers
from aligndet.engine.distributed import World, barrier, gather_objects
from aligndet.engine.evaluate import save_predictions
from aligndet.engine.loop import Training
from aligndet.engine.runfolder import RESULTS, writable
from aligndet.engine.stages import training_annotations
from aligndet.engine.validate import detections_on, metrics_of, validation_truth, without_nan
from aligndet.finetune import FineTune
from aligndet.protocol import Detector


def finish(config: Config, training: Training) -> Path:
    """Write the result of a complete run: its weights and, where ``data.val`` is set, metrics and predictions.

    Returns:
        The weights: ``pretrained.pt``, ``model.pt`` or ``backbone.pt`` in the run folder.
    """
    path = training.folder / RESULTS[config.task]
    if training.world.rank == 0:
        *_, result = training.models.values()
        content = training.export(result)
        checkpoint.save(path, content | {"config": training.config, "versions": checkpoint.versions()})
        averaged = "" if training.average is None else f", averaged with decay {training.average.decay:.4g}"
        training.log.note(f"{path}: written after {training.done} steps{averaged}, {training.skipped} images skipped")
    if config.task == settings.FINETUNE and config.data.val is None:
        training.log.note("data.val is not set: not evaluated")
    elif config.task == settings.FINETUNE:
        _measure(config, training)
    training.log.close()
    barrier(training.world)
    return path


def _measure(config: Config, training: Training) -> None:
    """Metrics of what was exported and, where that is an average, of the weights themselves; ``best.pt`` if best."""
    world, classes = training.world, training_annotations(config)[0].class_names
    (name, result), *others = reversed(training.models.items())
    same_buffers(result, world)
    found = {name: evaluate(config, cast(FineTune, result).detector, classes, world, training.folder)}
    training.log.note(summary(found[name]))
    training.log.figures(
        training.done, {"validation": {key: found[name][key] for key in found[name] if key != "classes"}}
    )
    for other, model in others:
        same_buffers(model, world)
        detector = cast(FineTune, model).detector
        found[other] = metrics_of(config, detector, classes, detections_on(config, detector, classes, world))
        training.log.note(f"of the weights themselves, not averaged:\n{summary(found[other])}")
        if world.rank == 0:
            both = found[name] | {"raw": found[other]}
            (training.folder / "metrics.json").write_text(json.dumps(without_nan(both), indent=1))
    if training.validation is not None:
        agreed = gather_objects(found, world)[0]
        training.validation.keep(training.folder, training.done, training.models, agreed, world)


def evaluate(config: Config, detector: Detector, classes: Sequence[str], world: World, folder: Path) -> dict[str, Any]:
    """COCO metrics of a detector on ``data.val``; writes ``metrics.json`` and ``predictions.json`` into ``folder``.

    Returns:
        The metrics of ``measure`` with per-class results; on every rank.

    Raises:
        ValueError: ``folder`` cannot be written, which is said before the first image.
    """
    if world.rank == 0:
        writable(folder)
    detections = detections_on(config, detector, classes, world)
    if world.rank == 0:  # first: metrics of masks refuse a file without them, and detections are what took the time
        truth = validation_truth(config, classes)
        save_predictions(folder / "predictions.json", truth, detections, classes=classes)
    metrics = metrics_of(config, detector, classes, detections, per_class=True)
    if world.rank == 0:
        (folder / "metrics.json").write_text(json.dumps(without_nan(metrics), indent=1))
    return metrics


def summary(metrics: dict[str, Any], per_class: bool = False) -> str:
    """Metrics as a small table, in per cent."""
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    lines = ["  ".join(f"{name} {100 * metrics[name]:.1f}" for name in names)]
    if "voc" in metrics:
        lines.append("VOC: " + "  ".join(f"{name} {100 * metrics['voc'][name]:.1f}" for name in names[:3]))
    if "masks" in metrics:
        lines.append("masks: " + "  ".join(f"{name} {100 * metrics['masks'][name]:.1f}" for name in names))
    if per_class:
        width = max(len(name) for name in metrics["classes"])
        lines += [
            f"{name:{width}}  AP {100 * row['AP']:5.1f}  AP50 {100 * row['AP50']:5.1f}"
            for name, row in metrics["classes"].items()
        ]
    return "\n".join(lines)
