"""Mode, owner, times and inode numbers; what POSIX lets whom do."""

import errno
import fcntl
import os
import stat
import struct
import subprocess
import termios
import time

import pytest
from harness.layers import MTIME_NS, Dir, File, HardLink, Special, Symlink
from harness.mounts import LANES, Mounted, Workshop
from harness.snapshot import assert_equal
from harness.users import NOBODY, as_user, in_child

ALICE, BOB, STAFF = 4001, 4002, 4500
FS_IOC_SETFLAGS, FS_IMMUTABLE_FL = 0x40086602, 0x10


def mode_of(path: os.PathLike[str]) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


# --- setattr --------------------------------------------------------------------------------------


def test_utimens_now_omit_and_nanoseconds(workshop: Workshop) -> None:
    tree = workshop({"f": File(data="x"), "d": Dir(), "s": Symlink("nowhere")})
    for name in ("f", "d", "s"):
        path = tree / name
        os.utime(path, ns=(123_456_789_987_654_321, 987_654_321_123_456_789), follow_symlinks=False)
        info = os.lstat(path)
        assert info.st_atime_ns == 123_456_789_987_654_321
        assert info.st_mtime_ns == 987_654_321_123_456_789
        before = time.time_ns()
        os.utime(path, follow_symlinks=False)  # both UTIME_NOW
        info = os.lstat(path)
        assert abs(info.st_mtime_ns - before) < 5_000_000_000
    # one of them UTIME_OMIT, as touch -a and touch -m do
    os.utime(tree / "f", ns=(1_000_000_001, 2_000_000_002))
    subprocess.run(["touch", "-a", "-d", "@5.5", tree / "f"], check=True)
    assert _times(tree / "f") == (5_500_000_000, 2_000_000_002)
    subprocess.run(["touch", "-m", "-d", "@6.25", tree / "f"], check=True)
    assert _times(tree / "f") == (5_500_000_000, 6_250_000_000)
    os.utime(tree / "f", ns=(-1_500_000_000, -1))
    assert _times(tree / "f") == (-1_500_000_000, -1)
    tree.remount()
    assert _times(tree / "f") == (-1_500_000_000, -1)


@pytest.mark.through(*LANES)  # pyfuse3 asks a clock of its own before it tells us
def test_what_is_made_after_a_touch_is_not_older(workshop: Workshop) -> None:
    tree = workshop({"lower": "x"})
    for n in range(20):
        (tree / f"f{n}").write_text("x")
    steps = [
        lambda n: os.utime(tree / f"f{n}"),
        lambda n: os.mkdir(tree / f"d{n}"),
        lambda n: subprocess.run(["touch", "-m", tree / f"d{n}"], check=True),
        lambda n: os.symlink("nowhere", tree / f"s{n}"),
    ]
    for n in range(20):
        for step in steps:
            step(n)
    for n in range(20):
        touched, made = _times(tree / f"f{n}")[1], _times(tree / f"d{n}")[1]
        assert touched <= made <= _times(tree / f"s{n}")[1]


def _times(path: os.PathLike[str]) -> tuple[int, int]:
    info = os.lstat(path)
    return info.st_atime_ns, info.st_mtime_ns


def test_changes_move_the_times_that_posix_says(workshop: Workshop) -> None:
    tree = workshop({"d/f": "x", "d/g": "y"})
    steps = {
        "chmod": (lambda: os.chmod(tree / "d/f", 0o600), "d/f", "c"),
        "write": (lambda: (tree / "d/f").write_text("z"), "d/f", "mc"),
        "truncate": (lambda: os.truncate(tree / "d/f", 0), "d/f", "mc"),
        "link": (lambda: os.link(tree / "d/f", tree / "l"), "d/f", "c"),
        "create": (lambda: (tree / "d/new").write_text(""), "d", "mc"),
        "unlink": (lambda: os.unlink(tree / "d/g"), "d", "mc"),
        "mkdir": (lambda: os.mkdir(tree / "d/sub"), "d", "mc"),
        "rmdir": (lambda: os.rmdir(tree / "d/sub"), "d", "mc"),
        "rename": (lambda: os.rename(tree / "d/new", tree / "d/newer"), "d", "mc"),
        "setxattr": (lambda: os.setxattr(tree / "d/f", "user.a", b""), "d/f", "c"),
    }
    for what, (step, path, moved) in steps.items():
        before = os.stat(tree / path)
        time.sleep(0.02)
        step()
        after = os.stat(tree / path)
        assert (after.st_mtime_ns > before.st_mtime_ns) == ("m" in moved), what
        assert (after.st_ctime_ns > before.st_ctime_ns) == ("c" in moved), what


