"""The rules of the house, held by machine: import arrows, size budgets, names."""

import ast
import re
from pathlib import Path

import pytest

import aligndet

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "aligndet").rglob("*.py")) + [ROOT / "train.py", ROOT / "eval.py"]
LAYERS = {
    **dict.fromkeys(("ops", "config", "checks", "typed", "version"), 0),
    "structures": 1,
    **dict.fromkeys(("protocol", "assigners", "losses"), 2),
    **dict.fromkeys(("models", "data"), 3),
    "plots": 3,
    **dict.fromkeys(("pretrain", "finetune", "image_domain", "soco", "reference"), 4),
    "weights": 5,
    "predict": 5,
    "interop": 5,
    "convert": 6,
    "engine": 6,
    "evaluate": 7,
    **dict.fromkeys(("demo_figures",), 7),
    **dict.fromkeys(("demo",), 8),
    **dict.fromkeys(("cli", "__main__", "__init__", "train", "eval"), 9),
}
# Same layer, but one may use the other.
ALLOWED = {
    ("cli", "__main__"),
    ("assigners", "protocol"),
    ("typed", "config"),
    ("checks", "config"),
    ("config", "checks"),
}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("").parts
    return relative[1] if relative[0] == "aligndet" else relative[0]


def imports_of(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "aligndet"}


def functions_of(path: Path) -> list[tuple[str, int, int]]:
    """(name, net lines, arguments) of each function: without docstring, comments and blank lines."""
    text = path.read_text()
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            skipped: set[int] = set()
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                skipped |= set(range(first.lineno, (first.end_lineno or 0) + 1))
            body = [n for n in range(node.lineno, (node.end_lineno or 0) + 1) if n not in skipped]
            net = sum(1 for n in body if lines[n - 1].strip() and not lines[n - 1].strip().startswith("#"))
            positional = [a for a in node.args.args + node.args.posonlyargs if a.arg not in ("self", "cls")]
            found.append((f"{path.relative_to(ROOT)}:{node.name}", net, len(positional)))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_arrows_point_one_way(path: Path) -> None:
    mine = part_of(path)
    for name in imports_of(ast.parse(path.read_text())):
        other = name.split(".")[1]
        if other == mine:
            continue
        allowed = LAYERS[other] < LAYERS[mine] or (other, mine) in ALLOWED or LAYERS[mine] == 9
        assert allowed, f"{mine} imports {name}"


def test_the_method_knows_no_detector() -> None:
    assert not [n for n in imports_of(ast.parse((ROOT / "aligndet/pretrain.py").read_text())) if ".models" in n]
    for path in (ROOT / "aligndet/models").rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        names |= {
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        names |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not [name for name in names if re.search("pretrain|momentum|contrastive", name.lower())], path


def test_size_budgets() -> None:
    functions = [row for path in SOURCES for row in functions_of(path)]
    long = [(name, net) for name, net, _ in functions if net > 40]
    assert len(long) <= 0.05 * len(functions), long
    assert not [(name, net) for name, net, _ in functions if net > 80]
    assert not [row for row in functions if row[2] > 6]
    assert not [(path, n) for path in SOURCES if (n := len(path.read_text().splitlines())) > 400]


def test_no_probing_and_no_pass_through() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert "hasattr(" not in text, path
        assert "**kwargs" not in text, path
        assert "weights_only=False" not in text, path


def test_public_names_exist() -> None:
    for name in aligndet.__all__:
        assert getattr(aligndet, name) is not None
