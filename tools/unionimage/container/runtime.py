"""The OCI runtime: which one works on this host, and one function per verb of its command line.

It starts processes and reads what they say; it knows nothing of images, names or networks. A
bundle (directory with `config.json`) comes from `bundle.py` or from a build.

Both runc and crun follow the OCI runtime command line. Where they differ:
- crun 1.8 refuses a host that mounts cgroup v1 controllers and a cgroup2 tree side by side. It
  works in a mount namespace from which the cgroup2 tree is gone, so it is started in one.
- their messages differ; `classify` turns both into docker's exit codes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from unionfuse import syscalls
from unionimage.container import limits
from unionimage.container.places import boot_id, run_directory
from unionimage.errors import UserError

# In order of preference: crun starts in a third of the time that runc takes.
CANDIDATES = ("crun", "runc")
PROBE_COMMAND = "/unionfuse-probe"
# The same as `_hide`, for callers that have threads.
HIDE_AND_EXEC = '{ umount "$0" 2>/dev/null || mount -t tmpfs -o size=4k none "$0"; } && exec "$@"'

MS_SLAVE, MS_REC = 1 << 19, 1 << 14

COMMAND_FAILED = 125  # the tool or the runtime failed, the command never ran
NOT_EXECUTABLE = 126
NOT_FOUND = 127

Stream = int | IO[bytes] | None


class RuntimeFailure(UserError):
    """The runtime refused; `exit_code` is docker's: 127 no such command, 126 not executable."""


