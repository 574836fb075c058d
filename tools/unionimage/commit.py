"""Commit: changes on top of an image become an image. Its cost follows the changes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence, Set
from pathlib import Path

from unionimage.image_config import History, ImageConfig, RunConfig
from unionimage.reference import Reference
from unionimage.spec import Platform
from unionimage.store import Image, Lease


def commit(
    lease: Lease,
    upper: Path,
    parent: Image | None,
    *,
    run: RunConfig | None = None,
    changes: Sequence[str] = (),
    message: str = "",
    author: str = "",
    created_by: str = "",
    names: Iterable[Reference] = (),
    newest: int | None = None,
    leave_out: Set[bytes] = frozenset(),
) -> Image:
    """Make an image of an upper directory.

    Args:
        upper: see `Lease.commit_upper`; nobody may write there meanwhile.
        parent: the image it lies on; None: nothing.
        run: how containers of it run; None: as the parent's.
        changes: Dockerfile instructions that change that.
        created_by: the command that made the changes, for the history.
        newest: SOURCE_DATE_EPOCH, seconds.

    Raises:
        UserError: a change is wrong, or a file changed while it was read.
    """
    base = parent.config if parent else ImageConfig(Platform.host())
    config = base._replace(run=with_changes(run or base.run, changes), author=author or base.author)
    layer = lease.commit_upper(
        upper,
        parent.diff_ids if parent else (),
        newest_ns=None if newest is None else newest * 1_000_000_000,
        leave_out=leave_out,
    )
    step = History(format_time(newest), created_by, author, message)
    config = config.with_step(step, layer.diff_id if layer else None)
    return lease.add_image(
        config._replace(comment=message), names=names, parent=parent.id if parent else None
    )


def with_changes(run: RunConfig, changes: Sequence[str]) -> RunConfig:
    """Apply Dockerfile instructions such as `ENV A=b` or `CMD ["sh"]`, which make no files.

    Raises:
        UserError: it is no instruction, or one that makes files.
    """
    if not changes:
        return run
    from unionimage.dockerfile.config import apply
    from unionimage.dockerfile.instructions import parse_trigger
    from unionimage.errors import UserError

    for change in changes:
        _, instruction = parse_trigger(change)
        try:
            run, _ = apply(run, instruction, cmd_is_own=False)
        except TypeError:
            raise UserError(f"{change.split()[0]} cannot be a change: it makes files") from None
    return run


def format_time(seconds: int | None) -> str:
    """Seconds since the epoch (None: now) as image configs have them."""
    whole, rest = divmod(time.time_ns() if seconds is None else seconds * 10**9, 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{rest // 1000:06}Z"
