"""A hostile program inside the mount: it reaches nothing outside upper and the layers.

The program is root in the mount as often as not: it may do what it likes to the merged tree, while
the daemon copies, renames and opens. Whatever path it makes up, the daemon follows none of its
links, and a file beside the layers stays as it was.
"""

import contextlib
import os
import shutil
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.layers import File, Layer, Special, Symlink
from harness.mounts import Mounted, Workshop
from harness.snapshot import snapshot
from harness.users import NOBODY, as_user

pytestmark = [pytest.mark.on("unionfuse"), pytest.mark.timeout(120)]

SECRET = "secret\n"
ROUNDS = 150


@pytest.fixture
def outside(workshop: Workshop) -> Iterator[Path]:
    """A directory beside the layers that must stay as it is."""
    directory = workshop.directory / "outside"
    directory.mkdir()
    (directory / "f").write_text(SECRET)
    (directory / "victim").write_text(SECRET)
    before = snapshot(directory, times=("mtime_ns", "ctime_ns"), inodes=True)
    yield directory
    assert snapshot(directory, times=("mtime_ns", "ctime_ns"), inodes=True) == before


def together(*actions: Callable[[int], None]) -> None:
    """Do each of the actions so many times, all at once; what they raise as OSError is theirs."""

    def run(action: Callable[[int], None]) -> None:
        for number in range(ROUNDS):
            with contextlib.suppress(OSError):
                action(number)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def assert_no_secret(tree: Mounted) -> None:
    """Nothing from outside was copied into upper."""
    found = [path for path in tree.upper.rglob("*") if path.is_file() and not path.is_symlink()]
    assert all(path.read_text() != SECRET for path in found)


def lower(outside: str = "") -> Layer:
    return {
        **{f"d/f{number}": f"lower {number}" for number in range(ROUNDS)},
        "d/sub/victim": "lower",
        "link": Symlink(outside or "/"),
    }


def test_links_swapped_while_files_are_copied_up(workshop: Workshop, outside: Path) -> None:
    """The directory becomes a link to outside and back while files in it are copied up."""
    tree = workshop(lower())
    os.symlink(outside, tree / "evil")

    def swap(number: int) -> None:
        os.rename(tree / "d", tree / "aside")
        os.symlink(outside, tree / "d")
        os.unlink(tree / "d")
        os.rename(tree / "aside", tree / "d")

    here = os.open(tree / "d", os.O_PATH)

    def copy_up(number: int) -> None:
        # By the directory itself, so that the program's own path does not lead outside.
        os.chmod(f"f{number}", 0o600, dir_fd=here)

    def replace(number: int) -> None:
        os.symlink(outside / "victim", f"new{number}", dir_fd=here)
        os.rename(f"new{number}", f"f{number}", src_dir_fd=here, dst_dir_fd=here)

    together(swap, copy_up, replace)
    os.close(here)
    assert_no_secret(tree)


def test_a_directory_swapped_during_renames(workshop: Workshop, outside: Path) -> None:
    tree = workshop(lower())
    (tree / "a").mkdir()
    (tree / "b").mkdir()
    os.symlink(outside, tree / "evil")

    def swap(number: int) -> None:
        os.rename(tree / "a", tree / "c")
        os.rename(tree / "b", tree / "a")
        os.rename(tree / "c", tree / "b")

    fds = [os.open(tree / name, os.O_PATH) for name in ("a", "b", "d")]

    def move(number: int) -> None:
        os.rename(f"f{number}", f"f{number}", src_dir_fd=fds[2], dst_dir_fd=fds[number % 2])
        os.rename(f"f{number}", "x", src_dir_fd=fds[number % 2], dst_dir_fd=fds[1 - number % 2])

    def empty(number: int) -> None:
        os.rmdir("a", dir_fd=fds[number % 2])
        os.symlink(outside, "x", dir_fd=fds[number % 2])

    together(swap, move, empty)
    for descriptor in fds:
        os.close(descriptor)
    assert_no_secret(tree)


def test_links_and_dots_lead_nowhere_else(workshop: Workshop, outside: Path) -> None:
    """`..` at the root, links in layers, /proc/self/fd: all are the kernel's, none the daemon's."""
    tree = workshop(lower(str(outside)))
    assert os.path.samefile(tree / "d/sub/../..", tree.root)
    assert os.readlink(tree / "link") == str(outside)
    before = os.lstat(tree / "link")
    os.chown(tree / "link", 7, 7, follow_symlinks=False)
    os.utime(tree / "link", ns=(1, 2), follow_symlinks=False)
    os.link(tree / "link", tree / "again", follow_symlinks=False)
    os.rename(tree / "link", tree / "moved")
    assert os.lstat(tree / "moved").st_ino == before.st_ino
    inside = os.open(tree / "d/f1", os.O_RDONLY)
    with open(f"/proc/self/fd/{inside}", "w") as again:
        again.write("through /proc")
    assert (tree / "d/f1").read_text() == "through /proc"
    os.unlink(tree / "d/f1")
    with pytest.raises(OSError, match="No such file"):
        # With a descriptor given Python says AT_SYMLINK_FOLLOW.
        os.link(f"/proc/self/fd/{inside}", tree / "back", src_dir_fd=inside, follow_symlinks=True)
    os.close(inside)


