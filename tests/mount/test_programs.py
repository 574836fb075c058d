"""Real programs at work in the mount, most of them on a real Debian tree."""

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from harness.debian import debian_root
from harness.layers import Dir, File, HardLink, Special, Symlink
from harness.mounts import Mounted, Stack, Workshop
from harness.snapshot import assert_equal, snapshot

pytestmark = [pytest.mark.on("unionfuse"), pytest.mark.timeout(240)]


def run(*words: str | Path, **how: object) -> str:
    """Run a program that must succeed; return what it printed."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False, **how)
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{words}: {said}{done.stderr.decode(errors='replace')}"
    return said


def debian(workshop: Workshop) -> Mounted:
    """Debian with an empty upper; then with what a container has: devices, a resolver."""
    stack = Stack.around(workshop.directory / "debian", [debian_root()])
    tree = workshop.mount(stack, watch="times")
    for name, minor in (("null", 3), ("zero", 5), ("random", 8), ("urandom", 9)):
        if not (tree / "dev" / name).exists():
            os.mknod(tree / "dev" / name, stat.S_IFCHR, os.makedev(1, minor))
            os.chmod(tree / "dev" / name, 0o666)
    (tree / "etc/resolv.conf").write_bytes(Path("/etc/resolv.conf").read_bytes())
    # the archive may be a snapshot, as on the machine itself: that is not "expired" here
    (tree / "etc/apt/apt.conf.d/99test").write_text(
        'Acquire::Check-Valid-Until "false";\nAcquire::Check-Date "false";\n'
    )
    return tree


VARIED = {
    "dir": Dir(mode=0o2750, uid=3, gid=4, xattrs={"user.dir": b"1"}),
    "dir/file": File(data=b"content", mode=0o640, uid=5, xattrs={"user.file": b"\x00\xff"}),
    "dir/suid": File(data=b"x", mode=0o4755),
    "dir/link": HardLink("dir/file"),
    "dir/sparse": File(parts={1 << 20: b"far out"}, size=4 << 20),
    "deep/er/and/deeper/still": "x",
    "symlink": Symlink("dir/file"),
    "dangling": Symlink("nowhere"),
    "fifo": Special(),
    "null": Special(kind=0o020000, device=os.makedev(1, 3)),
    "acl": File(data=b"acl"),
    "caf\udce9": "not utf-8",
    **{f"many/{number}": str(number) * number for number in range(200)},
}


def varied(workshop: Workshop) -> Mounted:
    tree = workshop(VARIED, {"dir/below": "below"})
    run("setfacl", "-m", "u:77:rw,g:88:r", tree / "acl")
    run("setfacl", "-d", "-m", "u:77:rwx", tree / "deep")
    os.unlink(tree / "many/7")
    os.rename(tree / "deep/er", tree / "deep/moved")
    return tree


@pytest.mark.doors
def test_tar_out_and_back(workshop: Workshop) -> None:
    tree = varied(workshop)
    options = ("--acls", "--xattrs", "--xattrs-include=*", "--sparse", "--numeric-owner")
    archive = workshop.directory / "archive.tar"
    wanted = tree.snapshot(times=["mtime_ns"])
    run("tar", *options, "--format=posix", "-cf", archive, "-C", tree.root, ".")
    outside = workshop.directory / "outside"
    outside.mkdir()
    run("tar", *options, "-xpf", archive, "-C", outside)
    assert_equal(snapshot(outside, times=["mtime_ns"]), wanted, ("extracted", "the mount"))
    (tree / "inside").mkdir()
    run("tar", *options, "-xpf", archive, "-C", tree / "inside")
    inside = snapshot(tree / "inside", times=["mtime_ns"])
    assert_equal(inside, wanted, ("extracted in the mount", "the mount"))
    run("tar", *options, "--compare", "-f", archive, "-C", tree / "inside")
    tree.remount()
    assert_equal(snapshot(tree / "inside", times=["mtime_ns"]), wanted, ("remounted", "before"))


def test_rsync_there_and_back(workshop: Workshop) -> None:
    tree = varied(workshop)
    copy = workshop.directory / "copy"
    options = ("-aHAX", "--numeric-ids", "--modify-window=-1")
    wanted = tree.snapshot(times=["mtime_ns"])
    run("rsync", *options, f"{tree.root}/", f"{copy}/")
    assert_equal(snapshot(copy, times=["mtime_ns"]), wanted, ("copy", "the mount"))
    run("rsync", *options, f"{copy}/", f"{tree.root}/back/")
    difference = run("rsync", *options, "-nci", "--delete", f"{copy}/", f"{tree.root}/back/")
    assert difference == ""
    (copy / "dir/file").write_text("changed outside")
    os.unlink(copy / "many/9")
    run("rsync", *options, "--delete", "--exclude=/back", "--inplace", f"{copy}/", f"{tree.root}/")
    assert (tree / "dir/link").read_text() == "changed outside"
    assert not (tree / "many/9").exists()


def _repository(where: Path) -> None:
    run("git", "init", "-q", where)
    for number in range(120):
        path = where / f"dir{number % 10}" / f"file{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"content {number}\n" * number)
    _git(where, "add", "-A")
    _git(where, "commit", "-qm", "first")


def _git(where: Path, *words: str) -> str:
    settings = ("-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "safe.directory=*")
    return run("git", *settings, "-C", where, *words)


def test_git(workshop: Workshop) -> None:
    base = workshop.directory / "git"
    stack = Stack.make(base, [{"x": ""}])
    _repository(stack.lowers[0] / "below")
    tree = workshop.mount(stack)
    below, clone = tree / "below", tree / "clone"
    assert _git(below, "status", "--porcelain") == ""
    run("git", "-c", "safe.directory=*", "clone", "-q", f"file://{below}", clone)
    assert _git(clone, "status", "--porcelain") == ""
    for where in (below, clone):
        (where / "dir1/file1").write_text("changed")
        os.unlink(where / "dir2/file2")
        os.rename(where / "dir3", where / "renamed")
        _git(where, "add", "-A")
        _git(where, "commit", "-qm", "second")
        _git(where, "checkout", "-q", "-b", "other", "HEAD~1")
        assert (where / "dir2/file2").read_text() == "content 2\n" * 2
        _git(where, "merge", "-q", "master")
        _git(where, "gc", "-q")
        assert "error" not in _git(where, "fsck", "--full")
        assert _git(where, "status", "--porcelain") == ""
    tree.remount()
    for where in (below, clone):
        assert _git(where, "status", "--porcelain") == ""
        _git(where, "fsck", "--full")


WRITER = """
import sqlite3, sys
base = sqlite3.connect(sys.argv[1], timeout=30)
for n in range(40):
    with base:
        base.execute("insert into t values (?, ?)", (sys.argv[2], n))
