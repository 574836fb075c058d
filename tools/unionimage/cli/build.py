"""`unionfuse build`: an image from a Dockerfile.

Progress goes to stderr, with -q the id to stdout.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from unionimage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from unionimage.dockerfile.build import Fetch, Request
    from unionimage.dockerfile.runstep import Secret
    from unionimage.reference import Reference
    from unionimage.spec import Platform
    from unionimage.store import Image, Store

EXAMPLE = """unionfuse build -t app:1 .
unionfuse build -f test.Dockerfile --target test --build-arg V=2 --secret id=key,src=key.pem .
printf 'FROM scratch\\nCOPY <<x /x\\nhello\\nx\\n' | unionfuse build -q -"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of docker's `build`."""
    add = parser.add_argument
    add("context", metavar="CONTEXT", help="a directory, a tar file, - (stdin) or a git URL")
    add("-t", "--tag", action="append", default=[], metavar="NAME", help="name of the image")
    add("-f", "--file", metavar="FILE", help="the Dockerfile (default: Dockerfile in the context)")
    add("--build-arg", action="append", default=[], metavar="NAME[=VALUE]", help="value of an ARG")
    add("--target", default="", metavar="STAGE", help="the stage to build (default: the last)")
    add("--platform", metavar="OS/ARCH[/VARIANT]", help="what to build for (default: this machine)")
    add("--no-cache", action="store_true", help="do every step again")
    add("--pull", action="store_true", help="look for newer versions of the base images")
    add("--label", action="append", default=[], metavar="NAME=VALUE", help="label of the image")
    add("--squash", action="store_true", help="make the new layers into one")
    add(
        "--secret",
        action="append",
        default=[],
        metavar="id=ID[,src=FILE|,env=NAME]",
        help="a secret for RUN --mount=type=secret",
    )
    add("--iidfile", metavar="FILE", help="write the image id to a file")
    add("-q", "--quiet", action="store_true", help="print the image id and nothing else")
    add(
        "--progress",
        choices=("auto", "plain", "tty", "quiet"),
        default="auto",
        help="how to show progress (default: auto)",
    )
    add(
        "--network",
        choices=("default", "none", "host"),
        default="default",
        help="the network of RUN steps that do not say their own",
    )
    for name in ("--rm", "--force-rm"):
        add(name, action="store_true", help="of docker; nothing of a step is left in any case")
    add("--driver", choices=("fuse", "overlay"), help="what RUN runs on (default: fuse)")
    add("--runtime", metavar="PROGRAM", help="the OCI runtime for RUN (default: crun or runc)")


def run(args: argparse.Namespace) -> int:
    """Build and tag; see `docs/build.md`."""
    from unionimage.cli.common import open_store
    from unionimage.dockerfile.build import build
    from unionimage.dockerfile.execute import StepFailed
    from unionimage.dockerfile.view import standard_error, view

    _become_root(args)
    request = _request(args)
    progress = "quiet" if args.quiet else args.progress
    stream = standard_error()
    with open_store(args) as store:
        shown = view(progress, stream)
        warn = _ignore if progress == "quiet" else _warn
        try:
            image = build(store, request, shown, _fetcher(store, progress), warn)
        except StepFailed as error:
            shown.close()
            _show_failure(error)
            raise
        finally:
            shown.close()
    if args.iidfile:
        Path(args.iidfile).write_text(image.id)
    if args.quiet:
        print(image.id)
    elif progress != "quiet":
        names = [name.familiar for name in request.names] or [""]
        for name in names:
            print(f"built {image.id.short} {name}".rstrip(), file=stream)
    return 0


def _become_root(args: argparse.Namespace) -> None:
    """Somebody who is not root builds as root of a user namespace; then this runs once more."""
    if os.geteuid() != 0:
        from unionimage import config
        from unionimage.container import rootless

        root = Path(args.root or config.load().root or config.default_root()).absolute()
        os.environ["PWD"] = os.getcwd()
        rootless.enter(root)
    if "UNIONFUSE_ROOTLESS" in os.environ:  # entering the namespace led to its /
        os.chdir(os.environ["PWD"])