def test_truncate_by_path_and_by_descriptor(workshop: Workshop) -> None:
    tree = workshop({"f": "0123456789", "g": "0123456789"})
    os.truncate(tree / "f", 4)
    with open(tree / "g", "r+") as file:
        file.truncate(6)
        assert os.fstat(file.fileno()).st_size == 6
        file.truncate(12)
        assert file.read() == "012345" + "\0" * 6
    assert (tree / "f").read_text() == "0123"
    with pytest.raises(IsADirectoryError):
        os.truncate(tree.root, 0)


def test_chown_of_one_of_both(workshop: Workshop) -> None:
    tree = workshop({"f": File(data="x", uid=1, gid=2), "s": Symlink("f", uid=3, gid=4)})
    os.chown(tree / "f", -1, 9)
    os.lchown(tree / "s", 8, -1)
    assert (os.stat(tree / "f").st_uid, os.stat(tree / "f").st_gid) == (1, 9)
    assert (os.lstat(tree / "s").st_uid, os.lstat(tree / "s").st_gid) == (8, 4)


# --- privilege that a change takes away -----------------------------------------------------------


def suid_stack() -> dict[str, File]:
    return {
        "prog": File(data="x", mode=0o6777, uid=ALICE, gid=STAFF),
        "nox": File(data="x", mode=0o2666, uid=ALICE, gid=STAFF),
        "cap": File(
            data="x",
            mode=0o777,
            xattrs={
                "security.capability": bytes.fromhex("01000002002000000000000000000000") + bytes(4)
            },
        ),
    }


@pytest.mark.doors
@pytest.mark.parametrize("how", ["write", "truncate", "O_TRUNC", "ftruncate", "append"])
def test_a_foreign_write_takes_setuid_and_capabilities_away(workshop: Workshop, how: str) -> None:
    stack = suid_stack()
    trees = [workshop(stack)]
    if workshop.kind != "plain":
        trees.append(workshop(stack, kind="plain"))

    def change(path: str) -> None:
        if how == "truncate":
            os.truncate(path, 0)
            return
        flags = {"O_TRUNC": os.O_TRUNC, "append": os.O_APPEND}.get(how, 0)
        descriptor = os.open(path, os.O_WRONLY | flags)
        if how == "ftruncate":
            os.ftruncate(descriptor, 0)
        elif how != "O_TRUNC":
            os.write(descriptor, b"evil")
        os.close(descriptor)

    for tree in trees:
        for name in stack:
            as_user(BOB, change, str(tree / name))
    results = [[(mode_of(tree / n), os.listxattr(tree / n)) for n in stack] for tree in trees]
    assert results[0] == results[-1]
    assert results[0][0][0] == 0o777
    assert results[0][2][1] == []


def test_a_write_through_a_descriptor_that_was_open_before_chmod(workshop: Workshop) -> None:
    tree = workshop({"f": File(data="x", mode=0o666)})

    def attack(path: str) -> None:
        descriptor = os.open(path, os.O_WRONLY)
        os.write(descriptor, b"1")
        in_child(os.chmod, path, 0o6777, before=lambda: os.setresuid(0, 0, 0))
        os.write(descriptor, b"2")
        os.close(descriptor)

    def become_bob_but_able_to_return() -> None:
        os.setresuid(BOB, BOB, 0)

    in_child(attack, str(tree / "f"), before=become_bob_but_able_to_return)
    assert mode_of(tree / "f") == 0o777


def test_chown_takes_setuid_away(workshop: Workshop) -> None:
    stack = suid_stack()
    tree, plain = workshop(stack), workshop(stack, kind="plain")
    for root in (tree.root, plain.root):
        os.chown(root / "prog", BOB, -1)
        os.chown(root / "nox", -1, BOB)
        os.chown(root / "cap", BOB, BOB)
    for name in stack:
        assert mode_of(tree / name) == mode_of(plain / name), name
        assert os.listxattr(tree / name) == os.listxattr(plain / name), name


