"""The registry's errors, as one line for people: what was asked for, the reason, the remedy."""

from __future__ import annotations

import json

from unionimage.errors import UserError

REASONS = {401: "unauthorized", 403: "denied", 404: "not found", 429: "too many requests"}
REMEDIES = {
    401: "use unionfuse login",
    403: "use unionfuse login with a name that may do this",
    404: "check the name and the tag",
    413: "its operator limits the size of uploads",
    429: "wait, or use unionfuse login for a higher limit",
}


class RegistryError(UserError):
    """A registry could not be reached, or answered what cannot be used.

    Args:
        subject: the host, image or file in question.
        reason: what is wrong.
        remedy: what the user can do; may be empty.
    """

    def __init__(self, subject: str, reason: str, remedy: str = "") -> None:
        super().__init__(f"{subject}: {reason}" + (f"; {remedy}" if remedy else ""))
        self.reason = reason


class RegistryStatusError(RegistryError):
    """An HTTP status that says no; `status` and the registry's own error `codes` are kept."""

    def __init__(self, subject: str, status: int, codes: list[str], reason: str, remedy: str):
        super().__init__(subject, reason, remedy)
        self.status = status
        self.codes = codes

    @classmethod
    def from_answer(
        cls, subject: str, status: int, body: bytes, wait: float | None = None
    ) -> RegistryStatusError:
        """Read the specification's `{"errors": [...]}`, or say what the status means."""
        codes, messages = _read_errors(body)
        reason = "; ".join(messages) or REASONS.get(status, f"answers {status}")
        if status >= 500:
            reason = f"is in trouble ({status}{': ' if messages else ''}{'; '.join(messages)})"
        remedy = REMEDIES.get(status, "try again later" if status >= 500 else "")
        if wait is not None and wait > 1:
            remedy = f"try again in {wait:.0f} seconds"
        return cls(subject, status, codes, reason, remedy)


def printable(text: str, limit: int = 300) -> str:
    """`text` from outside made harmless for a terminal: one line, no control characters, short."""
    clean = "".join(c if c.isprintable() else " " for c in text[: limit * 2])
    clean = " ".join(clean.split())
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def _read_errors(body: bytes) -> tuple[list[str], list[str]]:
    try:
        listed = json.loads(body)["errors"]
        entries = [entry for entry in listed if isinstance(entry, dict)]
    except (ValueError, LookupError, TypeError, RecursionError):
        return [], []
    codes = [printable(str(entry.get("code", ""))) for entry in entries]
    messages = [
        printable(str(entry.get("message") or entry.get("code") or "")) for entry in entries[:3]
    ]
    return codes, [message for message in messages if message]
