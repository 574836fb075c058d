"""Who we are to a registry: challenges, basic auth, bearer tokens.

Follows RFC 7235 (challenges), RFC 7617 (basic) and docker's token protocol
(https://distribution.github.io/distribution/spec/auth/token/ and …/oauth/).

Stored passwords go to the registry that they are stored for, and to a token server of the same host
or domain; to any other token server only if the configuration trusts it. A token goes to the
registry that asked for it and nowhere else.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode, urlsplit

from unionimage.json_object import NO_MAP
from unionimage.registry.credentials import Credential
from unionimage.registry.errors import RegistryError, printable
from unionimage.registry.transport import Transport, is_loopback, status_error
from unionimage.tuples import NamedTuple

TOKEN_LIMIT = 1024 * 1024
SHORTEST_LIFE = 60.0  # seconds; what the protocol says a token without expires_in lives
CLIENT = "unionfuse"

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_PARAMETER = re.compile(rf'\s*({_TOKEN})\s*=\s*("(?:[^"\\]|\\.)*"|[^\s,"]+)\s*')
_SCHEME = re.compile(rf"\s*({_TOKEN})(?=\s|,|$)")


class Challenge(NamedTuple):
    """One entry of a WWW-Authenticate header: the scheme in lower case and its parameters."""

    scheme: str
    parameters: Mapping[str, str] = NO_MAP


def parse_challenges(header: str) -> list[Challenge]:
    """The challenges in a WWW-Authenticate header; what cannot be read ends the list."""
    challenges: list[Challenge] = []
    position = 0
    while position < len(header):
        scheme = _SCHEME.match(header, position)
        if scheme is None:
            break
        position = scheme.end()
        parameters: dict[str, str] = {}
        while match := _PARAMETER.match(header, position):
            name, value = match.groups()
            if value.startswith('"'):
                value = re.sub(r"\\(.)", r"\1", value[1:-1])
            parameters.setdefault(name.lower(), value)
            position = match.end()
            if position < len(header) and header[position] != ",":
                break
            position += 1
        challenges.append(Challenge(scheme.group(1).lower(), parameters))
        while position < len(header) and header[position] in " \t,":
            position += 1
    return challenges


class Token(NamedTuple):
    """A bearer token and the `time.monotonic()` after which it is not used any more."""

    text: str
    expires: float

    def __repr__(self) -> str:
        return "Token(…)"


class Authorizer:
    """Answers the challenges of one registry; safe for several threads.

    Args:
        transport: the registry's own connection.
        credential: what is stored for the registry, or None for anonymous access.
        trusted_realms: hosts of token servers elsewhere that may see the credential.
    """

    def __init__(
        self,
        transport: Transport,
        credential: Credential | None,
        trusted_realms: Sequence[str] = (),
    ) -> None:
        self.transport = transport
        self.credential = credential
        self.trusted_realms = frozenset(trusted_realms)
        self._challenge: Challenge | None = None
        self._tokens: dict[str, Token] = {}
        self._lock = threading.Lock()
        self._realms: dict[str, Transport] = {}

    def close(self) -> None:
        """Drop the connections to token servers."""
        for transport in self._realms.values():
            transport.close()

    def header(self, scopes: Iterable[str]) -> str | None:
        """The Authorization header for a request, or None while the registry has not asked for one.

        Raises:
            RegistryError: the token server refuses or cannot be used.
        """
        with self._lock:
            if self._challenge is None:
                return None
            if self._challenge.scheme == "basic":
                return self._basic()
            return f"Bearer {self._token(self._challenge, scopes).text}"

    def renew(
        self, challenges: Sequence[Challenge], scopes: Iterable[str], used: str | None
    ) -> bool:
        """Take note of the challenges of a 401; False if there is nothing to try another time.

        Args:
            used: the Authorization header of the request that was refused.
        """
        known = {challenge.scheme: challenge for challenge in reversed(challenges)}
        with self._lock:
            if "bearer" in known:
                self._challenge = known["bearer"]
                key = _scope_key(scopes)
                token = self._tokens.get(key)
                if token is not None and used == f"Bearer {token.text}":
                    del self._tokens[key]
                return True
            if "basic" in known and self.credential is not None and self.credential.password:
                self._challenge = known["basic"]
                return used != self._basic()
            return False

    def _basic(self) -> str:
        credential = self.credential
        assert credential is not None
        pair = f"{credential.username}:{credential.password}".encode()
        return "Basic " + base64.b64encode(pair).decode()

    def _token(self, challenge: Challenge, scopes: Iterable[str]) -> Token:
        scopes = list(scopes)
        key = _scope_key(scopes)
        token = self._tokens.get(key)
        if token is None or token.expires <= time.monotonic():
            token = self._fetch(challenge, scopes)
            self._tokens[key] = token
        return token

    def _fetch(self, challenge: Challenge, scopes: list[str]) -> Token:
        if self.credential is not None and self.credential.registry_token:
            return Token(self.credential.registry_token, float("inf"))
        realm = challenge.parameters.get("realm", "")
        transport = self._realm_transport(realm)
        service = challenge.parameters.get("service", "")
        credential = self._credential_for(realm)
        if credential is not None and credential.identity_token:
            response = transport.request(
                "POST",
                realm,
                headers={"Content-Type": "application/x-www-form-urlencoded"},
                body=urlencode(
                    {
                        "grant_type": "refresh_token",
                        "refresh_token": credential.identity_token,
                        "service": service,
                        "client_id": CLIENT,
                        "scope": " ".join(scopes),
                    }
                ).encode(),
            )
        else:
            query = [("service", service)] if service else []
            query += [("scope", scope) for scope in scopes]
            headers = {}
            if credential is not None:
                query.append(("account", credential.username))
                headers["Authorization"] = self._basic()
            separator = "&" if urlsplit(realm).query else "?"
            url = f"{realm}{separator}{urlencode(query)}" if query else realm
            response = transport.request("GET", url, headers=headers)
        if response.status != 200:
            problem = status_error(response, transport.host)
            if problem.status in (401, 403) and credential is not None:
                raise RegistryError(
                    self.transport.host,
                    "unauthorized: incorrect username or password",
                    "log in again",
                ) from problem
            raise problem
        data = transport.read_all(response, TOKEN_LIMIT, f"{transport.host}: token")
        return _read_token(data, transport.host)

    def _realm_transport(self, realm: str) -> Transport:
        """A connection to the token server; plain HTTP only where the registry may use it."""
        parts = urlsplit(realm)
        host = self.transport.host
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise RegistryError(
                host,
                f"names a token server that is none ({printable(realm)!r})",
                "tell its operator",
            )
        plain = parts.scheme == "http"
        if plain and not is_loopback(parts.netloc) and not self.transport.insecure:
            raise RegistryError(
                host,
                f"wants to authenticate over plain HTTP at {printable(parts.netloc)}",
                "use --insecure if you trust the network between",
            )
        if parts.netloc == host and self.transport.base == f"{parts.scheme}://{host}":
            return self.transport
        transport = self._realms.get(parts.netloc)
        if transport is None:
            lenient = self.transport.insecure and _same_site(parts.hostname, host)
            transport = Transport(
                parts.netloc,
                lenient,
                limits=self.transport.limits,
                sleep=self.transport.sleep,
                scheme=parts.scheme,
            )
            self._realms[parts.netloc] = transport
        return transport

    def _credential_for(self, realm: str) -> Credential | None:
        """The credential, if the token server at `realm` may see it."""
        if self.credential is None:
            return None
        parts = urlsplit(realm)
        name = parts.hostname or ""
        if _same_site(name, self.transport.host) or {name, parts.netloc} & self.trusted_realms:
            return self.credential
        raise RegistryError(
            self.transport.host,
            f"wants your password sent to another site, {printable(parts.netloc)}",
            "if that is right, add it to token-realms in the configuration",
        )


def _scope_key(scopes: Iterable[str]) -> str:
    return " ".join(sorted(scopes))


def _same_site(name: str, host: str) -> bool:
    """Whether a token server belongs to a registry: the same host, or under the same domain.

    `auth.docker.io` belongs to `registry-1.docker.io` and `gitlab.com` to `registry.gitlab.com`. A
    domain has to have two labels at least; addresses have to be equal.
    """
    name = name.lower()
    own = (urlsplit(f"//{host}").hostname or "").lower()
    if name == own:
        return True
    if is_loopback(name) or is_loopback(own) or own.replace(".", "").isdigit() or ":" in own:
        return False
    domain = own.partition(".")[2] if own.count(".") >= 2 else own
    return name == domain or name.endswith("." + domain)


def _read_token(data: bytes, host: str) -> Token:
    try:
        answer: Any = json.loads(data)
        text = answer.get("token") or answer.get("access_token")
        life = float(answer.get("expires_in") or SHORTEST_LIFE)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise RegistryError(
            host, "its token server's answer is no JSON", "try again later"
        ) from error
    if not isinstance(text, str) or not text or not re.fullmatch(r"[\x21-\x7e]+", text):
        raise RegistryError(host, "its token server gave no token", "try again later")
    return Token(text, time.monotonic() + max(life * 0.9, 1.0))
