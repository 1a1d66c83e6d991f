"""Seeded mutations of config and label files, and the one rule for what may become of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from aligndet import load_config
from aligndet.config import Config
from aligndet.data.formats import load_annotations
from tests.data import same

LIMIT = 1.0  # s of this process, for one call
LONGEST = 2500  # characters of a message
DEEP = 3000  # levels


class StrangeOutcomeError(Exception):
    """A file that was not answered as the rule says."""


def outcome(read: Callable[[], Any], stranger: bool = False) -> str:
    """What became of a file: "read" or "refused"; StrangeOutcomeError for anything else.

    Args:
        stranger: the file has a key that no reader knows, so it must be refused.
    """
    started = time.process_time()
    try:
        read()
        result = "read"
    except (ValueError, FileNotFoundError) as error:
        result, message = "refused", str(error)
        if type(error) not in (ValueError, FileNotFoundError) or "\n" in message or len(message) > LONGEST:
            raise StrangeOutcomeError(
                f"{type(error).__name__}, {len(message)} characters: {message[:300]!r}"
            ) from error
    except Exception as error:
        raise StrangeOutcomeError(f"{type(error).__name__}: {str(error)[:300]}") from error
    if time.process_time() - started > LIMIT:
        raise StrangeOutcomeError(f"took {time.process_time() - started:.1f} s")
    if stranger and result == "read":
        raise StrangeOutcomeError("an unknown key was taken")
    return result


def number(rng: random.Random) -> Any:
    fixed = (0, -1, 1, 3, 0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 2**31, 2**63, -(2**64), 10**400)
    return rng.choice((*fixed, rng.randrange(-1000, 1000), rng.uniform(-10, 10), True))


def text(rng: random.Random) -> str:
    fixed = (
        "",
        " ",
        "off",
        "null",
        "1e999",
        "../../etc/passwd",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "ü" * 300,
        "%s",
        "{}",
    )
    return rng.choice(
        (*fixed, "x" * 5000, "\n", "1234", "9" * 5000, "none", "".join(map(chr, rng.choices(range(1, 999), k=9))))
    )


def nested(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(3 if depth < 4 else 1)
    if kind == 0:
        return rng.choice((number, text, lambda _: None))(rng)
    items = [nested(rng, depth + 1) for _ in range(rng.randrange(4))]
    return items if kind == 1 else {text(rng) or str(place): item for place, item in enumerate(items)}


def containers(tree: Any) -> list[Any]:
    found = [tree] if isinstance(tree, (dict, list)) else []
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        found += containers(item)
    return found


def mutated(tree: Any, rng: random.Random) -> Any:
    """A copy with one to three places replaced, removed, doubled or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = [
            (item, key) for item in containers(tree) for key in (item if isinstance(item, dict) else range(len(item)))
        ]
        if not places:
            break
        (item, key), (other, place) = rng.choice(places), rng.choice(places)
        moved = copy.deepcopy(other[place])
        act = rng.randrange(5)
        if act < 3:
            item[key] = (number, text, nested)[act](rng)
        elif act == 3:
            del item[key]
        else:
            item[key] = moved
    return tree


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place, act = rng.randrange(len(changed) + 1), rng.randrange(4)
        if act == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif act == 1:
            del changed[place : place + rng.randrange(20)]
        elif act == 2:
            changed[place:place] = changed[place : place + rng.randrange(40)]
        else:
            changed[place:place] = rng.choice(
                (b"\0", b"\xff\xfe", b"[" * 9, b"{", b"&a ", b"*a", b"!!", b"\t", b": ", b"\n", b"9" * 99)
            )
    return bytes(changed)


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def merge_bomb(levels: int) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


YAML_TRICKS = (
    "!!python/object/apply:os.system ['false']",
    "!!python/object:aligndet.config.Config {}",
    "!!python/name:os.system",
    "!!binary not-base64-%",
    "!!timestamp 2024-99-99",
    "2024-99-99",
    "!!int x",
    "!!float ''",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!bool maybe",
    "1:99:99:99.9",
    "0x" + "f" * 9000,
    "9" * 9000,
    "[" * DEEP,
    "[" * DEEP + "]" * DEEP,
    "{a: " * DEEP + "}" * DEEP,
    "&a [*a]",
    "- " * DEEP,
    "? " * DEEP,
    "*nowhere",
    "{? [a, b] : c}",
    "{? {a: b} : c}",
    "\0",
    "'unfinished",
    "@",
    "%TAG ! x",
    "--- a\n--- b",
)


