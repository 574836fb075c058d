"""How commands and a container's monitor talk over its socket.

A client sends one JSON line. `{"op": "attach", …}` turns the connection into frames both ways:
a byte for the kind, four for the length (big endian), the payload. Every other request is answered
by one JSON line.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from unionimage.errors import UserError

STDIN, STDOUT, STDERR, END_OF_INPUT, RESIZE, SIGNAL, EXIT = range(7)
HEADER = struct.Struct(">BI")
LARGEST = 1 << 20


def frame(kind: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, len(payload)) + payload


class Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The frames that are complete with `data`. Raises ValueError for nonsense."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            kind, length = HEADER.unpack_from(self._buffer)
            if length > LARGEST:
                raise ValueError("frame too long")
            if len(self._buffer) < HEADER.size + length:
                return
            payload = bytes(self._buffer[HEADER.size : HEADER.size + length])
            del self._buffer[: HEADER.size + length]
            yield kind, payload


def connect(path: str) -> socket.socket:
    """Connect to a monitor. Raises OSError when none listens."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_CLOEXEC)
    try:
        # through /proc the path is short enough for sun_path, wherever the directory is
        client.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    except OSError:
        client.close()
        raise
    finally:
        os.close(directory)
    return client


def listen(path: str) -> socket.socket:
    """A listening socket at `path`, for its owner only."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_CLOEXEC)
    try:
        if os.path.lexists(path):
            os.unlink(path)
        server.bind(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        os.chmod(path, 0o600)
    finally:
        os.close(directory)
    server.listen(64)
    server.setblocking(False)
    return server


def ask(path: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Send one request and wait for its answer.

    Raises UserError with what the monitor refuses, ConnectionError when it is gone.
    """
    try:
        client = connect(path)
    except OSError as error:
        raise ConnectionError(str(error)) from None
    with client:
        client.sendall(json.dumps(request).encode() + b"\n")
        data = b""
        while not data.endswith(b"\n"):
            part = client.recv(1 << 16)
            if not part:
                raise ConnectionError("the monitor ended")
            data += part
    answer: dict[str, Any] = json.loads(data)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer
