"""Containers without root: every command about them runs as root of one user namespace.

A keeper process (`sleep`) holds a user and a mount namespace for as long as the user has a session;
`enter` starts it when there is none and starts this command again inside. There the caller is uid
0, the ids of /etc/subuid and /etc/subgid are the others where newuidmap may map them, and mounts
can be made that the host does not see. Without such ranges only the caller's own uid exists; other
owners live in `user.containers.override_stat`, which the file system writes and shows.

Sources: user_namespaces(7), newuidmap(1), subuid(5).
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

from unionimage.container.places import run_directory
from unionimage.errors import UserError

INSIDE = "UNIONFUSE_ROOTLESS"  # the caller's uid on the host, set in the namespace
CLONE_NEWUSER = 0x10000000


def active() -> bool:
    """True in the namespace that `enter` made."""
    return INSIDE in os.environ


def group_map() -> list[tuple[int, int, int]]:
    """The group ids of this process's user namespace: inside, outside, count."""
    lines = Path("/proc/self/gid_map").read_text().splitlines()
    return [(int(inside), int(out), int(count)) for inside, out, count in map(str.split, lines)]


def enter(store_root: Path) -> None:
    """Start this command again as root of the user's namespace; never returns.

    Raises UserError where the kernel or the administrator allows no user namespaces.
    """
    directory = run_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    keeper = _keeper(directory)
    os.environ[INSIDE] = str(os.geteuid())
    os.environ["UNIONFUSE_ROOT"] = str(store_root)
    os.environ["UNIONFUSE_RUNROOT"] = str(directory)
    words = ["nsenter", "--preserve-credentials", "-U", "-m", "-t", str(keeper), "--"]
    sys.stdout.flush()
    os.execvp("nsenter", [*words, sys.executable, *_this_program(), *sys.argv[1:]])


def _this_program() -> list[str]:
    if os.path.exists(sys.argv[0]):
        return [sys.argv[0]]
    return ["-P", "-c", "from unionimage.cli import main; raise SystemExit(main())"]


def _keeper(directory: Path) -> int:
    """The pid of the process that holds the namespace; it is started if there is none."""
    with open(directory / "keeper.start", "w") as only_one:
        fcntl.flock(only_one, fcntl.LOCK_EX)
        with open(directory / "keeper", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                return int(file.read())
            # the lock goes to the keeper with the descriptor and ends with its life
            pid = _start_keeper(file.fileno())
            file.truncate(0)
            file.write(str(pid))
        return pid


def _start_keeper(lock: int) -> int:
    from unionfuse import syscalls

    made, tell_made = os.pipe()
    mapped, tell_mapped = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            syscalls.unshare(CLONE_NEWUSER | syscalls.CLONE_NEWNS)
            os.write(tell_made, b"\n")
            os.close(tell_mapped)
            if os.read(mapped, 1):
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
                slave_and_recursive = 1 << 19 | 1 << 14
                syscalls.mount(b"none", b"/", b"", slave_and_recursive, b"")
                null = os.open(os.devnull, os.O_RDWR)
                for number in (0, 1, 2):
                    os.dup2(null, number)
                os.set_inheritable(lock, True)
                os.execvp("sleep", ["sleep", "infinity"])
        finally:
            os._exit(1)
    os.close(tell_made)
    os.close(mapped)
    try:
        if not os.read(made, 1):
            raise UserError(
                "this system lets users make no user namespaces: see"
                " /proc/sys/user/max_user_namespaces, or run as root"
            )
        _map_ids(pid)
        os.write(tell_mapped, b"\n")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(made)
        os.close(tell_mapped)
    return pid


def _map_ids(pid: int) -> None:
    """Ranges where there are some and newuidmap works, else only the caller's own ids."""
    import pwd
    import shutil

    name = pwd.getpwuid(os.geteuid()).pw_name
    done = []
    for kind, own, file in (
        ("uid", os.geteuid(), "/etc/subuid"),
        ("gid", os.getegid(), "/etc/subgid"),
    ):
        given = _ranges(file, name, own)
        program = shutil.which(f"new{kind}map")
        if not given or program is None:
            break
        words, inside = [0, own, 1], 1
        for first, count in given:
            words += [inside, first, count]
            inside += count
        command = [program, str(pid), *map(str, words)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            break
        done.append(kind)
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if kind not in done:
            if kind == "gid":
                Path(f"/proc/{pid}/setgroups").write_text("deny")
            Path(f"/proc/{pid}/{kind}_map").write_text(f"0 {own} 1")


def _ranges(file: str, name: str, own: int) -> list[tuple[int, int]]:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return []
    rows = [line.split(":") for line in lines if line.count(":") == 2]
    return [(int(row[1]), int(row[2])) for row in rows if row[0] in (name, str(own))]
