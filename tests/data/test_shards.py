"""Shards: the parts joined are the whole, to the byte; a part that is missing or foreign is named."""

from pathlib import Path

import pytest

from aligndet.data.proposals import open_proposals
from aligndet.data.propose import propose
from aligndet.data.shards import Shard, merge_proposals, parse_shard
from tests.data.test_propose import NAMES, QUICK, fake_search

IMAGES = [*NAMES[:5], "raise.jpg", *NAMES[5:]]


def part(folder: Path, number: int, of: int, images: list[str] = IMAGES) -> Path:
    out = folder / f"{number}-{of}-{len(images)}.npz"
    propose(images, folder, out, QUICK, shard=Shard(number, of), workers=1, search=fake_search)
    return out


@pytest.mark.parametrize(("count", "of"), [(7, 3), (2, 5), (1, 1), (11, 11)])
def test_every_name_is_in_one_shard_in_order(count: int, of: int) -> None:
    names = [str(number) for number in range(count)]
    parts = [Shard(number, of).select(names) for number in range(1, of + 1)]
    assert [name for part in parts for name in part] == names
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_merged_file_is_that_of_one_run(tmp_path: Path) -> None:
    propose(IMAGES, tmp_path, tmp_path / "whole.npz", QUICK, workers=1, search=fake_search)
    parts = [part(tmp_path, number, 3) for number in (3, 1, 2)]
    merge_proposals(parts, tmp_path / "merged.npz")
    assert (tmp_path / "merged.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert list(open_proposals(tmp_path / "merged.npz").failures) == ["raise.jpg"]
    with pytest.raises(ValueError, match=r"want each of the 3 shards once; missing 2"):
        merge_proposals([parts[0], parts[1]], tmp_path / "other.npz")
    with pytest.raises(ValueError, match="there twice"):
        merge_proposals([*parts, parts[0]], tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"made otherwise than .*images: 14 -> 13"):
        merge_proposals([*parts[1:], part(tmp_path, 3, 3, NAMES)], tmp_path / "other.npz")
    with pytest.raises(ValueError, match="got a whole one"):
        merge_proposals([tmp_path / "whole.npz"], tmp_path / "other.npz")
    with pytest.raises(ValueError, match="exists"):
        merge_proposals(parts, tmp_path / "merged.npz")


def test_complete_file_of_another_shard_is_refused(tmp_path: Path) -> None:
    out = part(tmp_path, 1, 3)
    with pytest.raises(ValueError, match="other settings"):
        propose(IMAGES, tmp_path, out, QUICK, shard=Shard(2, 3), workers=1, search=fake_search)


@pytest.mark.parametrize("text", ["2", "0/3", "4/3", "a/b", "1/", "-1/2"])
def test_bad_shards_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="--shard: want i/n"):
        parse_shard(text)
    assert parse_shard("2/3") == Shard(2, 3)
