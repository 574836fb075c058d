"""HTTP as a registry needs it: time limits, back-off, and redirects that keep secrets at home.

This module knows nothing of images or of authentication: `auth` puts the Authorization header in,
and this module takes it out again when an answer leads to another host.
"""

from __future__ import annotations

import datetime
import email.utils
import ipaddress
import os
import random
import socket
import ssl
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InsecureRequestWarning,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from unionfuse import __version__
from unionimage.registry.errors import RegistryError, RegistryStatusError, printable

# Unverified connections are made where the user asked for them, and to loopback.
urllib3.disable_warnings(InsecureRequestWarning)

Response = urllib3.BaseHTTPResponse
Body = bytes | Callable[[], Iterator[bytes]] | None

CERTIFICATES = "/etc/docker/certs.d"
RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 5
MAX_ATTEMPTS = 5
LONGEST_PAUSE = 60.0  # seconds; a Retry-After beyond it is reported instead of waited for
ERROR_BODY_LIMIT = 64 * 1024
ERROR_BODY_SECONDS = 5.0
BUSY = 10  # times the stall limit that an answer to what was sent may take
SLOWEST = 64  # bytes a second over a whole stall limit; less counts as a stall


@dataclass(frozen=True)
class Limits:
    """How patient a transfer is: seconds to connect, seconds without a byte, tries, first pause."""

    connect: float = 10.0
    stall: float = 30.0
    attempts: int = MAX_ATTEMPTS
    pause: float = 0.5

    @classmethod
    def from_environment(cls) -> Limits:
        """The defaults, with `UNIONFUSE_REGISTRY_TIMEOUT` (seconds without a byte) applied."""
        text = os.environ.get("UNIONFUSE_REGISTRY_TIMEOUT")
        if not text:
            return cls()
        try:
            stall = float(text)
        except ValueError:
            stall = 0.0
        if not stall > 0:
            raise RegistryError(
                "UNIONFUSE_REGISTRY_TIMEOUT", f"{text!r} is no number of seconds", "unset it"
            )
        return cls(connect=min(stall, cls.connect), stall=stall)


