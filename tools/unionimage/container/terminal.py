"""The command's side of an attached container: terminal, keys to detach, signals passed on.

`attach` runs until the container has ended or the user detaches. The terminal is put back whatever
happens.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import selectors
import signal
import socket
import struct
import sys
import termios
import tty
from collections.abc import Iterator

from unionfuse.daemon import errand
from unionimage.container import wire
from unionimage.errors import UserError

DETACH_KEYS = "ctrl-p,ctrl-q"
CHUNK = 1 << 16
IMPATIENT = 3  # so many Ctrl-C end the command, whatever the container does
# Not passed on, save that the terminal is gone: that is for this process.
OWN_SIGNALS = errand.OWN_SIGNALS | {signal.SIGHUP}


def parse_detach_keys(text: str) -> bytes:
    """`ctrl-p,ctrl-q` as the bytes that a terminal sends. Raises UserError."""
    keys = bytearray()
    for key in text.split(","):
        match = re.fullmatch(r"ctrl-([a-z@\[\\\]^_])", key)
        if match:
            keys.append(ord(match.group(1).upper()) & 0x1F)
        elif len(key) == 1 and key.isascii():
            keys.append(ord(key))
        else:
            raise UserError(f"invalid detach keys {text!r}: write for example ctrl-p,ctrl-q")
    return bytes(keys)


class DetachKeys:
    """Finds the key sequence in what is typed, also over several reads."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._held = 0

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What to pass on, and whether the sequence is complete."""
        passed = bytearray()
        for byte in data:
            if byte == self._keys[self._held]:
                self._held += 1
                if self._held == len(self._keys):
                    return bytes(passed), True
                continue
            passed += self._keys[: self._held]
            self._held = 1 if byte == self._keys[0] else 0
            if not self._held:
                passed.append(byte)
        return bytes(passed), False


def terminal_size() -> tuple[int, int] | None:
    """Rows and columns of the terminal on stdin or stdout, None without one."""
    for descriptor in (0, 1):
        with contextlib.suppress(OSError):
            answer = fcntl.ioctl(descriptor, termios.TIOCGWINSZ, bytes(8))
            rows, columns, _, _ = struct.unpack("HHHH", answer)
            if rows and columns:
                return rows, columns
    return None


def require_terminal(interactive: bool, wants_tty: bool) -> None:
    """Docker's check: `-it` needs a terminal to type on. Raises UserError."""
    if interactive and wants_tty and not os.isatty(0):
        raise UserError("the input device is not a TTY: leave -t out", exit_code=1)


def request(*, stdin: bool, output: bool = True, stdout: bool = True, stderr: bool = True) -> bytes:
    """The line that attaches a connection."""
    what = {"op": "attach", "stdin": stdin, "stdout": output and stdout}
    return json.dumps(what | {"stderr": output and stderr}).encode() + b"\n"


class Attachment:
    """One attached connection. `run` returns the exit code, or None when the user detached."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        has_tty: bool,
        stdin: bool,
        detach_keys: str | None = None,
        sig_proxy: bool = True,
    ) -> None:
        self._socket = connection
        self._has_tty, self._stdin, self._sig_proxy = has_tty, stdin, sig_proxy
        self._keys = DetachKeys(parse_detach_keys(detach_keys or DETACH_KEYS))
        self._detachable = has_tty and os.isatty(0)
        self._interrupts = 0
        self._result: int | None = None
        self._over = False

    def run(self) -> int | None:
        frames = wire.Frames()
        with self._signals() as awoken, raw(self._has_tty and self._stdin):
            selector = selectors.DefaultSelector()
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(awoken, selectors.EVENT_READ)
            if self._stdin:
                try:
                    selector.register(0, selectors.EVENT_READ)
                except PermissionError:  # a regular file: always readable, epoll refuses it
                    self._send_file()
            if self._has_tty:
                self._resize()
            while not self._over:
                for key, _ in selector.select():
                    if key.fileobj is self._socket:
                        self._receive(frames)
                    elif key.fd == awoken:
                        self._take_signals(os.read(awoken, CHUNK))
                    elif not self._type():
                        selector.unregister(0)
        return self._result

    def _receive(self, frames: wire.Frames) -> None:
        try:
            data = self._socket.recv(CHUNK)
        except OSError:
            data = b""
        if not data:
            # the monitor was killed, or refused; what became of the container is in its state
            self._over = True
            self._result = 125 if self._result is None else self._result
        for kind, payload in frames.feed(data):
            if kind in (wire.STDOUT, wire.STDERR):
                write(1 if kind == wire.STDOUT else 2, payload)
            elif kind == wire.EXIT:
                self._result, self._over = payload[0], True

    def _type(self) -> bool:
        """Pass on what was typed; False at the end of the input."""
        try:
            data = os.read(0, CHUNK)
        except OSError:
            data = b""
        if not data:
            self._send(wire.frame(wire.END_OF_INPUT))
            return False
        detach = False
        if self._detachable:
            data, detach = self._keys.feed(data)
        if data:
            self._send(wire.frame(wire.STDIN, data))
        if detach:
            self._over = True
            self._result = None
        return True

    def _send_file(self) -> None:
        import threading

        def copy() -> None:
            while self._type():
                pass

        threading.Thread(target=copy, daemon=True).start()

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendall(data)

    def _resize(self) -> None:
        size = terminal_size()
        if size is not None:
            self._send(wire.frame(wire.RESIZE, struct.pack(">HH", *size)))

    def _take_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGWINCH:
                self._resize()
            elif number == signal.SIGHUP:
                self._over, self._result = True, 129
            elif number not in OWN_SIGNALS:
                self._send(wire.frame(wire.SIGNAL, bytes([number])))
                self._interrupts += number in (signal.SIGINT, signal.SIGTERM)
                if self._interrupts >= IMPATIENT:
                    self._over, self._result = True, 128 + number

    @contextlib.contextmanager
    def _signals(self) -> Iterator[int]:
        """A pipe that tells which signals came, while they are caught."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        caught = [signal.SIGHUP]
        if self._has_tty:
            caught.append(signal.SIGWINCH)
        if self._sig_proxy:
            caught += [
                number
                for number in signal.valid_signals()
                if number not in OWN_SIGNALS and isinstance(number, signal.Signals)
            ]
        old = {}
        for number in caught:
            with contextlib.suppress(OSError, ValueError):
                old[number] = signal.signal(number, lambda *_: None)
        try:
            yield reader
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous)
            os.close(reader)
            os.close(writer)


@contextlib.contextmanager
def raw(wanted: bool) -> Iterator[None]:
    """Every key goes to the container as it is typed."""
    if not wanted or not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSADRAIN)  # what was typed ahead is not thrown away
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def write(descriptor: int, data: bytes) -> None:
    sys.stdout.flush()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            import select

            select.select([], [descriptor], [])
