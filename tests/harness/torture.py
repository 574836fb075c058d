"""Programs that write without pause and check all that they read: `python torture.py NAME DIR N`.

Each works in DIR/NAME for N rounds and exits with 0 only if no call failed and everything that it
read was what it had written. What it leaves behind is the same after every run, wherever it runs.
"""

import hashlib
import mmap
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org",
    "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
}


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **_GIT},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{command}: exit {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def fio(here: Path, rounds: int) -> None:
    """Random writes, each block read back and checked against its checksum."""
    for number in range(rounds):
        _run(
            *("fio", "--name=verify", "--filename=data", "--size=4M", "--bs=4k", "--rw=randwrite"),
            *("--ioengine=psync", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1"),
            *("--verify_state_save=0", f"--randseed={number}", "--fsync=64"),
            cwd=here,
        )
    (here / "data").unlink()


def sqlite(here: Path, rounds: int) -> None:
    """Transactions, with a journal made and deleted for each."""
    base = sqlite3.connect(here / "base", isolation_level=None)
    base.execute("pragma journal_mode = delete")
    base.execute("create table t (n integer primary key, text)")
    for number in range(rounds * 10):
        base.execute("begin")
        for k in range(5):
            base.execute("insert into t values (?, ?)", (number * 5 + k, f"{number}-{k}" * 20))
        base.execute("commit")
        if number % 10 == 9:
            assert base.execute("pragma integrity_check").fetchone() == ("ok",)
            (count,) = base.execute("select count(*) from t").fetchone()
            assert count == (number + 1) * 5, count
    base.close()


def git(here: Path, rounds: int) -> None:
    """A repository: objects written, packed and checked."""
    _run("git", "init", "-q", "-b", "main", cwd=here)
    for number in range(rounds):
        for k in range(8):
            (here / f"file{k}").write_text(f"{number} {k}\n" * (50 + k))
        _run("git", "add", "-A", cwd=here)
        _run("git", "commit", "-q", "-m", f"round {number}", cwd=here)
        if number % 5 == 4:
            _run("git", "gc", "-q", cwd=here)
    assert _run("git", "status", "--porcelain", cwd=here) == ""
    _run("git", "fsck", "--strict", cwd=here)
    (here / "head").write_text(_run("git", "rev-parse", "HEAD", cwd=here))
    shutil.rmtree(here / ".git")


def tar(here: Path, rounds: int) -> None:
    """Trees packed, unpacked, compared and removed."""
    source = here / "source"
    for number in range(12):
        directory = source / f"d{number % 4}" / f"e{number}"
        directory.mkdir(parents=True)
        for k in range(6):
            file = directory / f"f{k}"
            file.write_bytes(random.Random(number * 6 + k).randbytes(3000 * k))
            file.chmod(0o600 | k)
            os.chown(file, k, k + 1)
        os.link(directory / "f1", directory / "hard")
        (directory / "soft").symlink_to("f2")
    for number in range(rounds):
        _run("tar", "-cf", "all.tar", "-C", "source", ".", cwd=here)
        goal = here / f"copy{number}"
        goal.mkdir()
        _run("tar", "-xpf", "all.tar", "-C", goal, cwd=here)
        assert _fingerprint(goal) == _fingerprint(source)
        if number < rounds - 1:
            shutil.rmtree(goal)
    (here / "all.tar").unlink()


def _fingerprint(tree: Path) -> str:
    lines = []
    for directory, _, files in os.walk(tree):
        for name in files:
            path = Path(directory, name)
            status = path.lstat()
            data = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()
            facts = (status.st_mode, status.st_uid, status.st_gid, status.st_nlink)
            inside = path.relative_to(tree)
            lines.append(f"{inside} {facts} {hashlib.sha256(data).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def mapped(here: Path, rounds: int) -> None:
    """A file written through a shared map, and read through a descriptor; its name is deleted."""
    size = 1 << 20
    draw = random.Random(7)
    expected = bytearray(size)
    for name in ("kept", "deleted"):
        (here / name).write_bytes(bytes(size))
    with open(here / "kept", "r+b") as kept, open(here / "deleted", "r+b") as deleted:
        (here / "deleted").unlink()
        maps = [mmap.mmap(file.fileno(), size) for file in (kept, deleted)]
        for number in range(rounds * 20):
            at, data = draw.randrange(size - 5000), draw.randbytes(draw.randrange(1, 5000))
            expected[at : at + len(data)] = data
            for view in maps:
                view[at : at + len(data)] = data
            if number % 20 == 19:
                for view, file in zip(maps, (kept, deleted), strict=True):
                    view.flush()
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    assert os.pread(file.fileno(), size, 0) == expected
                assert os.fstat(deleted.fileno()).st_nlink == 0
        for view in maps:
            view.close()
    assert (here / "kept").read_bytes() == expected


_ACTIONS = ("make", "make", "rename", "rename", "unlink", "link", "mkdir", "open")


def names(here: Path, rounds: int) -> None:
    """Names made, renamed, linked and deleted; a model says what each call must do."""
    draw = random.Random(11)
    model: dict[str, str] = {}  # name -> content; directories end with a slash
    open_files: list[tuple[int, str]] = []
    directories = ["", "a/", "b/", "b/c/"]
    for directory in directories[1:]:
        (here / directory).mkdir()
    for number in range(rounds * 60):
        name = draw.choice(directories) + f"n{draw.randrange(12)}"
        other = draw.choice(directories) + f"n{draw.randrange(12)}"
        path, target = here / name, here / other
        action = draw.choice(
            ("make", "make", "rename", "rename", "unlink", "link", "mkdir", "open")
        )
        before = len(model)
        try:
            if action == "make":
                with open(path, "x") as file:
                    file.write(f"{number}\n")
                model_change = {name: f"{number}\n"}
            elif action == "rename":
                os.rename(path, target)
                model_change = {other: model[name]} if name in model else None
            elif action == "unlink":
                path.unlink()
                model_change = {}
            elif action == "link":
                os.link(path, target)
                model_change = {other: model[name]} if name in model else None
            elif action == "mkdir":
                path.mkdir()
                path.rmdir()
                model_change = {}
            else:
                open_files.append((os.open(path, os.O_RDONLY), model.get(name, "?")))
                model_change = {}
            failed = None
        except OSError as error:
            failed = error
            model_change = {}
        _check(action, name, other, failed, model, path, target)
        assert model_change is not None, f"{action} {name} {other}: went through"
        gone = action == "unlink" or (action == "rename" and not _same(model, name, other))
        if failed is None and gone:
            del model[name]
        if failed is None:
            model.update(model_change)
        assert abs(len(model) - before) <= 1
        if number % 30 == 29:
            _compare(here, directories, model)
            for descriptor, content in open_files:
                assert os.pread(descriptor, 100, 0).decode() == content
                os.close(descriptor)
            open_files.clear()
    _compare(here, directories, model)


def _same(model: dict[str, str], name: str, other: str) -> bool:
    """Whether a rename would have done nothing: both are names of one file already."""
    return name == other or (name in model and model[name] == model.get(other))


def _check(
    action: str,
    name: str,
    other: str,
    failed: OSError | None,
    model: dict[str, str],
    path: Path,
    target: Path,
) -> None:
    """Whether a call had to fail as it did."""
    there, other_there = name in model, other in model
    expected: type[OSError] | None = None
    if action in ("make", "mkdir") and there:
        expected = FileExistsError
    elif action in ("rename", "unlink", "link", "open") and not there:
        expected = FileNotFoundError
    elif action == "link" and other_there:
        expected = FileExistsError
    if expected is None:
        assert failed is None, f"{action} {path} {target}: {failed!r}"
    else:
        assert type(failed) is expected, f"{action} {path} {target}: {failed!r}"


def _compare(here: Path, directories: list[str], model: dict[str, str]) -> None:
    found = {
        directory + entry.name: Path(entry.path).read_text()
        for directory in directories
        for entry in os.scandir(here / directory)
        if entry.is_file()
    }
    assert found == model, (sorted(found), sorted(model))


def listing(here: Path, rounds: int) -> None:
    """A big directory is listed while names come and go: those that stay are seen just once."""
    stay = {f"stay{number:04}" for number in range(600)}
    for name in stay:
        (here / name).touch()
    for number in range(rounds):
        (here / f"come{number % 7}").touch()
        seen: list[str] = []
        with os.scandir(here) as entries:
            for position, entry in enumerate(entries):
                seen.append(entry.name)
                if position % 150 == 149:
                    (here / f"go{number}-{position}").touch()
                    (here / f"go{number}-{position}").unlink()
        mine = [name for name in seen if name.startswith("stay")]
        assert len(mine) == len(stay) and set(mine) == stay, (len(mine), len(set(mine)))
        (here / f"come{number % 7}").unlink()


def lower(here: Path, rounds: int) -> None:
    """What the layers have is changed, moved, deleted and linked; run where `given` is from below.

    The files of `given` hold their own path; here it is a directory that the layers have.
    """
    given = here / "given"
    for number in range(rounds):
        directory = given / f"d{number % 20}"
        for file in sorted(directory.glob("f*")):
            inside = str(file.relative_to(given))
            assert file.read_text().startswith(inside + "\n"), inside
            match number // 20 % 4:
                case 0:
                    with open(file, "a") as opened:
                        opened.write(f"{number}\n")
                    file.chmod(0o640)
                case 1:
                    os.rename(file, directory / "moving")
                    os.link(directory / "moving", file)
                    (directory / "moving").unlink()
                case 2:
                    descriptor = os.open(file, os.O_RDWR)
                    file.unlink()
                    data = os.pread(descriptor, 1 << 16, 0)
                    assert os.fstat(descriptor).st_nlink == 0
                    file.write_bytes(data)
                    os.close(descriptor)
                case 3:
                    os.utime(file, ns=(number, number))
                    assert stat.S_IMODE(file.stat().st_mode) == 0o644
        if number // 20 % 4 == 1:
            os.rename(directory, given / "moved")
            os.rename(given / "moved", directory)


PROGRAMS: dict[str, Callable[[Path, int], None]] = {
    function.__name__: function
    for function in (fio, sqlite, git, tar, mapped, names, listing, lower)
}


if __name__ == "__main__":
    os.umask(0o022)
    place = Path(sys.argv[2]) / sys.argv[1]
    place.mkdir(exist_ok=True)
    PROGRAMS[sys.argv[1]](place, int(sys.argv[3]))
