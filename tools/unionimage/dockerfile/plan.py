"""From instructions to a plan: immutable steps with everything known before anything runs.

No instruction changes the config by what it runs, so the whole config, every expanded path, and
which stage needs which follow from the Dockerfile, the build arguments and the configs of the base
images. Only the stages that the target needs are planned. Executing is `execute.py`'s.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from unionimage.dockerfile import config
from unionimage.dockerfile.expand import expand, expand_document, split
from unionimage.dockerfile.instructions import (
    Arg,
    Cmd,
    Copy,
    Env,
    Expose,
    From,
    Instruction,
    Label,
    Maintainer,
    Run,
    StopSignal,
    User,
    Volume,
    Words,
    Workdir,
    heredoc_of,
    parse_instruction,
    parse_trigger,
    strip_tabs,
)
from unionimage.dockerfile.parser import Command, Dockerfile, DockerfileError
from unionimage.dockerfile.runmount import RunMount, parse_mount
from unionimage.image_config import ImageConfig, RunConfig
from unionimage.spec import Platform
from unionimage.tuples import NamedTuple

if TYPE_CHECKING:
    from unionimage.store import Image

PROXY_ARGUMENTS = frozenset(
    name
    for upper in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for name in (upper, upper.lower())
)

SCRIPTS = "/dev/pipes"
"""Where the heredocs that are programs lie while they run; BuildKit's place."""

Resolve = Callable[[str, Platform], "Image"]
"""Finds (or pulls) an image by the name a Dockerfile gives it."""


class Source(NamedTuple):
    """Where files come from: a stage (`stage` >= 0), an image, or else the build context."""

    stage: int = -1
    image: Image | None = None

    @property
    def is_context(self) -> bool:
        return self.stage < 0 and self.image is None


class RunAction(NamedTuple):
    """A process to run. `script` is a heredoc that is a program: (name, text).

    `proxy` holds proxy settings: set in the process, kept out of image, history and cache key.
    """

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: str
    network: str
    mounts: tuple[tuple[RunMount, Source], ...]
    script: tuple[str, str] | None
    proxy: tuple[str, ...]


class CopyAction(NamedTuple):
    """Files to copy. `destination` is absolute; a `/` at its end says that it is a directory.

    `documents` are (name, text); `unpack` says whether local archives are extracted.
    """

    is_add: bool
    source: Source
    sources: tuple[str, ...]
    documents: tuple[tuple[str, str], ...]
    destination: str
    chown: str
    chmod: str
    link: bool
    parents: bool
    exclude: tuple[str, ...]
    checksum: str
    unpack: bool


class WorkdirAction(NamedTuple):
    """A directory to make, with its parents, where it is not there yet."""

    path: str
    user: str


Action = RunAction | CopyAction | WorkdirAction


class Step(NamedTuple):
    """One instruction: what it does to files (None: nothing) and the config once it is done."""

    command: Command
    created_by: str
    action: Action | None
    run: RunConfig
    author: str

    @property
    def text(self) -> str:
        """The instruction on one line, as progress and errors show it."""
        return " ".join(self.command.original.partition("\n")[0].split())


class StagePlan(NamedTuple):
    """One stage: its base (`Source()`: scratch) and its steps."""

    number: int
    name: str
    base: Source
    platform: Platform
    steps: tuple[Step, ...]
    start: ImageConfig

    @property
    def needs(self) -> frozenset[int]:
        """The stages that must be built before this one can be."""
        found = {self.base.stage}
        for step in self.steps:
            if isinstance(step.action, CopyAction):
                found.add(step.action.source.stage)
            elif isinstance(step.action, RunAction):
                found.update(source.stage for _, source in step.action.mounts)
        return frozenset(found - {-1})


class Plan(NamedTuple):
    """The stages that are needed, each behind what it needs; the last one is the target."""

    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]


class Options(NamedTuple):
    """What the command line says about the plan. An empty `target` is the last stage.

    `network` is that of RUN steps which do not say their own: default, none or host.
    """

    build_args: Mapping[str, str]
    labels: tuple[tuple[str, str], ...]
    target: str
    platform: Platform
    network: str = "default"


class _Stage(NamedTuple):
    """A stage as the Dockerfile has it."""

    number: int
    origin: From
    line: int
    body: tuple[tuple[Command, Instruction], ...]


def make_plan(dockerfile: Dockerfile, options: Options, resolve: Resolve) -> Plan:
    """Plan a build.

    Raises:
        DockerfileError: a mistake in the Dockerfile, with its line.
        UserError: what `resolve` raises.
    """
    return _Planner(dockerfile, options, resolve).plan()


