"""What an instruction without files does to the image config, and how its history entry reads.

Config in, config out: nothing here touches files. History texts are written as docker writes them
(BuildKit's, without the mark by which BuildKit signs its own).
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable
from types import MappingProxyType

from unionimage.dockerfile.instructions import (
    Cmd,
    Entrypoint,
    Env,
    Expose,
    Healthcheck,
    Instruction,
    Label,
    Maintainer,
    Onbuild,
    Shell,
    StopSignal,
    User,
    Volume,
    Words,
    Workdir,
)
from unionimage.dockerfile.parser import DockerfileError
from unionimage.image_config import Healthcheck as HealthcheckConfig
from unionimage.image_config import RunConfig

DEFAULT_SHELL = ("/bin/sh", "-c")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_PORT = r"(?:(?P<host>[^/]*):)?(?P<first>\d+)(?:-(?P<last>\d+))?(?:/(?P<protocol>\w+))?"


def apply(run: RunConfig, instruction: Instruction, cmd_is_own: bool) -> tuple[RunConfig, str]:
    """The config after an instruction whose variables are expanded, and its history text.

    Args:
        cmd_is_own: whether the stage has a CMD of its own already; an ENTRYPOINT forgets one that
            was inherited.

    Raises:
        DockerfileError: a value is impossible (a port, a signal).
        TypeError: the instruction is one that makes files, or FROM, or ARG.
    """
    match instruction:
        case Env(pairs):
            return run._replace(env=with_variables(run.env, pairs)), _joined("ENV", pairs)
        case Label(pairs):
            labels = MappingProxyType({**run.labels, **dict(pairs)})
            return run._replace(labels=labels), _joined("LABEL", pairs)
        case Maintainer(name):
            return run, f"MAINTAINER {name}"
        case Workdir(path):
            path = absolute(run, path)
            return run._replace(working_dir=path), f"WORKDIR {path}"
        case User(user):
            return run._replace(user=user), f"USER {user}"
        case Expose(ports):
            ports = tuple(port for each in ports for port in _ports(each))
            known = dict.fromkeys((*run.exposed_ports, *ports))
            return run._replace(exposed_ports=tuple(known)), f"EXPOSE {_listed(ports)}"
        case Volume(paths):
            known = dict.fromkeys((*run.volumes, *paths))
            return run._replace(volumes=tuple(known)), f"VOLUME {_listed(paths)}"
        case Cmd(command):
            words = command_line(run, command)
            return run._replace(cmd=words), f"CMD {_quoted(words)}"
        case Entrypoint(command):
            words = command_line(run, command)
            cmd = run.cmd if cmd_is_own else None
            return run._replace(entrypoint=words, cmd=cmd), f"ENTRYPOINT {_quoted(words)}"
        case Shell(words):
            return run._replace(shell=words), f"SHELL {_listed(words)}"
        case StopSignal(signal):
            _check_signal(signal)
            return run._replace(stop_signal=signal), f"STOPSIGNAL {signal}"
        case Healthcheck():
            health = HealthcheckConfig(**instruction._asdict())
            return run._replace(healthcheck=health), f"HEALTHCHECK {_health_text(instruction)}"
        case Onbuild(trigger):
            return run._replace(on_build=(*run.on_build, trigger)), f"ONBUILD {trigger}"
    raise TypeError(f"{type(instruction).__name__} is not an instruction about the config alone")


def with_variables(env: tuple[str, ...], pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The environment with some variables set; what is there already keeps its place."""
    table = {name: value for name, _, value in (entry.partition("=") for entry in env)}
    table.update(pairs)
    return tuple(f"{name}={value}" for name, value in table.items())


def absolute(run: RunConfig, path: str) -> str:
    """A path of the image made absolute and clean; relative ones begin at the working directory."""
    path = posixpath.normpath(posixpath.join("/", run.working_dir, path))
    return "/" + path.lstrip("/")


def command_line(run: RunConfig, command: Words) -> tuple[str, ...]:
    """The words that a command line runs: the shell before a text, exec form as it is."""
    if not command.shell or not command.words:
        return command.words
    return (*(run.shell or DEFAULT_SHELL), *command.words)


def _joined(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in pairs)])


def _listed(words: Iterable[str]) -> str:
    return f"[{' '.join(words)}]"


def _quoted(words: Iterable[str]) -> str:
    return _listed(json.dumps(word, ensure_ascii=False) for word in words)


def _ports(text: str) -> list[str]:
    """`80`, `80/udp`, `8000-8002/tcp` as the config lists them."""
    found = re.fullmatch(_PORT, text)
    if found is None:
        raise DockerfileError(f"EXPOSE {text}: a port is written PORT[-LAST][/tcp|udp|sctp]")
    protocol = (found["protocol"] or "tcp").lower()
    first = int(found["first"])
    last = int(found["last"] or first)
    if protocol not in ("tcp", "udp", "sctp"):
        raise DockerfileError(f"EXPOSE {text}: the protocol is tcp, udp or sctp")
    if not first <= last <= 65535:
        raise DockerfileError(f"EXPOSE {text}: ports end at 65535 and ranges go up")
    return [f"{port}/{protocol}" for port in range(first, last + 1)]


def _check_signal(text: str) -> None:
    import signal

    if text.isdecimal():
        if 0 < int(text) <= 64:
            return
    elif "SIG" + text.upper().removeprefix("SIG") in signal.Signals.__members__ or re.fullmatch(
        r"(SIG)?RTM(IN(\+\d+)?|AX(-\d+)?)", text.upper()
    ):
        return
    raise DockerfileError(f"STOPSIGNAL {text}: no such signal")


def _health_text(health: Healthcheck) -> str:
    return (
        f"{{Test:{_listed(health.test)} Interval:{_go_duration(health.interval)}"
        f" Timeout:{_go_duration(health.timeout)} StartPeriod:{_go_duration(health.start_period)}"
        f" StartInterval:{_go_duration(health.start_interval)} Retries:{health.retries}}}"
    )


def _go_duration(nanoseconds: int) -> str:
    """As Go prints a duration: 1m3s, 500ms, 0s."""
    if nanoseconds < 10**9:
        return f"{nanoseconds / 10**6:g}ms" if nanoseconds else "0s"
    minutes, seconds = divmod(nanoseconds / 10**9, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{seconds:g}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
