"""`exec`: one more process in a running container."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import selectors
import signal
import socket
import stat
import subprocess
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from unionimage.container import bundle, capabilities, runtime, terminal, users, wire
from unionimage.container.state import Container, remove_tree
from unionimage.errors import UserError

CHUNK = 1 << 16


class Request(NamedTuple):
    """What to run, and how it differs from the container's own process."""

    command: Sequence[str]
    environment: Sequence[str] = ()
    user: str | None = None
    workdir: str | None = None
    tty: bool = False
    interactive: bool = False
    privileged: bool = False
    detach_keys: str | None = None


def process_of(container: Container, request: Request) -> bundle.Spec:
    """The OCI process object. Raises UserError for an unknown user."""
    root = Path(f"/proc/{container.state()['Pid']}/root")
    config, host_config = container.config, container.host_config
    config |= {"Tty": request.tty}
    if request.workdir:
        config["WorkingDir"] = request.workdir
    config["Env"] = [*(config.get("Env") or []), *request.environment]
    granted = bundle.granted_capabilities(host_config)
    if request.privileged:
        granted = capabilities.chosen(privileged=True)
    text = config.get("User") if request.user is None else request.user
    try:
        user = users.find(root, text or "", host_config.get("GroupAdd") or ())
    except UserError as error:
        raise UserError(error.message, exit_code=runtime.NOT_EXECUTABLE) from None
    environment = bundle.environment_of(config, user, str(config["Hostname"]))
    spec = bundle.process(config, host_config, user, request.command, environment, granted)
    if request.tty and (size := terminal.terminal_size()):
        spec["consoleSize"] = {"height": size[0], "width": size[1]}
    return spec


def run(container: Container, request: Request, chosen: runtime.Runtime) -> int:
    """Run it on this process's own streams; its exit code is returned.

    Raises RuntimeFailure (126, 127) when it never ran.
    """
    with _files(container, request) as directory:
        log = f"{directory}/log"
        console = f"{directory}/console" if request.tty else None
        start = functools.partial(
            chosen.exec, container.id, f"{directory}/process.json", console_socket=console, log=log
        )
        if console is None:
            code, said = _plain(start(stdin=None if request.interactive else subprocess.DEVNULL))
        else:
            code, said = _on_terminal(start, console, request)
        if code != 0 and (message := runtime.last_error(log)):
            raise runtime.failure(message)
        os.write(2, said)
    return code


def run_detached(container: Container, request: Request) -> None:
    """Have the monitor start it, and leave it: what ends without a parent is the monitor's to reap.

    Raises RuntimeFailure when it does not start, ConnectionError when the monitor is gone.
    """
    with _files(container, request) as directory:
        log = f"{directory}/log"
        asked = {"op": "exec", "process": f"{directory}/process.json", "log": log}
        if wire.ask(container.control, asked)["exit_code"] != 0:
            raise runtime.failure(runtime.last_error(log) or "exec failed")


@contextlib.contextmanager
def _files(container: Container, request: Request) -> Iterator[str]:
    directory = container.run / f"exec-{os.urandom(8).hex()}"
    directory.mkdir(mode=0o700)
    try:
        spec = process_of(container, request)
        _require_command(container, spec)
        (directory / "process.json").write_text(json.dumps(spec))
        (directory / "log").touch()
        yield str(directory)
    finally:
        remove_tree(directory)


def _require_command(container: Container, spec: bundle.Spec) -> None:
    """Refuse what cannot be executed, in one line: the runtimes would say it twice.

    Raises RuntimeFailure with 127 (there is no such command) or 126.
    """
    root = Path(f"/proc/{container.state()['Pid']}/root")
    directory, command = str(spec["cwd"]), str(spec["args"][0])
    if not stat.S_ISDIR(_mode(root, directory)):
        raise runtime.RuntimeFailure(f"no such directory: {directory}", exit_code=126)
    table = dict(entry.partition("=")[::2] for entry in spec["env"])
    if "/" in command:
        places, reason = [directory], "no such file or directory"
    else:
        places, reason = table.get("PATH", "").split(":"), "not found in $PATH"
    code = 127
    for place in places:
        mode = _mode(root, os.path.join(place, command))
        if stat.S_ISREG(mode) and mode & 0o111:
            return
        if mode and "/" in command:
            code = 126
            reason = "is a directory" if stat.S_ISDIR(mode) else "permission denied"
    raise runtime.RuntimeFailure(f'exec: "{command}": {reason}', exit_code=code)