def _stages(dockerfile: Dockerfile) -> tuple[tuple[Arg, ...], list[_Stage]]:
    """The ARGs above the first FROM, and the stages."""
    arguments: list[Arg] = []
    stages: list[_Stage] = []
    body: list[tuple[Command, Instruction]] = []
    for command in dockerfile.commands:
        instruction = parse_instruction(command)
        if isinstance(instruction, From):
            body = []
            stages.append(_Stage(len(stages), instruction, command.line, ()))
        elif not stages:
            if not isinstance(instruction, Arg):
                raise DockerfileError(
                    f"no build stage yet: {command.name} comes before FROM", command.line
                )
            arguments.append(instruction)
        else:
            body.append((command, instruction))
            stages[-1] = stages[-1]._replace(body=tuple(body))
    if not stages:
        raise DockerfileError("there is no FROM in it")
    return tuple(arguments), stages


class _Planner:
    def __init__(self, dockerfile: Dockerfile, options: Options, resolve: Resolve) -> None:
        self.escape = dockerfile.escape
        self.options = options
        self.resolve = resolve
        self.used_args: set[str] = set()
        self.warnings: list[str] = []
        self.planned: dict[int, _StageState] = {}
        self.predefined = _platform_arguments(options.platform, Platform.host())
        arguments, self.stages = _stages(dockerfile)
        self.globals = self._global_arguments(arguments)

    def plan(self) -> Plan:
        target = self._target()
        self.predefined["TARGETSTAGE"] = self.options.target or "default"
        self._stage(target)
        unused = self.options.build_args.keys() - self.used_args - PROXY_ARGUMENTS
        for name in sorted(unused - {"SOURCE_DATE_EPOCH"}):
            self.warnings.append(f"build-arg {name} was not used by the Dockerfile")
        return Plan(tuple(state.finished for state in self.planned.values()), tuple(self.warnings))

    def _target(self) -> int:
        name = self.options.target
        if not name:
            return len(self.stages) - 1
        found = self.find_stage(name, len(self.stages))
        if found < 0:
            known = ", ".join(stage.origin.name for stage in self.stages if stage.origin.name)
            raise DockerfileError(f"target stage {name!r} not found; it names: {known or 'none'}")
        return found

    def find_stage(self, name: str, before: int) -> int:
        """The index of a stage by name or number among the first `before` ones; -1: none.

        Of equal names the last counts, as in docker.
        """
        for stage in reversed(self.stages[:before]):
            if stage.origin.name and stage.origin.name == name.lower():
                return stage.number
        return int(name) if name.isdecimal() and int(name) < before else -1

    def _global_arguments(self, arguments: tuple[Arg, ...]) -> dict[str, str]:
        """The variables that FROM lines may use, and what a bare `ARG name` in a stage takes."""
        known: dict[str, str] = {}
        for arg in arguments:
            for name, default in arg.pairs:
                value = self.build_argument(name)
                if value is None and default is not None:
                    value = expand(default, {**self.predefined, **known}, self.escape)
                if value is not None:
                    known[name] = value
        return known

    def build_argument(self, name: str) -> str | None:
        """The value of `--build-arg name=`, if it was given."""
        self.used_args.add(name)
        return self.options.build_args.get(name)

    def _stage(self, number: int) -> _StageState:
        """Plan one stage, after the stages it is built on or copies from."""
        if number in self.planned:
            return self.planned[number]
        stage = self.stages[number]
        try:
            state = self._begin(stage)
        except DockerfileError as error:
            raise DockerfileError(error.reason, error.line or stage.line) from None
        for command, instruction in (*state.triggers, *stage.body):
            try:
                state.add(command, instruction)
            except DockerfileError as error:
                raise DockerfileError(error.reason, error.line or command.line) from None
        if number == self._target() and self.options.labels:
            state.add_labels(self.options.labels)
        self.planned[number] = state
        return state

    def _begin(self, stage: _Stage) -> _StageState:
        variables = {**self.predefined, **self.globals}
        base = expand(stage.origin.base, variables, self.escape)
        if not base:
            raise DockerfileError(f"base name ({stage.origin.base}) should not be blank")
        chosen = expand(stage.origin.platform, variables, self.escape)
        platform = Platform.parse(chosen) if chosen else self.options.platform
        earlier = self.find_stage(base, stage.number) if not base.isdecimal() else -1
        if earlier >= 0:
            return _StageState(self, stage, Source(stage=earlier), self._stage(earlier))
        if base == "scratch":
            return _StageState(self, stage, Source(), ImageConfig(platform))
        image = self.resolve(base, platform)
        return _StageState(self, stage, Source(image=image), image.config)

    def source(self, name: str, before: int) -> Source:
        """What `--from=name` or `from=name` means in stage number `before`."""
        if not name:
            return Source()
        if "$" in name[:-1]:
            raise DockerfileError(
                f"from={name}: variables are not expanded there; name a stage with FROM … AS"
            )
        found = self.find_stage(name, before)
        if found >= 0:
            self._stage(found)
            return Source(stage=found)
        if self.find_stage(name, len(self.stages)) >= 0:
            raise DockerfileError(f"from={name}: that stage does not come before this one")
        return Source(image=self.resolve(name, self.options.platform))


