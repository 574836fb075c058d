"""`RUN --mount=…`: one flag's text becomes a `RunMount`.

Source: Dockerfile reference, "RUN --mount".
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable

from unionimage.dockerfile.parser import DockerfileError
from unionimage.tuples import NamedTuple

_SIZE = r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?"
_OWN_KEYS = {
    "bind": {"from", "source", "target", "readonly"},
    "cache": {"from", "source", "target", "readonly", "id", "sharing", "mode", "uid", "gid"},
    "tmpfs": {"target", "size"},
    "secret": {"source", "target", "id", "required", "mode", "uid", "gid", "env"},
}
_ALIASES = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}


class RunMount(NamedTuple):
    """One mount of a RUN step.

    Attributes:
        type: bind, cache, tmpfs or secret.
        source_stage: `from=`: a stage or an image; empty: the build context, or for caches nothing.
        source: the path within it, without leading `/`.
        target: where it is mounted; empty for a secret that is only a variable.
        id: names a cache, or a secret.
        size: of a tmpfs in bytes; 0: no limit.
        mode, uid, gid: of a cache directory or a secret's file.
    """

    type: str
    source_stage: str = ""
    source: str = ""
    target: str = ""
    read_only: bool = True
    id: str = ""
    sharing: str = "shared"
    required: bool = False
    size: int = 0
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    env: str = ""


def parse_mount(text: str, expand: Callable[[str], str]) -> RunMount:
    """Parse the value of a `--mount` flag; raises DockerfileError."""
    fields = _fields(text, expand)
    kind = fields.pop("type", "bind").lower()
    if kind == "ssh":
        raise DockerfileError("--mount=type=ssh is not offered; use type=secret for a key")
    if kind not in _OWN_KEYS:
        raise DockerfileError(f"--mount=type={kind}: it is bind, cache, tmpfs or secret")
    for key in fields.keys() - _OWN_KEYS[kind]:
        raise DockerfileError(f"--mount={text}: {key!r} is not for type={kind}")
    if kind == "secret":
        return _secret(text, fields)
    target = fields.get("target", "")
    if not target:
        raise DockerfileError(f"--mount={text}: it needs target=")
    read_only = fields.get("readonly")
    sharing = fields.get("sharing", "shared").lower()
    if sharing not in ("shared", "private", "locked"):
        raise DockerfileError(f"--mount={text}: sharing is shared, private or locked")
    return RunMount(
        kind,
        source_stage=fields.get("from", ""),
        source=posixpath.normpath("/" + fields.get("source", "")).lstrip("/"),
        target=target,
        read_only=kind == "bind" if read_only is None else _truth("readonly", read_only),
        id=fields.get("id", "") or posixpath.normpath(target),
        sharing=sharing,
        size=_size(fields.get("size", "0")),
        mode=_number(fields, "mode", 8, 0o755),
        uid=_number(fields, "uid", 10, 0),
        gid=_number(fields, "gid", 10, 0),
    )


def _secret(text: str, fields: dict[str, str]) -> RunMount:
    if "source" in fields and "id" in fields:
        raise DockerfileError(f"--mount={text}: a secret has either id or source")
    target = fields.get("target", "")
    name = fields.get("id") or fields.get("source") or posixpath.basename(target)
    env = fields.get("env", "")
    if not name:
        raise DockerfileError(f"--mount={text}: a secret needs id= or target=")
    if not target and not env:
        target = "/run/secrets/" + posixpath.basename(name)
    return RunMount(
        "secret",
        target=target,
        id=name,
        required=_truth("required", fields.get("required", "false")),
        mode=_number(fields, "mode", 8, 0o400),
        uid=_number(fields, "uid", 10, 0),
        gid=_number(fields, "gid", 10, 0),
        env=env,
    )


def _fields(text: str, expand: Callable[[str], str]) -> dict[str, str]:
    """The key=value pairs; the text is a line of CSV, so values may be quoted."""
    import csv

    try:
        (row,) = csv.reader([text], strict=True)
    except (csv.Error, ValueError) as error:
        raise DockerfileError(f"--mount={text}: {error}") from None
    found: dict[str, str] = {}
    for field in row:
        key, has_value, value = field.partition("=")
        key = key.lower()
        if not has_value:
            if key not in ("ro", "readonly", "rw", "readwrite", "required"):
                raise DockerfileError(f"--mount={text}: {field!r} is not key=value")
            value = "true"
        elif key != "from":
            value = expand(value)
        if key in ("rw", "readwrite"):
            key, value = "readonly", "false" if _truth(key, value) else "true"
        key = _ALIASES.get(key, key)
        if key != "type" and not any(key in own for own in _OWN_KEYS.values()):
            raise DockerfileError(f"--mount={text}: unknown key {key!r}")
        found[key] = value
    return found


def _truth(key: str, text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "t", "f"):
        raise DockerfileError(f"--mount: {key} is true or false, not {text!r}")
    return text.lower() in ("true", "1", "t")


def _number(fields: dict[str, str], key: str, base: int, default: int) -> int:
    text = fields.get(key)
    if text is None:
        return default
    try:
        value = int(text, base)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32 or (key == "mode" and value > 0o7777):
        raise DockerfileError(f"--mount: {key}={text} is not a number that fits")
    return value


def _size(text: str) -> int:
    found = re.fullmatch(_SIZE, text.strip(), re.IGNORECASE)
    if found is None:
        raise DockerfileError(f"--mount: size={text} is not a size like 64m")
    return int(float(found[1]) * 1024 ** " kmgt".index(found[2].lower() or " "))