def test_setgid_is_refused_to_who_is_not_in_the_group(workshop: Workshop) -> None:
    tree = workshop({"f": File(data="x", mode=0o755, uid=ALICE, gid=STAFF)})
    as_user(ALICE, os.chmod, str(tree / "f"), 0o2755)
    assert mode_of(tree / "f") == 0o755
    as_user(ALICE, os.chmod, str(tree / "f"), 0o2755, groups=[STAFF])
    assert mode_of(tree / "f") == 0o2755


def test_root_keeps_setuid_when_it_writes(workshop: Workshop) -> None:
    tree = workshop({"prog": File(data="x", mode=0o4755, uid=ALICE)})
    (tree / "prog").write_text("root may")
    plain_rule = 0o4755
    assert mode_of(tree / "prog") == plain_rule


# --- who may --------------------------------------------------------------------------------------


def test_permissions_are_enforced(workshop: Workshop) -> None:
    tree = workshop(
        {
            "private": File(data="x", mode=0o600, uid=ALICE),
            "closed": Dir(mode=0o700, uid=ALICE),
            "closed/inside": "x",
            "ours": File(data="x", mode=0o060, uid=BOB, gid=STAFF),
            "open": Dir(mode=0o777),
        }
    )
    path = {name: str(tree / name) for name in ("private", "closed/inside", "ours", "open")}
    for call, *args in (
        (os.open, path["private"], os.O_RDONLY),
        (os.open, path["private"], os.O_WRONLY),
        (os.chmod, path["private"], 0o777),
        (os.chown, path["private"], BOB, -1),
        (os.stat, path["closed/inside"]),
        (os.utime, path["private"]),
        (os.unlink, path["private"]),
        (os.setxattr, path["private"], "user.x", b"y"),
        (os.listdir, str(tree / "closed")),
        (os.mkdir, str(tree / "closed/new")),
    ):
        with pytest.raises(PermissionError):
            as_user(BOB, call, *args)
    with pytest.raises(PermissionError):
        as_user(BOB, os.open, path["ours"], os.O_RDONLY)  # the owner's bits count for the owner
    as_user(ALICE, _read, path["ours"], groups=[STAFF])
    as_user(ALICE, os.chmod, path["private"], 0o640)
    as_user(ALICE, os.unlink, str(tree / "closed/inside"))
    assert as_user(BOB, os.access, path["private"], os.R_OK) is False
    assert as_user(ALICE, os.access, path["private"], os.R_OK) is True


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def test_sticky_directories(workshop: Workshop) -> None:
    tree = workshop({"tmp": Dir(mode=0o1777), "tmp/alices": File(data="x", mode=0o666, uid=ALICE)})
    for call, *args in (
        (os.unlink, str(tree / "tmp/alices")),
        (os.rename, str(tree / "tmp/alices"), str(tree / "tmp/mine")),
    ):
        with pytest.raises(PermissionError):
            as_user(BOB, call, *args)
    as_user(ALICE, os.unlink, str(tree / "tmp/alices"))