def _request(args: argparse.Namespace) -> Request:
    from unionimage.dockerfile.build import Request
    from unionimage.reference import Reference
    from unionimage.spec import Platform

    arguments = dict(_build_arguments(args.build_arg))
    return Request(
        context=args.context,
        file=args.file,
        names=tuple(Reference.parse(name).with_default_tag() for name in args.tag),
        build_args=arguments,
        labels=tuple(_pair("--label", label) for label in args.label),
        target=args.target,
        platform=Platform.parse(args.platform) if args.platform else Platform.host(),
        no_cache=args.no_cache,
        pull=args.pull,
        squash=args.squash,
        secrets=dict(map(_secret, args.secret)),
        epoch=_epoch(arguments),
        driver=args.driver,
        runtime=args.runtime,
        network=args.network,
    )


def _pair(flag: str, text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name:
        raise UserError(f"{flag} {text!r}: it is NAME=VALUE")
    return name, value


def _build_arguments(words: Iterable[str]) -> Iterable[tuple[str, str]]:
    """NAME=VALUE, or NAME alone: its value in the environment, if it has one."""
    for word in words:
        name, has_value, value = word.partition("=")
        if not name:
            raise UserError(f"--build-arg {word!r}: it is NAME=VALUE or NAME")
        if has_value:
            yield name, value
        elif name in os.environ:
            yield name, os.environ[name]


def _epoch(arguments: dict[str, str]) -> int | None:
    """SOURCE_DATE_EPOCH, as a build argument or from the environment; in seconds."""
    text = arguments.get("SOURCE_DATE_EPOCH", os.environ.get("SOURCE_DATE_EPOCH", ""))
    if not text:
        return None
    if not text.isdecimal() or int(text) > 253402300799:  # the end of the year 9999
        raise UserError(f"SOURCE_DATE_EPOCH={text}: it is seconds since 1970")
    arguments["SOURCE_DATE_EPOCH"] = text
    return int(text)


def _secret(text: str) -> tuple[str, Secret]:
    from unionimage.dockerfile.runstep import Secret

    fields = dict(field.partition("=")[::2] for field in text.split(","))
    kind = fields.pop("type", "file")
    name = fields.pop("id", "")
    file = fields.pop("src", fields.pop("source", ""))
    variable = fields.pop("env", "")
    if fields or not name or kind not in ("file", "env") or (file and variable):
        raise UserError(f"--secret {text!r}: it is id=ID[,src=FILE] or id=ID,env=NAME")
    if kind == "env" and file:
        file, variable = "", file
    if not file and not variable:
        file, variable = ("", name) if name in os.environ else (name, "")
    secret = Secret(file, variable)
    if variable and variable not in os.environ:
        raise UserError(f"--secret {name}: the variable {variable} is not set")
    if file and not os.access(file, os.R_OK):
        raise UserError(f"--secret {name}: cannot read the file {file}")
    return name, secret


def _show_failure(error: object) -> None:
    """What docker shows of a step that failed: its last output and its place in the Dockerfile."""
    from unionimage.dockerfile.execute import StepFailed
    from unionimage.dockerfile.view import excerpt, readable

    assert isinstance(error, StepFailed)
    lines = error.tail.rstrip(b"\n").split(b"\n")[-20:]
    print(f"------\n > {error.label}:", file=sys.stderr)
    for line in lines:
        print(readable(line), file=sys.stderr)
    print("------", file=sys.stderr)
    command = error.step.command
    if error.source and command.line:
        print(excerpt(error.source, command.line, command.end_line), file=sys.stderr)


def _fetcher(store: Store, progress: str) -> Fetch:
    """Pulls base images, and shows that as `pull` does."""

    def fetch(reference: Reference, platform: Platform) -> Image:
        from unionimage.cli.progress import reporter
        from unionimage.registry.pull import pull
        from unionimage.registry.session import Session

        with (
            Session(store.config) as session,
            reporter(quiet=progress == "quiet", stream=sys.stderr) as report,
        ):
            return pull(store, session, reference, report, platform).image

    return fetch


def _warn(text: str) -> None:
    print(f"unionfuse build: warning: {text}", file=sys.stderr)


def _ignore(text: str) -> None:
    pass