def is_loopback(host: str) -> bool:
    """Whether `host` (a `HOST[:PORT]`) names this machine, judged by its text alone."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@dataclass
class Transport:
    """A connection pool to one registry, `HOST[:PORT]`.

    Plain HTTP and unverified certificates are used for the local host and where `insecure` says so,
    by docker's rule: TLS is tried first, and plain HTTP only if the other side does not speak it.
    """

    host: str
    insecure: bool = False
    limits: Limits = field(default_factory=Limits.from_environment)
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self.lenient = self.insecure or is_loopback(self.host)
        self._scheme: str | None = None
        self.aborted = False
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._pool = _pool_manager(self.host, self.lenient, self._sockets)
        # Hosts that a redirect leads to get strict TLS, whatever this registry's is.
        self._strict_pool: urllib3.PoolManager | None = None if self.lenient else self._pool

    def abort(self) -> None:
        """End every connection, in whatever thread it waits; nothing is sent or tried any more."""
        self.aborted = True
        for connected in list(self._sockets):
            try:
                with socket.socket(fileno=os.dup(connected.fileno())) as same:
                    same.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has just ended by itself

    def close(self) -> None:
        """Drop all idle connections."""
        self._pool.clear()
        if self._strict_pool is not None:
            self._strict_pool.clear()

    @property
    def base(self) -> str:
        """`https://HOST` or `http://HOST`; the first use asks the registry which one it speaks."""
        if self._scheme is None:
            self._scheme = self._find_scheme()
        return f"{self._scheme}://{self.host}"

    def is_home(self, url: str) -> bool:
        """Whether `url` belongs to this registry: same scheme, host and port."""
        return origin(url) == origin(self.base)

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body = None,
        attempts: int | None = None,
    ) -> Response:
        """Send one request and return the answer with its body unread, whatever its status.

        Cuts, stalls, 429 and 5xx are tried again with growing pauses (`Retry-After` is honoured).
        Redirects are followed for GET and HEAD (others: 307 and 308 within this registry). The
        Authorization header never leaves this registry's scheme, host and port. `body` given as a
        function is called anew for every attempt.

        Raises:
            RegistryError: no answer after all attempts, a redirect loop, or one away from TLS.
            RegistryStatusError: still 429 or 5xx after all attempts.
        """
        attempts = attempts or self.limits.attempts
        url = urljoin(self.base, url)
        attempt = 0
        while True:
            attempt += 1
            if self.aborted:
                raise RegistryError(self.host, "the transfer was stopped")
            try:
                response = self._follow(method, url, dict(headers or {}), body)
            except (HTTPError, OSError) as error:
                if attempt >= attempts or _is_final(error):
                    raise self.explain(error, url) from error
                self.pause(attempt)
                continue
            if response.status not in RETRIED_STATUSES:
                return response
            wait = _retry_after(response)
            problem = status_error(response, urlsplit(url).netloc)
            if attempt >= attempts or (wait or 0) > LONGEST_PAUSE:
                raise problem
            self.pause(attempt, wait)

    def read_all(self, response: Response, limit: int, what: str) -> bytes:
        """The whole body of `response`, refused when longer than `limit` bytes or too slow."""
        try:
            data = _read(response, limit + 1, self.limits.stall)
        except (HTTPError, OSError) as error:
            response.close()
            raise self.explain(error, self.base) from error
        if len(data) > limit:
            response.close()
            raise RegistryError(what, f"is longer than {limit} bytes", "tell its operator")
        response.release_conn()
        return data

    def pause(self, attempt: int, wait: float | None = None) -> None:
        """Wait before attempt `attempt` + 1: `wait` seconds, or twice as long each time."""
        if wait is None:
            wait = min(self.limits.pause * 2 ** (attempt - 1), LONGEST_PAUSE)
            wait *= 0.75 + random.random() / 2
        self.sleep(wait)

    def explain(self, error: Exception, url: str) -> RegistryError:
        """The user's error for a failed connection or transfer."""
        host = urlsplit(url).netloc or self.host
        cause = error.reason if isinstance(error, MaxRetryError) and error.reason else error
        if isinstance(cause, NameResolutionError):
            return RegistryError(host, "the name cannot be looked up", "check it, and the network")
        if isinstance(cause, NewConnectionError):
            reason = str(cause).rpartition("] ")[2] or "no connection"
            return RegistryError(
                host, f"cannot connect: {printable(reason)}", "check the address and the network"
            )
        if isinstance(cause, ConnectTimeoutError):
            return RegistryError(host, "no connection in time", "check the network, then try again")
        if isinstance(cause, (SSLError, ssl.SSLError)):
            return _explain_tls(host, cause)
        if isinstance(cause, (ReadTimeoutError, TimeoutError)):
            return RegistryError(
                host, f"no byte came for {self.limits.stall:g} seconds", "try again later"
            )
        if isinstance(cause, InsecureRedirect):
            return RegistryError(
                host,
                f"redirects from TLS to plain HTTP: {printable(str(cause))}",
                "its operator has to mend this",
            )
        if isinstance(cause, TooManyRedirects):
            return RegistryError(host, "redirects in a circle", "its operator has to mend this")
        return RegistryError(
            host, f"the connection broke ({printable(str(cause))})", "try again later"
        )

    def _follow(self, method: str, url: str, headers: dict[str, str], body: Body) -> Response:
        """One request and, for GET and HEAD, the redirects that answer it."""
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send(method, url, headers, body)
            response.url = url  # urllib3 knows the path alone
            location = response.headers.get("Location")
            if response.status not in REDIRECTS or not location:
                return response
            target = urljoin(url, location)
            if method not in ("GET", "HEAD") and not (
                response.status in (307, 308) and self.is_home(target)
            ):
                return response
            finish(response)
            if urlsplit(target).scheme not in ("http", "https"):
                raise InsecureRedirect(target)
            if url.startswith("https:") and target.startswith("http:"):
                raise InsecureRedirect(target)
            if not self.is_home(target):
                headers.pop("Authorization", None)
            url = target
        raise TooManyRedirects(url)

    def _send(self, method: str, url: str, headers: Mapping[str, str], body: Body) -> Response:
        pool = self._pool if self.is_home(url) else self._pool_for_strangers(url)
        limits = self.limits
        if method in ("GET", "HEAD"):
            timeout = urllib3.Timeout(connect=limits.connect, read=limits.stall)
        else:
            # The limit for connecting also holds for each send; and what was sent may keep a
            # registry busy (verifying, moving to its storage) before it answers.
            timeout = urllib3.Timeout(connect=limits.stall, read=limits.stall * BUSY)
        return pool.request(
            method,
            url,
            body=body() if callable(body) else body,
            headers={"User-Agent": f"unionfuse/{__version__}", **headers},
            timeout=timeout,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )

    def _pool_for_strangers(self, url: str) -> urllib3.PoolManager:
        if self.lenient and is_loopback(urlsplit(url).netloc):
            return self._pool
        if self._strict_pool is None:
            self._strict_pool = _pool_manager(urlsplit(url).netloc, False, self._sockets)
        return self._strict_pool

    def _find_scheme(self) -> str:
        if not self.lenient:
            return "https"
        try:
            self._probe("https")
        except (SSLError, ssl.SSLError, MaxRetryError, HTTPError, OSError) as error:
            cause = error.reason if isinstance(error, MaxRetryError) and error.reason else error
            if isinstance(cause, (ReadTimeoutError, ConnectTimeoutError, NameResolutionError)):
                raise self.explain(error, f"https://{self.host}/") from error
            return "http"
        return "https"

    def _probe(self, scheme: str) -> None:
        timeout = urllib3.Timeout(connect=self.limits.connect, read=self.limits.stall)
        answer = self._pool.request(
            "GET",
            f"{scheme}://{self.host}/v2/",
            redirect=False,
            timeout=timeout,
            preload_content=False,
        )
        finish(answer)


