"""What several of the tests here need: a store."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from unionimage.store import Store


@pytest.fixture
def root(scratch: Path, tmp_path: Path) -> Iterator[Path]:
    path = scratch / f"s-{tmp_path.name}-{os.getpid()}"
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with Store.open(root) as opened:
        yield opened
