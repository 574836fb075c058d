"""HTTP/1.1 (RFC 9112) as a client: connections that are used again, answers that are streams.

Plain sockets: the libraries for it cost more to import than a small image takes to pull. It knows
nothing of redirects, attempts or secrets (see `transport`); a proxy is all that it adds.
"""

from __future__ import annotations

import io
import os
import re
import select
import socket
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from unionimage.tuples import NamedTuple

if TYPE_CHECKING:
    import ssl

_LONGEST_LINE = 65536
_MOST_HEADERS = 100
_MOST_IDLE = 8  # connections to one host
_BUFFER = 1 << 16
_HAS_NO_BODY = (204, 304)

Sent = bytes | Iterator[bytes] | None


class HttpError(Exception):
    """No answer, or none that can be read; says what was wrong with it."""


class NameUnknown(HttpError):
    """The host's name cannot be looked up."""


class NoConnection(HttpError):
    """Nobody takes the connection; the argument is the reason."""


class ProxyRefuses(NoConnection):
    """The proxy does not let TLS through to there."""


class NoConnectionInTime(HttpError):
    """Nobody took the connection before the time was over."""


NOBODY_THERE = (NameUnknown, NoConnection, NoConnectionInTime)


class Patience(NamedTuple):
    """Seconds that may pass: to connect and for each send, and for each read of the answer."""

    send: float
    read: float


class Headers:
    """The headers of an answer, by names in any case."""

    def __init__(self) -> None:
        self._values: dict[str, list[str]] = {}

    def add(self, name: str, value: str) -> None:
        self._values.setdefault(name.lower(), []).append(value)

    def getlist(self, name: str) -> list[str]:
        return self._values.get(name.lower(), [])

    def get(self, name: str, default: str = "") -> str:
        """All values of that name, with commas between them."""
        values = self._values.get(name.lower())
        return default if values is None else ", ".join(values)

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._values


