"""The command: how it mounts, detaches, ends, and what it says when it cannot."""

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import linux
from harness.mounts import is_mounted, remove_tree, staging_files, unionfuse_command
from harness.users import as_user, in_child
from harness.waiting import wait_until

import unionfuse.daemon.command
import unionfuse.daemon.daemon  # now: a user that a test becomes could not read it any more
import unionfuse.daemon.serving
from unionfuse import mounting, syscalls

_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_PR_SET_DUMPABLE = 4
_USER = 1000


class Place:
    """The directories of one mount, and the command line that mounts them."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.lower, self.upper, self.work, self.mnt = (
            base / name for name in ("lower", "upper", "work", "mnt")
        )
        for path in (self.lower, self.upper, self.work, self.mnt):
            path.mkdir()
        (self.lower / "file").write_text("lower")
        self.log = base / "log"

    def words(self, *options: str, **replaced: object) -> list[str]:
        """The arguments of a writable mount, with options added or replaced (None: left out)."""
        pairs = {"lowerdir": self.lower, "upperdir": self.upper, "workdir": self.work} | replaced
        line = [f"{name}={value}" for name, value in pairs.items() if value is not None]
        return ["-o", ",".join([*line, f"log={self.log}", *options]), str(self.mnt)]

    def mount(self, *options: str, **replaced: object) -> subprocess.CompletedProcess[str]:
        return run(*self.words(*options, **replaced))

    def daemon(self) -> int:
        """A pidfd of the daemon behind the mount."""
        mount = mounting.mount_at(os.fsencode(self.mnt))
        assert mount is not None
        pidfd = mounting.daemon_of(mount)
        assert pidfd is not None
        return pidfd


def run(*words: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        unionfuse_command(*words), capture_output=True, text=True, timeout=30, **how
    )


def ended(pidfd: int, seconds: float = 10) -> bool:
    gone = bool(select.select([pidfd], [], [], seconds)[0])
    os.close(pidfd)
    return gone


@pytest.fixture
def place(scratch: Path) -> Iterator[Place]:
    base = Path(tempfile.mkdtemp(prefix="program-", dir=scratch))
    base.chmod(0o755)
    yield Place(base)
    for point, _, _ in linux.mounts_below(base):
        linux.umount(point, linux.MNT_DETACH)
    remove_tree(base)  # a daemon may still be putting its things away in it


def test_it_returns_when_the_mount_answers_and_lets_go_of_everything(place: Place) -> None:
    reader, writer = os.pipe()
    # capture_output: returning at all means that nobody holds stdout and stderr open
    result = run(*place.words(), pass_fds=[writer], cwd=place.base)
    os.close(writer)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (place.mnt / "file").read_text() == "lower"
    assert select.select([reader], [], [], 5)[0] and os.read(reader, 1) == b""
    os.close(reader)


def test_quick_and_slow_requests_go_on_beside_each_other_and_need_no_pyfuse3(place: Place) -> None:
    for number in range(8):
        (place.lower / f"big{number}").write_bytes(bytes([number]) * 1_000_000)
    assert run(*place.words()).returncode == 0

    def slow(number: int) -> None:
        with open(place.mnt / f"big{number}", "r+b") as file:  # copies it up
            for _ in range(10):
                file.write(b"x")
                os.fsync(file.fileno())
        directory = os.open(place.mnt, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def quick(number: int) -> None:
        for turn in range(50):
            name = place.mnt / f"dir{number}-{turn}"
            name.mkdir()
            (name / "file").write_text("x")
            assert os.listdir(name) == ["file"]

    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(work, n) for n in range(8) for work in (slow, quick)]:
            done.result(timeout=60)
    assert len(os.listdir(place.mnt)) == 1 + 8 + 8 * 50
    mount = mounting.mount_at(os.fsencode(place.mnt))
    assert mount is not None
    server = mounting.server_of(mount)
    assert server is not None
    maps = Path(f"/proc/{server[1]}/maps").read_text()
    assert "_lane" in maps and "pyfuse3" not in maps


def test_the_daemon_is_told_from_a_keeper_that_started_in_the_same_tick(
    monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    assert place.mount().returncode == 0
    mount = mounting.mount_at(os.fsencode(place.mnt))
    assert mount is not None
    found = mounting.server_of(mount)
    assert found is not None and found[0] != found[1]
    read = mounting._stat_field
    monkeypatch.setattr(
        mounting, "_stat_field", lambda pid, n: 7 if n == mounting._START_TIME else read(pid, n)
    )
    assert mounting.server_of(mount) == found


def test_a_signal_that_comes_before_the_keeper_listens_is_not_lost(place: Place) -> None:
    """The keeper's interpreter takes a second to start here; the mount is there long before."""
    python = place.base / "python"
    python.write_text(
        f"#!{sys.executable} -IS\nimport os, sys, time\ntime.sleep(1)\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
    )  # not a shell: some clear the mask of signals
    python.chmod(0o755)
    script = (
        f"import sys; sys.executable = {str(python)!r}; from unionfuse.daemon.command import main; "
    )
    words = [sys.executable, "-c", script + "sys.exit(main())", "-f", *place.words(keeper="on")]
    process = subprocess.Popen(words)
    try:
        wait_until(lambda: is_mounted(place.mnt), 20, "the mount")
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "requests=" in place.log.read_text(), 20, "the line")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert not is_mounted(place.mnt)
    finally:
        process.kill()
        process.wait()


