"""Settings of every test: one thread, fixed seeds."""

import os
from pathlib import Path

import cv2
import pytest
import torch

torch.set_num_threads(1)
cv2.setNumThreads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that no process is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and weights; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("ALIGNDET_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"real data not found at {folder}; set ALIGNDET_SHARED")
    return folder
