"""HTTP as a registry needs it: time limits, back-off, and redirects that keep secrets at home.

This module knows nothing of images or of authentication: `auth` puts the Authorization header in,
and this module takes it out again when an answer leads to another host.
"""

from __future__ import annotations

import ipaddress
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from unionfuse import __version__
from unionimage.registry import http
from unionimage.registry.errors import RegistryError, RegistryStatusError, printable
from unionimage.registry.http import HttpError, Response
from unionimage.tuples import NamedTuple

if TYPE_CHECKING:
    import ssl

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


class Limits(NamedTuple):
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
        return cls(connect=min(stall, cls().connect), stall=stall)


def is_loopback(host: str) -> bool:
    """Whether `host` (a `HOST[:PORT]`) names this machine, judged by its text alone."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Transport:
    """A connection pool to one registry, `HOST[:PORT]`.

    Plain HTTP and unverified certificates are used for the local host and where `insecure` says so.
    Elsewhere than on the local host TLS is tried first (docker's rule), and plain HTTP only if the
    other side does not speak it; on it plain HTTP is, which nobody can overhear. None of this where
    `scheme` is given: http or https.
    """

    def __init__(
        self,
        host: str,
        insecure: bool = False,
        limits: Limits | None = None,
        sleep: Callable[[float], None] = time.sleep,
        scheme: str | None = None,
    ) -> None:
        self.host = host
        self.insecure = insecure
        self.limits = limits or Limits.from_environment()
        self.sleep = sleep
        self.scheme = scheme
        self._finding = threading.Lock()
        self.lenient = self.insecure or is_loopback(self.host)
        self.aborted = False
        self._pool = _pool(self.host, self.lenient)
        # Hosts that a redirect leads to get strict TLS, whatever this registry's is.
        self._strict_pool: http.Pool | None = None if self.lenient else self._pool

    def abort(self) -> None:
        """End every connection, in whatever thread it waits; nothing is sent or tried any more."""
        self.aborted = True
        self._pool.abort()
        if self._strict_pool is not None:
            self._strict_pool.abort()

    def close(self) -> None:
        """Drop all idle connections."""
        self._pool.close()
        if self._strict_pool is not None:
            self._strict_pool.close()

    @property
    def base(self) -> str:
        """`https://HOST` or `http://HOST`; the first use asks the registry which one it speaks."""
        with self._finding:
            if self.scheme is None:
                self.scheme = self._find_scheme()
        return f"{self.scheme}://{self.host}"

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
            except (HttpError, OSError) as error:
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
        except (HttpError, OSError) as error:
            response.close()
            raise self.explain(error, self.base) from error
        if len(data) > limit:
            response.close()
            raise RegistryError(what, f"is longer than {limit} bytes", "tell its operator")
        response.release()
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
        if isinstance(error, http.NameUnknown):
            return RegistryError(host, "the name cannot be looked up", "check it, and the network")
        if isinstance(error, http.NoConnection):
            return RegistryError(
                host,
                f"cannot connect: {printable(str(error))}",
                "check the address and the network",
            )
        if isinstance(error, http.NoConnectionInTime):
            return RegistryError(host, "no connection in time", "check the network, then try again")
        if _is_of_tls(error):
            return _explain_tls(host, error)
        if isinstance(error, TimeoutError):
            return RegistryError(
                host, f"no byte came for {self.limits.stall:g} seconds", "try again later"
            )
        if isinstance(error, InsecureRedirect):
            return RegistryError(
                host,
                f"redirects from TLS to plain HTTP: {printable(str(error))}",
                "its operator has to mend this",
            )
        if isinstance(error, TooManyRedirects):
            return RegistryError(host, "redirects in a circle", "its operator has to mend this")
        return RegistryError(
            host, f"the connection broke ({printable(str(error))})", "try again later"
        )

    def _follow(self, method: str, url: str, headers: dict[str, str], body: Body) -> Response:
        """One request and, for GET and HEAD, the redirects that answer it."""
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send(method, url, headers, body)
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
        patience = http.Patience(limits.connect, limits.stall)
        if method not in ("GET", "HEAD"):
            # What was sent may keep a registry busy (verifying, moving to its storage) before it
            # answers.
            patience = http.Patience(limits.stall, limits.stall * BUSY)
        return pool.request(
            method,
            url,
            {"User-Agent": f"unionfuse/{__version__}", **headers},
            body() if callable(body) else body,
            patience,
        )

    def _pool_for_strangers(self, url: str) -> http.Pool:
        if self.lenient and is_loopback(urlsplit(url).netloc):
            return self._pool
        if self._strict_pool is None:
            self._strict_pool = _pool(urlsplit(url).netloc, False)
        return self._strict_pool

    def _find_scheme(self) -> str:
        if not self.lenient:
            return "https"
        if is_loopback(self.host) and self._speaks("http"):
            return "http"  # without the cost of TLS, and of a greeting that is not understood
        return "https" if self._speaks("https") else "http"

    def _speaks(self, scheme: str) -> bool:
        """Whether there is a registry that is spoken to so. No secret is sent.

        Raises:
            RegistryError: nobody is there.
        """
        url = f"{scheme}://{self.host}/v2/"
        patience = http.Patience(self.limits.connect, self.limits.stall)
        try:
            answer = self._pool.request("GET", url, {}, None, patience)
        except http.ProxyRefuses:
            return False
        except (*http.NOBODY_THERE, TimeoutError) as error:
            raise self.explain(error, url) from error
        except (HttpError, OSError):
            return False
        finish(answer)
        # What speaks TLS answers a plain request with a 400, or leads away.
        return scheme == "https" or answer.status not in {400, *REDIRECTS}


class InsecureRedirect(HttpError):
    """A redirect from TLS to plain HTTP, or to something that is not HTTP."""


class TooManyRedirects(HttpError):
    """More than `MAX_REDIRECTS` in a row."""


def origin(url: str) -> http.Address:
    """Scheme, host and port of `url`: what has to be equal for a secret to be sent along."""
    return http.Address.of(url)


def status_error(response: Response, subject: str) -> RegistryStatusError:
    """The user's error for an answer that is none of the expected ones; takes the body.

    Args:
        subject: what was asked for, as the message names it.
    """
    try:
        data = _read(response, ERROR_BODY_LIMIT, ERROR_BODY_SECONDS)
    except (HttpError, OSError):
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
            response.release()
        else:
            response.close()
    except (HttpError, OSError):
        response.close()


def _retry_after(response: Response) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date), if there is a valid one."""
    text = response.headers.get("Retry-After", "").strip()
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:9])
    import datetime
    import email.utils

    try:
        moment = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help: certificates, redirects, nobody there."""
    final = (InsecureRedirect, TooManyRedirects, *http.NOBODY_THERE)
    return isinstance(error, final) or _is_of_tls(error)


def _is_of_tls(error: Exception) -> bool:
    """Whether TLS raised it, which is imported where it is used."""
    tls = sys.modules.get("ssl")
    return tls is not None and isinstance(error, tls.SSLError)


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


def _pool(host: str, lenient: bool) -> http.Pool:
    """A pool for `host`, through the proxy that the environment names (never for loopback)."""
    proxy = None if is_loopback(host) else _proxy(host)
    try:
        return http.Pool(lambda: _tls_context(host, lenient), proxy)
    except HttpError as error:
        raise RegistryError(printable(str(proxy)), str(error), "mend https_proxy") from None


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
    import ssl

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
