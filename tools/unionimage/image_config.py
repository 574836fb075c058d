"""The configuration of an image: what its id is the digest of.

What is not known here is kept in `extra`, for a config is changed and written anew.

Sources: OCI image-spec v1.1 (config.md); docker image spec v1.2 (Healthcheck, OnBuild, Shell).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from unionimage.digest import Digest, chain_ids
from unionimage.errors import BadContent
from unionimage.json_object import NO_MAP, dump, load_object, member, put, string_map, strings
from unionimage.spec import Platform
from unionimage.tuples import NamedTuple

_HEALTH_KEYS = (
    ("interval", "Interval"),
    ("timeout", "Timeout"),
    ("start_period", "StartPeriod"),
    ("start_interval", "StartInterval"),
    ("retries", "Retries"),
)


class Healthcheck(NamedTuple):
    """Docker's HEALTHCHECK; times in nanoseconds, 0 means: the default."""

    test: tuple[str, ...]
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0

    @classmethod
    def from_object(cls, table: Mapping[str, Any]) -> Healthcheck:
        what = "config: Healthcheck"
        numbers = {name: member(table, key, int, 0, what) for name, key in _HEALTH_KEYS}
        return cls(strings(table, "Test", what), **numbers)

    def to_object(self) -> dict[str, Any]:
        table: dict[str, Any] = {"Test": list(self.test)} if self.test else {}
        for name, key in _HEALTH_KEYS:
            if getattr(self, name):
                table[key] = getattr(self, name)
        return table


_KNOWN_TO_RUN = frozenset(
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


class RunConfig(NamedTuple):
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
    labels: Mapping[str, str] = NO_MAP
    stop_signal: str = ""
    stop_timeout: int | None = None
    shell: tuple[str, ...] | None = None
    on_build: tuple[str, ...] = ()
    healthcheck: Healthcheck | None = None
    extra: Mapping[str, Any] = NO_MAP

    @classmethod
    def from_object(cls, table: Mapping[str, Any]) -> RunConfig:
        what = "config"
        health = member(table, "Healthcheck", dict, {}, what)

        def command(key: str) -> tuple[str, ...] | None:
            return None if table.get(key) is None else strings(table, key, what)

        return cls(
            user=member(table, "User", str, "", what),
            exposed_ports=tuple(member(table, "ExposedPorts", dict, {}, what)),
            env=strings(table, "Env", what),
            entrypoint=command("Entrypoint"),
            cmd=command("Cmd"),
            volumes=tuple(member(table, "Volumes", dict, {}, what)),
            working_dir=member(table, "WorkingDir", str, "", what),
            labels=string_map(table, "Labels", what),
            stop_signal=member(table, "StopSignal", str, "", what),
            stop_timeout=member(table, "StopTimeout", int, -1, what)
            if table.get("StopTimeout") is not None
            else None,
            shell=command("Shell"),
            on_build=strings(table, "OnBuild", what),
            healthcheck=Healthcheck.from_object(health) if health else None,
            extra=MappingProxyType({k: v for k, v in table.items() if k not in _KNOWN_TO_RUN}),
        )

    def to_object(self) -> dict[str, Any]:
        """Docker's key order and omissions, so that equal configs have equal bytes."""
        table: dict[str, Any] = {}
        put(table, "User", self.user)
        put(table, "ExposedPorts", {port: {} for port in sorted(self.exposed_ports)})
        put(table, "Env", list(self.env))
        if self.entrypoint is not None:
            table["Entrypoint"] = list(self.entrypoint)
        if self.cmd is not None:
            table["Cmd"] = list(self.cmd)
        put(table, "Healthcheck", self.healthcheck.to_object() if self.healthcheck else None)
        put(table, "Volumes", {path: {} for path in sorted(self.volumes)})
        put(table, "WorkingDir", self.working_dir)
        put(table, "Labels", {key: self.labels[key] for key in sorted(self.labels)})
        put(table, "StopSignal", self.stop_signal)
        if self.stop_timeout is not None:
            table["StopTimeout"] = self.stop_timeout
        if self.shell is not None:
            table["Shell"] = list(self.shell)
        put(table, "OnBuild", list(self.on_build))
        table.update(self.extra)
        return table

    def environment(self) -> dict[str, str]:
        """`env` as a table; the last of equal names wins."""
        return {name: value for name, _, value in (entry.partition("=") for entry in self.env)}


class History(NamedTuple):
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
            created=member(table, "created", str, "", what),
            created_by=member(table, "created_by", str, "", what),
            author=member(table, "author", str, "", what),
            comment=member(table, "comment", str, "", what),
            empty_layer=member(table, "empty_layer", bool, False, what),
        )

    def to_object(self) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key in ("created", "created_by", "author", "comment"):
            put(table, key, getattr(self, key))
        put(table, "empty_layer", self.empty_layer)
        return table


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


class ImageConfig(NamedTuple):
    """The image configuration; the digest of its JSON is the image id.

    Attributes:
        diff_ids: the layers, base first.
        created: RFC 3339 or empty.
        extra: top-level members that this program does not know; written again unchanged.
    """

    platform: Platform
    diff_ids: tuple[Digest, ...] = ()
    history: tuple[History, ...] = ()
    run: RunConfig = RunConfig()
    created: str = ""
    author: str = ""
    comment: str = ""
    extra: Mapping[str, Any] = NO_MAP

    @classmethod
    def from_json(cls, data: bytes) -> ImageConfig:
        """Raises BadContent if it is no config, or history and layers disagree."""
        what = "config"
        table = load_object(data, what)
        rootfs = member(table, "rootfs", dict, {"type": "layers"}, what)
        if rootfs.get("type", "layers") != "layers":
            raise BadContent(f"config: rootfs type {rootfs['type']!r} is not supported")
        history = tuple(
            History.from_object(one) for one in member(table, "history", list, [], what)
        )
        diff_ids = tuple(Digest(one) for one in strings(rootfs, "diff_ids", "config: rootfs"))
        if history and sum(not step.empty_layer for step in history) != len(diff_ids):
            raise BadContent(
                f"config: history names {sum(not step.empty_layer for step in history)} layers, "
                f"rootfs {len(diff_ids)}"
            )
        return cls(
            Platform.from_object(table),
            diff_ids,
            history,
            RunConfig.from_object(member(table, "config", dict, {}, what)),
            member(table, "created", str, "", what),
            member(table, "author", str, "", what),
            member(table, "comment", str, "", what),
            MappingProxyType({k: v for k, v in table.items() if k not in _KNOWN | _DROPPED}),
        )

    def to_json(self) -> bytes:
        table: dict[str, Any] = self.platform.to_object()
        put(table, "created", self.created)
        put(table, "author", self.author)
        put(table, "comment", self.comment)
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
        step = step._replace(empty_layer=diff_id is None)
        history = self.history
        if not history and self.diff_ids:  # an image without history: docker shows such steps empty
            history = tuple(History(comment="unknown step") for _ in self.diff_ids)
        return self._replace(
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
