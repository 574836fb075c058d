"""Fixtures for every test: see tests/README.md for what they give and what they watch over."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import direct, linux
from harness.mounts import DOORS, KINDS, Workshop, remove_tree
from harness.watchdog import Watchdog, unmount_everything

_SECONDS_FOR_A_TEST = 60
_URING = Path("/sys/module/fuse/parameters/enable_uring")
_USUAL_KINDS = ("plain", "overlay", "unionfuse")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that take minutes too")
    parser.addoption(
        "--kinds",
        default=",".join(_USUAL_KINDS),
        help=f"what the scenarios run on, out of {', '.join(KINDS)} (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Imported before any test can import unionfuse, `direct` puts the hooks for faults in place.
    assert direct.changing_calls() == 0
    config.addinivalue_line(
        "markers", "on(*kinds): the kinds of tree that this scenario is about (default: all)"
    )
    config.addinivalue_line(
        "markers",
        "through(*kinds): of unionfuse's doors this scenario is about these alone (default: all)",
    )
    config.addinivalue_line(
        "markers",
        "doors: this scenario runs through other doors, too, in short runs (tests/README.md)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workshop" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("--kinds").split(",")
    if "unionfuse" in wanted:
        wanted += [door for door in _other_doors(metafunc) if door not in wanted]
    if mark := metafunc.definition.get_closest_marker("on"):
        wanted = [kind for kind in wanted if _covers(mark.args, kind)]
    if mark := metafunc.definition.get_closest_marker("through"):
        wanted = [kind for kind in wanted if kind not in DOORS or kind in mark.args]
    metafunc.parametrize("workshop", wanted, indirect=True, scope="function")


def _other_doors(metafunc: pytest.Metafunc) -> list[str]:
    if metafunc.config.getoption("--long"):
        return list(DOORS)
    chosen = metafunc.definition.get_closest_marker("doors") is not None
    return ["unionfuse-pyfuse3", "unionfuse-indexed"] if chosen else []


def _covers(named: tuple[str, ...], kind: str) -> bool:
    # who names unionfuse means all of its doors; a peer is asked what kernel overlayfs is asked
    return (
        kind in named
        or ("unionfuse" in named and kind in DOORS)
        or ("overlay" in named and kind == "fuse-overlayfs")
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        skip = pytest.mark.skip(reason="runs for minutes: --long")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    setattr(item, f"report_{report.when}", report)
    shop = getattr(item, "funcargs", {}).get("workshop")
    if report.failed and isinstance(shop, Workshop) and (messages := shop.messages()):
        report.sections.append(("what the daemons said", messages))
    return report


@pytest.fixture(autouse=True)
def no_mount_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A mount that a test leaves in pytest's directories fails it: they could not go away."""
    yield
    root = tmp_path_factory.getbasetemp()
    if left := linux.mounts_below(root):
        unmount_everything(root)
        pytest.fail(f"still mounted: {', '.join(point for point, _, _ in left)}")


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory for mounts. Not pytest's own: its path is short, on one file system, 0755."""
    directory = Path(tempfile.mkdtemp(prefix="unionfuse-test-"))
    os.chmod(directory, 0o755)
    yield directory
    remove_tree(directory)


@pytest.fixture(scope="session")
def watchdog(scratch: Path) -> Iterator[Watchdog]:
    dog = Watchdog(scratch)
    yield dog
    dog.close()


@pytest.fixture
def uring() -> Iterator[None]:
    """FUSE over io_uring allowed, and put back as it was."""
    if not _URING.exists():
        pytest.skip("the kernel has no FUSE over io_uring (Linux 6.14 and later)")
    yield from _uring_allowed("Y")


@pytest.fixture
def no_uring() -> Iterator[None]:
    """FUSE over io_uring not allowed, and put back as it was."""
    if _URING.exists():
        yield from _uring_allowed("N")
    else:
        yield


def _uring_allowed(answer: str) -> Iterator[None]:
    before = _URING.read_text()
    _URING.write_text(answer)
    yield
    _URING.write_text(before)


@pytest.fixture
def workshop(
    request: pytest.FixtureRequest, scratch: Path, watchdog: Watchdog
) -> Iterator[Workshop]:
    """Makes trees of the kind that the test is parametrised with; see harness.mounts.Workshop."""
    directory = Path(tempfile.mkdtemp(prefix="", dir=scratch))
    os.chmod(directory, 0o755)
    mark = request.node.get_closest_marker("timeout")
    watchdog.arm(mark.args[0] if mark else _SECONDS_FOR_A_TEST)
    shop = Workshop(directory, request.param)
    umask = os.umask(0o022)
    try:
        yield shop
        report = getattr(request.node, "report_call", None)
        shop.finish(failed=report is None or report.failed)
    finally:
        os.umask(umask)
        watchdog.disarm()
        for tree in shop._trees:
            tree.discard()
        remove_tree(directory)