def has_stranger(tree: Any) -> bool:
    """Whether a config tree has a key that no dataclass has at that place."""
    if not isinstance(tree, dict):
        return False
    hints = typing.get_type_hints(Config)
    for key, value in tree.items():
        if key not in hints:
            return True
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            names = {item.name for item in dataclasses.fields(hints[key])}
            if not value.keys() <= names:
                return True
    return False


def config_file(valid: dict[str, Any], rng: random.Random) -> tuple[bytes, bool]:
    """A config file made of a valid one, and whether it has a key that no dataclass has."""
    act = rng.randrange(6)
    if act == 0:
        data = spoilt(yaml.safe_dump(valid).encode(), rng)
        return data, _parsed_has_stranger(data)
    if act == 1:
        tree = copy.deepcopy(valid)
        section = rng.choice([tree, *(value for value in tree.values() if isinstance(value, dict))])
        name = rng.choice(sorted(tree["optim"]))
        near = (name + "s", name.upper(), name[::-1], f"{name}.{name}", "-" + name, " ", "\u202e" + name, "__class__")
        section[rng.choice(near)] = rng.choice((number, text, nested))(rng)
        return _dump(tree), has_stranger(tree)
    if act == 2:
        trick = rng.choice((*YAML_TRICKS, "\n" + bomb(rng.randint(2, 12)), "\n" + merge_bomb(rng.randint(2, 9))))
        key = rng.choice(sorted(valid))
        rest = yaml.safe_dump({name: value for name, value in valid.items() if name != key})
        return f"{rest}{key}: {trick}\n".encode(), False
    if act == 3:
        return rng.choice((rng.randbytes(rng.randrange(200)), *(trick.encode() for trick in YAML_TRICKS))), False
    tree = mutated(valid, rng)
    return _dump(tree), has_stranger(tree)


def _parsed_has_stranger(data: bytes) -> bool:
    """By PyYAML's own reader; False where it reads nothing."""
    try:
        return has_stranger(yaml.safe_load(data.decode()))
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError):
        return False


def _dump(tree: Any) -> bytes:
    """YAML with whatever is in the tree: JSON is YAML, but for numbers that are none and for surrogates."""
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


JSON_TRICKS = (
    b"[" * 10**5,
    b'{"a":' * 10**5,
    b"[" * 900 + b"]" * 900,
    b"9" * 9000,
    b"\xff\xfe",
    b"",
    b"null",
    b'"x"',
    b"NaN",
)


def coco_file(valid: dict[str, Any], rng: random.Random) -> bytes:
    act = rng.randrange(6)
    if act == 0:
        return spoilt(json.dumps(valid).encode(), rng)
    if act == 1:
        trick = rng.choice(JSON_TRICKS)
        plain = json.dumps(valid).encode()
        mark = rng.choice((b'"bbox": ', b'"id": ', b'"width": ', b'"name": ', b'"file_name": '))
        return trick if rng.random() < 0.3 else plain.replace(mark, mark + trick + b', "x": ', 1)
    return json.dumps(mutated(valid, rng)).encode()


XML_TRICKS = (
    '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a0 "x">'
    + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    + "]><annotation><filename>&a11;</filename></annotation>",
    '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation><object><name>&e;</name></object></annotation>',
    '<!DOCTYPE a [<!ENTITY e "'
    + "x" * 10000
    + '">]><annotation><filename>'
    + "&e;" * 10000
    + "</filename></annotation>",
    '<?xml version="1.0" encoding="klingon"?><annotation/>',
    '<?xml version="1.0" encoding="utf-7"?><annotation/>',
    "<annotation>" * 20000,
    "<annotation>" + "<a>" * 20000 + "</a>" * 20000 + "</annotation>",
    "<annotation><filename>../../../etc/passwd</filename></annotation>",
    "<annotation><filename>..</filename></annotation>",
    "<annotation><size><width>1e300</width><height>1e300</height></size></annotation>",
    "",
)


def voc_file(valid: str, rng: random.Random) -> bytes:
    act = rng.randrange(3)
    if act == 0:
        return rng.choice(XML_TRICKS).encode()
    if act == 1:
        return spoilt(valid.encode(), rng)
    words = valid.split(">")
    place = rng.randrange(len(words))
    words[place] = f"{number(rng)}<" + words[place].partition("<")[2]
    return ">".join(words).encode("utf-8", "replace")