class Address(NamedTuple):
    """Where a URL leads."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Address:
        """Raises HttpError for what is no http or https URL."""
        try:
            parts = urlsplit(url)
            port = parts.port or {"https": 443, "http": 80}[parts.scheme]
            host = (parts.hostname or "").lower()
        except (ValueError, KeyError):
            raise HttpError("leads to an address that is none") from None
        if not host:
            raise HttpError("leads to an address that is none")
        return cls(parts.scheme, host, port)

    @property
    def authority(self) -> str:
        """`HOST:PORT` for CONNECT, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Response:
    """An answer whose body is still to be read.

    Attributes:
        url: what was asked for.
    """

    def __init__(self, connection: _Connection, url: str, has_body: bool) -> None:
        self.url = url
        self._connection: _Connection | None = connection
        version, self.status, self.headers = connection.read_head()
        words = self.headers.get("Connection").lower().replace(",", " ").split()
        self._reusable = "close" not in words and (version >= "HTTP/1.1" or "keep-alive" in words)
        self._chunked = False
        self._left: int | None = 0  # bytes of the body, or of this chunk; None: until the end
        if has_body and self.status not in _HAS_NO_BODY:
            self._frame()

    def _frame(self) -> None:
        coding = self.headers.get("Transfer-Encoding").lower().strip()
        lengths = {one.strip() for one in self.headers.get("Content-Length").split(",")} - {""}
        if coding:
            if coding != "chunked":
                raise HttpError(f"an answer with transfer coding {coding!r}")
            self._chunked = True
        elif lengths:
            (length, *others) = lengths
            if others or not (length.isascii() and length.isdigit()):
                raise HttpError("an answer with a Content-Length that is none")
            self._left = int(length[:20])
        else:
            self._left, self._reusable = None, False

    def read1(self, size: int) -> bytes:
        """Some bytes of the body, at most `size`; none at its end.

        Raises:
            HttpError: it broke off, or is damaged.
            TimeoutError: nothing came for too long.
        """
        connection = self._connection
        if connection is None:
            return b""
        if self._chunked and not self._left and not self._next_chunk(connection):
            return b""
        if self._left == 0 or size <= 0:
            return b""
        data = connection.file.read1(size if self._left is None else min(size, self._left))
        if self._left is not None:
            if not data:
                raise HttpError("the answer ended early")
            self._left -= len(data)
            if self._chunked and not self._left and connection.line():
                raise HttpError("a damaged answer (chunks)")
        return data

    def _next_chunk(self, connection: _Connection) -> bool:
        text = connection.line().partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", text):
            raise HttpError("a damaged answer (chunks)")
        self._left = int(text, 16)
        if self._left:
            return True
        connection.headers()  # trailers
        self._chunked = False
        return False

    def release(self) -> None:
        """Let the connection be used again if the body was read to its end, else close it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._reusable and self._left == 0 and not self._chunked:
                connection.give_back(connection)
            else:
                connection.close()

    def close(self) -> None:
        """Close the connection, whatever it still holds."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class _Connection:
    def __init__(self, connected: socket.socket, give_back: Callable[[_Connection], None]) -> None:
        self.socket = connected
        self.file = io.BufferedReader(socket.SocketIO(connected, "r"), _BUFFER)
        self.give_back = give_back

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def is_alive(self) -> bool:
        """Whether the other side has kept it, idle as it was."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return not poll.poll(0)

    def line(self) -> bytes:
        """The next line of the answer, without its end."""
        data = self.file.readline(_LONGEST_LINE)
        if not data.endswith(b"\n"):
            raise HttpError(
                "the answer ended early" if len(data) < _LONGEST_LINE else "a long line"
            )
        return data.rstrip(b"\r\n")

    def read_head(self) -> tuple[str, int, Headers]:
        """Version, status and headers of an answer; those that only announce one are skipped."""
        for _ in range(_MOST_HEADERS):
            match = re.match(rb"(HTTP/1\.\d) +(\d{3})(?: |$)", self.line())
            if match is None:
                raise HttpError("what answers does not speak HTTP")
            status, headers = int(match.group(2)), self.headers()
            if status >= 200:
                return match.group(1).decode(), status, headers
        raise HttpError("no answer, but announcements")

    def headers(self) -> Headers:
        headers = Headers()
        for _ in range(_MOST_HEADERS):
            line = self.line().decode("latin-1")
            if not line:
                return headers
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise HttpError("a damaged answer (headers)")
            headers.add(name, value.strip())
        raise HttpError("an answer of too many headers")

    def send(self, head: bytes, body: Sent) -> None:
        if body is None or isinstance(body, bytes):
            self.socket.sendall(head + (body or b""))
            return
        self.socket.sendall(head)
        for piece in body:
            self.socket.sendall(piece)


class Pool:
    """Connections to any host, each used again and again; safe for several threads.

    Args:
        tls: makes the TLS context when it is first needed.
        proxy: the URL of an HTTP proxy that all goes through.
    """

    def __init__(self, tls: Callable[[], ssl.SSLContext], proxy: str | None = None) -> None:
        self._make_tls = tls
        self._tls: ssl.SSLContext | None = None
        self._proxy = None if proxy is None else Address.of(_with_scheme(proxy))
        self._proxy_headers = {} if proxy is None else _proxy_headers(_with_scheme(proxy))
        if self._proxy is not None and self._proxy.scheme != "http":
            raise HttpError("a proxy has to be named by an http:// address")
        self._idle: dict[Address, list[_Connection]] = {}
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._aborted = False

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: Sent,
        patience: Patience,
    ) -> Response:
        """Send a request and wait for the head of its answer.

        Args:
            body: pieces need a Content-Length among the headers.

        Raises:
            HttpError: see its subclasses.
            TimeoutError: no byte for too long.
            OSError: the connection broke; of TLS, an `ssl.SSLError`.
        """
        address = Address.of(url)
        connection = self._take(address) or self._connect(address, patience)
        try:
            connection.socket.settimeout(patience.send)
            refused: OSError | None = None
            try:
                connection.send(self._head(method, url, address, headers, body), body)
            except (BrokenPipeError, ConnectionResetError) as error:
                refused = error  # what is refused early has often been answered
            connection.socket.settimeout(patience.read)
            try:
                return Response(connection, url, has_body=method != "HEAD")
            except (HttpError, OSError):
                if refused is not None:
                    raise refused from None
                raise
        except BaseException:
            connection.close()
            raise

    def abort(self) -> None:
        """End every connection, in whatever thread it waits, and make no more."""
        self._aborted = True
        for connected in list(self._sockets):
            try:  # not by its own method: that of TLS would change what the other thread reads
                with socket.socket(fileno=os.dup(connected.fileno())) as same:
                    same.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has just ended by itself

    def close(self) -> None:
        """Close all idle connections."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def _take(self, address: Address) -> _Connection | None:
        while True:
            with self._lock:
                idle = self._idle.get(address)
                if not idle:
                    return None
                connection = idle.pop()
            if connection.is_alive():
                return connection
            connection.close()

    def _connect(self, address: Address, patience: Patience) -> _Connection:
        def give_back(connection: _Connection) -> None:
            with self._lock:
                idle = self._idle.setdefault(address, [])
                if len(idle) < _MOST_IDLE and not self._aborted:
                    idle.append(connection)
                    return
            connection.close()

        connected = _connect(self._proxy or address, patience.send)
        try:
            self._note(connected)
            if self._proxy is not None and address.scheme == "https":
                connected.settimeout(patience.read)
                self._tunnel(connected, address)
            if address.scheme == "https":
                if self._tls is None:
                    self._tls = self._make_tls()
                connected = self._tls.wrap_socket(connected, server_hostname=address.host)
                self._note(connected)
            return _Connection(connected, give_back)
        except BaseException:
            connected.close()
            raise

    def _note(self, connected: socket.socket) -> None:
        self._sockets.add(connected)
        if self._aborted:
            raise HttpError("the transfer was stopped")

    def _tunnel(self, connected: socket.socket, address: Address) -> None:
        """Have the proxy connect us; nothing follows its answer until we speak."""
        lines = _lines(f"CONNECT {address.authority} HTTP/1.1", self._proxy_headers)
        connected.sendall(lines.replace(b"\r\n", f"\r\nHost: {address.authority}\r\n".encode(), 1))
        answered = _Connection(connected, lambda connection: None)
        try:
            _, status, _ = answered.read_head()
        finally:
            answered.file.close()
        if status != 200:
            raise ProxyRefuses(f"the proxy refuses ({status})")

    def _head(
        self, method: str, url: str, address: Address, headers: Mapping[str, str], body: Sent
    ) -> bytes:
        parts = urlsplit(url)
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        host = parts.netloc.rpartition("@")[2]
        sent = {"Host": host, "Accept-Encoding": "identity"}
        if self._proxy is not None and address.scheme == "http":
            target = f"http://{host}{target}"
            sent |= self._proxy_headers
        if isinstance(body, bytes) or (body is None and method in ("POST", "PUT", "PATCH")):
            sent["Content-Length"] = str(len(body or b""))
        return _lines(f"{method} {target} HTTP/1.1", {**sent, **headers})


