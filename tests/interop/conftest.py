"""What the tests against registries share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.command import Command, make_command
from harness.registry import OciLayout, Registry, layer_tar


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that asks for no password."""
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that wants `jo` and her password `s3cret`."""
    with Registry(tmp_path_factory.mktemp("guarded"), password="s3cret") as running:
        yield running


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> OciLayout:
    """A layout with an image `one` of two layers."""
    made = OciLayout(tmp_path_factory.mktemp("layout") / "oci")
    base = layer_tar({"etc": None, "etc/hosts": b"127.0.0.1 localhost\n", "etc/old": b"x"})
    made.image("one", [base, layer_tar({"etc": None, "etc/.wh.old": b"", "etc/new": b"new\n"})])
    return made


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """The command, with a store of its own."""
    return make_command(tmp_path, "store")
