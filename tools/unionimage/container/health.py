"""HEALTHCHECK: the command that is run now and then, and what is thought of the container.

The monitor owns the clock and reaps the processes; this decides what to run and what it means.
Times are seconds here and nanoseconds in docker's Config. Source: docker's Dockerfile reference.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from typing import Any

from unionimage.container.runtime import Runtime
from unionimage.container.state import Container, now

KEPT_RESULTS = 5
LONGEST_OUTPUT = 4096


class Checker:
    """The checks of one run of a container."""

    def __init__(self, container: Container, runtime: Runtime, check: dict[str, Any]) -> None:
        self._container, self._runtime = container, runtime
        self._test = list(check["Test"])
        self.interval = _seconds(check, "Interval", 30.0)
        self._timeout = _seconds(check, "Timeout", 30.0)
        self._start_period = _seconds(check, "StartPeriod", 0.0)
        self._start_interval = _seconds(check, "StartInterval", 5.0)
        self._retries = int(check.get("Retries") or 3)
        self._began = time.monotonic()
        self._status, self._streak = "starting", 0
        self._results: list[dict[str, Any]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._output = container.run / "health"
        self._pid_file = container.run / "health.pid"
        self._run_since = ""

    @classmethod
    def for_container(cls, container: Container, runtime: Runtime) -> Checker | None:
        """The checker of a container, None when it has no health check."""
        check = container.config.get("Healthcheck") or {}
        test = check.get("Test") or []
        if not test or test[0] == "NONE":
            return None
        return cls(container, runtime, check)

    def first_delay(self) -> float:
        return self.next_delay()

    def next_delay(self) -> float:
        """Until the next check: more often while the container is starting."""
        if self._status == "starting" and self._starting():
            return min(self._start_interval, self.interval)
        return self.interval

    def status(self) -> dict[str, Any]:
        """Docker's State.Health."""
        return {
            "Status": self._status,
            "FailingStreak": self._streak,
            "Log": list(self._results),
        }

    def begin(self) -> float:
        """Start the command; the seconds that it may take are returned."""
        spec = json.loads((self._container.bundle / "config.json").read_bytes())["process"]
        shell = self._test[0] == "CMD-SHELL"
        spec["args"] = ["/bin/sh", "-c", self._test[1]] if shell else self._test[1:]
        spec["terminal"] = False
        file = self._container.run / "health.json"
        file.write_text(json.dumps(spec))
        self._run_since = now()
        self._pid_file.unlink(missing_ok=True)
        with open(self._output, "wb") as output:
            self._process = self._runtime.exec(
                self._container.id,
                file,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pid_file=self._pid_file,
            )
        return self._timeout

    def ended(self, pid: int, code: int) -> bool:
        """Take note of a process that ended; False when it is none of ours."""
        if self._process is None or pid != self._process.pid:
            return False
        self._process.returncode = code
        self._process = None
        with contextlib.suppress(OSError), open(self._output, "rb") as file:
            text = file.read(LONGEST_OUTPUT).decode(errors="replace")
            self._note(code, text)
        return True

    def timed_out(self) -> None:
        """The command took too long: kill it, that counts as a failure."""
        self.cancel()
        self._note(-1, f"health check exceeded timeout ({self._timeout:g}s)")

    def cancel(self) -> None:
        """Kill what still runs: the check, which has a session of its own, and who waits for it."""
        if self._process is None:
            return
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(self._pid_file.read_text()), signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _note(self, code: int, output: str) -> None:
        result = {"Start": self._run_since, "End": now(), "ExitCode": code, "Output": output}
        self._results = [*self._results, result][-KEPT_RESULTS:]
        if code == 0:
            self._status, self._streak = "healthy", 0
        elif self._status == "starting" and self._starting():
            return  # failures do not count while it may still be starting
        else:
            self._streak += 1
            if self._streak >= self._retries:
                self._status = "unhealthy"

    def _starting(self) -> bool:
        return time.monotonic() - self._began < self._start_period


def _seconds(check: dict[str, Any], key: str, usual: float) -> float:
    value = check.get(key) or 0
    return value / 1e9 if value else usual