class Runtime(NamedTuple):
    """One usable runtime. Immutable: sharing it between threads is safe."""

    name: str
    path: str
    state: str  # its --root
    hidden: str | None = None  # the cgroup2 mount that it must not see
    cgroups: bool = True  # False where we may make none: rootless and nothing delegated

    def spawn(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start the runtime's command line; `options` are those of subprocess.Popen."""
        command = [self.path, "--root", self.state]
        if self.name == "crun" and not self.cgroups:
            command += ["--cgroup-manager", "disabled"]
        command += arguments
        if self.hidden is None:
            return subprocess.Popen(command, **options)
        if threading.active_count() == 1:  # what runs between fork and exec suffers no threads
            hide = functools.partial(_hide, os.fsencode(self.hidden))
            return subprocess.Popen(command, preexec_fn=hide, **options)
        wrapper = ["unshare", "-m", "--propagation", "slave", "sh", "-c", HIDE_AND_EXEC]
        return subprocess.Popen([*wrapper, self.hidden, *command], **options)

    def run(
        self,
        container: str,
        bundle: str | Path,
        *,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = None,
        stderr: Stream = None,
    ) -> int:
        """Run a container in the foreground and return the exit code of its process.

        Raises RuntimeFailure when the process was never started. Whatever happens, the container is
        deleted at the end.
        """
        with _log_file(self.state) as log:
            arguments = ("--log", log, "--log-format", "json", "run", "-b", str(bundle), container)
            process = self.spawn(*arguments, stdin=stdin, stdout=stdout, stderr=stderr)
            try:
                code = process.wait()
            except BaseException:
                self.delete(container, force=True)
                process.wait()
                raise
            message = last_error(log)
        if code != 0 and message:
            self.delete(container, force=True)
            raise failure(message)
        return code if code >= 0 else 128 - code

    def start_detached(
        self,
        container: str,
        bundle: str | Path,
        pid_file: str | Path,
        *,
        create_only: bool = False,
        console_socket: str | None = None,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = subprocess.DEVNULL,
        stderr: Stream = subprocess.DEVNULL,
    ) -> int:
        """Create a container, start it unless `create_only`, and return its pid on this host.

        The container's process keeps the three streams; with `console_socket` it gets a terminal,
        whose other end arrives at that socket. The caller should be a child subreaper: the process
        becomes its child and is to be waited for. Raises RuntimeFailure; nothing is left then.
        """
        verb = ["create"] if create_only else ["run", "--detach"]
        verb += ["--bundle", str(bundle), "--pid-file", str(pid_file)]
        if console_socket is not None:
            verb += ["--console-socket", console_socket]
        Path(pid_file).unlink(missing_ok=True)
        with _log_file(self.state) as log:
            arguments = ("--log", log, "--log-format", "json", *verb, container)
            code = self.spawn(*arguments, stdin=stdin, stdout=stdout, stderr=stderr).wait()
            message = last_error(log)
        if code != 0:
            self.delete(container, force=True)
            message = message or f"{self.name} ended with exit code {code}"
            raise _start_failure(message, bundle)
        try:
            return int(Path(pid_file).read_text())
        except (FileNotFoundError, ValueError):  # crun, where what it forked for it was killed
            self.delete(container, force=True)
            message = f"{self.name} ended without starting the process: try again"
            raise failure(message) from None

    def start(self, container: str) -> None:
        """Start what `start_detached(create_only=True)` created."""
        self._call("start", container)

    def kill(self, container: str, number: int = signal.SIGTERM) -> None:
        """Send a signal to the container's first process."""
        self._call("kill", container, str(int(number)))

    def delete(self, container: str, *, force: bool = False) -> None:
        """Remove the runtime's state and the cgroup; with `force` kill first and never complain."""
        if force:
            self.begin_delete(container).wait()
        else:
            self._call("delete", container)

    def begin_delete(self, container: str) -> subprocess.Popen[bytes]:
        """`delete --force` as a process that the caller waits for."""
        null = subprocess.DEVNULL
        return self.spawn("delete", "--force", container, stdin=null, stdout=null, stderr=null)

    def pause(self, container: str) -> None:
        """Freeze all processes."""
        self._call("pause", container)

    def resume(self, container: str) -> None:
        """Thaw all processes."""
        self._call("resume", container)

    def update(self, container: str, resources: Mapping[str, Any]) -> None:
        """Change limits of a running container; `resources` is the OCI `linux.resources` object."""
        self._call("update", "--resources", "-", container, text=json.dumps(resources))

    def status(self, container: str) -> str | None:
        """created, running, paused or stopped as the runtime sees it; None when it is unknown."""
        code, out, _ = self._ask("state", container)
        return str(json.loads(out)["status"]) if code == 0 else None

    def exec(
        self,
        container: str,
        process_file: str | Path,
        *,
        detach: bool = False,
        console_socket: str | None = None,
        pid_file: str | Path | None = None,
        log: str | None = None,
        **options: Any,
    ) -> subprocess.Popen[bytes]:
        """Start the OCI process object in `process_file` in a running container."""
        arguments = ["--log", log, "--log-format", "json"] if log else []
        arguments += ["exec", "--process", str(process_file)]
        if detach:
            arguments.append("--detach")
        if pid_file is not None:
            arguments += ["--pid-file", str(pid_file)]
        if console_socket is not None:
            arguments += ["--console-socket", console_socket]
        return self.spawn(*arguments, container, **options)

    def _call(self, *arguments: str, text: str = "") -> None:
        code, _, said = self._ask(*arguments, text=text)
        if code != 0:
            raise failure(said.strip() or f"exit code {code}")

    def _ask(self, *arguments: str, text: str = "") -> tuple[int, str, str]:
        """Exit code, output and errors."""
        pipe = subprocess.PIPE
        process = self.spawn(*arguments, stdin=pipe, stdout=pipe, stderr=pipe)
        out, said = process.communicate(text.encode())
        return process.returncode, out.decode(errors="replace"), said.decode(errors="replace")


def _hide(mount: bytes) -> None:
    """Leave the host's mount namespace and take one mount away in the new one."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(b"none", b"/", b"", MS_REC | MS_SLAVE, b"")
    try:
        syscalls.umount(mount)
    except OSError:  # in a user namespace the host's mounts cannot be taken apart, but covered
        syscalls.mount(b"none", mount, b"tmpfs", 0, b"size=4k")


def find(choice: str | None = None, directory: Path | None = None) -> Runtime:
    """The runtime to use: `choice` (a name or a path), else the first that works on this host.

    What works is found out by starting a container whose command does not exist, once per boot and
    per version of the program; the answer is kept in `directory`. Raises RuntimeFailure.
    """
    directory = directory or run_directory()
    names = (choice,) if choice else CANDIDATES
    reasons = []
    for name in names:
        found, reason = _remembered(name, directory), ""
        if found is None:
            found, reason = _search(name, directory)
        if found is not None:
            return found
        reasons.append(reason)
    remedy = "install crun or runc" if choice is None else "leave --runtime out to search"
    raise RuntimeFailure(
        f"no usable OCI runtime ({'; '.join(reasons)}): {remedy}", exit_code=COMMAND_FAILED
    )


def _remembered(name: str, directory: Path) -> Runtime | None:
    """The answer that was found earlier in this boot for the program as it is now."""
    try:
        kept = json.loads(_memory(name, directory).read_bytes())
        path = kept["key"][1]
        if kept["key"] != _key(path) or ("/" in name and path != name):
            return None
        return Runtime(kept["name"], path, kept["state"], kept["hidden"], kept["cgroups"])
    except (OSError, ValueError, LookupError):
        return None


def _search(name: str, directory: Path) -> tuple[Runtime | None, str]:
    """Find the program and try it; what works is remembered. A reason when it does not."""
    import shutil

    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        return None, f"{name} is not installed"
    short = os.path.basename(name)
    runtime, reason = _probe(Runtime(short, path, str(directory / short)), directory)
    if runtime is None:
        return None, f"{name}: {reason}"
    memory = _memory(name, directory)
    staged = memory.with_suffix(f".{os.getpid()}")
    staged.write_text(json.dumps({"key": _key(path), **runtime._asdict()}))
    staged.replace(memory)
    return runtime, ""


def _memory(name: str, directory: Path) -> Path:
    return directory / f"runtime-{os.path.basename(name)}.json"


def _key(path: str) -> list[Any]:
    status = os.stat(path)
    return [boot_id(), path, status.st_mtime_ns, status.st_size, os.geteuid()]


def _probe(runtime: Runtime, directory: Path) -> tuple[Runtime | None, str]:
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    runtime = runtime._replace(cgroups=bool(limits.host().controllers))
    tries = [runtime]
    hybrid = _hybrid_cgroup2()
    if hybrid is not None:
        tries.append(runtime._replace(hidden=hybrid))
    reason = ""
    for candidate in tries:
        reason = _try(candidate, directory)
        if not reason:
            return candidate, ""
    return None, reason


def _try(runtime: Runtime, directory: Path) -> str:
    """Why this runtime cannot start containers here; empty when it can."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=directory, prefix="probe-") as bundle:
        for part in ("rootfs", "rootfs/proc", "rootfs/dev", "rootfs/sys"):
            os.mkdir(f"{bundle}/{part}")
        config = _probe_config(f"{bundle}/rootfs")
        Path(bundle, "config.json").write_text(json.dumps(config))
        name = os.path.basename(bundle)
        _, _, said = runtime._ask("run", "-b", bundle, name)
        runtime.delete(name, force=True)
    return "" if PROBE_COMMAND in said else readable(said) or "it says nothing"


def _probe_config(root: str) -> dict[str, Any]:
    spaces: list[dict[str, str]] = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]
    return {
        "ociVersion": "1.0.2",
        "process": {"args": [PROBE_COMMAND], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": root},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": spaces},
    }


