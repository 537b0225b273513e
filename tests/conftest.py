"""What all tests share: no network, no time limits that a busy machine breaks, and the folder `shared`."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import that reads it: a test never reaches the Hub

import pytest
from hypothesis import settings

SHARED = Path(__file__).resolve().parents[2] / "shared"

settings.register_profile("tcsp_hf", deadline=None, derandomize=True)
settings.load_profile("tcsp_hf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED.is_dir():
        return
    for item in items:
        if "shared" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs the folder `shared` beside the checkout"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with `data` and `weights` beside the checkout, for tests marked `shared`."""
    return SHARED