class InsecureRedirect(HTTPError):
    """A redirect from TLS to plain HTTP, or to something that is not HTTP."""


class TooManyRedirects(HTTPError):
    """More than `MAX_REDIRECTS` in a row."""


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of `url`: what has to be equal for a secret to be sent along."""
    parts = urlsplit(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
    return parts.scheme, (parts.hostname or "").lower(), port


def status_error(response: Response, subject: str) -> RegistryStatusError:
    """The user's error for an answer that is none of the expected ones; takes the body.

    Args:
        subject: what was asked for, as the message names it.
    """
    try:
        data = _read(response, ERROR_BODY_LIMIT, ERROR_BODY_SECONDS)
    except (HTTPError, OSError):
        data = b""
    finish(response)
    return RegistryStatusError.from_answer(
        subject, response.status, data, wait=_retry_after(response)
    )


def _read(response: Response, limit: int, patience: float) -> bytes:
    """At most `limit` bytes of the body; TimeoutError when it only trickles for `patience` s."""
    pace, parts, left = Pace(patience), [], limit
    while left > 0 and (data := response.read1(left)):
        pace.count(len(data))
        parts.append(data)
        left -= len(data)
    return b"".join(parts)


class Pace:
    """Tells a trickle from a transfer: under `SLOWEST` bytes a second over `window` seconds."""

    def __init__(self, window: float) -> None:
        self._window = window
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()
        self._bytes = 0

    def count(self, count: int) -> None:
        self._bytes += count
        elapsed = time.monotonic() - self._since
        if elapsed < self._window:
            return
        if self._bytes < SLOWEST * elapsed:
            raise TimeoutError("the transfer is next to standing still")
        self.restart()


def finish(response: Response) -> None:
    """Read the rest of a body, even an empty one, so that its connection can be used again."""
    try:
        if len(_read(response, ERROR_BODY_LIMIT, ERROR_BODY_SECONDS)) < ERROR_BODY_LIMIT:
            response.release_conn()
        else:
            response.close()
    except (HTTPError, OSError):
        response.close()


def _retry_after(response: Response) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date), if there is a valid one."""
    text = response.headers.get("Retry-After", "").strip()
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help: certificates, redirects, nobody there."""
    cause: Any = error.reason if isinstance(error, MaxRetryError) else error
    return isinstance(
        cause,
        (
            SSLError,
            ssl.SSLError,
            InsecureRedirect,
            TooManyRedirects,
            NameResolutionError,
            NewConnectionError,
            ConnectTimeoutError,
        ),
    )


def _explain_tls(host: str, error: Exception) -> RegistryError:
    text = str(error)
    if "WRONG_VERSION_NUMBER" in text or "record layer" in text:
        return RegistryError(
            host, "does not speak TLS", "use --insecure if you trust the network between"
        )
    reason = text.partition("certificate verify failed: ")[2].partition(" (_ssl")[0]
    return RegistryError(
        host,
        f"its certificate is not trusted ({printable(reason or text)})",
        f"put its authority into {CERTIFICATES}/{host}/ca.crt, or use --insecure",
    )


def _pool_manager(
    host: str, lenient: bool, sockets: weakref.WeakSet[socket.socket]
) -> urllib3.PoolManager:
    """A pool for `host`, through the proxy that the environment names (never for loopback).

    Args:
        sockets: is told of every connection.
    """
    manager = _plain_manager(host, lenient)
    manager.pool_classes_by_scheme = {
        scheme: _noting(pool, sockets) for scheme, pool in manager.pool_classes_by_scheme.items()
    }
    return manager


def _noting(pool: Any, sockets: weakref.WeakSet[socket.socket]) -> type[Any]:
    """The same kind of pool, whose connections note their sockets."""

    base: Any = pool.ConnectionCls

    def connect(connection: Any) -> None:
        base.connect(connection)
        sockets.add(connection.sock)

    noting = type(base.__name__, (base,), {"connect": connect})
    return type(pool.__name__, (pool,), {"ConnectionCls": noting})


def _plain_manager(host: str, lenient: bool) -> urllib3.PoolManager:
    context = _tls_context(host, lenient)
    proxy = None if is_loopback(host) else _proxy(host)
    if proxy is None:
        return urllib3.PoolManager(num_pools=8, maxsize=8, retries=False, ssl_context=context)
    return urllib3.ProxyManager(
        proxy, num_pools=8, maxsize=8, retries=False, ssl_context=context, proxy_ssl_context=None
    )


def _proxy(host: str) -> str | None:
    """What https_proxy, http_proxy, all_proxy and no_proxy say about `host`."""
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return None
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    if proxy_bypass(host):
        return None
    return proxies.get("https") or proxies.get("http") or proxies.get("all")


def _tls_context(host: str, lenient: bool) -> ssl.SSLContext:
    """TLS for `host`, with the authorities and client keys of /etc/docker/certs.d/HOST added."""
    if lenient:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = ssl.create_default_context()
    folder = os.path.join(CERTIFICATES, host)
    if "/" in host or not os.path.isdir(folder):
        return context
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        try:
            if name.endswith(".crt"):
                context.load_verify_locations(path)
            elif name.endswith(".cert"):
                context.load_cert_chain(path, path[: -len("cert")] + "key")
        except (OSError, ssl.SSLError) as error:
            raise RegistryError(path, f"cannot be used ({error})", "mend or remove it") from error
    return context
