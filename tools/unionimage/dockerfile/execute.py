"""A plan is carried out: cached steps are taken from the cache, the others make layers.

First every stage goes as far as the cache takes it, which needs no mount and no thread. What
remains runs with a thread for each stage that waits only for the stages it needs. A step that fails
stops the others; what was finished stays cached.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from unionimage.digest import Digest, chain_ids
from unionimage.dockerfile import copystep
from unionimage.dockerfile.cache import HOLD, BuildCache, Cached, key_of
from unionimage.dockerfile.kitchen import Kitchen
from unionimage.dockerfile.parser import DockerfileError
from unionimage.dockerfile.plan import (
    CopyAction,
    Plan,
    RunAction,
    Source,
    StagePlan,
    Step,
    WorkdirAction,
)
from unionimage.errors import UserError
from unionimage.image_config import History, ImageConfig
from unionimage.tuples import NamedTuple

if TYPE_CHECKING:
    from unionimage.dockerfile.runstep import Environment, Secret

"""Holds the layers of cached steps in the store."""

COMMENT = "unionfuse.dockerfile.v0"
"""The comment of history entries, as BuildKit writes its own."""


class StepView(Protocol):
    """How one step that is carried out shows itself."""

    def output(self, data: bytes) -> None: ...

    def done(self) -> None: ...

    def failed(self) -> None: ...


class View(Protocol):
    """How a build shows itself; used from several threads."""

    def close(self) -> None: ...

    def cached(self, label: str) -> None: ...

    def begin(self, label: str) -> StepView: ...


class StepFailed(UserError):
    """A RUN step whose process ended with another code than 0.

    Attributes:
        step, label: which one.
        code: the exit code.
        tail: the last lines it wrote.
        source: the text of the Dockerfile, where it is known.
    """

    def __init__(self, step: Step, label: str, code: int, tail: bytes) -> None:
        super().__init__(f"Dockerfile, line {step.command.line}: {step.text}: exit code {code}")
        self.step = step
        self.label = label
        self.code = code
        self.tail = tail
        self.source = ""


def timestamp(epoch: int | None) -> str:
    """SOURCE_DATE_EPOCH, or else the time now, as history entries have it: RFC 3339 in UTC."""
    import datetime

    if epoch is None:
        return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return datetime.datetime.fromtimestamp(epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Settings(NamedTuple):
    """How a plan is carried out.

    Attributes:
        epoch: SOURCE_DATE_EPOCH in seconds, or None.
        secrets: by id.
    """

    no_cache: bool
    epoch: int | None
    secrets: Mapping[str, Secret]
    runtime: str | None = None


class Build:
    """One build: `run()` once."""

    def __init__(
        self, plan: Plan, kitchen: Kitchen, cache: BuildCache, settings: Settings, view: View
    ) -> None:
        self.plan = plan
        self.kitchen = kitchen
        self.cache = cache
        self.settings = settings
        self.view = view
        self.stages = {stage.number: StageBuild(self, stage) for stage in plan.stages}
        self.stopped = threading.Event()
        self._environment: Environment | None = None

    def run(self) -> ImageConfig:
        """Carry out the plan and return the config of its target.

        Raises:
            StepFailed: a RUN step failed.
            UserError: any other step could not be carried out.
        """
        target = self.stages[self.plan.stages[-1].number]
        for stage in self.stages.values():
            stage.take_cached()
        if not target.finished:
            unfinished = [stage for stage in self.stages.values() if not stage.finished]
            if any(stage.will_make_files for stage in unfinished):
                self.kitchen.enter_private_namespace()
            try:
                if self.kitchen.driver != "overlay" and any(s.will_run for s in unfinished):
                    self.kitchen.helper.prepare()
                self._run_stages(unfinished)
            finally:
                if self._environment is not None:
                    self._environment.networks.close()
                self.kitchen.close()
        return target.config

    def _run_stages(self, stages: Sequence[StageBuild]) -> None:
        if len(stages) == 1:
            try:
                stages[0].carry_out()
            except BaseException:
                self._stop()
                raise
            return
        errors: list[BaseException] = []
        threads = [threading.Thread(target=self._guarded, args=(stage, errors)) for stage in stages]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            self._stop()
            for thread in threads:
                thread.join()
            raise
        if errors:
            raise errors[0]

    def _guarded(self, stage: StageBuild, errors: list[BaseException]) -> None:
        try:
            stage.carry_out()
        except BaseException as error:
            if not self.stopped.is_set():
                errors.append(error)
            self._stop()

    def _stop(self) -> None:
        self.stopped.set()
        for stage in self.stages.values():
            stage.ready.set()  # whoever waits looks at `stopped`
        if self._environment is not None:
            self._environment.running.stop()

    def environment(self) -> Environment:
        """What RUN steps share; made when the first of them runs."""
        from unionimage.dockerfile.network import Networks
        from unionimage.dockerfile.runstep import Environment, Running

        if self._environment is None:
            self._environment = Environment(
                self.kitchen,
                Running(self.settings.runtime, self.kitchen.helper),
                Networks(self.kitchen.scratch),
                self.settings.secrets,
                self.stack_of,
            )
        return self._environment

    def remember(self, key: str, made: Cached) -> None:
        """Cache what a step made; its layer is kept until `prune` drops the build cache."""
        if made.diff_id is not None:
            self.kitchen.store.hold_layers(HOLD, [made.diff_id])
        self.cache.remember(key, made)

    @property
    def epoch(self) -> int | None:
        return self.settings.epoch

    def stage_name(self, source: Source) -> str:
        """How messages name the stage that a source is."""
        return self.stages[source.stage].plan.name

    def stack_of(self, source: Source) -> Sequence[Digest]:
        """The layers of a stage that is finished, or of an image."""
        if source.image is not None:
            return source.image.config.diff_ids
        return self.stages[source.stage].config.diff_ids


class StageBuild:
    """One stage on its way: the config so far, and the key of all that led there."""

    def __init__(self, build: Build, plan: StagePlan) -> None:
        self.build = build
        self.plan = plan
        self.ready = threading.Event()
        self.config = plan.start
        self.done = 0
        self._trail = ""

    @property
    def finished(self) -> bool:
        return self._trail != "" and self.done == len(self.plan.steps)

    @property
    def will_make_files(self) -> bool:
        """Whether a step is left that may make a layer."""
        return any(step.action is not None for step in self.plan.steps[self.done :])

    @property
    def will_run(self) -> bool:
        """Whether a RUN step is left."""
        return any(isinstance(step.action, RunAction) for step in self.plan.steps[self.done :])

    def take_cached(self) -> None:
        """Go as far as the cache takes it, if all stages that are needed are there."""
        stages = self.build.stages
        if not all(stages[number].finished for number in self.plan.needs):
            return
        self._begin()
        while self.done < len(self.plan.steps):
            step = self.plan.steps[self.done]
            with _at(step):
                recipe = self._recipe(step, may_mount=False)
            cached = None if recipe is None else self._cached(recipe.key)
            if recipe is None or cached is None:
                return
            self.build.view.cached(self._label(step))
            self._take(step, recipe.key, cached)
        self.ready.set()

    def carry_out(self) -> None:
        """Do what is left, once the stages that are needed are there."""
        for number in sorted(self.plan.needs):
            self.build.stages[number].ready.wait()
        self._begin()
        while self.done < len(self.plan.steps):
            if self.build.stopped.is_set():
                return
            self._one(self.plan.steps[self.done])
        self.ready.set()

    def _begin(self) -> None:
        if self._trail or self.build.stopped.is_set():
            return
        base = self.plan.base
        if base.stage >= 0:
            origin = self.build.stages[base.stage]
            self.config = origin.config._replace(run=origin.config.run._replace(on_build=()))
            self._trail = origin._trail
        else:
            identity = "scratch" if base.image is None else base.image.id
            self._trail = key_of("base", identity, str(self.plan.platform))
            self.config = self.plan.start._replace(run=self.plan.start.run._replace(on_build=()))

    def _one(self, step: Step) -> None:
        with _at(step):
            recipe = self._recipe(step, may_mount=True)
        assert recipe is not None
        label = self._label(step)
        cached = self._cached(recipe.key)
        if cached is not None:
            self.build.view.cached(label)
            self._take(step, recipe.key, cached)
            return
        diff_id = None
        if step.action is not None:
            view = self.build.view.begin(label)
            try:
                with _at(step):
                    diff_id = self._make_layer(step, recipe, view)
            except BaseException:
                view.failed()
                raise
            view.done()
        made = Cached(diff_id, timestamp(self.build.settings.epoch))
        self.build.remember(recipe.key, made)
        self._take(step, recipe.key, made)

    def _take(self, step: Step, key: str, made: Cached) -> None:
        """Go on behind a step that is done."""
        history = History(
            created=made.created, created_by=step.created_by, comment=COMMENT, author=step.author
        )
        # The comment of a base that was committed or imported is about that base.
        config = self.config._replace(run=step.run, author=step.author, comment="")
        self.config = config.with_step(history, made.diff_id)
        self._trail = key_of(key, made.diff_id)
        self.done += 1

    def _label(self, step: Step) -> str:
        name = f"{self.plan.name} " if len(self.build.plan.stages) > 1 else ""
        return f"[{name}{self.done + 1}/{len(self.plan.steps)}] {step.text}"

    # ---- keys

    def _cached(self, key: str) -> Cached | None:
        """What the cache has for a key, its layer held by this build."""
        if self.build.settings.no_cache:
            return None
        found = self.build.cache.step(key)
        if found is None or found.diff_id is None:
            return found
        return found if self.build.kitchen.lease.has_layer(found.diff_id) else None

    @property
    def _chain(self) -> str:
        chain = chain_ids(self.config.diff_ids)
        return chain[-1] if chain else ""

    def _recipe(self, step: Step, *, may_mount: bool) -> Recipe | None:
        """The key of a step; None where only a mount could tell it."""
        action = step.action
        if action is None:
            return Recipe(key_of("config", self._trail, step.created_by))
        epoch = self.build.settings.epoch
        if isinstance(action, WorkdirAction):
            return Recipe(key_of("workdir", self._chain, *action, epoch))
        if isinstance(action, CopyAction):
            goods = copystep.gather(self.build, action, may_mount=may_mount)
            if goods is None:
                return None
            chain = "" if action.link else self._chain
            look = (action.destination, action.chown, action.chmod, action.link, action.parents)
            key = key_of("copy", chain, look, action.unpack, goods.digest, epoch)
            return Recipe(key, goods)
        mounts = [
            (tuple(mount), self._identity(mount.type, mount.source, source))
            for mount, source in action.mounts
        ]
        facts = (action.args, tuple(sorted(action.env)), action.cwd, action.user, action.network)
        return Recipe(key_of("run", self._chain, facts, mounts, action.script, epoch))

    def _identity(self, kind: str, path: str, source: Source) -> str:
        """What tells the content of a mount's source: a digest, or layers, which never change."""
        if kind in ("tmpfs", "secret"):
            return ""
        if not source.is_context:
            return ",".join(self.build.stack_of(source))
        if kind == "cache":
            return ""
        return copystep.context_digest(self.build.kitchen.context, path)

    # ---- work

    def _make_layer(self, step: Step, recipe: Recipe, view: StepView) -> Digest | None:
        kitchen = self.build.kitchen
        below = self.config.diff_ids
        upper = kitchen.scratch()
        upper.chmod(0o755)
        match step.action:
            case CopyAction() as action:
                assert recipe.goods is not None
                if action.link:
                    below = ()
                copystep.carry_out(self.build, action, recipe.goods, below, upper)
            case WorkdirAction() as action:
                copystep.make_workdir(self.build, action, below, upper)
            case RunAction() as action:
                self._run(step, action, below, upper, view)
        return self._commit(upper, below)

    def _commit(self, upper: Path, below: Sequence[Digest]) -> Digest | None:
        if not os.listdir(upper):
            return None
        epoch = self.build.settings.epoch
        newest = None if epoch is None else epoch * 10**9
        layer = self.build.kitchen.lease.begin().commit_upper(upper, below, newest_ns=newest)
        return None if layer is None else layer.diff_id

    def _run(
        self, step: Step, action: RunAction, below: Sequence[Digest], upper: Path, view: StepView
    ) -> None:
        from unionimage.dockerfile import runstep

        tail = bytearray()

        def output(data: bytes) -> None:
            view.output(data)
            tail.extend(data)
            del tail[:-8192]

        code = runstep.run(self.build.environment(), action, below, upper, output)
        if code != 0:
            raise StepFailed(step, self._label(step), code, bytes(tail))


@contextlib.contextmanager
def _at(step: Step) -> Iterator[None]:
    """Whatever a user can mend in a step is told with its line of the Dockerfile."""
    try:
        yield
    except StepFailed:
        raise
    except DockerfileError as error:
        raise DockerfileError(error.reason, error.line or step.command.line) from None
    except UserError as error:
        raise DockerfileError(f"{step.text}: {error.message}", step.command.line) from None


class Recipe(NamedTuple):
    """The key of a step, and what was gathered to tell it."""

    key: str
    goods: copystep.Goods | None = None
