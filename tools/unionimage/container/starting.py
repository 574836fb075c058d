"""Starting: everything made ready, then a monitor forked that outlives the command."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from unionfuse import syscalls
from unionimage import spawn
from unionimage.container import (
    monitor,
    netavark,
    networks,
    prepare,
    remains,
    rootless,
    runtime,
    slirp,
)
from unionimage.container.places import boot_id
from unionimage.container.state import ALIVE, Container
from unionimage.errors import Conflict, NotFound, UserError

CONNECT, START = b"c", b"s"  # what a monitor is told
DESCRIPTORS = {"namespace", "leave"}  # in what is noted of a container's network
LAST_MOMENTS = 5.0  # seconds that a monitor may take between writing the end and its own

if TYPE_CHECKING:
    from collections.abc import Callable

    from unionimage.container.inventory import Inventory


def start(
    inventory: Inventory,
    container: Container,
    *,
    attach: bytes | None = None,
    console_size: tuple[int, int] | None = None,
) -> socket.socket | None:
    """Start a container; with `attach` (a `terminal.request`) a connection to it is returned.

    Raises UserError with docker's exit code; nothing is mounted or running then.
    """
    ours, theirs = socket.socketpair() if attach is not None else (None, None)
    try:
        if ours is not None and attach is not None:
            ours.sendall(attach)
        wanted = {
            "root": str(inventory.root),
            "container": container.id,
            "console_size": console_size,
        }
        # In a fork of the spawner, too: the monitor has a copy of all that its parent has touched.
        answer = spawn.ask("start", wanted, [2] if theirs is None else [2, theirs.fileno()])
        if answer is None:
            _start(inventory, container, theirs, console_size)
            if not spawn.is_fork():
                spawn.start()
        elif answer:
            raise KINDS[answer["kind"]](answer["error"], exit_code=answer["exit_code"])
    except BaseException:
        if ours is not None:
            ours.close()
        raise
    finally:
        if theirs is not None:
            theirs.close()
    return ours


KINDS = {kind.__name__: kind for kind in (UserError, Conflict, NotFound)}


def serve(wanted: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
    """`start` in a fork of the spawner: what there is to complain of is answered."""
    from unionimage.container.inventory import Inventory
    from unionimage.store import Store

    root = Path(wanted["root"])
    inventory = Inventory(root, lambda: Store.open(root))
    client = socket.socket(fileno=descriptors[1]) if len(descriptors) > 1 else None
    try:
        container = inventory.containers.find(wanted["container"])
        _start(inventory, container, client, wanted["console_size"])
    except UserError as error:
        kind = type(error) if type(error) in KINDS.values() else UserError
        return {"error": error.message, "exit_code": error.exit_code, "kind": kind.__name__}
    return {}


def _start(
    inventory: Inventory,
    container: Container,
    client: socket.socket | None,
    console_size: tuple[int, int] | None,
) -> None:
    """Make ready, and have a monitor start the process; `client` is attached to it."""
    with container.locked():
        remains.bury(inventory, container)
        container.reload()
        state = container.state()
        deadline = time.monotonic() + LAST_MOMENTS
        while state["Status"] not in ALIVE and container.monitor_lives():
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        if state["Status"] in ALIVE or container.monitor_lives():
            raise Conflict(f"container {container.name} is {state['Status']} already")
        remains.clear(inventory, container)  # what a start left that was killed
        chosen = runtime.find(container.record.get("Runtime"))
        # Forked before the work is done: the memory that this touches is not the monitor's.
        begin, answers = _fork_monitor(inventory, container, chosen, client)
        with answers, contextlib.ExitStack() as until_told:
            until_told.callback(answers.read)  # after a failure: until the monitor has ended
            # Nor is a database open then: SQLite's locks are not for a child.
            with begin, inventory.open_store() as opened:
                prepare.prepare(
                    container,
                    opened,
                    inventory.containers,
                    console_size,
                    reserved=lambda: _tell(begin, CONNECT),
                )
                kept = {"BootId": boot_id(), "RestartCount": 0, "StoppedByUser": False}
                container.write_state(state | kept | {"Error": ""})
                _tell(begin, START)
            until_told.pop_all()
            _hear(inventory, container, answers.readline())


def _fork_monitor(
    inventory: Inventory,
    container: Container,
    chosen: runtime.Runtime,
    client: socket.socket | None,
) -> tuple[BinaryIO, BinaryIO]:
    """Fork the monitor: it is told CONNECT, START; how that went it answers. The end: neither."""
    from unionimage.store import database

    database.before_fork()  # the monitor opens it when the container has ended
    told, begin = os.pipe2(os.O_CLOEXEC)
    answers, ready = os.pipe2(os.O_CLOEXEC)
    gc.freeze()  # the child never touches what was made before: its pages stay shared
    pid = os.fork()
    if pid == 0:
        _be_monitor(inventory, container, chosen, client, told, ready)
    os.close(told)
    os.close(ready)
    os.waitpid(pid, 0)
    return os.fdopen(begin, "wb"), os.fdopen(answers, "rb")


def _tell(begin: BinaryIO, what: bytes) -> None:
    begin.write(what)
    begin.flush()


def _hear(inventory: Inventory, container: Container, answer: bytes) -> None:
    """How the start went. Raises UserError if it did not."""
    if not answer:
        remains.clear(inventory, container)
        raise UserError(f"the monitor of {container.name} died at its start", exit_code=125)
    told = json.loads(answer)
    if "error" in told:
        prepare.remove_cgroup(container)  # a runtime that gives up half way may leave it
        raise UserError(told["error"], exit_code=told["exit_code"])


def _be_monitor(
    inventory: Inventory,
    container: Container,
    chosen: runtime.Runtime,
    client: socket.socket | None,
    told: int,
    ready: int,
) -> None:
    """The child's way: leave the command's session, keep the container, never return."""
    try:
        if os.fork() != 0:
            os._exit(0)
        os.setsid()
        os.chdir("/")
        _close_all_but(sorted({told, ready} | ({client.fileno()} if client else set())))
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        what = os.read(told, 1)
        if not what:
            os._exit(0)
        log = os.open(container.run / "monitor.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        null = os.open(os.devnull, os.O_RDWR)
        for target, source in ((0, null), (1, log), (2, log)):
            os.dup2(source, target)
        os.close(log)
        os.close(null)
        others = hooks(inventory, container)
        if what == CONNECT:
            what = _connect_until_told(told, container, others)
        os.close(told)
        if what == START:
            monitor.Monitor(container, chosen, others, client, ready).run()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _connect_until_told(told: int, container: Container, others: monitor.Hooks) -> bytes:
    """Have the network connected while the root is mounted; what the monitor is told then."""
    with open(container.run / "alive", "wb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)  # another start waits until all is taken away again
        with contextlib.suppress(UserError):  # it is tried again, and heard, at the start
            others.begin_to_connect()
        what = os.read(told, 1)
        if what != START:
            others.disconnect()
            networks.forget_live(container)
    return what


def hooks(
    inventory: Inventory, container: Container, network: dict[str, int] | None = None
) -> monitor.Hooks:
    """What others do for a monitor; `network` is what another process has noted of it."""
    noted = network or {}
    namespace = noted.get("namespace", -1)
    connected: Callable[[], None] | None = None
    asked: dict[str, Any] = {}  # what was asked of the engine
    rootless_network: slirp.Connection | None = None
    if "slirp" in noted:
        rootless_network = slirp.Connection(noted["slirp"], noted["leave"])
    for name in noted.keys() & DESCRIPTORS:
        os.set_inheritable(noted[name], False)

    def begin(opened: int) -> str:
        """Have the engine connect a namespace, which is kept open: it outlives the process."""
        nonlocal namespace, connected, asked
        namespace = opened
        path = f"/proc/{os.getpid()}/fd/{namespace}"
        if not networks.live(container)["Networks"]:
            prepare.reserve(container, inventory.networks, inventory.containers)
        asked = netavark.input_for(container, inventory.networks)
        connected = netavark.begin_to_connect(container, path, asked)
        return path

    def begin_to_connect() -> str | None:
        if rootless.active() or container.record["IdMappings"]:
            return None  # the namespace has to be of the user namespace that there will be
        if connected is not None:
            return f"/proc/{os.getpid()}/fd/{namespace}"
        return begin(new_network_namespace())

    def connect(pid: int) -> None:
        nonlocal rootless_network, connected
        if rootless.active():
            ports = networks.live(container)["PortMappings"]
            rootless_network = slirp.Connection.start(pid, container.run, ports)
            return
        if connected is None:
            begin(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        assert connected is not None
        waiting, connected = connected, None
        waiting()

    def disconnect() -> None:
        nonlocal namespace, rootless_network, connected
        if rootless_network is not None:
            rootless_network.stop()
            rootless_network = None
        if connected is not None:  # the start failed meanwhile
            waiting, connected = connected, None
            with contextlib.suppress(UserError):
                waiting()
        if namespace >= 0:
            with contextlib.suppress(UserError):
                path = f"/proc/{os.getpid()}/fd/{namespace}"
                now_has = netavark.input_for(container, inventory.networks)
                # A start that failed has forgotten its addresses.
                netavark.disconnect(path, now_has if now_has["networks"] else asked)
            os.close(namespace)
            namespace = -1

    def note_network() -> tuple[dict[str, int], list[int]]:
        note = {"namespace": namespace} if namespace >= 0 else {}
        if rootless_network is not None:
            note |= {"slirp": rootless_network.pid, "leave": rootless_network.leave}
        return note, [note[name] for name in note.keys() & DESCRIPTORS]

    def event(action: str, **attributes: str) -> None:
        inventory.events.container(container, action, **attributes)

    return monitor.Hooks(
        begin_to_connect=begin_to_connect,
        connect=connect,
        disconnect=disconnect,
        unmount=lambda: prepare.undo(container),
        removed=lambda: inventory.delete(container, anonymous_volumes=True),
        event=event,
        note_network=note_network,
    )


def new_network_namespace() -> int:
    """A descriptor of a network namespace that nobody is in. For a process without threads."""
    told, tell = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            syscalls.unshare(syscalls.CLONE_NEWNET)
            os.write(tell, b"\n")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    try:
        if not os.read(told, 1):
            raise UserError("no network namespace can be made: it takes CAP_SYS_ADMIN")
        return os.open(f"/proc/{child}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(told)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _close_all_but(keep: list[int]) -> None:
    low = 3
    for descriptor in [*keep, 1 << 20]:
        os.closerange(low, descriptor)
        low = descriptor + 1
