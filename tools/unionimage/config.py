"""The configuration file: TOML, `/etc/unionfuse/config.toml` and then the user's own over it.

    [store]
    root = "/srv/images"           # where images are kept
    driver = "overlay"             # or "fuse": what mounts use
    durable = true                 # wait for the disk before a layer counts as stored
    dedupe = "reflink"             # "off", or "hardlink": share equal files between layers

    [limits]
    layer-size = 274877906944      # bytes one layer may unpack to
    layer-entries = 10000000

    [registries]
    insecure = ["registry.lan:5000"]   # plain HTTP, or HTTPS without checking the certificate
    [registries.mirrors]
    "docker.io" = ["mirror.lan"]       # asked first, in this order
    [registries.short-names]
    debian = "registry.lan/base/debian"
    [registries.token-realms]
    "registry.lan" = ["login.lan"]     # token servers elsewhere that may see its password

`UNIONFUSE_CONFIG` names one file that is read instead of both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from unionimage.errors import UserError
from unionimage.tuples import NamedTuple

DRIVERS = ("fuse", "overlay")
DEDUPE = ("off", "reflink", "hardlink")

_STRING, _STRINGS, _FLAG, _NUMBER = "a string", "a list of strings", "true or false", "a number"
_KEYS: dict[str, dict[str, str]] = {
    "store": {"root": _STRING, "driver": _STRING, "durable": _FLAG, "dedupe": _STRING},
    "limits": {"layer-size": _NUMBER, "layer-entries": _NUMBER},
    "registries": {
        "insecure": _STRINGS,
        "mirrors": "a table",
        "short-names": "a table",
        "token-realms": "a table",
    },
}


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Config(NamedTuple):
    """What the configuration files say, with defaults for the rest.

    Attributes:
        root: of the store; None: the default place.
        mirrors: registry -> registries that are asked first.
        short_names: what a user types -> full repository name.
        token_realms: registry -> hosts of token servers elsewhere that may see its password.
        layer_size, layer_entries: see `changeset.limits.Limits`.
    """

    root: str | None = None
    driver: str = "fuse"
    durable: bool = False
    dedupe: str = "reflink"
    layer_size: int = 256 << 30
    layer_entries: int = 10_000_000
    insecure: tuple[str, ...] = ()
    mirrors: Mapping[str, tuple[str, ...]] = _NOTHING
    short_names: Mapping[str, str] = _NOTHING
    token_realms: Mapping[str, tuple[str, ...]] = _NOTHING


def load() -> Config:
    """Read the configuration. Raises UserError, which names file and key."""
    tables: dict[str, dict[str, Any]] = {name: {} for name in _KEYS}
    for path in _files():
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue
        for section, table in _parse(path, data).items():
            tables[section].update(table)
    store, limits, registries = tables["store"], tables["limits"], tables["registries"]
    defaults = Config()
    return Config(
        store.get("root"),
        _one_of(store.get("driver", defaults.driver), "driver", DRIVERS),
        store.get("durable", defaults.durable),
        _one_of(store.get("dedupe", defaults.dedupe), "dedupe", DEDUPE),
        limits.get("layer-size", defaults.layer_size),
        limits.get("layer-entries", defaults.layer_entries),
        tuple(registries.get("insecure", ())),
        _tuples(registries.get("mirrors", {})),
        dict(registries.get("short-names", {})),
        _tuples(registries.get("token-realms", {})),
    )


def default_root() -> Path:
    """Where the store is unless someone says otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/unionfuse")
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "unionfuse"


def _files() -> list[Path]:
    if named := os.environ.get("UNIONFUSE_CONFIG"):
        if not os.path.exists(named):
            raise UserError(f"UNIONFUSE_CONFIG names {named}, which does not exist")
        return [Path(named)]
    own = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return [Path("/etc/unionfuse/config.toml"), Path(own) / "unionfuse/config.toml"]


def _parse(path: Path, data: bytes) -> dict[str, dict[str, Any]]:
    import tomllib

    try:
        tables = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    for section, table in tables.items():
        if section not in _KEYS or not isinstance(table, dict):
            raise UserError(f"{path}: there is no section [{section}]; see docs/images.md")
        for key, value in table.items():
            kind = _KEYS[section].get(key)
            if kind is None:
                raise UserError(f"{path}: there is no key {key!r} in [{section}]")
            if not _fits(value, kind):
                raise UserError(f"{path}: {key!r} in [{section}] must be {kind}")
    for key in ("mirrors", "token-realms"):
        for name, hosts in tables.get("registries", {}).get(key, {}).items():
            if not _fits(hosts, _STRINGS):
                raise UserError(f"{path}: the {key} of {name!r} must be {_STRINGS}")
    for name, full in tables.get("registries", {}).get("short-names", {}).items():
        if not _fits(full, _STRING):
            raise UserError(f"{path}: the short name {name!r} must be {_STRING}")
    return tables


def _tuples(table: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(values) for name, values in table.items()}


def _fits(value: Any, kind: str) -> bool:
    if kind == _STRINGS:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if kind == _NUMBER:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    return isinstance(value, {_STRING: str, _FLAG: bool}.get(kind, dict))


def _one_of(value: str, key: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UserError(f"configuration: {key} {value!r} is none of {', '.join(choices)}")
    return value
