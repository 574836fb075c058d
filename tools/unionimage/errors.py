"""The one error type that is meant for people.

Whatever goes wrong because of what a user typed, sent or lacks is a `UserError`; the command line
prints its message on one line and exits with its code. Everything else is a bug and says so.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake or a refusal that the user can do something about.

    Args:
        message: one line; names the thing, the reason and, where there is one, the remedy.
        exit_code: what the process exits with: 1 as docker's own errors, 125 to 127 for `run`.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code

    @property
    def message(self) -> str:
        return str(self.args[0])


class NotFound(UserError):
    """An image, layer, blob or container of that name is not here."""


class Conflict(UserError):
    """What was asked for would take something away that is in use, or a name that is taken."""


class BadContent(UserError):
    """Bytes from outside are not what they claim to be: digest, size, format, or plain hostile."""
