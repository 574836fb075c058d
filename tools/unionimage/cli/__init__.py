"""The command `unionfuse`: one file per verb, dispatched here.

Only the module of the verb that was asked for is imported: start-up time is a feature. This is also
the single place where errors become messages and exit codes.
"""

from __future__ import annotations

import errno
import gc
import os
import sys

from unionfuse import __version__
from unionimage import spawn
from unionimage.cli.verbs import ALIASES, GROUPS, VERBS

TYPE_CHECKING = False  # see unionfuse.daemon.errand
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from types import ModuleType
    from typing import NoReturn

USAGE = 125
"""Docker's exit code for a flag that does not exist."""
INTERRUPTED = 130
"""The exit code after Ctrl-C."""


def command() -> NoReturn:
    """The console script: `main`, and an end without taking the interpreter apart (10 ms)."""
    gc.set_threshold(20_000)  # imports make much that lives, and nothing to collect (3 ms)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller: nothing else may get its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    try:
        code = spawn.command(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code is None:
        code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    A call in the manner of mount(8) (an `-o` list with `lowerdir=`) is handed to the file system.
    """
    words = sys.argv[1:] if argv is None else argv
    if _is_mount_call(words):
        from unionfuse.daemon.command import main as mount_program

        return mount_program(words)
    verb = ""
    module: ModuleType | None = None
    try:
        root, words = _global_options(words)
        if not words or words[0] in ("help", "-h", "--help"):
            return _help(words[1:])
        if words[0] in ("-v", "-V", "--version"):
            print(f"unionfuse {__version__}")
            return 0
        verb, words = resolve(words)
        module = load_verb(verb)
        args = parser_of(verb, module).parse_args(words)
        args.root = root
        code = module.run(args)
        sys.stdout.flush()
        return int(code)
    except BaseException as error:
        return _report(verb, error, getattr(module, "ERROR_CODE", 1))


def resolve(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb that these words ask for, and its arguments. Raises UserError if there is none."""
    from unionimage.errors import UserError

    for length in (2, 1):
        if (target := ALIASES.get(tuple(words[:length]))) is not None:
            return target[0], [*target[1:], *words[length:]]
    if words[0] in VERBS:
        return words[0], list(words[1:])
    import difflib

    near = difflib.get_close_matches(words[0], VERBS, 1)
    hint = f"did you mean '{near[0]}'?" if near else "see 'unionfuse --help'"
    raise UserError(f"'{words[0]}' is not a unionfuse command; {hint}")


def load_verb(verb: str) -> ModuleType:
    """Import the module of a verb."""
    import importlib

    return importlib.import_module("." + VERBS[verb][0], __name__)


_parsers: dict[str, argparse.ArgumentParser] = {}


def parser_of(verb: str, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of a verb; help, completion and manual pages are all made from it.

    It is made once: a spawner makes those of its verbs before it forks.
    """
    from unionimage.cli.parser import VerbParser

    if verb in _parsers:
        return _parsers[verb]
    parser = VerbParser(
        prog=f"unionfuse {verb}", description=VERBS[verb][1] + ".", example=module.EXAMPLE
    )
    module.configure(parser)
    _parsers[verb] = parser
    return parser


_ALONE = ("-h", "--help", "-v", "-V", "--version")


def _global_options(words: list[str]) -> tuple[str | None, list[str]]:
    from unionimage.errors import UserError

    root = os.environ.get("UNIONFUSE_ROOT") or None
    while words and words[0].startswith("--root"):
        option, equals, value = words[0].partition("=")
        if option != "--root":
            break
        rest = words[1:] if equals else words[2:]
        root = value if equals else "".join(words[1:2])
        if not root:
            raise UserError("--root needs a directory", exit_code=USAGE)
        words = rest
    if words and words[0].startswith("-") and words[0] not in _ALONE:
        raise UserError(f"unknown flag: {words[0]}; see 'unionfuse --help'", exit_code=USAGE)
    return root, words


def _help(words: list[str]) -> int:
    if words:
        verb, _ = resolve(words)
        parser_of(verb, load_verb(verb)).print_help()
        return 0
    print(
        "Usage: unionfuse [--root DIR] VERB [ARGUMENT…]\n"
        "       unionfuse -o lowerdir=…[,upperdir=…,workdir=…] DIR\n\n"
        "Images and containers on a union file system."
    )
    width = max(map(len, VERBS)) + 2
    for group, verbs in GROUPS.items():
        print(f"\n{group}:")
        for verb, (_, text) in verbs.items():
            print(f"  {verb:<{width}}{text}")
    print(
        "\n  --root DIR   the store (also UNIONFUSE_ROOT; as root /var/lib/unionfuse)\n\n"
        "'unionfuse VERB --help' tells more and shows an example."
    )
    return 0


_ROOM = "; make room on that disk: 'unionfuse prune' removes what nothing uses"
_REMEDIES = {errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM}


def _report(verb: str, error: BaseException, error_code: int) -> int:
    """Say on stderr what went wrong, in one line, and return the exit code."""
    from unionimage.errors import UserError

    name = f"unionfuse {verb}".rstrip()
    match error:
        case UserError():
            print(f"{name}: {error.message}", file=sys.stderr)
            return error.exit_code if error.exit_code != 1 else error_code
        case KeyboardInterrupt():
            return INTERRUPTED
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing left to flush at exit
            return 141
        case SystemExit():
            return error.code if isinstance(error.code, int) else 0
        case OSError(strerror=str(reason)):
            where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
            remedy = _REMEDIES.get(error.errno or 0, "")
            print(f"{name}: {where}{reason}{remedy}", file=sys.stderr)
        case _ if type(error).__module__ == "sqlite3":
            remedy = "see that the store's disk has room and can be written"
            print(f"{name}: the store's database: {error}; {remedy}", file=sys.stderr)
        case _:
            print(
                f"{name}: internal error: {type(error).__name__}: {error}"
                " (a bug; UNIONFUSE_DEBUG=1 shows where)",
                file=sys.stderr,
            )
    if os.environ.get("UNIONFUSE_DEBUG"):
        import traceback

        traceback.print_exception(error)
    return error_code


def _is_mount_call(words: list[str]) -> bool:
    if words and words[0].startswith("-o"):
        return True  # no verb begins so; what is missing in the list, the file system says
    for position, word in enumerate(words):
        if word == "-o" and "lowerdir=" in "".join(words[position + 1 : position + 2]):
            return True
        if word.startswith("-o") and "lowerdir=" in word:
            return True
    return False