def _umount(place: Place) -> None:
    linux.umount(place.mnt)


def _fusermount(place: Place) -> None:
    subprocess.run(["fusermount3", "-u", place.mnt], check=True)


def _verb(place: Place) -> None:
    command = "import sys; from unionimage.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", command, "umount", place.mnt], check=True)
    assert staging_files(place.work) == []  # at once: the verb waits for the daemon


@pytest.mark.parametrize("end", [_umount, _fusermount, _verb])
@pytest.mark.parametrize("option", ["express=on", "express=off"])
def test_every_way_to_unmount_is_clean(place: Place, end: object, option: str) -> None:
    assert place.mount("volatile", option).returncode == 0
    (place.mnt / "new").write_text("new")
    (place.mnt / "file").unlink()
    daemon = place.daemon()
    assert callable(end)
    end(place)
    assert ended(daemon)
    assert staging_files(place.work) == []
    assert (place.upper / "new").read_text() == "new"
    assert not [path for path in place.work.rglob("*") if "volatile" in str(path)]
    assert "ERROR" not in place.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(place: Place, number: signal.Signals) -> None:
    alone = ["keeper=off"] if number == signal.SIGHUP else []  # to a keeper it says: replace it
    assert place.mount("volatile", *alone).returncode == 0
    (place.mnt / "new").write_text("new")
    daemon = place.daemon()
    signal.pidfd_send_signal(daemon, number)
    assert ended(daemon)
    assert not is_mounted(place.mnt)
    assert staging_files(place.work) == []


def test_a_signal_ends_a_mount_that_is_in_use(place: Place) -> None:
    assert place.mount().returncode == 0
    file = os.open(place.mnt / "file", os.O_RDONLY)
    daemon = place.daemon()
    signal.pidfd_send_signal(daemon, signal.SIGTERM)
    wait_until(lambda: not is_mounted(place.mnt), what="the unmount")
    assert os.read(file, 10) == b"lower"  # those who have files open get a moment
    assert ended(daemon)
    with contextlib.suppress(OSError):
        os.close(file)


def test_sigusr1_logs_a_line(place: Place) -> None:
    assert place.mount().returncode == 0
    daemon = place.daemon()
    with open(place.mnt / "file"):
        signal.pidfd_send_signal(daemon, signal.SIGUSR1)
        os.close(daemon)
        line = re.compile(r"nodes=\d+ open=\d+ requests=\d+\n")
        wait_until(lambda: line.search(place.log.read_text()), what="the line")


def test_a_warning_reaches_who_mounts_and_the_log(place: Place, no_uring: None) -> None:
    result = place.mount("uring=on")
    assert result.returncode == 0
    assert result.stderr.startswith("unionfuse: uring=on: the kernel does not offer it")
    assert result.stderr.count("\n") == 1 and "enable_uring" in place.log.read_text()


