"""The code of docs/protocol.md, as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "protocol.md"


def blocks() -> list[str]:
    """The Python blocks of the page, in order: the detector, pre-training, fine-tuning and evaluation."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def executed(*numbers: int, **names: Any) -> dict[str, Any]:
    """The names that exist after the given blocks were run one after another with ``names`` known to them."""
    module = ModuleType("protocol_page_code")
    sys.modules[module.__name__] = module  # dataclasses look up the module of their class
    vars(module).update(names)
    for number in numbers:
        before = PAGE.read_text().split(blocks()[number])[0].count("\n")
        # Empty lines in front: a traceback then shows the line of the page.
        exec(compile("\n" * before + blocks()[number], str(PAGE), "exec"), vars(module))
    return vars(module)
