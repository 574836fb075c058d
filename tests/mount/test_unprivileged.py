"""An ordinary user: through fusermount3, and as root of a user namespace."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.layers import Dir, File, HardLink, Symlink
from harness.mounts import Mounted, Stack, option_list, remove_tree, staging_files
from harness.snapshot import Tree, assert_equal, snapshot
from harness.users import as_user
from harness.watchdog import Watchdog

import unionfuse.daemon.command
import unionfuse.daemon.daemon  # now: a user that a test becomes could not read it any more
import unionfuse.daemon.serving
from unionfuse import mounting

USER = 65534  # nobody: fusermount3 wants one that has a name
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_PR_SET_DUMPABLE = 4

LAYERS = (
    {"d/top": "top", "d/gone": None},
    {
        "d/f": File(data=b"lower" * 3000, mode=0o640, xattrs={"user.x": b"1"}),
        "d/gone": "x",
        "d/sub/g": "g",
        "one": "linked",
        "d/two": HardLink("one"),
        "full/y": "y",
        "s": Symlink("d"),
        "sticky": Dir(mode=0o1777),
    },
)


@pytest.fixture
def stack(scratch: Path, watchdog: Watchdog, tmp_path: Path) -> Iterator[Stack]:
    """A stack that belongs to an ordinary user; /dev/fuse is open to all, as udev makes it."""
    made = Stack.make(scratch / tmp_path.name, LAYERS)
    for path in (made.base, *made.base.rglob("*")):
        os.chown(path, USER, USER, follow_symlinks=False)
    mode = os.stat("/dev/fuse").st_mode & 0o777
    os.chmod("/dev/fuse", 0o666)
    watchdog.arm(60)
    yield made
    watchdog.disarm()
    os.chmod("/dev/fuse", mode)
    remove_tree(made.base)


def _change(root: Path) -> None:
    os.chmod(root / "d/f", 0o600)
    (root / "d/two").write_text("changed")
    os.unlink(root / "d/top")
    os.unlink(root / "full/y")
    os.rmdir(root / "full")
    os.mkdir(root / "full", 0o700)
    (root / "full/new").write_text("new")
    os.rename(root / "d", root / "moved")
    os.link(root / "moved/sub/g", root / "g2")
    os.setxattr(root / "moved/sub", "user.dir", b"2")
    os.symlink("x", root / "new-link")
    os.rename(root / "s", root / "moved/s")


def _use(words: list[str]) -> tuple[Tree, Tree]:
    """Mount, change, look; unmount, mount, look again."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    root, seen = Path(words[-1]), []
    for number in range(2):
        assert unionfuse.daemon.command.main(words) == 0
        if number == 0:
            _change(root)
        seen.append(snapshot(root))
        mount = mounting.mount_at(os.fsencode(root))
        assert mount is not None
        daemon = mounting.daemon_of(mount)
        assert daemon is not None
        mounting.detach(os.fsencode(root))
        assert mounting.wait_for_end(daemon, 10)
    return seen[0], seen[1]


def _use_in_user_namespace(words: list[str]) -> tuple[Tree, Tree]:
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {USER} 1")
    Path("/proc/self/gid_map").write_text(f"0 {USER} 1")
    return _use(words)


@pytest.mark.parametrize("use", [_use, _use_in_user_namespace])
def test_changes_without_privilege(stack: Stack, use: object) -> None:
    live, remounted = as_user(
        USER,
        use,
        ["-o", option_list(stack.options()), str(stack.mountpoint)],
    )
    assert_equal(remounted, live, ("remounted", "live"))
    assert sorted(live) == sorted(
        [b".", b"full", b"full/new", b"g2", b"moved", b"moved/f", b"moved/s", b"moved/sub",
         b"moved/sub/g", b"moved/two", b"new-link", b"one", b"sticky"]
    )  # fmt: skip
    assert live[b"one"] == live[b"moved/two"]
    assert (live[b"one"].nlink, live[b"g2"].nlink) == (2, 2)
    assert live[b"moved/f"].mode == "0600"
    assert stack.work is not None
    assert staging_files(stack.work) == []
    # what was written without privilege is what kernel overlayfs reads with userxattr
    kernel = Mounted("overlay", stack, {"userxattr": None})
    kernel.mount()
    try:
        assert sorted(kernel.snapshot()) == sorted(live)
    finally:
        kernel.discard()
