"""Docker's config.json: which credential belongs to which registry, and the helpers that keep them.

Format and helper protocol: https://docs.docker.com/reference/cli/docker/login/ and
https://github.com/docker/docker-credential-helpers. Keys of the file that are not ours are kept.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from typing import TYPE_CHECKING, Any

from unionimage.registry.errors import RegistryError, printable
from unionimage.tuples import NamedTuple

if TYPE_CHECKING:
    import subprocess

DOCKER_HUB = "docker.io"
_HUB_HOSTS = ("index.docker.io", "registry-1.docker.io")
DOCKER_HUB_KEY = "https://index.docker.io/v1/"
TOKEN_USER = "<token>"  # what helpers store as the name when the secret is an identity token
HELPER_TIMEOUT = 60  # seconds: a helper may ask the person something


class Credential(NamedTuple):
    """A name with a password, or a token in its place; none of the secrets shows in repr()."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:
        return f"Credential({self.username!r}, …)"


class CredentialFile:
    """`$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`.

    Args:
        path: another file.
    """

    def __init__(self, path: str | None = None) -> None:
        folder = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
        self.path = path or os.path.join(folder, "config.json")

    def get(self, host: str) -> Credential | None:
        """What is stored for the registry `host`, or None.

        Raises:
            RegistryError: the file is no JSON, or its credential helper is missing or fails.
        """
        config = self._read()
        helper = _helper(config, host)
        if helper:
            return _ask_helper(helper, _key(host))
        auths = _mapping(config, "auths")
        for key, entry in auths.items():
            if _host_of_key(key) == host and isinstance(entry, dict) and entry:
                return self._decode(key, entry)
        return None

    def put(self, host: str, credential: Credential) -> str | None:
        """Store a credential; returns the file's path if it lies there unencrypted, else None."""
        config = self._read()
        helper = _helper(config, host)
        auths = dict(_mapping(config, "auths"))
        for key in [key for key in auths if _host_of_key(key) == host]:
            del auths[key]
        if helper:
            _tell_helper(helper, _key(host), credential)
            auths[_key(host)] = {}  # as docker does: it lists what the helper keeps
            if _mapping(config, "auths") == auths:
                return None
        else:
            pair = f"{credential.username}:{credential.password}".encode()
            entry = {"auth": base64.b64encode(pair).decode()}
            if credential.identity_token:
                entry = {
                    "auth": base64.b64encode(f"{credential.username}:".encode()).decode(),
                    "identitytoken": credential.identity_token,
                }
            auths[_key(host)] = entry
        self._write({**config, "auths": auths})
        return None if helper else self.path

    def remove(self, host: str) -> bool:
        """Forget what is stored for `host`; False if there was nothing."""
        config = self._read()
        helper = _helper(config, host)
        auths = _mapping(config, "auths")
        left = {key: entry for key, entry in auths.items() if _host_of_key(key) != host}
        found = len(left) != len(auths)
        if helper:
            found = _ask_helper(helper, _key(host)) is not None or found
            _run_helper(helper, "erase", _key(host))
        if len(left) != len(auths):
            self._write({**config, "auths": left})
        return found

    def _read(self) -> dict[str, Any]:
        try:
            with open(self.path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RegistryError(self.path, error.strerror or str(error), "mend it") from error
        try:
            config = json.loads(data or b"{}")
        except (ValueError, RecursionError) as error:
            raise RegistryError(self.path, f"is no JSON: {error}", "mend or remove it") from error
        if not isinstance(config, dict):
            raise RegistryError(self.path, "is no JSON object", "mend or remove it")
        return config

    def _write(self, config: dict[str, Any]) -> None:
        """Replace the file in one step, readable by its owner only; a symlink to it is kept."""
        import tempfile

        path = os.path.realpath(self.path)
        folder = os.path.dirname(path)
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            descriptor, staged = tempfile.mkstemp(dir=folder, prefix=".config.json.")
        except OSError as error:
            raise RegistryError(folder, error.strerror or str(error), "make it writable") from error
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(config, file, indent="\t")
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
        except BaseException:
            os.unlink(staged)
            raise

    def _decode(self, key: str, entry: dict[str, Any]) -> Credential:
        username, password = str(entry.get("username", "")), str(entry.get("password", ""))
        if entry.get("auth"):
            try:
                pair = base64.b64decode(str(entry["auth"]), validate=True).decode()
            except (binascii.Error, ValueError) as error:
                raise RegistryError(
                    self.path,
                    f"holds no valid entry for {printable(key)}",
                    "use unionfuse login again",
                ) from error
            username, _, password = pair.partition(":")
        return Credential(
            username,
            password.rstrip("\0"),
            str(entry.get("identitytoken", "")),
            str(entry.get("registrytoken", "")),
        )


def registry_of(server: str | None) -> str:
    """The registry that a user means by SERVER: `https://HOST/v1/`, `HOST[:PORT]`, or nothing."""
    if not server:
        return DOCKER_HUB
    host = (server.partition("://")[2] if "://" in server else server).partition("/")[0].lower()
    if host in (DOCKER_HUB, *_HUB_HOSTS):
        return DOCKER_HUB
    if not host or "@" in host or not host.isprintable() or " " in host:
        raise RegistryError(printable(server), "is no registry", "give HOST[:PORT]")
    return host


def _key(host: str) -> str:
    return DOCKER_HUB_KEY if host == DOCKER_HUB else host


def _host_of_key(key: str) -> str:
    """The registry that a key of `auths` means: `https://HOST/v1/`, `HOST/`, `HOST`."""
    host = key.partition("://")[2] or key
    host = host.partition("/")[0].lower()
    return DOCKER_HUB if host in _HUB_HOSTS else host


def _mapping(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _helper(config: dict[str, Any], host: str) -> str | None:
    """The name of the credential helper in charge of `host`; None: the file itself."""
    for key, name in _mapping(config, "credHelpers").items():
        if _host_of_key(key) == host:
            return str(name)
    name = config.get("credsStore")
    return str(name) if name else None


def _run_helper(helper: str, action: str, text: str) -> subprocess.CompletedProcess[bytes]:
    import shutil
    import subprocess

    program = f"docker-credential-{helper}"
    if "/" in helper or shutil.which(program) is None:
        raise RegistryError(
            printable(program),
            "the credential helper named in config.json is not installed",
            "install it, or take its name out of config.json",
        )
    try:
        return subprocess.run(
            [program, action], input=text.encode(), capture_output=True, timeout=HELPER_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise RegistryError(
            program, f"{action} failed ({type(error).__name__})", "try it by hand"
        ) from error


def _ask_helper(helper: str, key: str) -> Credential | None:
    result = _run_helper(helper, "get", key)
    if result.returncode != 0:
        text = (result.stdout + result.stderr).decode(errors="replace")
        if "credentials not found" in text:
            return None
        raise RegistryError(
            f"docker-credential-{helper}", printable(text) or "get failed", "try it by hand"
        )
    try:
        answer = json.loads(result.stdout)
        username, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise RegistryError(
            f"docker-credential-{helper}", "its answer is no JSON", "try it by hand"
        ) from error
    if username == TOKEN_USER:
        return Credential(identity_token=secret)
    return Credential(username, secret)


def _tell_helper(helper: str, key: str, credential: Credential) -> None:
    secret = credential.identity_token or credential.password
    name = TOKEN_USER if credential.identity_token else credential.username
    text = json.dumps({"ServerURL": key, "Username": name, "Secret": secret})
    result = _run_helper(helper, "store", text)
    if result.returncode != 0:
        reason = printable((result.stdout + result.stderr).decode(errors="replace"))
        raise RegistryError(
            f"docker-credential-{helper}", reason or "store failed", "try it by hand"
        )
