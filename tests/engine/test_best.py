"""Which validation was the best, what is kept of it, and when hope ends."""

from pathlib import Path

import pytest
from torch import nn

from aligndet.engine import checkpoint
from aligndet.engine.best import AVERAGE, RAW, Validation
from aligndet.engine.distributed import single
from tests.ranks import on_two_ranks


def exported(model: nn.Module) -> dict[str, object]:
    return {"kind": "detector", "weight": model.weight.detach().clone()}  # type: ignore[union-attr, operator]


def validation(patience: int | None = None) -> Validation:
    return Validation(lambda model: {"AP": float(model.weight.detach().max())}, exported, 5, patience)  # type: ignore[operator, union-attr]


def models(raw: float, average: float | None = None) -> dict[str, nn.Module]:
    """Layers whose AP is their weight."""
    found: dict[str, nn.Module] = {}
    for name, value in ((RAW, raw), (AVERAGE, average)):
        if value is not None:
            found[name] = nn.Linear(1, 1, bias=False)
            nn.init.constant_(found[name].weight, value)  # type: ignore[arg-type]
    return found


def kept(item: Validation, folder: Path, step: int, tried: dict[str, nn.Module]) -> bool:
    return item.keep(folder, step, tried, item.measured(tried, single()), single())


def test_the_best_of_raw_and_average_is_on_the_disk(tmp_path: Path) -> None:
    item = validation()
    improved = [
        kept(item, tmp_path, step, models(raw, average))
        for step, raw, average in ((5, 0.25, 0.125), (10, 0.0, 0.25), (15, 0.25, 0.5), (20, 0.375, 0.4375))
    ]
    assert improved == [True, False, True, False], "an equal AP is no better one"
    assert (item.best, item.stale) == (0.5, 1)
    content = checkpoint.load(tmp_path / "best.pt")
    assert (content["step"], content["of"], content["metrics"]) == (15, AVERAGE, {"AP": 0.5})
    assert content["weight"].item() == 0.5


def test_zero_counts_as_a_first_result_and_nan_never(tmp_path: Path) -> None:
    item = validation(patience=2)
    assert not kept(item, tmp_path, 5, models(float("nan")))
    assert not (tmp_path / "best.pt").exists()
    assert kept(item, tmp_path, 10, models(0.0))
    assert (item.best, item.stale) == (0.0, 0)
    assert not kept(item, tmp_path, 15, models(float("nan")))
    assert item.best == 0.0


@pytest.mark.parametrize(("patience", "ends"), [(1, 2), (2, 5), (3, 6), (None, None)])
def test_hope_ends_after_so_many_in_a_row(tmp_path: Path, patience: int | None, ends: int | None) -> None:
    """APs 0.2, 0.1, 0.3, 0.3, 0.1, 0.2: the second is the first without a better one, the fourth to sixth are three."""
    item = validation(patience)
    found = None
    for number, ap in enumerate((0.2, 0.1, 0.3, 0.3, 0.1, 0.2), start=1):
        kept(item, tmp_path, number, models(ap))
        if item.hopeless:
            found = number
            break
    assert found == ends


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/best\.pt: cannot be written"):
        kept(validation(), tmp_path / "nowhere", 5, models(0.5))


RANKS = """
import torch
torch.set_num_threads(1)
from torch import nn
from aligndet.engine import distributed as d
from aligndet.engine.best import Validation, same_buffers
from pathlib import Path
world = d.start("cpu")
norm = nn.BatchNorm2d(3)
norm.running_mean.fill_(world.rank + 1)
same_buffers(norm, world)
assert norm.running_mean.tolist() == [1, 1, 1]
item = Validation(lambda model: {"AP": 0.5 - world.rank / 4}, lambda model: {"rank": world.rank}, 5, 1)
for step in (5, 10):
    found = item.measured({"weights": norm}, world)
    assert found == {"weights": {"AP": 0.5}}, "rank 0 measured it"
    item.keep(Path(FOLDER), step, {"weights": norm}, found, world)
assert (item.best, item.stale, item.hopeless) == (0.5, 1, True)
d.stop(world)
"""


def test_ranks_agree_on_the_best_and_on_the_end(tmp_path: Path) -> None:
    on_two_ranks(RANKS.replace("FOLDER", repr(str(tmp_path))))
    assert checkpoint.load(tmp_path / "best.pt")["rank"] == 0
