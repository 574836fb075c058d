"""The error that every part of `container` raises for what a user can do something about."""

from __future__ import annotations


class ContainerError(Exception):
    """One line for the user, and the exit code that docker would give (125 unless told)."""

    def __init__(self, message: str, exit_code: int = 125) -> None:
        super().__init__(message)
        self.exit_code = exit_code