def test_names_that_the_union_uses_itself(workshop: Workshop, outside: Path) -> None:
    """Whiteouts, marks and redirects that a program writes are refused, or are nothing special."""
    tree = workshop(lower(), {"d/below": "below"})
    for name in ("trusted.overlay.redirect", "trusted.overlay.opaque", "trusted.overlay.origin"):
        with contextlib.suppress(OSError):
            os.setxattr(tree / "d", name, os.fsencode(f"/../../{outside}"))
    with contextlib.suppress(OSError):
        os.setxattr(tree / "d/f1", "trusted.overlay.metacopy", b"")
        os.setxattr(tree / "d/f1", "trusted.overlay.redirect", os.fsencode(f"/../..{outside}/f"))
    with contextlib.suppress(OSError):
        os.mknod(tree / "d/f2.whiteout", stat.S_IFCHR, 0)
    with contextlib.suppress(OSError):
        (tree / ".wh.d").write_text("")
    (tree / "d/sub/changed").write_text("x")
    tree.remount()
    assert (tree / "d/below").read_text() == "below"
    assert (tree / "d/f1").read_text() == "lower 1"
    contents = [p.read_text() for p in tree.root.rglob("*") if p.is_file()]
    assert SECRET not in contents


CAPABILITY = struct.pack("<5I", 0x02000001, 1, 0, 0, 0)  # VFS_CAP_REVISION_2, effective

# --- rights -----------------------------------------------------------------------------------

RIGHTS: Layer = {
    "mine": File(data=b"root's", mode=0o600),
    "setuid": File(data=b"#!", mode=0o6755),
    "shared/x": File(data=b"x", mode=0o666),
    "closed/f": File(data=b"closed", mode=0o644),
    "null": Special(kind=stat.S_IFCHR, device=os.makedev(1, 3), mode=0o666),
}


def _denied(action: Callable[[], object]) -> bool:
    try:
        action()
    except PermissionError:
        return True
    return False


def _try_everything(root: Path) -> list[str]:
    """What an ordinary user could do although the modes forbid it."""
    attempts: dict[str, Callable[[], object]] = {
        "read": lambda: (root / "mine").read_text(),
        "write": lambda: (root / "mine").write_text("x"),
        "chmod": lambda: (root / "setuid").chmod(0o777),
        "chown": lambda: os.chown(root / "shared/x", NOBODY, NOBODY),
        "enter": lambda: (root / "closed/f").read_text(),
        "list": lambda: os.listdir(root / "closed"),
        "create": lambda: (root / "new").write_text("x"),
        "unlink": lambda: (root / "shared/x").unlink(),
        "link": lambda: os.link(root / "setuid", root / "shared/s"),
        "rename": lambda: os.rename(root / "shared", root / "s"),
        "node": lambda: os.mknod(root / "shared/n", stat.S_IFBLK | 0o666, os.makedev(7, 0)),
        "trusted": lambda: os.setxattr(root / "shared/x", "trusted.x", b"1"),
        "capability": lambda: os.setxattr(root / "shared/x", "security.capability", CAPABILITY),
    }
    return [name for name, attempt in attempts.items() if not _denied(attempt)]


def test_rights_are_the_kernels_to_check(workshop: Workshop) -> None:
    tree = workshop(RIGHTS)
    (tree / "closed").chmod(0o700)
    for path in (tree.root.parents[0], tree.root.parents[1]):
        path.chmod(0o755)
    assert as_user(NOBODY, _try_everything, tree.root) == []
    (tree / "mine").chmod(0o600)  # and the same once it is in upper
    os.utime(tree / "setuid")
    (tree / "shared/x").write_text("x")
    assert as_user(NOBODY, _try_everything, tree.root) == []


def _write_to_setuid(root: Path) -> None:
    with open(root / "setuid", "r+") as file:
        file.write("evil")


def test_a_foreign_write_takes_set_uid_away(workshop: Workshop) -> None:
    tree = workshop({"setuid": File(data=b"#!....", mode=0o6777)})
    as_user(NOBODY, _write_to_setuid, tree.root)
    assert (tree / "setuid").stat().st_mode & 0o6000 == 0
    assert (tree.upper / "setuid").stat().st_mode & 0o6000 == 0


def test_nodev_and_nosuid_hold(workshop: Workshop) -> None:
    tree = workshop(RIGHTS, options={"nodev": None, "nosuid": None})
    with pytest.raises(PermissionError):
        (tree / "null").read_bytes()
    os.mknod(tree / "made", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with pytest.raises(PermissionError):
        (tree / "made").read_bytes()
    shutil.copy("/usr/bin/id", tree / "id")
    (tree / "id").chmod(0o4755)
    assert as_user(NOBODY, _who, tree / "id") == NOBODY


def _who(program: Path) -> int:
    said = subprocess.run([program, "-u"], capture_output=True, text=True, check=True)
    return int(said.stdout)


def test_device_nodes_are_not_opened_by_the_daemon(workshop: Workshop) -> None:
    """Copying up or listing a node never opens it: a tape would rewind, a FIFO would hang."""
    tree = workshop(
        {
            "fifo": Special(kind=stat.S_IFIFO),
            "null": Special(kind=stat.S_IFCHR, device=os.makedev(1, 3)),
        }
    )
    for name in ("fifo", "null"):
        os.chown(tree / name, 5, 5)
        os.link(tree / name, tree / f"{name}2")
        assert os.lstat(tree.upper / name).st_uid == 5
