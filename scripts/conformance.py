"""Public conformance suites on a mount program and on kernel overlayfs: see scripts/conformance.

A suite is known by what lies in its directory. Each of its tests gets a name; what counts is
which names pass, and whether something fails here that passes on kernel overlayfs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

# name of a test -> None where it passed, else what it said
Outcome = dict[str, str | None]
_SECONDS_FOR_A_TEST = 300


class MountProgram:
    """A mount program, or kernel overlayfs where the path is None."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.name = "overlayfs" if path is None else Path(path).name

    @contextmanager
    def mounted(self, scratch: Path) -> Iterator[Path]:
        """A union of one empty layer and an empty upper."""
        lower, upper, work, mnt = (scratch / name for name in ("lower", "upper", "work", "mnt"))
        for path in (lower, upper, work, mnt):
            path.mkdir(parents=True)
        line = f"lowerdir={lower},upperdir={upper},workdir={work}"
        if self.path is None:
            line += ",index=on,redirect_dir=on,xino=on"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", line, mnt], check=True)
        else:
            subprocess.run([self.path, "-o", line, mnt], check=True)
        try:
            yield mnt
        finally:
            subprocess.run(["umount", "-l", mnt], check=True)


def pjdfstest(suite: Path, program: MountProgram, only: Sequence[str]) -> Outcome:
    """POSIX semantics of system calls: shell scripts that print TAP."""
    if not (suite / "pjdfstest").exists():
        for command in (["autoreconf", "-ifs"], ["./configure"], ["make", "pjdfstest"]):
            subprocess.run(command, cwd=suite, check=True, stdout=subprocess.DEVNULL)
    scripts = sorted((suite / "tests").rglob("*.t"))
    scripts = [path for path in scripts if not only or any(name in str(path) for name in only)]
    outcome: Outcome = {}
    with tempfile.TemporaryDirectory(prefix="conformance-", dir="/tmp") as scratch:
        os.chmod(scratch, 0o755)
        # most of the time is sleep(1), so that times differ: several at once
        with program.mounted(Path(scratch)) as mnt, ThreadPoolExecutor(4) as pool:

            def run(script: Path) -> Outcome:
                name = str(script.relative_to(suite / "tests"))
                directory = mnt / name.replace("/", "-")
                directory.mkdir()
                return _tap(name, script, directory)

            for part in pool.map(run, scripts):
                outcome |= part
    return outcome


def _tap(name: str, script: Path, directory: Path) -> Outcome:
    result = subprocess.run(
        ["sh", script], cwd=directory, capture_output=True, text=True, timeout=_SECONDS_FOR_A_TEST
    )
    plan = re.search(r"^1\.\.(\d+)", result.stdout, re.MULTILINE)
    lines = re.findall(r"^(not ok|ok) (\d+)(.*)$", result.stdout, re.MULTILINE)
    outcome: Outcome = (
        {f"{name}:{number}": "not run" for number in range(1, int(plan[1]) + 1)}
        if (plan)
        else {f"{name}:plan": (result.stderr or "no plan").strip()}
    )
    for verdict, number, rest in lines:
        passed = verdict == "ok" or "TODO" in rest
        outcome[f"{name}:{number}"] = None if passed else rest.strip(" -") or "not ok"
    return outcome


def unionmount(suite: Path, program: MountProgram, only: Sequence[str]) -> Outcome:
    """Union semantics, with the upper rotated to be a lower layer again and again."""
    names = only or re.findall(r'^    "([\w-]+)",?$', (suite / "run").read_text(), re.MULTILINE)
    extra = [name for name in _DIRECTORY_RENAMES if not only and name not in names]
    outcome: Outcome = {}
    with tempfile.TemporaryDirectory(prefix="conformance-", dir="/var/tmp") as scratch:
        base = Path(scratch)
        base.chmod(0o755)  # some tests run as an ordinary user
        environment = os.environ | {"UNIONMOUNT_BASEDIR": str(base / "base")}
        (base / "base").mkdir()
        kind = ["--verify"]
        if program.path is not None:
            # mount(8) forgets PATH; scripts/conformance gave us a mount namespace of our own
            (base / "bin").mkdir()
            (base / "bin" / program.name).symlink_to(program.path)
            places = f"lowerdir={base / 'bin'}:/usr/local/bin"
            words = ["mount", "-t", "overlay", "overlay", "-o", places, "/usr/local/bin"]
            subprocess.run(words, check=True)
            kind = [f"--fuse={program.name}"]
        for name in [*names, *extra]:
            words = ["./run", "--ov=3", *kind, name]
            result = subprocess.run(
                words, cwd=suite, env=environment, capture_output=True, text=True, check=False
            )
            said = (result.stdout + result.stderr).strip().splitlines()
            outcome[name] = None if result.returncode == 0 else " / ".join(said[-2:])
        subprocess.run(["./run", "--clean-up"], cwd=suite, env=environment, capture_output=True)
        if program.path is not None:
            subprocess.run(["umount", "/usr/local/bin"], check=True)
        for _ in range(3):  # whatever a failed test left mounted
            for mount in reversed(Path("/proc/self/mounts").read_text().splitlines()):
                if scratch in mount:
                    subprocess.run(["umount", "-l", mount.split()[1]], capture_output=True)
    return outcome