class _StageState:
    """A stage while it is planned: the config so far and the variables in force."""

    def __init__(
        self, planner: _Planner, stage: _Stage, base: Source, origin: _StageState | ImageConfig
    ) -> None:
        self.planner = planner
        self.stage = stage
        self.base = base
        self.steps: list[Step] = []
        self.cmd_is_own = False
        self.start: ImageConfig
        self.args: dict[str, str] = {}
        if isinstance(origin, _StageState):  # a stage hands its arguments on
            self.start = origin.end
            self.args = dict(origin.args)
        else:
            self.start = origin
        self.platform = self.start.platform
        self.run = self.start.run._replace(on_build=())
        self.author = self.start.author
        self.triggers = [
            (command._replace(line=stage.line, end_line=stage.line), instruction)
            for command, instruction in map(parse_trigger, self.start.run.on_build)
        ]

    @property
    def finished(self) -> StagePlan:
        return StagePlan(
            self.stage.number,
            self.stage.origin.name or f"stage-{self.stage.number}",
            self.base,
            self.platform,
            tuple(self.steps),
            self.start,
        )

    @property
    def end(self) -> ImageConfig:
        """The config that a stage built on this one starts from; its layers are not known yet."""
        return self.start._replace(run=self.run, author=self.author)

    @property
    def variables(self) -> dict[str, str]:
        """What `$name` means now; ENV wins over ARG."""
        return {**self.args, **self.run.environment()}

    def expand(self, word: str) -> str:
        return expand(word, self.variables, self.planner.escape)

    def add(self, command: Command, instruction: Instruction) -> None:
        """Add one step."""
        match instruction:
            case Arg():
                self._arg(command, instruction)
            case Run():
                self._run(command, instruction)
            case Copy():
                self._copy(command, instruction)
            case _:
                expanded = self._expanded(instruction)
                self.run, text = config.apply(self.run, expanded, self.cmd_is_own)
                self.cmd_is_own |= isinstance(expanded, Cmd)
                action = None
                if isinstance(expanded, Maintainer):
                    self.author = expanded.name
                elif isinstance(expanded, Workdir):
                    action = WorkdirAction(self.run.working_dir, self.run.user)
                self._step(command, text, action)

    def add_labels(self, labels: tuple[tuple[str, str], ...]) -> None:
        """`--label`: one LABEL step behind all others."""
        self.run, text = config.apply(self.run, Label(labels), self.cmd_is_own)
        self._step(Command("LABEL", (), (), False, (), text, 0, 0), text, None)

    def _step(self, command: Command, created_by: str, action: Action | None) -> None:
        self.steps.append(Step(command, created_by, action, self.run, self.author))

    def _expanded(self, instruction: Instruction) -> Instruction:
        """The instruction with its variables replaced, where docker replaces them."""
        match instruction:
            case Env(pairs):
                return Env(self._pairs(pairs))
            case Label(pairs):
                return Label(self._pairs(pairs))
            case Workdir(path):
                return Workdir(self.expand(path))
            case User(user):
                return User(self.expand(user))
            case StopSignal(signal):
                return StopSignal(self.expand(signal))
            case Volume(paths):
                return Volume(tuple(map(self.expand, paths)))
            case Expose(ports):
                escape = self.planner.escape
                return Expose(
                    tuple(word for port in ports for word in split(port, self.variables, escape))
                )
        return instruction

    def _pairs(self, pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        return tuple((self.expand(name), self.expand(value)) for name, value in pairs)

    def _arg(self, command: Command, arg: Arg) -> None:
        planner = self.planner
        said: list[str] = []
        for written, default in arg.pairs:
            name = self.expand(written)
            value = planner.build_argument(name)
            if value is None and default is not None:
                value = self.expand(default)
            elif value is None:
                value = planner.globals.get(name, planner.predefined.get(name))
            if value is not None:
                self.args[name] = value
            said.append(name if value is None else f"{name}={value}")
        self._step(command, "ARG " + " ".join(said), None)

    def _run(self, command: Command, run: Run) -> None:
        words, script = _with_heredocs(run.command)
        args = (
            words
            if script is not None or not run.command.shell
            else (*(self.run.shell or config.DEFAULT_SHELL), *words)
        )
        mounts = tuple(self._mount(text) for text in run.mounts)
        variables = self.variables
        variables.setdefault("PATH", config.DEFAULT_PATH)
        visible = {name: variables[name] for name in self.args}
        given = self.planner.options.build_args
        action = RunAction(
            args=args,
            env=tuple(f"{name}={value}" for name, value in variables.items()),
            cwd=self.run.working_dir or "/",
            user=self.run.user,
            network=self.planner.options.network if run.network == "default" else run.network,
            mounts=mounts,
            script=script,
            proxy=tuple(
                f"{name}={value}"
                for name, value in sorted(given.items())
                if name in PROXY_ARGUMENTS and name not in variables
            ),
        )
        shown = [f"|{len(visible)}"] if visible else []
        shown += [f"{name}={value}" for name, value in visible.items()]
        self._step(command, " ".join(["RUN", *shown, *args]), action)

    def _mount(self, text: str) -> tuple[RunMount, Source]:
        mount = parse_mount(text, self.expand)
        if mount.type in ("tmpfs", "secret") or (mount.type == "cache" and not mount.source_stage):
            return mount, Source()
        return mount, self.planner.source(mount.source_stage, self.stage.number)

    def _copy(self, command: Command, copy: Copy) -> None:
        source = self.planner.source(copy.source_stage, self.stage.number)
        destination = self.expand(copy.destination)
        is_directory = destination.endswith("/") or posixpath.basename(destination) in (".", "")
        path = config.absolute(self.run, destination)
        if is_directory and path != "/":
            path += "/"
        documents = tuple(
            (name, expand_document(text, self.variables) if replaced else text)
            for name, text, replaced in copy.documents
        )
        sources = tuple(map(self.expand, copy.sources))
        urls = [source for source in sources if re.match("(https?|git|ssh)://|git@", source)]
        if urls and not copy.is_add:
            raise DockerfileError(f"COPY takes no URL ({urls[0]}): use ADD")
        if any(re.match(r"git|ssh|.*\.git(#|$)", url) for url in urls):
            raise DockerfileError(f"ADD does not clone repositories ({urls[0]}): use RUN git clone")
        if urls and copy.unpack:
            raise DockerfileError("--unpack is for local archives, not for a URL")
        if len(sources) + len(documents) > 1 and not path.endswith("/"):
            raise DockerfileError(
                f"{command.name} of several sources needs a destination that ends with a /"
            )
        action = CopyAction(
            is_add=copy.is_add,
            source=source,
            sources=sources,
            documents=documents,
            destination=path,
            chown=self.expand(copy.chown),
            chmod=self.expand(copy.chmod),
            link=copy.link,
            parents=copy.parents,
            exclude=tuple(map(self.expand, copy.exclude)),
            checksum=self.expand(copy.checksum),
            unpack=copy.is_add if copy.unpack is None else copy.unpack,
        )
        if copy.keep_git_dir:
            raise DockerfileError("--keep-git-dir is not offered: ADD does not clone repositories")
        self._step(command, _copy_text(command.name, copy, action, destination), action)


def _copy_text(name: str, copy: Copy, action: CopyAction, destination: str) -> str:
    flags = [
        f"--{flag}={value}"
        for flag, value in (
            ("from", copy.source_stage),
            ("chown", action.chown),
            ("chmod", action.chmod),
            ("checksum", action.checksum),
        )
        if value
    ]
    flags += ["--link"] * copy.link + ["--parents"] * copy.parents
    flags += [f"--exclude={pattern}" for pattern in action.exclude]
    documents = [f"<<{document}" for document, _ in action.documents]
    return " ".join([name, *flags, *action.sources, *documents, destination])


def _with_heredocs(command: Words) -> tuple[tuple[str, ...], tuple[str, str] | None]:
    """A command line with its inline documents: (the words, a document that is itself a program).

    A lone heredoc is the text for the shell, or a program where it begins with `#!`; others are
    handed to the shell as they stand in the file.
    """
    if not command.heredocs:
        return command.words, None
    text = command.words[0]
    alone = heredoc_of(text)
    if alone is None:
        parts = [text]
        for document in command.heredocs:
            parts += ["\n", document.content, document.name]
        return ("".join(parts),), None
    name, content = command.heredocs[0]
    if alone[0]:
        content = strip_tabs(content)
    if content.startswith("#!"):
        return (f"{SCRIPTS}/{name}",), (name, content)
    return (content,), None


def _platform_arguments(target: Platform, build: Platform) -> dict[str, str]:
    """The ARGs that docker defines by itself."""
    return {
        f"{prefix}{name}": value
        for prefix, platform in (("TARGET", target), ("BUILD", build))
        for name, value in (
            ("PLATFORM", str(platform)),
            ("OS", platform.os),
            ("ARCH", platform.architecture),
            ("VARIANT", platform.variant),
        )
    }