def _mode(root: Path, path: str) -> int:
    """Type and permissions of a file in the container, 0 when it is not there."""
    try:
        descriptor = users.open_inside(root, path.lstrip("/") or ".", os.O_PATH)
    except OSError:
        return 0
    try:
        return os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)


def _plain(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
    return (code if code >= 0 else 128 - code), b""


def _on_terminal(
    start: Callable[..., subprocess.Popen[bytes]], console: str, request: Request
) -> tuple[int, bytes]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        listener.bind(console)
        listener.listen(1)
        null = subprocess.DEVNULL
        process = start(stdin=null, stdout=null, stderr=subprocess.PIPE, start_new_session=True)
        assert process.stderr is not None
        master = _receive_terminal(listener, process)
        if master is not None:
            detached = _Proxy(master, request).run()
            if detached:
                _keep_open(master)
                process.stderr.close()
                process.returncode = 0  # it goes on without us
                return 0, b""
            os.close(master)
        _, said = process.communicate()
    code = process.returncode
    return (code if code >= 0 else 128 - code), said


def _receive_terminal(listener: socket.socket, process: subprocess.Popen[bytes]) -> int | None:
    listener.settimeout(0.05)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if process.poll() is not None:
                return None
            continue
        with connection:
            connection.settimeout(None)
            _, descriptors, _, _ = socket.recv_fds(connection, 64, 1)
        return descriptors[0]


def _keep_open(master: int) -> None:
    """Whoever closes a terminal hangs up on its processes: a child holds it until they end."""
    if os.fork() != 0:
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    with contextlib.suppress(OSError):
        while os.read(master, CHUNK):
            pass
    os._exit(0)


class _Proxy:
    """Between this terminal and the one of the process. `run` is True when the user detached."""

    def __init__(self, master: int, request: Request) -> None:
        self._master = master
        self._stdin = request.interactive
        keys = terminal.parse_detach_keys(request.detach_keys or terminal.DETACH_KEYS)
        self._keys = terminal.DetachKeys(keys)

    def run(self) -> bool:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        handler = signal.signal(signal.SIGWINCH, lambda *_: None)
        try:
            with terminal.raw(self._stdin), selectors.DefaultSelector() as selector:
                selector.register(self._master, selectors.EVENT_READ)
                selector.register(reader, selectors.EVENT_READ)
                if self._stdin:
                    selector.register(0, selectors.EVENT_READ)
                self._resize()
                return self._loop(selector, reader)
        finally:
            signal.signal(signal.SIGWINCH, handler)
            signal.set_wakeup_fd(previous)
            os.close(reader)
            os.close(writer)

    def _loop(self, selector: selectors.BaseSelector, reader: int) -> bool:
        while True:
            for key, _ in selector.select():
                if key.fd == reader:
                    os.read(reader, CHUNK)
                    self._resize()
                elif key.fd == self._master:
                    data = _read(self._master)
                    if not data:
                        return False
                    terminal.write(1, data)
                else:
                    data = _read(0)
                    if not data:
                        selector.unregister(0)
                    passed, detach = self._keys.feed(data)
                    if passed:
                        os.write(self._master, passed)
                    if detach:
                        return True

    def _resize(self) -> None:
        if terminal.terminal_size() is not None:
            size = fcntl.ioctl(0 if os.isatty(0) else 1, termios.TIOCGWINSZ, bytes(8))
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, CHUNK)
    except OSError:  # EIO: the last holder of the terminal is gone
        return b""