def _lines(first: str, headers: Mapping[str, str]) -> bytes:
    lines = [first, *(f"{name}: {value}" for name, value in headers.items())]
    if any("\r" in line or "\n" in line for line in lines):
        raise HttpError("a line break where none may be")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _with_scheme(proxy: str) -> str:
    return proxy if "://" in proxy else f"http://{proxy}"


def _proxy_headers(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    if parts.username is None:
        return {}
    import base64

    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair).decode()}


def _connect(address: Address, seconds: float) -> socket.socket:
    """Connect to the first of a host's addresses that takes it."""
    # As bytes, or all of IDNA is imported to find that there is nothing to translate.
    host: str | bytes = address.host.encode() if address.host.isascii() else address.host
    try:
        found = _look_up(host, address.port)
    except (socket.gaierror, UnicodeError) as error:
        raise NameUnknown(str(error)) from None
    problem: Exception | None = None
    for family, kind, protocol, _, where in found:
        made = socket.socket(family, kind, protocol)
        try:
            made.settimeout(seconds)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.connect(where)
            return made
        except TimeoutError as error:
            made.close()
            problem = problem or NoConnectionInTime(str(error))
        except OSError as error:
            made.close()
            problem = problem or NoConnection(error.strerror or str(error))
        except BaseException:
            made.close()
            raise
    raise problem or NoConnection("it has no address")


def _look_up(host: str | bytes, port: int) -> Iterable[tuple[int, int, int, str, tuple[object]]]:
    return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)  # type: ignore[return-value]
