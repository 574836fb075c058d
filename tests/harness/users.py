"""Running a function as somebody else: what permissions mean can only be tested so."""

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

NOBODY = 65534


def as_user(
    uid: int,
    function: Callable[..., Any],
    *args: Any,
    gid: int | None = None,
    groups: Sequence[int] = (),
) -> Any:
    """Call `function` in a child process that runs as `uid` and return its result.

    `gid` is `uid` unless given. What the function raises is raised here.
    """

    def become() -> None:
        os.setgroups(list(groups))
        os.setresgid(*(gid if gid is not None else uid,) * 3)
        os.setresuid(uid, uid, uid)

    return in_child(function, *args, before=become)


def in_child(
    function: Callable[..., Any], *args: Any, before: Callable[[], None] = lambda: None
) -> Any:
    """Call `before`, then `function` in a child process; return or raise what the latter did."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            try:
                before()
                answer = (True, function(*args))
            except Exception as error:
                error.add_note("".join(traceback.format_tb(error.__traceback__)))
                answer = (False, _portable(error))
            with open(writing, "wb") as pipe:
                pickle.dump(answer, pipe)
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if not data:
        raise RuntimeError(f"the child ended with status {os.waitstatus_to_exitcode(status)}")
    worked, value = pickle.loads(data)
    if not worked:
        raise value
    return value


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