def test_new_files_belong_to_who_made_them(workshop: Workshop) -> None:
    tree = workshop({"d": Dir(mode=0o777), "d/x": ""})

    def make(directory: str) -> None:
        os.umask(0o027)
        os.close(os.open(f"{directory}/file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(f"{directory}/dir", 0o777)
        os.mkfifo(f"{directory}/fifo", 0o666)
        os.symlink("t", f"{directory}/link")

    as_user(ALICE, make, str(tree / "d"))
    wanted = {"file": 0o640, "dir": 0o750, "fifo": 0o640, "link": 0o777}
    for name, mode in wanted.items():
        info = os.lstat(tree / "d" / name)
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (ALICE, ALICE, mode)


@pytest.mark.doors
def test_setgid_directories_give_their_group(workshop: Workshop) -> None:
    tree = workshop({"d": Dir(mode=0o2777, uid=BOB, gid=STAFF), "d/x": ""})

    def make(directory: str) -> None:
        os.close(os.open(f"{directory}/file", os.O_CREAT | os.O_WRONLY, 0o2775))
        os.mkdir(f"{directory}/dir", 0o755)
        os.mkfifo(f"{directory}/fifo")
        os.symlink("t", f"{directory}/link")

    as_user(ALICE, make, str(tree / "d"))
    assert {os.lstat(tree / "d" / n).st_gid for n in ("file", "dir", "fifo", "link")} == {STAFF}
    assert mode_of(tree / "d/dir") == 0o2755
    assert mode_of(tree / "d/file") == 0o755, "set-gid is not for who is not in the group"


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
def test_umask(workshop: Workshop, umask: int) -> None:
    tree = workshop({"d/x": ""})
    os.umask(umask)
    (tree / "d/file").touch(0o666)
    os.mkdir(tree / "d/dir")
    os.mknod(tree / "d/node", stat.S_IFREG | 0o666)
    os.umask(0o022)
    assert mode_of(tree / "d/file") == 0o666 & ~umask
    assert mode_of(tree / "d/dir") == 0o777 & ~umask
    assert mode_of(tree / "d/node") == 0o666 & ~umask


def test_device_nodes_are_made_and_kept(workshop: Workshop) -> None:
    tree = workshop({"d/null": Special(kind=stat.S_IFCHR, device=os.makedev(1, 3))})
    os.mknod(tree / "d/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    os.mknod(tree / "d/disk", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    tree.remount()
    assert os.stat(tree / "d/null").st_rdev == os.makedev(1, 3)
    assert os.stat(tree / "d/zero").st_rdev == os.makedev(1, 5)
    assert os.stat(tree / "d/disk").st_rdev == os.makedev(259, 70_000)


@pytest.mark.on("overlay", "unionfuse")
def test_a_whiteout_device_cannot_be_made(workshop: Workshop) -> None:
    # it would be gone at once: kernel overlayfs says EPERM
    tree = workshop({"d/x": ""})
    with pytest.raises(PermissionError):
        os.mknod(tree / "d/w", stat.S_IFCHR | 0o600, os.makedev(0, 0))
    assert os.listdir(tree / "d") == ["x"]


# --- inode numbers --------------------------------------------------------------------------------

NUMBERED = (
    {"a": "1", "d/top": "", "d/both": ""},
    {"b": "2", "d/base": "", "d/both": "", "l1": "l", "l2": HardLink("l1"), "s": Symlink("a"),
     "lower/x": ""},
)  # fmt: skip


def numbers(tree: Mounted) -> dict[bytes, int]:
    return {path: record.ino or 0 for path, record in tree.snapshot(inodes=True).items()}


def test_inode_numbers_are_unique(workshop: Workshop) -> None:
    tree = workshop(*NUMBERED)
    for number in range(50):
        (tree / f"d/new{number}").write_text("")
    found = numbers(tree)
    assert found.pop(b"l1") == found[b"l2"]
    assert len(set(found.values())) == len(found)


@pytest.mark.doors
def test_inode_numbers_survive_copy_up_rename_and_remount(workshop: Workshop) -> None:
    tree = workshop(*NUMBERED)
    before = numbers(tree)
    for name in ("a", "b", "d/base", "l1", "lower/x"):
        os.chmod(tree / name, 0o600)
        assert os.stat(tree / name).st_ino == before[name.encode()], name
    os.lchown(tree / "s", 1, 1)
    os.chmod(tree / "d", 0o700)
    os.chmod(tree / "lower", 0o700)
    assert numbers(tree) == before
    tree.remount()
    assert numbers(tree) == before
    os.rename(tree / "b", tree / "d/b")
    os.rename(tree / "lower", tree / "d/lower")
    expected = dict(before)
    for old in (b"b", b"lower", b"lower/x"):
        expected[b"d/" + old] = expected.pop(old)
    assert numbers(tree) == expected
    tree.remount()
    assert numbers(tree) == expected


def test_an_inode_number_is_not_given_again_while_it_is_in_use(workshop: Workshop) -> None:
    tree = workshop(*NUMBERED)
    with open(tree / "b") as file:
        os.unlink(tree / "b")
        for number in range(30):
            (tree / f"n{number}").write_text("")
        used = {os.stat(tree / f"n{number}").st_ino for number in range(30)}
        assert os.fstat(file.fileno()).st_ino not in used


def test_the_live_tree_equals_the_tree_after_a_remount(workshop: Workshop) -> None:
    tree = workshop(*NUMBERED)
    os.rename(tree / "d", tree / "e")
    os.unlink(tree / "e/base")
    (tree / "e/top").write_text("more than before")
    os.link(tree / "l1", tree / "e/l3")
    os.mkdir(tree / "d")
    os.truncate(tree / "b", 0)
    os.setxattr(tree / "e", "user.x", b"y")
    live = tree.snapshot(times=["mtime_ns"], inodes=True)
    tree.remount()
    assert_equal(tree.snapshot(times=["mtime_ns"], inodes=True), live)


def test_times_of_a_lower_file_are_shown_to_the_nanosecond(workshop: Workshop) -> None:
    tree = workshop({"f": "x", "d": Dir()})
    assert os.stat(tree / "f").st_mtime_ns == MTIME_NS
    assert os.stat(tree / "d").st_mtime_ns == MTIME_NS


@pytest.mark.on("overlay", "unionfuse")
def test_a_readonly_union_refuses_every_change(workshop: Workshop) -> None:
    tree = workshop({"f": "top", "d/x": ""}, {"f": "base", "d/y": "", "s": Symlink("f")},
                    writable=False)  # fmt: skip
    before = tree.snapshot()
    for change in (
        lambda: os.open(tree / "f", os.O_WRONLY),
        lambda: os.open(tree / "f", os.O_RDWR | os.O_TRUNC),
        lambda: os.open(tree / "new", os.O_CREAT | os.O_WRONLY),
        lambda: os.chmod(tree / "f", 0),
        lambda: os.chown(tree / "f", 1, 1),
        lambda: os.truncate(tree / "f", 0),
        lambda: os.utime(tree / "f"),
        lambda: os.setxattr(tree / "f", "user.x", b""),
        lambda: os.unlink(tree / "f"),
        lambda: os.mkdir(tree / "new"),
        lambda: os.rmdir(tree / "d"),
        lambda: os.rename(tree / "f", tree / "g"),
        lambda: os.link(tree / "f", tree / "g"),
        lambda: os.symlink("x", tree / "g"),
        lambda: os.mknod(tree / "g"),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    assert_equal(tree.snapshot(), before)
    assert not as_user(NOBODY, os.access, str(tree / "f"), os.W_OK)
    assert os.statvfs(tree.root).f_flag & os.ST_RDONLY


# --- flags of the inode (chattr) ------------------------------------------------------------------


@pytest.mark.through(*LANES)  # pyfuse3 has no handler for ioctl
@pytest.mark.on("plain", "overlay", "unionfuse")
def test_immutable_and_append_only(workshop: Workshop) -> None:
    tree = workshop({"f": "data", "d/g": ""})
    written = tree.root if tree.kind == "plain" else tree.upper
    try:
        chattr("+i", tree / "f", tree / "d")
        assert "i" in lsattr(tree / "f") and "i" in lsattr(tree / "d")
        for refused in (
            lambda: os.chmod(tree / "f", 0o600),
            lambda: os.setxattr(tree / "f", "user.x", b""),
            lambda: os.truncate(tree / "f", 0),
            lambda: os.unlink(tree / "f"),
            lambda: os.rename(tree / "f", tree / "moved"),
            lambda: os.unlink(tree / "d/g"),
            lambda: os.mkdir(tree / "d/new"),
        ):
            with pytest.raises(PermissionError):
                refused()
        assert (tree / "f").read_text() == "data"
        chattr("-i", tree / "f", tree / "d")
        chattr("+a", tree / "f")
        with open(tree / "f", "a") as file:
            file.write("+")
        with pytest.raises(PermissionError):
            open(tree / "f", "r+").close()
        chattr("-a", tree / "f")
        os.unlink(tree / "d/g")
        (tree / "f").write_text("new")
    finally:  # nothing could remove these otherwise
        subprocess.run(["chattr", "-R", "-ia", written], capture_output=True)


@pytest.mark.through(*LANES)  # as above
@pytest.mark.on("plain", "overlay", "unionfuse")
def test_an_ordinary_user_cannot_make_a_file_immutable(workshop: Workshop) -> None:
    tree = workshop({"f": File(data="x", uid=ALICE, mode=0o644)})

    def make_immutable() -> None:
        with open(tree / "f") as file:
            fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("i", FS_IMMUTABLE_FL))

    with pytest.raises(PermissionError):
        as_user(ALICE, make_immutable)


def test_a_file_is_no_terminal(workshop: Workshop) -> None:
    tree = workshop({"f": "x"})
    with open(tree / "f") as file, pytest.raises(OSError) as caught:
        fcntl.ioctl(file, termios.TCGETS, bytes(60))
    assert caught.value.errno == errno.ENOTTY


def chattr(change: str, *paths: os.PathLike[str]) -> None:
    subprocess.run(["chattr", change, *paths], check=True)


def lsattr(path: os.PathLike[str]) -> str:
    listed = subprocess.run(["lsattr", "-d", path], check=True, capture_output=True, text=True)
    return listed.stdout.split()[0]
