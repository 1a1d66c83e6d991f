"""Claims about configuration: strict keys, types, tasks, combinations, overrides."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from aligndet.checks import CONVENTIONS
from aligndet.config import (
    BACKBONES,
    DETECTORS,
    Config,
    DataConfig,
    ModelConfig,
    differences,
    from_dict,
    load_config,
    to_dict,
)
from aligndet.models import DETECTORS as CLASSES
from aligndet.models import backbones, options_of
from aligndet.models.conventions import ANCHORS, DENSE, REGIONS

CONFIGS = Path(__file__).parents[1] / "configs"
NEEDS: dict[str, dict[str, str]] = {
    "pretrain": {"data.images": "a", "data.proposals": "b"},
    "finetune": {"data.train": "a"},
    "image_domain": {"data.images": "a"},
}


def minimal(**changes: object) -> dict[str, object]:
    tree: dict[str, object] = {"task": "finetune", "run": "r", "data": {"train": "t.json"}, "optim": {"steps": 7}}
    return tree | changes


def test_each_detector_is_offered_the_conventions_that_it_has() -> None:
    """torchvision_v2, of RetinaNet alone, comes from files and is no setting: its towers have norms."""
    tables = {"fcos": DENSE, "retinanet": ANCHORS, "faster_rcnn": REGIONS, "mask_rcnn": REGIONS}
    for detector, table in tables.items():
        assert set(CONVENTIONS[detector]) == set(table) - {"torchvision_v2"}
    assert CONVENTIONS.keys() == tables.keys()


def test_evaluation_asks_nothing_of_the_sizes_of_training(tmp_path: Path) -> None:
    tree = minimal(data={"train": "t.json", "val": "v.json", "short_side": 256, "long_side": 128})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    assert load_config(tmp_path / "c.yaml", evaluation=True).data.long_side == 128
    with pytest.raises(ValueError, match=r"data\.long_side: want at least the largest short side 256, got 128"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_load_and_survive_a_round_trip(path: Path) -> None:
    task = next(line.split()[1] for line in path.read_text().splitlines() if line.startswith("task:"))
    config = load_config(path, [f"{key}={value}" for key, value in NEEDS[task].items()])
    assert from_dict(to_dict(config)) == config
    assert config.task == task


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (minimal(optim={"step": 7}), "unknown key 'optim.step'; the nearest valid key is 'optim.steps'"),
        (minimal(sede=3), "unknown key 'sede'; the nearest valid key is 'seed'"),
        (minimal(lr=0.1), "unknown key 'lr'; the nearest valid key is 'optim.lr'"),
        (minimal(seed="three"), "seed: want a whole number, got 'three'"),
        (minimal(seed=True), "seed: want a whole number, got True"),
        (minimal(optim={"steps": 7, "lr": -1}), "optim.lr: want a finite number above 0, got -1.0"),
        (minimal(optim={"steps": 7, "lr": ".nan"}), "optim.lr: want a number, got '.nan'"),
        (minimal(optim={"steps": 7, "lr": float("nan")}), "optim.lr: want a finite number above 0, got nan"),
        (minimal(optim={"steps": 7, "name": "adam"}), "optim.name: want one of sgd, adamw, got 'adam'; did you mean"),
        (minimal(optim={"steps": 7, "epochs": 7}), "optim.epochs, optim.steps: want exactly one"),
        (minimal(optim={}), "optim.epochs, optim.steps: want exactly one"),
        (minimal(optim={"steps": 7, "base_batch": 8}), "optim.base_batch, optim.lr_scaling: want both or neither"),
        (minimal(optim={"steps": 7, "lr_scaling": "sqrt"}), "want both or neither, got None and sqrt"),
        (minimal(timeout=1e300), "timeout: want at most 1000000 s, got 1e+300"),
        (minimal(timeout=0.5), "timeout: want a finite number of at least 1, got 0.5"),
        (minimal(optim=[1]), "optim: want keys and values"),
        (
            minimal(model={"detector": "retinanet", "conventions": "mmdet"}),
            "model.conventions: want one of aligndet, torchvision, detectron2 for retinanet, got mmdet",
        ),
        (
            minimal(weights="w.pt", method={"modules": ["neck"], "keep_predictors": False}),
            "method.keep_predictors: has no effect without head in method.modules",
        ),
        (
            minimal(task="pretrain", data={"images": "i", "proposals": "p"}, method={"name": "soco", "scope": "image"}),
            "method.scope: not read by method.name soco; remove, or set method.scope=null",
        ),
        (minimal(optim={"steps": 7, "milestones": [3, 2]}), "optim.milestones: want an ascending list"),
        (minimal(optim={"steps": 7, "milestones": [3, 7]}), "optim.milestones: want all below the length of 7"),
        (minimal(optim={"steps": 7, "batch": 5, "accumulate": 2}), "optim.accumulate: want a divisor"),
        (minimal(method={"temperature": 0.2}), "method.temperature: not read by task finetune"),
        (minimal(data={}), "data.train: task finetune needs it"),
        (minimal(task="image_domain", data={"images": "a"}), "model.norm: a backbone trained from random weights"),
        (minimal(task="pretrain", data={"images": "a"}), "data.proposals: task pretrain needs it"),
        (minimal(data={"train": "t", "flip": 1.5}), "data.flip: want a number in 0 .. 1, got 1.5"),
        (minimal(optim={"steps": 7, "warmup_ratio": 2}), "optim.warmup_ratio: want a number in 0 .. 1, got 2.0"),
        (minimal(model={"frozen_stages": 9}), "model.frozen_stages: want 0 .. 4, got 9"),
        (minimal(model={"levels": 2}), "model.levels"),
        (minimal(model={"score_threshold": 2}), "model.score_threshold: want a number in 0 .. 1, got 2.0"),
        (minimal(model={"detector": "detr", "dropout": 3}), "model.dropout: want a number in 0 .. 1, got 3.0"),
        (
            minimal(model={"detector": "yolo"}),
            "faster_rcnn, mask_rcnn, detr, got 'yolo'",
        ),
        (minimal(model={"backbone": "resnet51"}), "swin_b, swin_l, got 'resnet51'; did you mean 'resnet50'?"),
        (minimal(model={"queries": 5}), "model.queries: no option of fcos, only of detr; remove it"),
        (minimal(data={"train": "t", "short_side": []}), "data.short_side: want at least one"),
        (minimal(data={"train": "t", "short_side": 900, "long_side": 800}), "data.long_side: want at least"),
        (minimal(data={"train": "t", "augment": "lsj"}), "data.augment: want one of plain, detr, jitter, got 'lsj'"),
        (minimal(data={"train": "t", "jitter_size": 640}), "data.jitter_size: only read by data.augment jitter, which"),
        (
            minimal(data={"train": "t", "augment": "jitter", "jitter_size": 99999}),
            "data.jitter_size: want at most 16384 px, got 99999",
        ),
        (
            minimal(data={"train": "t", "augment": "detr", "jitter_scale": [0.3, 1.5]}),
            "data.jitter_scale: only read by",
        ),
        (minimal(data={"train": "t", "augment": "jitter", "crop_sides": [9, 99]}), "data.crop_sides: only read by"),
        (minimal(data={"train": "t", "crop_first": [400]}), "data.crop_first: only read by data.augment detr, which"),
        (minimal(data={"train": "t", "augment": "jitter", "short_side": 600}), "data.short_side: not read by"),
        (
            minimal(data={"train": "t", "augment": "jitter", "jitter_scale": [2, 0.1]}),
            "data.jitter_scale: want two asc",
        ),
        (minimal(data={"train": "t", "augment": "jitter", "jitter_scale": [0, 1]}), "data.jitter_scale"),
        (minimal(data={"train": "t", "augment": "detr", "crop_sides": [400]}), "data.crop_sides: want two ascending"),
        (minimal(data={"train": "t", "augment": "detr", "crop_first": []}), "data.crop_first: want at least one size"),
        (minimal(data={"train": "t", "augment": "jitter", "group_aspect": True}), "data.group_aspect: has no effect"),
        (
            minimal(data={"train": "t", "group_aspect": True}, optim={"steps": 7, "batch": 1}),
            "data.group_aspect: has no",
        ),
        (minimal(weights="a", model={"backbone_weights": "b"}), "weights, model.backbone_weights: want one"),
        (minimal(method={"keep_predictors": False}), "method.keep_predictors: has no effect without weights"),
        (minimal(task="train"), "task: want one of pretrain, finetune, image_domain, got 'train'"),
        (minimal(run=""), "run: want the folder"),
    ],
)
def test_each_mistake_is_named(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_dict(tree)
    assert message in str(caught.value)


def test_values_convert_where_yaml_is_known_to_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("task: finetune\nrun: r\ndata: {train: t, short_side: 97}\noptim: {lr: 1e-3, steps: 7, clip: 5}\n")
    config = load_config(path)
    assert (config.optim.lr, config.optim.clip, config.data.short_side) == (1e-3, 5.0, (97,))
    assert type(config.optim.clip) is float


def test_a_word_that_yaml_reads_as_false_is_taken_as_the_word(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "task: image_domain\nrun: r\nmodel: {norm: batch}\ndata: {images: i}\noptim: {steps: 1, amp: off}\n"
    )
    assert load_config(path).optim.amp == "off"
    with pytest.raises(ValueError, match=r"optim.name: want text, got False"):
        load_config(path, ["optim.name=off"])


def test_overrides_win_and_are_read_as_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("task: finetune\nrun: r\ndata: {train: t}\noptim: {steps: 7}\n")
    overrides = ["seed=5", "data.short_side=[31, 37]", "optim.steps=null", "optim.epochs=3", "data.val=a=b.json"]
    config = load_config(path, overrides)
    assert (config.seed, config.data.short_side, config.optim.epochs) == (5, (31, 37), 3)
    assert config.data.val == "a=b.json"
    path.write_text("task: finetune\nrun: r\ndata: {train: t, short_side: [31]}\noptim: {steps: 7, clip: 3}\n")
    config = load_config(path, ["data.short_side=null", "optim.clip=null"])
    assert config.data.short_side == DataConfig().short_side, "null: the default, where null is no value"
    assert config.optim.clip is None
    with pytest.raises(ValueError, match="want key=value"):
        load_config(path, ["seed"])
    with pytest.raises(ValueError, match="task is not a section"):
        load_config(path, ["task.name=3"])


def test_files_that_are_no_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such file"):
        load_config(tmp_path / "none.yaml")
    for text in ("[1, 2]", "a: [", "!!python/object/apply:os.system ['true']"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.yaml"):
            load_config(tmp_path / "bad.yaml")


def test_differences_name_the_changed_keys() -> None:
    old = to_dict(from_dict(minimal()))
    new = to_dict(from_dict(minimal(seed=3, optim={"steps": 7, "lr": 0.5})))
    assert differences(old, new) == ["optim.lr: 0.01 -> 0.5", "seed: 0 -> 3"]
    assert differences(old, old) == []


def test_defaults_are_the_method_s_numbers() -> None:
    config = Config()
    assert (config.method.temperature, config.method.embedding, config.method.candidates) == (0.5, 256, None)
    assert (config.method.momentum, config.optim.lr, config.optim.weight_decay) == (0.996, 0.01, 1e-4)
    assert config.data.short_side == (640, 672, 704, 736, 768, 800)


def test_words_and_options_are_those_of_the_models() -> None:
    assert tuple(CLASSES) == DETECTORS
    assert backbones.BACKBONES == BACKBONES
    of_class = {item.name: item.metadata["of"] for item in dataclasses.fields(ModelConfig) if item.default is None}
    del of_class["backbone_weights"]
    assert of_class == {name: tuple(kind for kind in CLASSES if name in options_of(kind)) for name in of_class}
    assert {name for name, whose in of_class.items() if whose == ("detr",)} >= {"queries", "decoder_layers"}
