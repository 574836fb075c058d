"""The value types of OCI images and of docker's schema 2: parsed, immutable, written canonically.

Everything here is a view of JSON that came from somewhere: digests are always of the bytes as they
came, so those are kept in the store and never written again from these values. What is not known
here is kept in `extra` where a value is changed and written anew (configs), and otherwise ignored.

Sources: OCI image-spec v1.1 (descriptor.md, manifest.md, image-index.md, config.md); docker image
manifest v2 schema 2; docker image spec v1.2 (Healthcheck, OnBuild, Shell).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

from unionimage.digest import MAX_JSON, Digest, chain_ids
from unionimage.errors import BadContent

T = TypeVar("T")

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = OCI_LAYER + "+gzip"
OCI_LAYER_ZSTD = OCI_LAYER + "+zstd"
OCI_FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = DOCKER_LAYER + ".gzip"
DOCKER_LAYER_ZSTD = DOCKER_LAYER + ".zstd"
DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"

MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEXES = (OCI_INDEX, DOCKER_LIST)
CONFIGS = (OCI_CONFIG, DOCKER_CONFIG)

NO_MAP: Mapping[str, Any] = MappingProxyType({})


def compression_of(media_type: str) -> str:
    """`gzip`, `zstd` or `none` of a layer's media type.

    Raises:
        BadContent: a foreign layer, an encrypted one, or no layer at all.
    """
    if media_type.startswith((OCI_FOREIGN, DOCKER_FOREIGN)):
        raise BadContent(f"layers of type {media_type} are not distributed with their image")
    base, _, suffix = media_type.partition("+")
    if base == OCI_LAYER and suffix in ("", "gzip", "zstd"):
        return suffix or "none"
    if media_type.startswith(DOCKER_LAYER) and media_type[len(DOCKER_LAYER) :] in (
        "",
        ".gzip",
        ".zstd",
    ):
        return media_type[len(DOCKER_LAYER) + 1 :] or "none"
    raise BadContent(f"layers of type {media_type!r} are not supported")


def dump(value: Any) -> bytes:
    """JSON as this program writes it: compact, key order as given, so digests are stable."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def load_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object; one of another kind, too large or ambiguous raises BadContent."""
    if len(data) > MAX_JSON:
        raise BadContent(f"{what} has {len(data)} bytes; more than {MAX_JSON} are refused")
    try:
        value = json.loads(data, object_pairs_hook=lambda pairs: _unique(pairs, what))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BadContent(f"{what} is not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise BadContent(f"{what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise BadContent(f"{what} has a key twice")
    return table


def _get(table: Mapping[str, Any], key: str, kind: type[T], default: T | None, what: str) -> Any:
    """A member of that JSON type; absent and null give the default (None: it is required)."""
    value = table.get(key)
    if value is None:
        if default is None:
            raise BadContent(f"{what} lacks {key!r}")
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadContent(f"{what}: {key!r} is not a {_NAMES[kind]}")
    return value


_NAMES = {str: "string", int: "number", list: "list", dict: "JSON object", bool: "truth value"}


def _strings(table: Mapping[str, Any], key: str, what: str) -> tuple[str, ...]:
    values = _get(table, key, list, [], what)
    if not all(isinstance(value, str) for value in values):
        raise BadContent(f"{what}: {key!r} is not a list of strings")
    return tuple(values)


def _string_map(table: Mapping[str, Any], key: str, what: str) -> Mapping[str, str]:
    values = _get(table, key, dict, {}, what)
    if not all(isinstance(value, str) for value in values.values()):
        raise BadContent(f"{what}: {key!r} does not map to strings")
    return MappingProxyType(dict(values)) if values else NO_MAP


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on. Empty strings mean: not said."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """`linux/arm64/v8`, `linux/amd64`, `arm64` (then linux). Raises BadContent."""
        parts = text.lower().split("/")
        if not all(parts) or len(parts) > 3:
            raise BadContent(f"{text!r} is not a platform (OS/ARCH[/VARIANT])")
        if len(parts) == 1:
            parts = [parts[0], host_architecture()[0]] if parts[0] == "linux" else ["linux", *parts]
        architecture, variant = normal_architecture(parts[1])
        return cls(parts[0], architecture, parts[2] if len(parts) == 3 else variant)

    @classmethod
    def host(cls) -> Platform:
        return cls("linux", *host_architecture())

    @classmethod
    def from_object(cls, table: Mapping[str, Any]) -> Platform:
        return cls(
            _get(table, "os", str, "", "platform"),
            _get(table, "architecture", str, "", "platform"),
            _get(table, "variant", str, "", "platform"),
            _get(table, "os.version", str, "", "platform"),
        )

    def to_object(self) -> dict[str, Any]:
        table = {"architecture": self.architecture, "os": self.os}
        if self.os_version:
            table["os.version"] = self.os_version
        if self.variant:
            table["variant"] = self.variant
        return table

    def satisfies(self, wanted: Platform) -> bool:
        """True if what is wanted is this; a variant is compared only where one is wanted."""
        if (self.os, self.architecture) != (wanted.os, wanted.architecture):
            return False
        if self.architecture == "arm64" and {self.variant, wanted.variant} <= {"", "v8"}:
            return True
        return not wanted.variant or self.variant == wanted.variant

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armv8l": ("arm64", ""),
    "armv7l": ("arm", "v7"),
    "armhf": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armel": ("arm", "v6"),
    "i386": ("386", ""),
    "i686": ("386", ""),
}


def normal_architecture(name: str) -> tuple[str, str]:
    """Go's name and variant of an architecture (containerd, platforms/database.go)."""
    return _ARCHITECTURES.get(name, (name, ""))


def host_architecture() -> tuple[str, str]:
    import os

    return normal_architecture(os.uname().machine)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Names a blob: its type, digest and size in bytes."""

    media_type: str
    digest: Digest
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(default_factory=lambda: NO_MAP, hash=False)
    urls: tuple[str, ...] = ()

    @classmethod
    def of(cls, media_type: str, data: bytes) -> Descriptor:
        """The descriptor of these bytes."""
        return cls(media_type, Digest.of(data), len(data))

    @classmethod
    def from_object(cls, table: Any, what: str = "descriptor") -> Descriptor:
        if not isinstance(table, dict):
            raise BadContent(f"{what} is not a JSON object")
        size = _get(table, "size", int, None, what)
        if size < 0:
            raise BadContent(f"{what} has a negative size")
        platform = table.get("platform")
        return cls(
            _get(table, "mediaType", str, None, what),
            Digest(_get(table, "digest", str, None, what)),
            size,
            Platform.from_object(platform) if isinstance(platform, dict) else None,
            _string_map(table, "annotations", what),
            _strings(table, "urls", what),
        )

    def to_object(self) -> dict[str, Any]:
        table: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size,
        }
        if self.urls:
            table["urls"] = list(self.urls)
        if self.annotations:
            table["annotations"] = dict(self.annotations)
        if self.platform:
            table["platform"] = self.platform.to_object()
        return table


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image manifest, OCI or docker schema 2 (`media_type` says which)."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=lambda: NO_MAP, hash=False)

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises BadContent if this is no manifest of an image that is supported."""
        table = load_object(data, "manifest")
        if table.get("schemaVersion") != 2:
            raise BadContent(
                "manifest is not of schema version 2; push the image again with a newer tool"
            )
        media_type = _get(table, "mediaType", str, OCI_MANIFEST, "manifest")
        if media_type not in MANIFESTS or "manifests" in table:
            raise BadContent(f"manifest type {media_type!r} is not an image")
        config = Descriptor.from_object(table.get("config"), "manifest: config")
        if config.media_type not in CONFIGS:
            raise BadContent(f"{config.media_type!r} is no image config: this is another artifact")
        layers = _get(table, "layers", list, [], "manifest")
        return cls(
            media_type,
            config,
            tuple(Descriptor.from_object(layer, "manifest: layer") for layer in layers),
            _string_map(table, "annotations", "manifest"),
        )

    def to_json(self) -> bytes:
        table: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": self.media_type,
            "config": self.config.to_object(),
            "layers": [layer.to_object() for layer in self.layers],
        }
        if self.annotations:
            table["annotations"] = dict(self.annotations)
        return dump(table)


@dataclass(frozen=True, slots=True)
class Index:
    """An OCI image index or docker manifest list: one manifest for each platform."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=lambda: NO_MAP, hash=False)

    @classmethod
    def from_json(cls, data: bytes) -> Index:
        table = load_object(data, "index")
        media_type = _get(table, "mediaType", str, OCI_INDEX, "index")
        if table.get("schemaVersion") != 2 or media_type not in INDEXES or "layers" in table:
            raise BadContent(f"{media_type!r} is not an image index")
        manifests = _get(table, "manifests", list, None, "index")
        return cls(
            media_type,
            tuple(Descriptor.from_object(one, "index: manifest") for one in manifests),
            _string_map(table, "annotations", "index"),
        )

    def to_json(self) -> bytes:
        table: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": self.media_type,
            "manifests": [one.to_object() for one in self.manifests],
        }
        if self.annotations:
            table["annotations"] = dict(self.annotations)
        return dump(table)

    def images(self) -> tuple[Descriptor, ...]:
        """The manifests of images; attestations, whose platform is `unknown`, are left out."""
        return tuple(
            one for one in self.manifests if one.platform is None or one.platform.os != "unknown"
        )

    def select(self, wanted: Platform) -> Descriptor:
        """The manifest for a platform, an exact variant first. Raises BadContent if none fits."""
        fitting = [one for one in self.manifests if one.platform and one.platform.satisfies(wanted)]
        if not fitting and len(self.manifests) == 1 and self.manifests[0].platform is None:
            return self.manifests[0]
        if not fitting:
            there = ", ".join(sorted({str(one.platform) for one in self.manifests if one.platform}))
            raise BadContent(f"no image for platform {wanted}; there are: {there or 'none'}")
        exact = [one for one in fitting if one.platform and one.platform.variant == wanted.variant]
        return (exact or fitting)[0]


def parse_manifest(data: bytes, media_type: str = "") -> Manifest | Index:
    """Parse a manifest or an index, whichever it is. Raises BadContent."""
    table = load_object(data, "manifest")
    named = table.get("mediaType") or media_type
    if named in INDEXES or (named not in MANIFESTS and "manifests" in table):
        return Index.from_json(data)
    return Manifest.from_json(data)


@dataclass(frozen=True, slots=True)
class Healthcheck:
    """Docker's HEALTHCHECK; times in nanoseconds, 0 means: the default."""

    test: tuple[str, ...]
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0

    _KEYS = (
        ("interval", "Interval"),
        ("timeout", "Timeout"),
        ("start_period", "StartPeriod"),
        ("start_interval", "StartInterval"),
        ("retries", "Retries"),
    )

    @classmethod
    def from_object(cls, table: Mapping[str, Any]) -> Healthcheck:
        what = "config: Healthcheck"
        numbers = {name: _get(table, key, int, 0, what) for name, key in cls._KEYS}
        return cls(_strings(table, "Test", what), **numbers)

    def to_object(self) -> dict[str, Any]:
        table: dict[str, Any] = {"Test": list(self.test)} if self.test else {}
        for name, key in self._KEYS:
            if getattr(self, name):
                table[key] = getattr(self, name)
        return table


@dataclass(frozen=True, slots=True)
class RunConfig:
    """The `config` of an image: how a container of it runs.

    `entrypoint`, `cmd` and `shell` are None where they are not set; an empty tuple is set, to
    nothing. `env` holds NAME=VALUE in order. `extra` is what this program does not know.
    """

    user: str = ""
    exposed_ports: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    volumes: tuple[str, ...] = ()
    working_dir: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: NO_MAP, hash=False)
    stop_signal: str = ""
    stop_timeout: int | None = None
    shell: tuple[str, ...] | None = None
    on_build: tuple[str, ...] = ()
    healthcheck: Healthcheck | None = None
    extra: Mapping[str, Any] = field(default_factory=lambda: NO_MAP, hash=False)

    _KNOWN = frozenset(
        [
            "User",
            "ExposedPorts",
            "Env",
            "Entrypoint",
            "Cmd",
            "Volumes",
            "WorkingDir",
            "Labels",
            "StopSignal",
            "StopTimeout",
            "Shell",
            "OnBuild",
            "Healthcheck",
        ]
    )

    @classmethod
    def from_object(cls, table: Mapping[str, Any]) -> RunConfig:
        what = "config"
        health = _get(table, "Healthcheck", dict, {}, what)

        def command(key: str) -> tuple[str, ...] | None:
            return None if table.get(key) is None else _strings(table, key, what)

        return cls(
            user=_get(table, "User", str, "", what),
            exposed_ports=tuple(_get(table, "ExposedPorts", dict, {}, what)),
            env=_strings(table, "Env", what),
            entrypoint=command("Entrypoint"),
            cmd=command("Cmd"),
            volumes=tuple(_get(table, "Volumes", dict, {}, what)),
            working_dir=_get(table, "WorkingDir", str, "", what),
            labels=_string_map(table, "Labels", what),
            stop_signal=_get(table, "StopSignal", str, "", what),
            stop_timeout=_get(table, "StopTimeout", int, -1, what)
            if table.get("StopTimeout") is not None
            else None,
            shell=command("Shell"),
            on_build=_strings(table, "OnBuild", what),
            healthcheck=Healthcheck.from_object(health) if health else None,
            extra=MappingProxyType({k: v for k, v in table.items() if k not in cls._KNOWN}),
        )

    def to_object(self) -> dict[str, Any]:
        """Docker's key order and omissions, so that equal configs have equal bytes."""
        table: dict[str, Any] = {}
        _put(table, "User", self.user)
        _put(table, "ExposedPorts", {port: {} for port in sorted(self.exposed_ports)})
        _put(table, "Env", list(self.env))
        if self.entrypoint is not None:
            table["Entrypoint"] = list(self.entrypoint)
        if self.cmd is not None:
            table["Cmd"] = list(self.cmd)
        _put(table, "Healthcheck", self.healthcheck.to_object() if self.healthcheck else None)
        _put(table, "Volumes", {path: {} for path in sorted(self.volumes)})
        _put(table, "WorkingDir", self.working_dir)
        _put(table, "Labels", {key: self.labels[key] for key in sorted(self.labels)})
        _put(table, "StopSignal", self.stop_signal)
        if self.stop_timeout is not None:
            table["StopTimeout"] = self.stop_timeout
        if self.shell is not None:
            table["Shell"] = list(self.shell)
        _put(table, "OnBuild", list(self.on_build))
        table.update(self.extra)
        return table

    def environment(self) -> dict[str, str]:
        """`env` as a table; the last of equal names wins."""
        return {name: value for name, _, value in (entry.partition("=") for entry in self.env)}


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    if value:
        table[key] = value