def ltp(suite: Path, program: MountProgram, only: Sequence[str]) -> Outcome:
    """System call checks of the Linux Test Project: those in runtest/syscalls that were built.

    Build before, for instance: make autotools && ./configure && make -C lib &&
    make -C testcases/kernel/syscalls/rename. What makes file systems of its own is left out.
    """
    syscalls = suite / "testcases" / "kernel" / "syscalls"
    built = {
        path.name: path
        for path in syscalls.rglob("*")
        if path.is_file() and os.access(path, os.X_OK) and path.with_suffix(".c").exists()
    }
    outcome: Outcome = {}
    with tempfile.TemporaryDirectory(prefix="conformance-", dir="/var/tmp") as scratch:
        os.chmod(scratch, 0o755)
        with program.mounted(Path(scratch)) as mnt:
            mnt.chmod(0o1777)
            for line in (suite / "runtest" / "syscalls").read_text().splitlines():
                name, _, command = line.partition(" ")
                words = command.split()
                path = built.get(words[0]) if words else None
                if path is None or (only and name not in only) or _has_its_own_device(path):
                    continue
                outcome |= _ltp_test(name, path, words[1:], mnt)
    return outcome


def _has_its_own_device(path: Path) -> bool:
    source = path.with_suffix(".c").read_text(errors="replace")
    return bool(
        re.search(
            r"mount_device|all_filesystems|needs_device|format_device|tst_acquire_device", source
        )
    )


def _ltp_test(name: str, path: Path, words: Sequence[str], mnt: Path) -> Outcome:
    """One program. Its exit code has bits: 1 failed, 2 broken, 4 warning, 32 does not apply."""
    places = {"TMPDIR": str(mnt), "LTP_COLORIZE_OUTPUT": "n"}
    places["PATH"] = f"{path.parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["timeout", "-k", "1", "60", path, *words],  # ends its children too
        cwd=mnt,
        env=os.environ | places,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode in (124, 137):
        return {name: "not done after a minute"}
    if result.returncode & 32 and not result.returncode & 3:
        return {}
    said = [line for line in (result.stdout + result.stderr).splitlines() if "PASS" not in line]
    failed = [line for line in said if re.search("FAIL|BROK", line)]
    return {name: " / ".join(failed[:2]) or "failed" if result.returncode & 3 else None}


# they belong to the list, but the script adds them in another form
_DIRECTORY_RENAMES = ("rename-dir", "rename-empty-dir", "rename-pop-dir", "rename-move-dir")

Runner = Callable[[Path, MountProgram, Sequence[str]], Outcome]
SUITES: dict[str, Runner] = {"pjdfstest.c": pjdfstest, "mount_union.py": unionmount, "runltp": ltp}


def report(ours: Outcome, oracle: Outcome, program: MountProgram) -> int:
    """Print counts, and what fails here alone; return how many those are."""
    for name, outcome in ((program.name, ours), ("overlayfs", oracle)):
        failed = [test for test, said in outcome.items() if said is not None]
        print(f"{name}: {len(outcome) - len(failed)} of {len(outcome)} passed")
    alone = [test for test, said in ours.items() if said and oracle.get(test) is None]
    for test in alone:
        print(f"  only {program.name} fails: {test}: {ours[test]}")
    for test, said in oracle.items():
        if said:
            who = "only overlayfs fails" if ours.get(test, "") is None else "both fail"
            print(f"  {who}: {test}: {said}")
    return len(alone)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/conformance", description=__doc__)
    parser.add_argument("suite", type=Path, help="a checkout of a suite")
    parser.add_argument("program", nargs="?", default="unionfuse", help="default: unionfuse")
    parser.add_argument("test", nargs="*", help="only these")
    args = parser.parse_args()
    local = Path(sys.executable).parent / args.program
    path = shutil.which(args.program) or (str(local) if local.exists() else None)
    if path is None:
        parser.error(f"{args.program}: no such mount program")
    runner = next((run for file, run in SUITES.items() if (args.suite / file).exists()), None)
    if runner is None:
        parser.error(f"{args.suite}: no suite known here: pjdfstest, unionmount-testsuite, ltp")
    # Not by a link of /usr/local/bin, which `unionmount` lays another directory over.
    program = MountProgram(os.path.realpath(path))
    suite = args.suite.resolve()
    ours = runner(suite, program, args.test)
    oracle = runner(suite, MountProgram(None), args.test)
    return 1 if report(ours, oracle, program) else 0


if __name__ == "__main__":
    sys.exit(main())
