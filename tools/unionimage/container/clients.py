"""The connections of a container's monitor: commands that ask, and terminals that are attached."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

from unionimage.container import wire
from unionimage.errors import UserError

CHUNK = 1 << 16
SLOW = 1 << 20  # bytes unsent to a client above which the container has to wait


class Client:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.attached = self.stdin = self.stdout = self.stderr = False
        self.waits = False  # for the exit code
        self.received = b""
        self.frames = wire.Frames()
        self.unsent = bytearray()


class Clients:
    """All of them, served in the monitor's loop.

    Args:
        answer: does what a request asks; a UserError is sent back.
        take: gets a frame of an attached client: who, kind, payload.
        gone: told of each connection that ended.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        answer: Callable[[Client, dict[str, Any]], None],
        take: Callable[[Client, int, bytes], None],
        gone: Callable[[Client], None],
    ) -> None:
        self._selector = selector
        self._answer, self._take, self._gone = answer, take, gone
        self._clients: list[Client] = []

    def __iter__(self) -> Iterator[Client]:
        return iter(list(self._clients))

    @property
    def slow(self) -> bool:
        """Whether somebody reads so slowly that more output would only pile up."""
        return any(len(client.unsent) > SLOW for client in self._clients)

    @property
    def unsent(self) -> bool:
        return any(client.unsent for client in self._clients)

    def listen(self, server: socket.socket) -> None:
        """Take every connection that comes."""

        def accept(_: int) -> None:
            with contextlib.suppress(BlockingIOError):
                connection, _address = server.accept()
                self.add(connection)

        self._selector.register(server, selectors.EVENT_READ, accept)

    def add(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        client = Client(connection)
        self._clients.append(client)
        self._selector.register(
            connection, selectors.EVENT_READ, lambda mask: self._serve(client, mask)
        )

    def drop(self, client: Client) -> None:
        if client not in self._clients:
            return
        self._clients.remove(client)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client.socket)
        client.socket.close()
        self._gone(client)

    def send(self, client: Client, data: bytes) -> None:
        """Now, or as soon as the other side takes it."""
        client.unsent += data
        try:
            while client.unsent:
                sent = client.socket.send(client.unsent)
                del client.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.drop(client)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        known = self._selector.get_key(client.socket)
        if known.events != wanted:
            self._selector.modify(client.socket, wanted, known.data)

    def reply(self, client: Client, answer: dict[str, Any]) -> None:
        self.send(client, json.dumps(answer).encode() + b"\n")

    def _serve(self, client: Client, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self.send(client, b"")
        if not mask & selectors.EVENT_READ or client not in self._clients:
            return
        try:
            data = client.socket.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(client)
            return
        try:
            self._understand(client, data)
        except (ValueError, KeyError, TypeError, struct.error):
            self.drop(client)

    def _understand(self, client: Client, data: bytes) -> None:
        if not client.attached:
            client.received += data
            line, newline, data = client.received.partition(b"\n")
            if not newline:
                return
            client.received = b""
            try:
                self._answer(client, json.loads(line))
            except UserError as error:
                self.reply(client, {"error": error.message})
        if client.attached:
            for kind, payload in client.frames.feed(data):
                self._take(client, kind, payload)
