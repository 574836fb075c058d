"""A whole build: context, Dockerfile, base images, plan, execution, and the image at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from unionimage.digest import Digest
from unionimage.dockerfile.cache import BuildCache
from unionimage.dockerfile.context import open_context
from unionimage.dockerfile.execute import Build, Settings, StepFailed, View, timestamp
from unionimage.dockerfile.kitchen import BuildLease, Kitchen
from unionimage.dockerfile.parser import parse
from unionimage.dockerfile.plan import Options, Plan, make_plan
from unionimage.errors import UserError
from unionimage.image_config import ImageConfig
from unionimage.reference import Reference
from unionimage.spec import Platform
from unionimage.tuples import NamedTuple

if TYPE_CHECKING:
    from unionimage.dockerfile.runstep import Secret
    from unionimage.store import Image, Store


class Request(NamedTuple):
    """What is to be built; the fields are the flags of the command line.

    Attributes:
        epoch: SOURCE_DATE_EPOCH in seconds; None: now.
        driver: fuse or overlay; None: the best for each step.
    """

    context: str
    file: str | None
    names: tuple[Reference, ...]
    build_args: Mapping[str, str]
    labels: tuple[tuple[str, str], ...]
    target: str
    platform: Platform
    no_cache: bool
    pull: bool
    squash: bool
    secrets: Mapping[str, Secret]
    epoch: int | None
    driver: str | None
    runtime: str | None
    network: str = "default"


Fetch = Callable[[Reference, Platform], "Image"]
"""Pulls an image into the store."""


def build(
    store: Store, request: Request, view: View, fetch: Fetch, warn: Callable[[str], None]
) -> Image:
    """Build an image, store it and give it its names.

    Args:
        fetch: is asked for base images that are not in the store, or always with `--pull`.
        warn: is told of what is odd but no error.

    Raises:
        StepFailed: a RUN step failed; the steps before it stay cached.
        UserError: anything else that the user can mend.
    """
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(
            contextlib.closing(BuildLease(store, f"build {request.context}"))
        )
        context, text = open_context(request.context, request.file, lease)
        stack.callback(context.close)
        bases = _Bases(store, lease, fetch, request.pull)
        options = Options(
            request.build_args,
            request.labels,
            request.target,
            request.platform,
            request.network,
        )
        plan = make_plan(parse(text), options, bases.resolve)
        for warning in plan.warnings:
            warn(warning)
        kitchen = Kitchen(store, lease, context, request.driver)
        cache = stack.enter_context(contextlib.closing(BuildCache(store.root)))
        settings = Settings(request.no_cache, request.epoch, request.secrets, request.runtime)
        try:
            config = Build(plan, kitchen, cache, settings, view).run()
        except StepFailed as error:
            error.source = text
            raise
        if request.squash:
            from unionimage.dockerfile.squash import squash

            config = squash(kitchen, _base_config(plan), config, timestamp(request.epoch))
        return _add_image(store, lease, config, request.names)


def _add_image(
    store: Store, lease: BuildLease, config: ImageConfig, names: Sequence[Reference]
) -> Image:
    """The image of a config with these names; one that is there already is not written again."""
    data = config.to_json()
    image = store.find(Digest.of(data))
    if image is None:
        return lease.begin().add_image(data, names=names)
    for name in names:
        if name not in image.names:
            image = store.tag(image, name)
    return image


def _base_config(plan: Plan) -> ImageConfig:
    """What the target stands on in the end, below all stages."""
    stages = {stage.number: stage for stage in plan.stages}
    stage = plan.stages[-1]
    while stage.base.stage >= 0:
        stage = stages[stage.base.stage]
    return stage.start


class _Bases:
    """Finds base images in the store, or fetches them; each name once a build."""

    def __init__(self, store: Store, lease: BuildLease, fetch: Fetch, always: bool) -> None:
        self._store = store
        self._lease = lease
        self._fetch = fetch
        self._always = always
        self._known: dict[tuple[str, str], Image] = {}

    def resolve(self, name: str, platform: Platform) -> Image:
        """The image of a FROM or `--from=`. Raises UserError where there is none."""
        key = (name, str(platform))
        if key not in self._known:
            image = self._find(name, platform)
            for diff_id in image.config.diff_ids:
                self._lease.has_layer(diff_id)
            self._known[key] = image
        return self._known[key]

    def _find(self, name: str, platform: Platform) -> Image:
        image = None if self._always else self._store.find(name)
        if image is not None and image.config.platform.satisfies(platform):
            return image
        try:
            return self._fetch(self._store.reference(name).with_default_tag(), platform)
        except UserError as error:
            here = f"here it is for {image.config.platform}; " if image is not None else ""
            raise UserError(f"base image {name} for {platform}: {here}{error.message}") from None