def _hybrid_cgroup2() -> str | None:
    """Where cgroup2 is mounted beside cgroup v1 controllers; None on a pure host."""
    tree, legacy = None, False
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind = rest.split(" ", 1)[0]
        legacy = legacy or kind == "cgroup"
        if kind == "cgroup2":
            tree = fields.split(" ")[4]
    return tree if legacy else None


@contextlib.contextmanager
def _log_file(state: str) -> Iterator[str]:
    path = f"{os.path.dirname(state)}/log-{os.urandom(8).hex()}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        yield path
    finally:
        os.unlink(path)


def last_error(log: str) -> str:
    """The last error in a JSON-lines log of a runtime, empty when it holds none."""
    message = ""
    for line in Path(log).read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
            message = str(entry.get("msg", ""))
    return message


def readable(message: str) -> str:
    """What a runtime said, as one line without its own time stamps and prefixes."""
    line = message.strip().splitlines()[-1] if message.strip() else ""
    found = re.search(r'msg="((?:[^"\\]|\\.)*)"', line)
    if found:
        line = found.group(1).replace('\\"', '"')
    elif line.startswith("{"):
        with contextlib.suppress(ValueError, KeyError):
            line = str(json.loads(line)["msg"])
    line = re.sub(r"^runc \w+ failed: ", "", line)
    line = re.sub(r"^unable to start container process: ", "", line)
    missing = re.match(r"executable file `(.*)` not found in \$PATH", line)  # crun
    if missing:
        command = missing.group(1)
        reason = "no such file or directory" if "/" in command else "not found in $PATH"
        return f'exec: "{command}": {reason}'
    return re.sub(r"^open executable: ", "exec: ", line)


def classify(message: str) -> int:
    """Docker's exit code for a runtime's message: 127, 126 or 125."""
    text = message.lower()
    about_command = "exec" in text
    if about_command and ("not found" in text or "no such file" in text):
        return NOT_FOUND
    denied = (
        "permission denied",
        "operation not permitted",
        "is a directory",
        "format error",
        "too many levels of symbolic links",
    )
    if about_command and any(word in text for word in denied):
        return NOT_EXECUTABLE
    return COMMAND_FAILED


def _start_failure(message: str, bundle: str | Path) -> RuntimeFailure:
    """What a runtime said of a bundle that it did not start; of a directory both say only EPERM."""
    command = _command_of(bundle)
    told = failure(message, command)
    if told.exit_code == NOT_EXECUTABLE and _is_directory(bundle, command):
        return RuntimeFailure(f'exec: "{command}": is a directory', exit_code=NOT_EXECUTABLE)
    return told


def _is_directory(bundle: str | Path, path: str) -> bool:
    from unionimage.container import users

    try:
        spec = json.loads(Path(bundle, "config.json").read_bytes())
        place = os.path.join(spec["process"]["cwd"], path)
        root = Path(bundle, spec["root"]["path"])
        os.close(users.open_inside(root, place, os.O_PATH | os.O_DIRECTORY))
    except (OSError, ValueError, LookupError):
        return False
    return True


def _command_of(bundle: str | Path) -> str:
    try:
        return str(json.loads(Path(bundle, "config.json").read_bytes())["process"]["args"][0])
    except (OSError, ValueError, LookupError):
        return ""


def failure(message: str, command: str = "") -> RuntimeFailure:
    """A RuntimeFailure for what a runtime said; it is told the command where it does not say it."""
    line = readable(message)
    if command and line.startswith("exec: ") and command not in line:
        line = f'exec: "{command}": {line.removeprefix("exec: ").lower()}'
    return RuntimeFailure(line, exit_code=classify(line))