"""


def test_sqlite_in_wal_mode(workshop: Workshop) -> None:
    base = workshop.directory / "sqlite"
    stack = Stack.make(base, [{"x": ""}])
    with sqlite3.connect(stack.lowers[0] / "data.db") as made:
        made.execute("pragma journal_mode=wal")
        made.execute("create table t (who text, n integer)")
        made.execute("insert into t values ('below', 0)")
    made.close()
    tree = workshop.mount(stack)
    path = tree / "data.db"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, name]) for name in "abc"]
    reader = sqlite3.connect(path, timeout=30)
    assert reader.execute("pragma journal_mode").fetchone() == ("wal",)
    counts = [reader.execute("select count(*) from t").fetchone()[0] for _ in range(20)]
    assert counts == sorted(counts)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert reader.execute("select who, count(*) from t group by who order by who").fetchall() == [
        ("a", 40), ("b", 40), ("below", 1), ("c", 40),
    ]  # fmt: skip
    assert reader.execute("pragma integrity_check").fetchone() == ("ok",)
    reader.close()
    tree.remount()
    with sqlite3.connect(path) as again:
        assert again.execute("select count(*) from t").fetchone() == (121,)
        assert again.execute("pragma integrity_check").fetchone() == ("ok",)
    again.close()


@pytest.mark.parametrize(
    "engine", [("psync",), ("psync", "--direct=1"), ("mmap",), ("libaio", "--iodepth=8")]
)
def test_fio_verifies(workshop: Workshop, engine: tuple[str, ...]) -> None:
    tree = workshop({"data.0.0": File(data=b"x" * (4 << 20))})
    run(
        "fio", "--name=data", f"--directory={tree.root}", "--size=4m", "--rw=randrw", "--bs=4k-64k",
        "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0",
        "--randrepeat=1",
        f"--ioengine={engine[0]}", *engine[1:],
    )  # fmt: skip


def test_copying_finding_and_removing(workshop: Workshop) -> None:
    tree = debian(workshop)
    found = run("find", tree / "usr", "-xdev").count("\n")
    assert found == run("find", debian_root() / "usr", "-xdev").count("\n")
    run("cp", "-a", "--reflink=auto", tree / "etc", tree / "etc.copy")
    run("cp", "-a", "--reflink=auto", tree / "usr/bin", tree / "bin.copy")
    run("diff", "-r", "--no-dereference", tree / "etc", tree / "etc.copy")
    assert_equal(
        snapshot(tree / "bin.copy", times=["mtime_ns"]),
        snapshot(tree / "usr/bin", times=["mtime_ns"]),
    )
    run("chmod", "-R", "go-w", tree / "etc")
    run("chown", "-R", "7:8", tree / "usr/share/doc")
    run("rm", "-rf", tree / "usr/share/doc", tree / "bin.copy", tree / "var/lib")
    run("mv", tree / "usr/share", tree / "share")
    wanted = tree.snapshot(content=False)
    tree.remount()
    assert_equal(tree.snapshot(content=False), wanted, ("remounted", "before"))
    tree.remount("overlay")
    assert_equal(tree.snapshot(content=False), wanted, ("in overlayfs", "before"))


def _in_chroot(tree: Mounted, *words: str) -> str:
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "DEBIAN_FRONTEND": "noninteractive",
        "LC_ALL": "C",
    }
    return run("chroot", tree.root, *words, env=environment)


def test_apt_installs_and_removes_a_package(workshop: Workshop) -> None:
    tree = debian(workshop)
    _in_chroot(tree, "apt-get", "-q", "update")
    _in_chroot(tree, "apt-get", "-qy", "--no-install-recommends", "install", "tree", "less")
    assert "tree v" in _in_chroot(tree, "tree", "--version")
    assert "install ok installed" in _in_chroot(tree, "dpkg-query", "-s", "tree")
    assert _in_chroot(tree, "dpkg", "--audit") == ""
    assert _in_chroot(tree, "dpkg", "--verify", "tree", "less") == ""
    wanted = tree.snapshot(content=False)
    tree.remount()
    assert_equal(tree.snapshot(content=False), wanted, ("remounted", "before"))
    assert _in_chroot(tree, "dpkg", "--verify", "tree", "less") == ""
    _in_chroot(tree, "apt-get", "-qy", "purge", "tree")
    assert not (tree / "usr/bin/tree").exists()
    assert (tree.upper / "usr/bin/less").exists()


def test_pip_installs_into_a_virtual_environment(workshop: Workshop) -> None:
    tree = workshop({"home/x": ""})
    environment = tree / "home/venv"
    run(sys.executable, "-m", "venv", environment)
    run(environment / "bin/pip", "install", "-q", "--disable-pip-version-check", "packaging")
    program = "import packaging.version as v; print(v.__file__, v.Version('1.0') < v.Version('2'))"
    said = run(environment / "bin/python", "-c", program)
    assert said.split() == [
        str(next((environment / "lib").glob("*/site-packages/packaging/version.py"))),
        "True",
    ]
    run(environment / "bin/pip", "uninstall", "-qy", "packaging")
    assert not list((environment / "lib").glob("*/site-packages/packaging"))


@pytest.mark.long
def test_a_big_package_with_all_that_it_needs(workshop: Workshop) -> None:
    tree = debian(workshop)
    _in_chroot(tree, "apt-get", "-q", "update")
    _in_chroot(tree, "apt-get", "-qy", "install", "git", "python3", "build-essential")
    assert _in_chroot(tree, "dpkg", "--audit") == ""
    (tree / "root/hello.c").write_text('#include <stdio.h>\nint main(void) { puts("built"); }\n')
    _in_chroot(tree, "cc", "-o", "/root/hello", "/root/hello.c")
    assert _in_chroot(tree, "/root/hello") == "built\n"
    assert _in_chroot(tree, "python3", "-c", "print(6 * 7)") == "42\n"
    _in_chroot(tree, "apt-get", "-qy", "purge", "build-essential", "git")
    _in_chroot(tree, "apt-get", "-qy", "autoremove")
    wanted = tree.snapshot(content=False)
    tree.remount("overlay")
    assert_equal(tree.snapshot(content=False), wanted, ("in overlayfs", "before"))