def test_stats_count_requests_by_name(place: Place) -> None:
    assert place.mount("stats").returncode == 0
    os.mkdir(place.mnt / "directory")
    daemon = place.daemon()
    linux.umount(place.mnt)
    assert ended(daemon)
    assert re.search(r"unmounted: .*\bMKDIR=1\b", place.log.read_text())


@pytest.mark.parametrize("option", ["express=on", "express=off"])
def test_debug_stays_in_front_and_prints_requests(place: Place, option: str) -> None:
    words = [word.replace(f",log={place.log}", "") for word in place.words(option)]
    process = subprocess.Popen(
        unionfuse_command("-d", *words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_until(lambda: is_mounted(place.mnt), 20, "the mount")
    os.mkdir(place.mnt / "a-name")
    linux.umount(place.mnt)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert re.search("mkdir", said, re.IGNORECASE) and "a-name" in said


def test_without_upper_it_is_read_only(place: Place) -> None:
    assert place.mount(upperdir=None, workdir=None).returncode == 0
    assert os.statvfs(place.mnt).f_flag & os.ST_RDONLY
    with pytest.raises(OSError, match="Read-only file system"):
        (place.mnt / "new").touch()


def test_generic_flags_reach_the_kernel(place: Place) -> None:
    assert place.mount("ro", "nodev", "nosuid", "noexec", "noatime", "fsname=me").returncode == 0
    flags = os.statvfs(place.mnt).f_flag
    for flag in (os.ST_RDONLY, os.ST_NODEV, os.ST_NOSUID, os.ST_NOEXEC, os.ST_NOATIME):
        assert flags & flag
    shown = subprocess.run(
        ["findmnt", "-no", "SOURCE,FSTYPE,OPTIONS", place.mnt], capture_output=True, text=True
    ).stdout
    assert shown.startswith("me ") and "fuse.unionfuse" in shown
    assert "default_permissions" in shown and "allow_other" in shown


def test_paths_relative_escaped_and_many(place: Place) -> None:
    odd = place.base / "a:b,c\\d"
    odd.mkdir()
    (odd / "odd").touch()
    layers = [place.base / f"l{number}" for number in range(500)]
    for layer in layers:
        layer.mkdir()
        (layer / layer.name).touch()
    names = ":".join(["a\\:b\\,c\\\\d", *(layer.name for layer in layers)])
    words = ["-o", f"lowerdir={names},,upperdir=upper,workdir=work,", "mnt"]
    assert run(*words, cwd=place.base).returncode == 0
    assert len(os.listdir(place.mnt)) == 501


def test_a_layer_may_contain_the_mount_point(place: Place) -> None:
    inside = place.lower / "inside"
    inside.mkdir()
    place.mnt = inside
    assert place.mount().returncode == 0
    assert os.listdir(inside / "inside") == []
    (inside / "inside" / "new").write_text("new")
    assert (place.upper / "inside" / "new").read_text() == "new"


def test_called_by_mount8(place: Place) -> None:
    program = place.base / "bin"
    program.mkdir()
    script = f'#!/bin/sh\nexec {sys.executable} -m unionfuse "$@"\n'
    (program / "unionfuse").write_text(script)
    (program / "unionfuse").chmod(0o755)
    line = place.words("x-systemd.automount", "noatime")[1]
    # mount(8) forgets PATH and looks in the usual places: the program is put there in a namespace.
    steps = f"""
        mount --bind {program} /usr/local/bin
        mount -t fuse.unionfuse source {place.mnt} -o '{line}'
        cat {place.mnt}/file
        umount {place.mnt}
    """
    words = ["unshare", "--mount", "sh", "-ec", steps]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "lower"


def test_a_lock_that_is_given_back_in_time_is_waited_for(place: Place) -> None:
    assert place.mount().returncode == 0
    second = place.base / "second"
    second.mkdir()
    process = subprocess.Popen(unionfuse_command(*place.words()[:-1], str(second)))
    time.sleep(0.5)
    linux.umount(place.mnt)
    assert process.wait(10) == 0
    assert (second / "file").read_text() == "lower"


# what is wrong, by the name of a method of _Wrong -> what the one line on stderr must name
WRONG = {
    "missing_layer": "missing",
    "layer_is_a_file": "lower/file",
    "missing_upper": "missing",
    "missing_work": "missing",
    "upper_is_a_file": "lower/file",
    "work_on_another_file_system": "/dev/shm",
    "work_inside_upper": "inside",
    "upper_inside_work": "upper",
    "work_is_upper": "the same directory",
    "upper_is_a_layer": "upper",
    "strangers_in_work": "stranger",
    "upper_in_use": "upper",
    "missing_mountpoint": "missing",
    "mountpoint_is_a_file": "lower/file",
    "mountpoint_is_busy": "mnt",
    "log_cannot_be_written": "missing/log",
}


class _Wrong:
    def __init__(self, place: Place) -> None:
        self.place = place
        self.missing = place.base / "missing"

    def missing_layer(self) -> list[str]:
        return self.place.words(lowerdir=self.missing)

    def layer_is_a_file(self) -> list[str]:
        return self.place.words(lowerdir=self.place.lower / "file")

    def missing_upper(self) -> list[str]:
        return self.place.words(upperdir=self.missing)

    def missing_work(self) -> list[str]:
        return self.place.words(workdir=self.missing)

    def upper_is_a_file(self) -> list[str]:
        return self.place.words(upperdir=self.place.lower / "file")

    def work_on_another_file_system(self) -> list[str]:
        return self.place.words(workdir="/dev/shm")

    def work_inside_upper(self) -> list[str]:
        (self.place.upper / "inside").mkdir()
        return self.place.words(workdir=self.place.upper / "inside")

    def upper_inside_work(self) -> list[str]:
        return self.place.words(workdir=self.place.base)

    def work_is_upper(self) -> list[str]:
        return self.place.words(workdir=self.place.upper)

    def upper_is_a_layer(self) -> list[str]:
        return self.place.words(lowerdir=f"{self.place.lower}:{self.place.upper}")

    def strangers_in_work(self) -> list[str]:
        (self.place.work / "stranger").touch()
        return self.place.words()

    def upper_in_use(self) -> list[str]:
        other = self.place.base / "other"
        other.mkdir()
        work = self.place.base / "other-work"
        work.mkdir()
        words = self.place.words(workdir=work)
        assert run(*words[:-1], str(other)).returncode == 0
        return self.place.words()

    def missing_mountpoint(self) -> list[str]:
        return [*self.place.words()[:-1], str(self.missing)]

    def mountpoint_is_a_file(self) -> list[str]:
        return [*self.place.words()[:-1], str(self.place.lower / "file")]

    def mountpoint_is_busy(self) -> list[str]:
        assert self.place.mount(upperdir=None, workdir=None).returncode == 0
        return self.place.words()

    def log_cannot_be_written(self) -> list[str]:
        line = self.place.words()[1].replace(str(self.place.log), str(self.missing / "log"))
        return ["-o", line, str(self.place.mnt)]


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_refused_in_one_line(place: Place, wrong: str) -> None:
    words = getattr(_Wrong(place), wrong)()
    mounts = linux.mounts_below(place.base)
    before = sorted(map(str, place.base.rglob("*")))
    result = run(*words)
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"unionfuse: .*\n", result.stderr), result.stderr
    assert WRONG[wrong] in result.stderr and ";" in result.stderr
    assert linux.mounts_below(place.base) == mounts
    assert [p for p in sorted(map(str, place.base.rglob("*"))) if p != str(place.log)] == [
        p for p in before if p != str(place.log)
    ]


@pytest.mark.parametrize("missing", ["fuse", "null"])
def test_a_missing_device_is_named(place: Place, missing: str) -> None:
    prepare = "mount -t tmpfs none /dev"
    if missing == "fuse":
        prepare += " && mknod /dev/null c 1 3"
    script = f'{prepare} && exec "$@"'
    words = ["unshare", "-m", "sh", "-c", script, "sh", *unionfuse_command(*place.words())]
    result = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert result.returncode == 1
    assert re.fullmatch(rf"unionfuse: /dev/{missing}: .*; .*\n", result.stderr), result.stderr


@pytest.mark.parametrize("words", [["-o", "ro", "/mnt"], ["-o", "lowerdir=/,bogus", "/mnt"], []])
def test_wrong_usage_is_2(words: list[str]) -> None:
    result = run(*words)
    assert result.returncode == 2
    assert re.fullmatch(r"unionfuse: .*\n", result.stderr)


def test_version_and_help() -> None:
    assert re.fullmatch(r"unionfuse \d+\.\d+\.\d+\n", run("--version").stdout)
    assert "lowerdir=" in run("--help").stdout


def test_options_without_effect_are_said_once(place: Place) -> None:
    result = place.mount("index=on", "threaded=1", "index=off")
    assert result.returncode == 0
    assert result.stderr == "unionfuse: accepted without effect: index, threaded\n"


# --- without root ---------------------------------------------------------------------------


@pytest.fixture
def own_place(place: Place) -> Iterator[Place]:
    """The place belongs to an ordinary user, and /dev/fuse is open to all, as udev makes it."""
    for path in (place.base, *place.base.iterdir(), place.lower / "file"):
        os.chown(path, _USER, _USER)
    mode = os.stat("/dev/fuse").st_mode & 0o777
    os.chmod("/dev/fuse", 0o666)
    yield place
    os.chmod("/dev/fuse", mode)


def _dumpable() -> None:
    """Own /proc/self again after a change of user, as any program that was executed does."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def _mount_change_unmount(words: list[str]) -> tuple[int, str, str, str]:
    _dumpable()
    mnt = Path(words[-1])
    code = unionfuse.daemon.command.main(words)
    content = (mnt / "file").read_text()
    (mnt / "new").write_text("new")
    (mnt / "file").unlink()
    kind = subprocess.run(["findmnt", "-no", "FSTYPE", mnt], capture_output=True, text=True).stdout
    mount = mounting.mount_at(os.fsencode(mnt))
    assert mount is not None
    daemon = mounting.daemon_of(mount)
    assert daemon is not None
    mounting.detach(os.fsencode(mnt))
    assert mounting.wait_for_end(daemon, 10)
    return code, content, kind.strip(), str(os.listdir(mnt))


def test_an_ordinary_user_mounts_through_fusermount3(own_place: Place) -> None:
    result = as_user(_USER, _mount_change_unmount, own_place.words())
    assert result == (0, "lower", "fuse.unionfuse", "[]")
    assert (own_place.upper / "new").stat().st_uid == _USER
    assert staging_files(own_place.work) == []


def _in_user_namespace(words: list[str]) -> tuple[int, str, str, str]:
    _dumpable()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {_USER} 1")
    Path("/proc/self/gid_map").write_text(f"0 {_USER} 1")
    return _mount_change_unmount(words)


def test_root_of_a_user_namespace_mounts_by_itself(own_place: Place) -> None:
    result = as_user(_USER, _in_user_namespace, own_place.words())
    assert result == (0, "lower", "fuse.unionfuse", "[]")
    assert (own_place.upper / "new").stat().st_uid == _USER
    assert staging_files(own_place.work) == []


def _refused(words: list[str]) -> int:
    _dumpable()
    return unionfuse.daemon.command.main(words)


def test_no_permission_for_the_device(own_place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    os.chmod("/dev/fuse", 0o600)
    assert as_user(_USER, _refused, own_place.words()) == 1
    said = capfd.readouterr().err
    assert re.fullmatch(r"unionfuse: /dev/fuse: .*; .*\n", said)
    assert staging_files(own_place.work) == []


def _without_fuse_conf() -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(b"", b"/", b"", _MS_REC | _MS_PRIVATE, b"")
    syscalls.mount(b"/dev/null", b"/etc/fuse.conf", b"", _MS_BIND, b"")


@pytest.mark.parametrize(
    "option, remedy",
    [("allow_other", "leave allow_other out"), ("ro", "fusermount3 mounts only on directories")],
)
def test_what_fusermount3_refuses(
    own_place: Place, capfd: pytest.CaptureFixture[str], option: str, remedy: str
) -> None:
    if option == "ro":
        os.chown(own_place.mnt, 0, 0)
    words = own_place.words(option)
    in_child(as_user, _USER, _refused, words, before=_without_fuse_conf)
    said = capfd.readouterr().err
    assert re.fullmatch(r"unionfuse: \S+/mnt: .*; .*\n", said)
    assert remedy in said