@dataclass(frozen=True, slots=True)
class History:
    """One step of how an image was made. `created` is RFC 3339 or empty."""

    created: str = ""
    created_by: str = ""
    author: str = ""
    comment: str = ""
    empty_layer: bool = False

    @classmethod
    def from_object(cls, table: Any) -> History:
        what = "config: history"
        if not isinstance(table, dict):
            raise BadContent(f"{what} is not a list of JSON objects")
        return cls(
            created=_get(table, "created", str, "", what),
            created_by=_get(table, "created_by", str, "", what),
            author=_get(table, "author", str, "", what),
            comment=_get(table, "comment", str, "", what),
            empty_layer=_get(table, "empty_layer", bool, False, what),
        )

    def to_object(self) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key in ("created", "created_by", "author", "comment"):
            _put(table, key, getattr(self, key))
        _put(table, "empty_layer", self.empty_layer)
        return table


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The image configuration; the digest of its JSON is the image id.

    Attributes:
        diff_ids: the layers, base first.
        created: RFC 3339 or empty.
        extra: top-level members that this program does not know; written again unchanged.
    """

    platform: Platform
    diff_ids: tuple[Digest, ...] = ()
    history: tuple[History, ...] = ()
    run: RunConfig = field(default_factory=RunConfig)
    created: str = ""
    author: str = ""
    comment: str = ""
    extra: Mapping[str, Any] = field(default_factory=lambda: NO_MAP, hash=False)

    _KNOWN = frozenset(
        [
            "architecture",
            "variant",
            "os",
            "os.version",
            "rootfs",
            "history",
            "config",
            "created",
            "author",
            "comment",
        ]
    )
    # What docker's old builder wrote about the container a layer came from; wrong after a change.
    _DROPPED = frozenset(["container", "container_config", "id", "parent", "throwaway"])

    @classmethod
    def from_json(cls, data: bytes) -> ImageConfig:
        """Raises BadContent if it is no config, or history and layers disagree."""
        what = "config"
        table = load_object(data, what)
        rootfs = _get(table, "rootfs", dict, {"type": "layers"}, what)
        if rootfs.get("type", "layers") != "layers":
            raise BadContent(f"config: rootfs type {rootfs['type']!r} is not supported")
        history = tuple(History.from_object(one) for one in _get(table, "history", list, [], what))
        diff_ids = tuple(Digest(one) for one in _strings(rootfs, "diff_ids", "config: rootfs"))
        if history and sum(not step.empty_layer for step in history) != len(diff_ids):
            raise BadContent(
                f"config: history names {sum(not step.empty_layer for step in history)} layers, "
                f"rootfs {len(diff_ids)}"
            )
        return cls(
            Platform.from_object(table),
            diff_ids,
            history,
            RunConfig.from_object(_get(table, "config", dict, {}, what)),
            _get(table, "created", str, "", what),
            _get(table, "author", str, "", what),
            _get(table, "comment", str, "", what),
            MappingProxyType(
                {k: v for k, v in table.items() if k not in cls._KNOWN | cls._DROPPED}
            ),
        )

    def to_json(self) -> bytes:
        table: dict[str, Any] = self.platform.to_object()
        _put(table, "created", self.created)
        _put(table, "author", self.author)
        _put(table, "comment", self.comment)
        table["config"] = self.run.to_object()
        table["rootfs"] = {"type": "layers", "diff_ids": list(self.diff_ids)}
        if self.history:
            table["history"] = [step.to_object() for step in self.history]
        table.update(self.extra)
        return dump(table)

    @property
    def chain_id(self) -> Digest | None:
        """The chainID of all layers; None for an image without any."""
        chain = chain_ids(self.diff_ids)
        return chain[-1] if chain else None

    def with_step(self, step: History, diff_id: Digest | None) -> ImageConfig:
        """The config after one more step; `diff_id` None means that the step made no layer."""
        step = replace(step, empty_layer=diff_id is None)
        history = self.history
        if not history and self.diff_ids:  # an image without history: docker shows such steps empty
            history = tuple(History(comment="unknown step") for _ in self.diff_ids)
        return replace(
            self,
            diff_ids=self.diff_ids if diff_id is None else (*self.diff_ids, diff_id),
            history=(*history, step),
            created=step.created or self.created,
        )

    def layer_steps(self) -> Sequence[tuple[History, Digest | None]]:
        """Each step of the history, the oldest first, with the layer it made (None: none).

        An image without history gives one empty step a layer.
        """
        layers = iter(self.diff_ids)
        if not self.history:
            return [(History(), layer) for layer in layers]
        return [(step, None if step.empty_layer else next(layers)) for step in self.history]
