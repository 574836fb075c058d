"""Fixtures for the tests of the command line that start containers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.containers import Box, boxed, nothing_left


@pytest.fixture(scope="module")
def containers(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Box]:
    """A store with the image `busybox`, shared by the tests of a module."""
    yield from boxed(scratch / request.module.__name__.rpartition(".")[2])


@pytest.fixture
def box(containers: Box) -> Iterator[Box]:
    """The module's store; whatever a test leaves there is removed, what that leaves is an error."""
    yield containers
    containers.remove_all()
    assert nothing_left(containers)
