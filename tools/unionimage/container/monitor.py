"""The process that keeps one container: starts it, holds its streams, and outlives the command.

One thread, one loop: what is registered with the selector is a function that takes the events. It
is the child subreaper, so the container's first process is its own child and its exit code is known
for sure. It writes log and state, passes on what `streams` and `clients` bring, runs the health
check, keeps the restart policy, and cleans up when the container has ended. What it does *not* do:
mount (the command did that before, errors are told to the user there), decide configuration, or
know images.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from unionimage.container import bundle, limits, logs, sleeping, wire
from unionimage.container.clients import Client, Clients
from unionimage.container.processes import signal_number, start_time
from unionimage.container.runtime import Runtime
from unionimage.container.state import NEVER, Container, now
from unionimage.container.streams import Streams
from unionimage.errors import UserError

if TYPE_CHECKING:
    from unionimage.container import health

CHUNK = 1 << 16
FIRST_DELAY, LONGEST_DELAY = 0.1, 60.0
LONG_ENOUGH = 10.0  # seconds up after which a restart counts as a success
DRAIN = 1.0  # seconds to wait for output that somebody still holds open after the exit
PR_SET_CHILD_SUBREAPER = 36

State = dict[str, Any]


class Hooks(NamedTuple):
    """What the monitor has done for it by others, so that it need not know them."""

    # The path of a network namespace that is being connected, to create the process in; or None:
    # the process makes it.
    begin_to_connect: Callable[[], str | None]
    connect: Callable[[int], None]  # the network of a process, between create and start
    disconnect: Callable[[], None]
    unmount: Callable[[], None]
    removed: Callable[[], None]  # --rm
    event: Callable[..., None]
    # What `connect` has made, as numbers, and the descriptors among them, for another process.
    note_network: Callable[[], tuple[dict[str, int], list[int]]]


class Monitor:
    """See the module. `run` returns when the container has ended for good."""

    def __init__(
        self,
        container: Container,
        runtime: Runtime,
        hooks: Hooks,
        first: socket.socket | None,
        ready: int,
    ) -> None:
        self._container, self._runtime, self._hooks = container, runtime, hooks
        self._ready = ready  # a pipe: one JSON line tells the command how the start went
        self._tty = bool(container.config.get("Tty"))
        self._state: State = container.state()
        self._selector = selectors.DefaultSelector()
        self._clients = Clients(self._selector, self._answer, self._take_frame, self._gone)
        self._streams: Streams | None = None
        self._starters: dict[int, Client] = {}  # pid of an exec that is about to be answered
        self._exit_code: int | None = None
        self._stopping = False
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self._delay = FIRST_DELAY
        self._started = 0.0
        self._memory_cgroup: Path | None = None
        self._health: health.Checker | None = None
        self._done = False
        self._sleeps_after = sleeping.after()
        self._log = logs.writer_of(container.log_path, container.host_config)
        if first is not None:
            self._clients.add(first)

    def run(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._alive = os.open(self._container.run / "alive", flags, 0o600)
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        _become_subreaper()
        self._take_signals()
        self._listen(wire.listen(self._container.control))
        try:
            self._start()
        except UserError as error:
            self._failed_start(error)
            return
        except Exception as error:
            self._failed_start(UserError(f"{type(error).__name__}: {error}", exit_code=125))
            raise
        self._tell({"pid": self._state["Pid"]})
        self._keep()

    def _take_signals(self) -> None:
        self._wake, awoken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(awoken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # a shutdown of the host asks everybody: the container gets its stop signal
        signal.signal(signal.SIGTERM, lambda *_: self._timer("stop", 0.0, self._begin_stop))
        self._selector.register(self._wake, selectors.EVENT_READ, self._reap)

    def _listen(self, server: socket.socket) -> None:
        self._server = server
        self._clients.listen(server)

    def _keep(self) -> None:
        """Until the container has ended for good."""
        while not self._done:
            self._step()
        self._server.close()
        os.close(self._alive)  # everything is put away: whoever hears of the end may start it again
        self._farewell()

    # ---- sleeping

    def _may_sleep(self) -> bool:
        """Whether there is nothing to do until output, a client or a signal comes."""
        return (
            self._sleeps_after is not None
            and not self._timers
            and not self._starters
            and self._exit_code is None
            and self._streams is not None
            and not self._streams.busy
            and not any(self._clients)
        )

    def _sleep(self) -> None:
        """See `sleeping`. Returns when something has come in between."""
        signal.pthread_sigmask(signal.SIG_BLOCK, sleeping.SIGNALS)
        if self._selector.select(0) or self._timers:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, sleeping.SIGNALS)
            return
        assert self._streams is not None
        streams, (network, others) = self._streams.note(), self._hooks.note_network()
        server = self._server.fileno()
        note = {
            "root": str(self._container.directory.parent.parent),
            "container": self._container.id,
            "runtime": list(self._runtime),
            "network": network,
            "streams": streams,
            "server": server,
            "alive": self._alive,
            "stopping": self._stopping,
            "started": self._started,
            "delay": self._delay,
            "memory_cgroup": str(self._memory_cgroup) if self._memory_cgroup else None,
            "unwritten": self._log.unwritten if self._log is not None else None,
        }
        watched = [server, *self._streams.outputs]
        sleeping.sleep(note, watched, [self._alive, *others, *self._streams.inputs])

    def go_on(self, note: dict[str, Any]) -> None:
        """`run` in the process that has slept."""
        for descriptor in (note["alive"], note["server"]):
            os.set_inheritable(descriptor, False)
        self._alive = note["alive"]
        self._stopping, self._delay = note["stopping"], note["delay"]
        self._started = note["started"]
        if note["memory_cgroup"] is not None:
            self._memory_cgroup = Path(note["memory_cgroup"])
        if note["unwritten"] is None:
            self._stop_log()
        elif self._log is not None:
            self._log.unwritten = note["unwritten"]
        self._streams = Streams.noted(
            self._selector, note["streams"], self._pass_on, self._maybe_ended
        )
        server = socket.socket(fileno=note["server"])
        server.setblocking(False)
        self._listen(server)
        self._take_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, sleeping.SIGNALS)
        self._keep()

    # ---- starting

    def _start(self) -> None:
        config = self._container.config
        console = str(self._container.run / "console") if self._tty else None
        networked = self._container.record.get("NetworkMode") == "engine"
        self._streams = streams = Streams(
            self._selector,
            console=console,
            wants_input=bool(config.get("OpenStdin")),
            received=self._pass_on,
            ended=self._maybe_ended,
        )
        stdin, stdout, stderr = streams.theirs
        try:
            if networked and (namespace := self._hooks.begin_to_connect()) is not None:
                bundle.set_network(self._container.bundle, namespace)
            pid = self._runtime.start_detached(
                self._container.id,
                self._container.bundle,
                self._container.run / "pid",
                create_only=networked,
                console_socket=console,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )
            if networked:
                self._hooks.connect(pid)
                self._runtime.start(self._container.id)
        except BaseException:
            streams.abandon()
            self._runtime.delete(self._container.id, force=True)
            self._hooks.disconnect()
            raise
        finally:
            streams.let_go()
        streams.started()
        self._started = time.monotonic()
        self._exit_code = None
        self._memory_cgroup = limits.cgroup_of(pid, "memory")
        self._write(
            Status="running",
            Pid=pid,
            PidStart=start_time(pid),
            StartedAt=now(),
            Error="",
            OOMKilled=False,
            ExitCode=0,
        )
        self._hooks.event("start")
        if config.get("Healthcheck"):
            self._begin_health_checks()

    def _begin_health_checks(self) -> None:
        from unionimage.container import health

        check = health.Checker.for_container(self._container, self._runtime)
        if check is not None:
            self._health = check
            self._write(Health=check.status())
            self._timer("health", check.first_delay(), self._check_health)

    def _failed_start(self, error: UserError) -> None:
        code = error.exit_code if error.exit_code in (126, 127) else 128
        status = "created" if self._state["StartedAt"] == NEVER else "exited"
        self._write(Status=status, Pid=0, ExitCode=code, Error=error.message)
        with contextlib.suppress(OSError):
            self._hooks.unmount()
        for client in self._clients:
            client.socket.close()
        self._tell({"error": error.message, "exit_code": max(error.exit_code, 125)})

    def _tell(self, answer: dict[str, Any]) -> None:
        """Answer the command that started this monitor; it may be gone already."""
        with contextlib.suppress(OSError):
            os.write(self._ready, json.dumps(answer).encode() + b"\n")
        os.close(self._ready)

    # ---- the loop

    def _step(self) -> None:
        if self._streams is not None:
            self._streams.hold(self._clients.slow)
        sleepy = self._may_sleep()
        events = self._selector.select(self._sleeps_after if sleepy else self._next_timer())
        for key, mask in events:
            key.data(mask)
        if sleepy and not events:
            self._sleep()
        for name, (when, action) in list(self._timers.items()):
            if when <= time.monotonic() and self._timers.get(name, (None,))[0] == when:
                del self._timers[name]
                action()

    def _timer(self, name: str, delay: float, action: Callable[[], None]) -> None:
        self._timers[name] = (time.monotonic() + delay, action)

    def _next_timer(self) -> float | None:
        if not self._timers:
            return None
        return max(0.0, min(when for when, _ in self._timers.values()) - time.monotonic())

    # ---- output, input and clients

    def _pass_on(self, name: str, data: bytes) -> None:
        """Output of the process: to the log and to everybody who is attached."""
        if self._log is not None:
            try:
                self._log.write(name, data)
            except OSError as error:
                self._stop_log()
                self._write(LogError=f"{self._container.log_path}: {error.strerror}")
        kind = wire.STDOUT if name == "stdout" else wire.STDERR
        for client in self._clients:
            if client.attached and getattr(client, name):
                self._clients.send(client, wire.frame(kind, data))

    def _take_frame(self, client: Client, kind: int, payload: bytes) -> None:
        if kind == wire.SIGNAL:
            self._signal(payload[0])
        elif self._streams is None:
            return
        elif kind == wire.STDIN and client.stdin:
            self._streams.write(payload)
        elif kind == wire.END_OF_INPUT and client.stdin:
            if self._container.config.get("StdinOnce"):
                self._streams.end_input()
        elif kind == wire.RESIZE:
            self._streams.resize(*struct.unpack(">HH", payload))

    def _gone(self, client: Client) -> None:
        """Who gave the input is gone: so is the input (docker's StdinOnce)."""
        once = self._container.config.get("StdinOnce") and not self._tty
        if client.stdin and once and self._streams is not None:
            self._streams.end_input()

    def _answer(self, client: Client, request: dict[str, Any]) -> None:
        """Do what a request asks. Raises UserError, which is sent back."""
        match request["op"]:
            case "attach":
                client.attached = True
                client.stdin = bool(request.get("stdin"))
                client.stdout = client.stderr = bool(request.get("output", True))
                client.stdout = bool(request.get("stdout", client.stdout))
                client.stderr = bool(request.get("stderr", client.stderr))
                self._hooks.event("attach")
            case "wait":
                client.waits = True
            case "stop":
                client.waits = True
                self._begin_stop(request.get("signal"), request.get("timeout"))
            case "kill":
                number = int(request["signal"])
                self._hooks.event("kill", signal=str(number))
                if number == signal.SIGKILL:
                    self._manually_stopped()
                self._signal(number)
                self._clients.reply(client, {})
            case "pause":
                self._pause()
                self._clients.reply(client, {})
            case "unpause":
                self._unpause()
                self._clients.reply(client, {})
            case "exec":
                self._exec(client, request["process"], request["log"])
            case "reload":
                self._container.reload()
                self._clients.reply(client, {})
            case other:
                raise UserError(f"unknown request {other!r}")

    def _exec(self, client: Client, process_file: str, log: str) -> None:
        """Start one more process, which nobody waits for; `_reap` answers when it has started."""
        null = subprocess.DEVNULL
        process = self._runtime.exec(
            self._container.id,
            process_file,
            detach=True,
            log=log,
            stdin=null,
            stdout=null,
            stderr=null,
            start_new_session=True,
        )
        process.returncode = 0  # it is reaped here
        self._starters[process.pid] = client

    # ---- stopping

    def _begin_stop(self, number: int | None = None, timeout: int | None = None) -> None:
        self._manually_stopped()
        if self._state["Status"] == "paused":
            self._unpause()
        self._timers.pop("restart", None)
        if self._exit_code is not None and not self._draining():
            self._finish()
            return
        config = self._container.config
        chosen = number if number is not None else signal_number(config.get("StopSignal"))
        seconds = timeout if timeout is not None else config.get("StopTimeout")
        self._signal(chosen)
        if seconds is None:
            seconds = 10
        if seconds >= 0:
            self._timer("kill", seconds, lambda: self._signal(signal.SIGKILL))

    def _manually_stopped(self) -> None:
        self._stopping = True
        self._write(StoppedByUser=True)

    def _signal(self, number: int) -> None:
        """To the first process: it is our child and not yet reaped, so the pid is its own."""
        if self._exit_code is None and self._state.get("Pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._state["Pid"], number)

    def _pause(self) -> None:
        if self._state["Status"] != "running":
            raise UserError(f"container {self._container.name} is {self._state['Status']}")
        self._runtime.pause(self._container.id)
        self._write(Status="paused")
        self._hooks.event("pause")

    def _unpause(self) -> None:
        if self._state["Status"] != "paused":
            raise UserError(f"container {self._container.name} is not paused")
        self._runtime.resume(self._container.id)
        self._write(Status="running")
        self._hooks.event("unpause")

    # ---- the end

    def _reap(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, CHUNK)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            code = code if code >= 0 else 128 - code
            if pid == self._state.get("Pid"):
                self._exit_code = code
                self._timers.pop("kill", None)
                self._timer("drain", DRAIN, self._stop_draining)
                self._maybe_ended()
            elif (client := self._starters.pop(pid, None)) is not None:
                self._clients.reply(client, {"exit_code": code})
            elif self._health is not None and self._health.ended(pid, code):
                self._health_result()

    def _draining(self) -> bool:
        """Whether output may still come."""
        return self._streams is not None and self._streams.open

    def _stop_draining(self) -> None:
        if self._streams is not None:
            self._streams.end_output()

    def _maybe_ended(self) -> None:
        """Once the process has ended and all its output is read."""
        if self._exit_code is None or self._draining() or self._done:
            return
        if self._state["Status"] in ("exited", "restarting"):
            return
        self._timers.pop("drain", None)
        self._timers.pop("health", None)
        if self._health is not None:
            self._health.cancel()
            self._health = None
        if self._streams is not None:
            self._streams.close_input()
        killed_by_oom = limits.ran_out_of_memory(self._memory_cgroup)
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.flush()
        restarts = self._should_restart()
        deleting = self._runtime.begin_delete(self._container.id)
        self._hooks.disconnect()
        if not restarts:
            self._hooks.unmount()  # beside the runtime: its process has ended, its mounts with it
        if deleting.wait() != 0:
            self._delete_again()
        if killed_by_oom:
            self._hooks.event("oom")
        self._hooks.event("die", exitCode=str(self._exit_code))
        self._write(Pid=0, ExitCode=self._exit_code, FinishedAt=now(), OOMKilled=killed_by_oom)
        if restarts:
            self._schedule_restart()
        else:
            self._finish()

    def _delete_again(self) -> None:
        """The runtime died, or could not: what it left would be in the way of the next start."""
        from unionimage.container import prepare

        self._runtime.delete(self._container.id, force=True)
        prepare.remove_cgroup(self._container)

    def _should_restart(self) -> bool:
        if self._stopping:
            return False
        self._container.reload()
        policy = self._container.host_config.get("RestartPolicy") or {}
        match policy.get("Name"):
            case "always" | "unless-stopped":
                return True
            case "on-failure":
                most = policy.get("MaximumRetryCount") or 0
                count = self._state.get("RestartCount", 0)
                return self._exit_code != 0 and (not most or count < most)
        return False

    def _schedule_restart(self) -> None:
        if time.monotonic() - self._started > LONG_ENOUGH:
            self._delay = FIRST_DELAY
        self._write(Status="restarting")
        self._timer("restart", self._delay, self._restart)
        self._delay = min(self._delay * 2, LONGEST_DELAY)

    def _restart(self) -> None:
        self._write(RestartCount=self._state.get("RestartCount", 0) + 1)
        try:
            self._start()
        except UserError as error:
            self._exit_code = error.exit_code
            self._write(Status="restarting", Error=error.message, ExitCode=error.exit_code)
            if self._should_restart():
                self._schedule_restart()
            else:
                self._finish()

    def _finish(self) -> None:
        """Nothing will run again: leave nothing behind but upper, log and the exit code."""
        self._stop_log()
        self._hooks.unmount()
        self._write(Status="exited")
        if self._container.host_config.get("AutoRemove"):
            self._hooks.removed()
        self._done = True

    def _farewell(self) -> None:
        """Tell every client the exit code, and wait a moment for the slow ones."""
        code = self._exit_code or 0
        for client in self._clients:
            if client.attached:
                self._clients.send(client, wire.frame(wire.EXIT, bytes([code & 0xFF])))
            elif client.waits:
                self._clients.reply(client, {"exit_code": code})
        deadline = time.monotonic() + 30
        while self._clients.unsent and time.monotonic() < deadline:
            for key, mask in self._selector.select(1.0):
                key.data(mask)

    # ---- health

    def _check_health(self) -> None:
        if self._health is None:
            return
        if self._state["Status"] == "paused":
            self._timer("health", self._health.interval, self._check_health)
            return
        timeout = self._health.begin()
        self._timer("health", timeout, self._health_timed_out)

    def _health_timed_out(self) -> None:
        if self._health is not None:
            self._health.timed_out()
            self._health_result()

    def _health_result(self) -> None:
        if self._health is None:
            return
        before = (self._state.get("Health") or {}).get("Status")
        status = self._health.status()
        self._write(Health=status)
        if status["Status"] != before:
            self._hooks.event(f"health_status: {status['Status']}")
        self._timer("health", self._health.next_delay(), self._check_health)

    # ---- records

    def _write(self, **changes: Any) -> None:
        self._state |= changes
        with contextlib.suppress(FileNotFoundError):
            self._container.write_state(self._state)

    def _stop_log(self) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()
            self._log = None


def _become_subreaper() -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
