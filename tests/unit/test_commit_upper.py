"""Uppers → layers: what the union showed before a commit, it shows after it.

The oracle is kernel overlayfs: changes are made through a mount of it, its upper is committed, and
a mount of the image with the new layer must be the same tree.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.tars import tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unionimage.digest import Digest
from unionimage.store import Store

from unionfuse import syscalls

Change = Callable[[Path], object]


@pytest.fixture
def store(scratch: Path, tmp_path: Path) -> Iterator[Store]:
    # Not in tmp_path: overlay mounts want a file system with xattrs and whiteouts.
    root = scratch / f"store-{tmp_path.name}-{os.getpid()}"
    with Store.open(root) as opened:
        yield opened
    shutil.rmtree(root)


@contextmanager
def overlay(
    store: Store, layers: list[Digest], upper: Path | None, options: str = ""
) -> Iterator[Path]:
    empty = [store.root / "empty1", store.root / "empty2"]
    merged = store.root / "merged"
    for path in (*empty, merged):
        path.mkdir(exist_ok=True)
    lowers = [str(path) for path in [*store.chain_directories(layers), *empty]]
    words = f"lowerdir={':'.join(lowers)}{options}"
    if upper is not None:
        work = upper.with_name(upper.name + ".work")
        work.mkdir(exist_ok=True)
        words += f",upperdir={upper},workdir={work}"
    syscalls.mount(b"overlay", os.fsencode(merged), b"overlay", 0 if upper else 1, words.encode())
    try:
        yield merged
    finally:
        syscalls.umount(os.fsencode(merged))


def base(store: Store) -> list[Digest]:
    with store.lease("test") as lease:
        directory = lease.scratch()
        for name in ("d/sub", "e", "d/other", "deep/a/b/c"):
            (directory / name).mkdir(parents=True)
        for name in ("f", "g", "d/f", "d/sub/f", "d/other/x", "e/f", "deep/a/b/c/f"):
            (directory / name).write_text(name * 10)
        os.link(directory / "f", directory / "hard")
        os.symlink("f", directory / "link")
        os.chmod(directory / "e", 0o1770)
        layer = lease.commit_upper(directory)
        assert layer is not None
        store.hold_layers("test", [layer.diff_id])
        return [layer.diff_id]


def committed(store: Store, layers: list[Digest], change: Change, options: str = "") -> None:
    """Make a change on an overlay, commit its upper, and compare both trees."""
    upper = store.root / "upper"
    for leftover in (upper, upper.with_name("upper.work")):
        shutil.rmtree(leftover, ignore_errors=True)
    upper.mkdir(mode=0o755)
    with overlay(store, layers, upper, options) as merged:
        change(merged)
        wanted = tree(merged)
    with store.lease("test") as lease:
        layer = lease.commit_upper(upper, layers)
        after = layers if layer is None else [*layers, layer.diff_id]
        with overlay(store, after, None) as merged:
            assert tree(merged) == wanted


def move(old: Path, new: Path) -> None:
    """mv(1) copies where overlayfs without redirect_dir says EXDEV."""
    subprocess.run(["mv", "-T", old, new], check=True)


CHANGES: dict[str, Change] = {
    "nothing": lambda root: None,
    "new": lambda root: (root / "new").write_text("new"),
    "changed": lambda root: (root / "f").write_text("changed"),
    "deleted": lambda root: (root / "g").unlink(),
    "deleted directory": lambda root: shutil.rmtree(root / "d"),
    "made anew": lambda root: (
        shutil.rmtree(root / "d"), (root / "d").mkdir(), (root / "d/n").touch(),
    ),
    "file instead": lambda root: (shutil.rmtree(root / "d"), (root / "d").write_text("file")),
    "directory instead": lambda root: ((root / "g").unlink(), (root / "g/x").mkdir(parents=True)),
    "link": lambda root: os.link(root / "f", root / "d/hard2"),
    "mode": lambda root: (root / "d/f").chmod(0o4711),
    "owner": lambda root: os.chown(root / "d", 7, 8),
    "xattr": lambda root: os.setxattr(root / "d/f", "user.a", b"b"),
    "trusted": lambda root: os.setxattr(root / "d/f", "trusted.a", b"b"),
    "acl": lambda root: subprocess.run(
        ["setfacl", "-m", "u:7:rw,d:u:7:rw", root / "d"], check=True
    ),
    "time": lambda root: os.utime(root / "f", ns=(1, 1_234_567_890_987_654_321)),
    "times before 1970": lambda root: os.utime(root / "f", ns=(1, -1_500_000_001)),
    "pipe": lambda root: os.mkfifo(root / "pipe", 0o640),
    "device": lambda root: os.mknod(root / "null", 0o020666, os.makedev(1, 3)),
    "odd names": lambda root: [Path(f"{root}/{name}").touch() for name in ("a\nb", "é" * 120, " ")],
    "renamed": lambda root: move(root / "d", root / "d2"),
    "renamed and changed": lambda root: (
        move(root / "deep/a", root / "a2"),
        (root / "a2/b/c/f").unlink(),
        (root / "a2/b/new").write_text("n"),
    ),
    "renamed twice": lambda root: (
        move(root / "d", root / "x"), move(root / "x", root / "e/y"),
    ),
    "renamed, and what is in it too": lambda root: (
        (root / "d/f").chmod(0o600), (root / "d/sub/f").chmod(0o600),
        move(root / "d", root / "d2"), move(root / "d2/sub", root / "d2/sub2"),
        move(root / "d2/f", root / "d2/f2"),
    ),
    "renamed over": lambda root: (
        shutil.rmtree(root / "e"), move(root / "d", root / "e"), (root / "d").mkdir(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", ["", ",redirect_dir=on", ",redirect_dir=on,metacopy=on"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_commit_shows_what_the_overlay_showed(store: Store, name: str, options: str) -> None:
    committed(store, base(store), CHANGES[name], options)


@given(names=st.lists(st.sampled_from(sorted(CHANGES)), min_size=2, max_size=5))
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_several_changes_in_a_row(store: Store, names: list[str]) -> None:
    def change(root: Path) -> None:
        for name in names:
            try:
                CHANGES[name](root)
            except OSError:
                pass  # an earlier one took away what it wants
            except subprocess.CalledProcessError:
                pass

    committed(store, base(store), change, ",redirect_dir=on,metacopy=on")


def test_the_same_changes_give_the_same_layer(store: Store) -> None:
    """On whatever file system they lie, and in whatever order they were made."""
    layers = []
    for order in (1, -1):
        with store.lease("test") as lease:
            directory = lease.scratch()
            for name in ["b", "a", "c"][::order]:
                (directory / name).write_text(name)
                os.utime(directory / name, ns=(0, 5_000_000_001))
            layer = lease.commit_upper(directory, newest_ns=4_000_000_000)
            assert layer is not None
            layers.append(layer.diff_id)
    assert layers[0] == layers[1]


def test_only_the_upper_is_read(store: Store) -> None:
    """A commit does not even open what lies below: it works when that is gone."""
    layers = base(store)
    upper = store.root / "upper"
    upper.mkdir()
    with overlay(store, layers, upper) as merged:
        (merged / "d/f").write_text("changed")
    below = store.chain_directories(layers)[0]
    below.rename(below.with_suffix(".away"))
    below.mkdir()
    with store.lease("test") as lease:
        layer = lease.commit_upper(upper, layers)
    assert layer is not None and layer.entries == 2
    below.rmdir()
    below.with_suffix(".away").rename(below)


@pytest.mark.parametrize("dialect", ["dotted", "xattr", "userxattr", "fuse-overlayfs"])
def test_whiteouts_of_every_dialect(store: Store, dialect: str) -> None:
    layers = base(store)
    upper = store.root / "upper"
    (upper / "d").mkdir(parents=True)
    match dialect:
        case "dotted":
            (upper / ".wh.g").touch()
            (upper / "d/.wh..wh..opq").touch()
        case "fuse-overlayfs":
            (upper / ".wh.g").touch()
            os.setxattr(upper / "d", "user.fuseoverlayfs.opaque", b"y")
        case "xattr" | "userxattr":
            prefix = "trusted" if dialect == "xattr" else "user"
            (upper / "g").touch()
            os.setxattr(upper / "g", f"{prefix}.overlay.whiteout", b"y")
            os.setxattr(upper, f"{prefix}.overlay.opaque", b"x")
            os.setxattr(upper / "d", f"{prefix}.overlay.opaque", b"y")
    with store.lease("test") as lease:
        layer = lease.commit_upper(upper, layers)
        assert layer is not None
        with overlay(store, [*layers, layer.diff_id], None) as merged:
            assert not (merged / "g").exists()
            assert os.listdir(merged / "d") == []
            assert (merged / "f").exists()
            assert os.listxattr(merged / "d") == []
