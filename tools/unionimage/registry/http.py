"""Connections of `http.client` that are used again, and answers that are streams.

It knows nothing of redirects, attempts or secrets (see `transport`); what it adds to the library is
a pool, errors by what went wrong, and an end to what waits in other threads. urllib3 has all that
and costs twice as much to import as the rest of a small pull takes.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from unionimage.tuples import NamedTuple

if TYPE_CHECKING:
    import ssl
    from http.client import HTTPConnection, HTTPException, HTTPResponse
else:

    def _plain_client():
        """The module http.client as it is where there is no TLS: to import that takes 12 ms.

        What plain HTTP does not need, and what `_TlsConnection` does by itself. It stays here:
        others who import the module get it as a whole.
        """
        import http

        if "ssl" in sys.modules or "http.client" in sys.modules:
            import http.client

            return http.client
        sys.modules["ssl"] = None  # "there is none"
        try:
            import http.client
        finally:
            del sys.modules["ssl"]
        del sys.modules["http.client"]
        return vars(http).pop("client")

    _client = _plain_client()
    HTTPConnection, HTTPResponse = _client.HTTPConnection, _client.HTTPResponse
    HTTPException = _client.HTTPException

_MOST_IDLE = 8  # connections to one host
_IN_A_PATH = "/%:@!$&'()*+,;=~-._"

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


class Response:
    """An answer whose body is still to be read.

    Attributes:
        url: what was asked for.
        headers: by names in any case.
    """

    def __init__(
        self,
        answer: HTTPResponse,
        url: str,
        connection: HTTPConnection,
        give_back: Callable[[], None],
    ) -> None:
        self.url = url
        self.status = answer.status
        self.headers = answer.headers
        self._answer = answer
        self._connection = connection
        self._give_back = give_back

    def read1(self, size: int) -> bytes:
        """Some bytes of the body, at most `size`; none at its end.

        Raises:
            HttpError: it broke off, or is damaged.
            TimeoutError: nothing came for too long.
        """
        if size <= 0:
            return b""
        with _told():
            data = self._answer.read1(size)
        if not data and self._answer.length:
            raise HttpError("the answer ended early")
        return data

    def release(self) -> None:
        """Let the connection be used again if the body was read to its end, else close it."""
        answer = self._answer
        whole = answer.isclosed() if answer.chunked else answer.length == 0
        if not whole or answer.will_close:
            self.close()
            return
        answer.close()
        self._give_back()

    def close(self) -> None:
        """Close the connection, whatever it still holds."""
        self._answer.close()
        self._connection.close()


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
        self._idle: dict[Address, list[HTTPConnection]] = {}
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
        target, added = self._target(url, address)
        connection = self._take(address) or self._connect(address, patience)
        connected = connection.sock
        try:
            connected.settimeout(patience.send)
            refused: OSError | None = None
            with _told():
                try:
                    connection.request(method, target, body, {**added, **headers})
                except (BrokenPipeError, ConnectionResetError) as error:
                    refused = error  # what is refused early has often been answered
                connected.settimeout(patience.read)
                try:
                    answer = connection.getresponse()
                except (HTTPException, OSError):
                    if refused is not None:
                        raise refused from None
                    raise
        except BaseException:
            connection.close()
            raise
        return Response(answer, url, connection, lambda: self._give_back(address, connection))

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

    def _take(self, address: Address) -> HTTPConnection | None:
        while True:
            with self._lock:
                idle = self._idle.get(address)
                if not idle:
                    return None
                connection = idle.pop()
            if _is_alive(connection.sock):
                return connection
            connection.close()

    def _give_back(self, address: Address, connection: HTTPConnection) -> None:
        with self._lock:
            idle = self._idle.setdefault(address, [])
            if len(idle) < _MOST_IDLE and not self._aborted:
                idle.append(connection)
                return
        connection.close()

    def _connect(self, address: Address, patience: Patience) -> HTTPConnection:
        host, port = (self._proxy or address)[1:]
        made: HTTPConnection
        if address.scheme == "https":
            if self._tls is None:
                self._tls = self._make_tls()
            made = _TlsConnection(host, port, patience.send, self._tls, address.host)
            if self._proxy is not None:
                made.set_tunnel(address.host, address.port, self._proxy_headers)
        else:
            made = _Connection(host, port, patience.send)
        _open(made)
        self._sockets.add(made.sock)
        if self._aborted:
            made.close()
            raise HttpError("the transfer was stopped")
        return made

    def _target(self, url: str, address: Address) -> tuple[str, dict[str, str]]:
        """What to ask a connection for, and headers that the way there needs."""
        parts = urlsplit(url)
        target = quote(parts.path or "/", safe=_IN_A_PATH)
        if parts.query:
            target += "?" + quote(parts.query, safe=_IN_A_PATH + "?")
        if self._proxy is None or address.scheme == "https":
            return target, {}
        return f"http://{parts.netloc.rpartition('@')[2]}{target}", self._proxy_headers


class _Connection(HTTPConnection):
    """A connection that imports no tables of Unicode (3 ms) for a name in ASCII."""

    def connect(self) -> None:
        self._create_connection = _connect
        super().connect()


def _connect(address: tuple[str, int], *arguments: Any) -> socket.socket:
    host: Any = address[0].encode() if address[0].isascii() else address[0]
    return socket.create_connection((host, address[1]), *arguments)


class _TlsConnection(_Connection):
    """A connection, perhaps through a proxy, with TLS over it.

    Args:
        name: whom the certificate has to name.
    """

    default_port = 443

    def __init__(
        self, host: str, port: int, timeout: float, context: ssl.SSLContext, name: str
    ) -> None:
        super().__init__(host, port, timeout)
        self._context, self._name = context, name

    def connect(self) -> None:
        super().connect()
        self.sock: Any = self._context.wrap_socket(self.sock, server_hostname=self._name)


@contextmanager
def _told() -> Iterator[None]:
    """What the library raises about a request or an answer becomes an HttpError."""
    try:
        yield
    except OSError:  # some of which are HTTPExceptions, or ValueErrors, too
        raise
    except (HTTPException, ValueError) as error:
        raise HttpError(f"{type(error).__name__}: {error}") from None


def _open(connection: HTTPConnection) -> None:
    """Connect, through the proxy and TLS if there are such."""
    try:
        connection.connect()
    except (socket.gaierror, UnicodeError) as error:
        raise NameUnknown(str(error)) from None
    except HTTPException as error:
        connection.close()
        raise HttpError(f"{type(error).__name__}: {error}") from None
    except OSError as error:
        if str(error).startswith("Tunnel connection failed"):
            raise ProxyRefuses(f"the proxy refuses ({error})") from None
        if connection.sock is not None:  # there is a connection: it is what came then
            connection.close()
            raise
        if isinstance(error, TimeoutError):
            raise NoConnectionInTime(str(error)) from None
        raise NoConnection(error.strerror or str(error)) from None


def _is_alive(connected: socket.socket) -> bool:
    """Whether the other side has kept a connection, idle as it was."""
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return not poll.poll(0)


def _with_scheme(proxy: str) -> str:
    return proxy if "://" in proxy else f"http://{proxy}"


def _proxy_headers(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    if parts.username is None:
        return {}
    import base64

    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair).decode()}
