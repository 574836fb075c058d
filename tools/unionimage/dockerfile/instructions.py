"""What each command of a Dockerfile means: a `Command` of the parser becomes one typed instruction.

Arguments and flags are checked here; variables are *not* yet expanded (that needs the stage:
`plan.py`). A flag that is not built is refused by name. Source: Dockerfile reference; where it is
silent, BuildKit.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from unionimage.dockerfile.parser import Command, DockerfileError, Heredoc, parse
from unionimage.tuples import NamedTuple

_STAGE_NAME = r"[a-z][a-z0-9-_.]*"
_HEREDOC = re.compile(r"(\d*)<<(-?)([^<]+)")
_DURATION = r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)"
_NANOSECONDS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}


class From(NamedTuple):
    """FROM: begins a stage; `base` is an image, an earlier stage or `scratch`."""

    base: str
    name: str
    platform: str


class Arg(NamedTuple):
    """ARG: build-time variables, each with a default or None."""

    pairs: tuple[tuple[str, str | None], ...]


class Env(NamedTuple):
    """ENV: variables that stay in the image."""

    pairs: tuple[tuple[str, str], ...]


class Label(NamedTuple):
    """LABEL: metadata of the image."""

    pairs: tuple[tuple[str, str], ...]


class Maintainer(NamedTuple):
    """MAINTAINER (deprecated by docker): the author field."""

    name: str


class Words(NamedTuple):
    """A command line: exec form (`shell` False) or one text for the shell."""

    words: tuple[str, ...]
    shell: bool
    heredocs: tuple[Heredoc, ...] = ()


class Run(NamedTuple):
    """RUN; `mounts` are the texts of its `--mount` flags."""

    command: Words
    mounts: tuple[str, ...] = ()
    network: str = "default"


class Document(NamedTuple):
    """A heredoc that COPY or ADD writes as a file."""

    name: str
    content: str
    expand: bool


class Copy(NamedTuple):
    """COPY and ADD (`is_add`)."""

    is_add: bool
    sources: tuple[str, ...]
    documents: tuple[Document, ...]
    destination: str
    source_stage: str = ""
    chown: str = ""
    chmod: str = ""
    link: bool = False
    parents: bool = False
    exclude: tuple[str, ...] = ()
    checksum: str = ""
    unpack: bool | None = None
    keep_git_dir: bool = False


class Workdir(NamedTuple):
    path: str


class User(NamedTuple):
    user: str


class Expose(NamedTuple):
    ports: tuple[str, ...]


class Volume(NamedTuple):
    paths: tuple[str, ...]


class Cmd(NamedTuple):
    command: Words


class Entrypoint(NamedTuple):
    command: Words


class Shell(NamedTuple):
    words: tuple[str, ...]


class StopSignal(NamedTuple):
    signal: str


class Healthcheck(NamedTuple):
    """HEALTHCHECK; `test` as the image config has it; nanoseconds, 0 means the default."""

    test: tuple[str, ...]
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0


class Onbuild(NamedTuple):
    """ONBUILD: `trigger` is the text of the instruction kept for images built on this one."""

    trigger: str


Instruction = (
    From | Arg | Env | Label | Maintainer | Run | Copy | Workdir | User | Expose | Volume | Cmd
    | Entrypoint | Shell | StopSignal | Healthcheck | Onbuild
)  # fmt: skip


def parse_instruction(command: Command) -> Instruction:
    """Understand one command; raises DockerfileError with its line."""
    maker = _MAKERS.get(command.name)
    try:
        if maker is None:
            raise DockerfileError(f"unknown instruction: {command.name}{_meant(command.name)}")
        return maker(command)
    except DockerfileError as error:
        raise DockerfileError(error.reason, error.line or command.line) from None


def parse_trigger(text: str) -> tuple[Command, Instruction]:
    """Understand an ONBUILD trigger as an image config holds it."""
    (command,) = parse(text).commands
    return command, parse_instruction(command)


def _meant(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, list(_MAKERS), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# ---- flags


def _flags(
    command: Command,
    text: tuple[str, ...] = (),
    switch: tuple[str, ...] = (),
    many: tuple[str, ...] = (),
) -> dict[str, list[str]]:
    """The flags of a command by name; switches have the value "true" or "false"."""
    found: dict[str, list[str]] = {}
    for flag in command.flags:
        if flag == "--":
            break
        name, has_value, value = flag.removeprefix("--").partition("=")
        if name not in (*text, *switch, *many):
            raise DockerfileError(f"{command.name} does not take the flag --{name}")
        if name in found and name not in many:
            raise DockerfileError(f"the flag --{name} is given twice")
        if name in switch:
            value = value.lower() if has_value else "true"
            if value not in ("true", "false"):
                raise DockerfileError(f"the flag --{name} is true or false, not {value!r}")
        elif not has_value:
            raise DockerfileError(f"the flag --{name} needs a value: --{name}=…")
        found.setdefault(name, []).append(value)
    return found


def _one(flags: dict[str, list[str]], name: str) -> str:
    return flags.get(name, [""])[0]


def _is_set(flags: dict[str, list[str]], name: str) -> bool:
    return _one(flags, name) == "true"


def _arguments(command: Command, least: int = 1, most: int | None = None) -> tuple[str, ...]:
    count = len(command.arguments)
    if count < least:
        raise DockerfileError(f"{command.name} requires at least {least} argument(s)")
    if most is not None and count > most:
        raise DockerfileError(f"{command.name} requires exactly {most} argument(s), got {count}")
    return command.arguments


# ---- one maker for each instruction


def _from(command: Command) -> From:
    words = _arguments(command)
    flags = _flags(command, text=("platform",))
    name = ""
    if len(words) == 3 and words[1].lower() == "as":
        name = words[2].lower()
        if not re.fullmatch(_STAGE_NAME, name):
            raise DockerfileError(f"invalid name for a stage: {words[2]!r}")
    elif len(words) != 1:
        raise DockerfileError("FROM is written: FROM [--platform=P] IMAGE [AS NAME]")
    return From(words[0], name, _one(flags, "platform"))


def _arg(command: Command) -> Arg:
    _flags(command)
    pairs: list[tuple[str, str | None]] = []
    for word in _arguments(command):
        name, has_default, default = word.partition("=")
        if not name:
            raise DockerfileError("ARG needs a name before '='")
        pairs.append((name, default if has_default else None))
    return Arg(tuple(pairs))


def _pairs(command: Command) -> tuple[tuple[str, str], ...]:
    _flags(command)
    words = _arguments(command)
    pairs = tuple(zip(words[::2], words[1::2], strict=True))
    if any(not name for name, _ in pairs):
        raise DockerfileError(f"{command.name} names can not be blank")
    return pairs


def _words(command: Command) -> Words:
    words = command.arguments
    if len(words) == 1 and not words[0] and not command.json:
        words = ()
    return Words(words, shell=not command.json, heredocs=command.heredocs)


def _run(command: Command) -> Run:
    flags = _flags(command, text=("network", "security"), many=("mount",))
    network = _one(flags, "network") or "default"
    if network not in ("default", "none", "host"):
        raise DockerfileError(f"--network={network}: it is default, none or host")
    if _one(flags, "security") not in ("", "sandbox"):
        raise DockerfileError("--security=insecure is not offered: RUN always runs confined")
    words = _words(command)
    if not words.words:
        raise DockerfileError("RUN requires a command")
    return Run(words, tuple(flags.get("mount", ())), network)


_COPY_TEXT = ("chown", "chmod")


def _copy(command: Command) -> Copy:
    flags = _flags(
        command, text=(*_COPY_TEXT, "from"), switch=("link", "parents"), many=("exclude",)
    )
    return _sources(command, flags)


def _add(command: Command) -> Copy:
    flags = _flags(
        command,
        text=(*_COPY_TEXT, "checksum"),
        switch=("link", "keep-git-dir", "unpack"),
        many=("exclude",),
    )
    return _sources(command, flags)


def _sources(command: Command, flags: dict[str, list[str]]) -> Copy:
    *words, destination = _arguments(command, least=2)
    if not command.json and _HEREDOC.fullmatch(destination):
        raise DockerfileError(f"{command.name} cannot write to a heredoc")
    contents = {each.name: each.content for each in command.heredocs}
    sources: list[str] = []
    documents: list[Document] = []
    for word in words:
        found = None if command.json else _HEREDOC.fullmatch(word)
        if found is None:
            sources.append(word)
        else:
            documents.append(_document(found, contents))
    return Copy(
        is_add=command.name == "ADD",
        sources=tuple(sources),
        documents=tuple(documents),
        destination=destination,
        source_stage=_one(flags, "from"),
        chown=_one(flags, "chown"),
        chmod=_one(flags, "chmod"),
        link=_is_set(flags, "link"),
        parents=_is_set(flags, "parents"),
        exclude=tuple(flags.get("exclude", ())),
        checksum=_one(flags, "checksum"),
        unpack=_is_set(flags, "unpack") if "unpack" in flags else None,
        keep_git_dir=_is_set(flags, "keep-git-dir"),
    )


def _document(found: re.Match[str], contents: dict[str, str]) -> Document:
    """The heredoc `<<NAME`, `<<-NAME` (leading tabs dropped) or `<<"NAME"` (not expanded)."""
    word = found[3]
    name = re.sub(r"[\"']|\\(?=.)", "", word)
    content = contents.get(name)
    if content is None:
        raise DockerfileError(f"the heredoc {word} has no text")
    if found[2]:
        content = strip_tabs(content)
    return Document(name, content, expand=name == word)


def strip_tabs(content: str) -> str:
    """The text of a `<<-` heredoc: without the tabs that begin its lines."""
    return re.sub(r"(?m)^\t+", "", content)


def heredoc_of(text: str) -> tuple[bool, str] | None:
    """Where `text` is one heredoc and nothing else: (whether its tabs are dropped, its name)."""
    found = _HEREDOC.fullmatch(text.strip())
    if found is None or re.search(r"\s", found[3].strip()):
        return None
    return bool(found[2]), re.sub(r"[\"']", "", found[3].strip())


def _workdir(command: Command) -> Workdir:
    _flags(command)
    return Workdir(_arguments(command, most=1)[0])


def _user(command: Command) -> User:
    _flags(command)
    return User(_arguments(command, most=1)[0])


def _expose(command: Command) -> Expose:
    _flags(command)
    return Expose(tuple(sorted(_arguments(command))))


def _volume(command: Command) -> Volume:
    _flags(command)
    paths = tuple(path.strip() for path in _arguments(command))
    if "" in paths:
        raise DockerfileError("VOLUME specified can not be an empty string")
    return Volume(paths)


def _cmd(command: Command) -> Cmd:
    _flags(command)
    return Cmd(_words(command))


def _entrypoint(command: Command) -> Entrypoint:
    _flags(command)
    return Entrypoint(_words(command))


def _shell(command: Command) -> Shell:
    _flags(command)
    if not command.json:
        raise DockerfileError('SHELL requires the arguments as JSON: SHELL ["/bin/sh", "-c"]')
    return Shell(_arguments(command))


def _stop_signal(command: Command) -> StopSignal:
    _flags(command)
    return StopSignal(_arguments(command, most=1)[0])


def _maintainer(command: Command) -> Maintainer:
    _flags(command)
    return Maintainer(_arguments(command, most=1)[0])


def _healthcheck(command: Command) -> Healthcheck:
    times = ("interval", "timeout", "start-period", "start-interval")
    flags = _flags(command, text=(*times, "retries"))
    kind, *words = _arguments(command)
    if kind.upper() == "NONE":
        if words:
            raise DockerfileError("HEALTHCHECK NONE takes no arguments")
        return Healthcheck(("NONE",))
    if kind.upper() != "CMD":
        raise DockerfileError(f"unknown type {kind!r} in HEALTHCHECK (try CMD)")
    if not any(words):
        raise DockerfileError("HEALTHCHECK CMD needs a command")
    retries = _one(flags, "retries") or "0"
    if not retries.isdecimal():
        raise DockerfileError(f"--retries={retries}: it is a number, 0 or more")
    interval, timeout, start_period, start_interval = (
        _duration(name, _one(flags, name)) for name in times
    )
    test = ("CMD" if command.json else "CMD-SHELL", *words)
    return Healthcheck(test, interval, timeout, start_period, start_interval, int(retries))


def _duration(name: str, text: str) -> int:
    """A duration as Go writes it (`1m30s`, `500ms`), in nanoseconds."""
    if text in ("", "0"):
        return 0
    parts = re.findall(_DURATION, text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise DockerfileError(f"--{name}={text}: a duration is written like 30s or 1m30s")
    total = round(sum(float(number) * _NANOSECONDS[unit] for number, unit in parts))
    if 0 < total < _NANOSECONDS["ms"]:
        raise DockerfileError(f"--{name}={text}: it cannot be less than 1ms")
    return total


def _onbuild(command: Command) -> Onbuild:
    text = re.sub(r"^\s*ONBUILD\s*", "", command.original, flags=re.IGNORECASE)
    if not text:
        raise DockerfileError("ONBUILD requires an instruction")
    try:
        (inner,) = parse(text).commands
    except DockerfileError as error:
        raise DockerfileError(error.reason, command.line) from None
    if inner.name == "ONBUILD":
        raise DockerfileError("chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed")
    if inner.name in ("FROM", "MAINTAINER"):
        raise DockerfileError(f"{inner.name} isn't allowed as an ONBUILD trigger")
    parse_instruction(inner._replace(line=command.line))
    return Onbuild(text)


_MAKERS: dict[str, Callable[[Command], Instruction]] = {
    "FROM": _from,
    "ARG": _arg,
    "ENV": lambda command: Env(_pairs(command)),
    "LABEL": lambda command: Label(_pairs(command)),
    "MAINTAINER": _maintainer,
    "RUN": _run,
    "COPY": _copy,
    "ADD": _add,
    "WORKDIR": _workdir,
    "USER": _user,
    "EXPOSE": _expose,
    "VOLUME": _volume,
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "SHELL": _shell,
    "STOPSIGNAL": _stop_signal,
    "HEALTHCHECK": _healthcheck,
    "ONBUILD": _onbuild,
}