def yolo_file(valid: str, rng: random.Random) -> bytes:
    words = valid.split(" ")
    words[rng.randrange(len(words))] = str(rng.choice((number, text))(rng))
    plain = " ".join(words).encode("utf-8", "surrogatepass")
    return spoilt(plain, rng) if rng.random() < 0.5 else plain


class Fuzzer:
    """Mutated files of every kind in one folder; ``tried`` counts outcomes by kind."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng, self.folder, self.valid = random.Random(seed), folder, valid_config()
        self.paths = {kind: write(folder / kind) for kind, write in same.WRITERS.items()}
        self.coco = _with_masks(json.loads(self.paths["coco"].read_text()))
        self.xml = folder / "voc/Annotations/ü.xml"
        self.label = folder / "yolo/labels/train/ü.txt"
        self.whole = {path: path.read_text(encoding="utf-8") for path in (self.xml, self.label, self.paths["yolo"])}
        self.list = folder / "voc/ImageSets/Main/train.txt"
        self.tried = {kind: {"read": 0, "refused": 0} for kind in ("config", "coco", "voc", "yolo")}
        self.unknown_keys = 0  # configs that had one
        self.strangers: list[str] = []
        self.slowest = 0.0

    def run(self, count: int) -> None:
        """``count`` files: half of them configs, three in eight COCO, the rest VOC and YOLO."""
        turns = (
            "config",
            "coco",
            "config",
            "coco",
            "config",
            "coco",
            "config",
            "voc",
            *("config", "coco") * 3,
            "config",
            "yolo",
        )
        for index in range(count):
            self._one(turns[index % len(turns)])

    def _one(self, kind: str) -> None:
        written: Path
        stranger = False
        if kind == "config":
            written = self.folder / "config.yaml"
            data, stranger = config_file(self.valid, self.rng)
            self.unknown_keys += stranger
        elif kind == "coco":
            written, data = self.paths["coco"], coco_file(self.coco, self.rng)
        elif kind == "voc":
            written = self.xml
            data = voc_file(self.whole[self.xml], self.rng)
        else:
            written = self.rng.choice((self.label, self.paths["yolo"]))
            data = yolo_file(self.whole[written], self.rng)
        written.write_bytes(data)
        masks = kind in ("coco", "yolo") and self.rng.random() < 0.5
        started = time.process_time()
        try:
            if kind == "config":
                result = outcome(lambda: load_config(written), stranger)
            else:
                result = outcome(lambda: load_annotations(self.paths[kind], split="train", masks=masks))
            self.tried[kind][result] += 1
        except StrangeOutcomeError as error:
            self.strangers.append(f"{kind}: {error} <- {data[:300]!r}")
        self.slowest = max(self.slowest, time.process_time() - started)
        if written in self.whole:
            written.write_text(self.whole[written], encoding="utf-8")


def _with_masks(tree: dict[str, Any]) -> dict[str, Any]:
    forms = (
        [[10.0, 20.0, 40.0, 20.0, 40.0, 30.0]],
        {"size": [same.HEIGHT, same.WIDTH], "counts": [100, 40, same.HEIGHT * same.WIDTH - 140]},
        {"size": [same.HEIGHT, same.WIDTH], "counts": "T3X1\\T7"},
    )
    for place, annotation in enumerate(tree["annotations"]):
        annotation |= {"id": place + 1, "iscrowd": 0, "area": 30.0, "segmentation": forms[place % 3]}
    return tree


def valid_config() -> dict[str, Any]:
    """A config with a key of every kind, which is read."""
    return {
        "task": "finetune",
        "run": "runs/x",
        "seed": 3,
        "weights": None,
        "model": {"detector": "fcos", "backbone": "resnet18", "norm": "frozen", "channels": 64, "levels": None},
        "data": {
            "train": "a.json",
            "val": "b.json",
            "classes": ["cat"],
            "short_side": [256, 320],
            "long_side": 500,
            "flip": 0.5,
        },
        "method": {"reference_compatible": False},
        "optim": {"steps": 20, "lr": 1e-3, "batch": 4, "milestones": [10, 15], "clip": 1.0, "schedule": "step"},
    }
