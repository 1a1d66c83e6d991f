"""Plain values, as YAML and JSON give them: read strictly, shown briefly, checked against type, words and bounds."""

from __future__ import annotations

import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any

import yaml

DEEPEST = 50  # levels of brackets in YAML
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 120


class _PlainLoader(yaml.SafeLoader):
    """YAML's plain values without what makes a small file large or hides a value: aliases, and keys that repeat."""

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:  # noqa: N803, PyYAML's name
        if self.flow_level >= DEEPEST:  # here, since the scanner's time grows with the square of the level
            raise yaml.scanner.ScannerError(None, None, "nested too deep", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.composer.ComposerError(
                None, None, "aliases (*) are not read, write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {shown(key.value)} twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def read_yaml(text: str | bytes) -> Any:
    """The plain value of a YAML text, in time and memory that grow with its length only.

    Raises:
        ValueError: no YAML, not UTF-8, nested too deep; tags, aliases, keys that repeat. One line, without a file name.
    """
    try:
        return yaml.load(text.decode() if isinstance(text, bytes) else text, _PlainLoader)
    except RecursionError:
        raise ValueError("not readable as YAML: nested too deep") from None
    # Scalars that only look like dates or numbers raise whatever their constructors do.
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"not readable as YAML: {' '.join(str(error).split())[:300]}") from None


def shown(value: Any) -> str:
    """``repr`` for messages: one line, cut where it is long or deep, also of numbers with too many digits to print."""
    try:
        return _BRIEF.repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to print"


def checked(value: Any, hint: Any, metadata: Mapping[str, Any], key: str) -> Any:
    """``value`` as the type of ``hint``: whole number, number, text, truth, a list of one of these, or None.

    Args:
        hint: a resolved annotation, ``X`` or ``X | None`` or ``tuple[X, ...]``.
        metadata: "choices" (empty: any), "above" and "least", exclusive and inclusive lower bounds.
        key: what errors call it.

    Raises:
        ValueError: another type, another word, or a number that is not finite or below its bound.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    want = next(option for option in options if option is not type(None))
    if value is False and "off" in metadata["choices"]:
        value = "off"  # which YAML 1.1 reads as false
    converted = _converted(value, want)
    if converted is None:
        raise ValueError(f"{key}: want {_describe(hint)}, got {shown(value)}")
    for word in converted if isinstance(converted, tuple) else (converted,):
        if metadata["choices"] and word not in metadata["choices"]:
            near = difflib.get_close_matches(str(word), metadata["choices"], n=1, cutoff=0.4)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{key}: want one of {', '.join(metadata['choices'])}, got {shown(word)}{hint_text}")
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            above, least = metadata["above"], metadata["least"]
            if isinstance(number, int) and abs(number) >= 2**63:
                raise ValueError(f"{key}: want a whole number below 2**63, got {shown(number)}")
            if not (above < number < math.inf and least <= number):
                bound = f"above {above:g}" if math.isfinite(above) else f"of at least {least:g}"
                raise ValueError(f"{key}: want a finite number {bound}, got {shown(number)}")
    return converted


def _converted(value: Any, want: Any) -> Any:
    """The value as ``want``, or None where it is of another type; YAML reads 1e-3 as text, so numbers may be text."""
    if typing.get_origin(want) is tuple:
        if not isinstance(value, (list, tuple)):
            value = [value]
        items = tuple(_converted(item, typing.get_args(want)[0]) for item in value)
        return None if any(item is None for item in items) else items
    if want is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return None
    return value if type(value) is want else None


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list ({_describe(typing.get_args(hint)[0])} each)"
    return names[hint]
