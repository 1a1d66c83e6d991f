"""Plain values, as YAML and JSON give them, checked against a type, a choice of words and bounds."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any


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
        raise ValueError(f"{key}: want {_describe(hint)}, got {value!r}")
    for word in converted if isinstance(converted, tuple) else (converted,):
        if metadata["choices"] and word not in metadata["choices"]:
            near = difflib.get_close_matches(str(word), metadata["choices"], n=1, cutoff=0.4)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{key}: want one of {', '.join(metadata['choices'])}, got {word!r}{hint_text}")
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            above, least = metadata["above"], metadata["least"]
            if not (above < number < math.inf and least <= number):
                bound = f"above {above:g}" if math.isfinite(above) else f"of at least {least:g}"
                raise ValueError(f"{key}: want a finite number {bound}, got {number!r}")
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
        except ValueError:
            return None
    return value if type(value) is want else None


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list ({_describe(typing.get_args(hint)[0])} each)"
    return names[hint]
