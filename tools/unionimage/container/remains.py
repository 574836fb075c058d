"""What a dead monitor left: processes, mounts, addresses, cgroups. Cleaned up by who finds it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from unionimage.container import netavark, networks, prepare, rootless, runtime
from unionimage.container.places import boot_id
from unionimage.container.processes import started_by
from unionimage.container.state import ALIVE, Container, Record, now, remove_tree
from unionimage.errors import UserError

if TYPE_CHECKING:
    from unionimage.container.inventory import Inventory

REBOOTED = 255  # docker's exit code for what a reboot ended
KILLED = 137


def bury(inventory: Inventory, container: Container) -> None:
    """What a dead monitor left: processes, mounts, network, cgroup. Hold `locked()`."""
    state = container.state()
    if state["Status"] not in ALIVE or container.monitor_lives():
        return
    same_boot = state.get("BootId") == boot_id()
    if same_boot:
        _kill_leftovers(inventory, container, state)
    else:
        _forget_runtime(container)
    prepare.undo(container)
    message = "its monitor was killed" if same_boot else "the host was restarted"
    code = KILLED if same_boot else REBOOTED
    change = {"Status": "exited", "Pid": 0, "ExitCode": code, "FinishedAt": now()}
    container.write_state(state | change | {"Error": message})
    inventory.events.container(container, "die", exitCode=str(code))
    if container.host_config.get("AutoRemove"):
        inventory.delete(container, anonymous_volumes=True)


def clear(inventory: Inventory, container: Container) -> None:
    """What a start left whose command and monitor were killed. Hold `locked()`.

    For a container that does not run, and has no monitor: nothing is done where nothing is left.
    """
    if container.monitor_lives():
        return
    known = False
    with contextlib.suppress(UserError):
        chosen = runtime.find(container.record.get("Runtime"))
        known = os.path.exists(os.path.join(chosen.state, container.id))
    if known or networks.live(container)["Networks"] or any(prepare.cgroups_of(container)):
        _kill_leftovers(inventory, container, {})
    if container.mounted():
        prepare.undo(container)
    networks.forget_live(container)


def _kill_leftovers(inventory: Inventory, container: Container, state: Record) -> None:
    pid = int(state.get("Pid") or 0)
    alive = started_by(pid, state.get("PidStart"))
    if networks.live(container)["Networks"] and not rootless.active():
        data = netavark.input_for(container, inventory.networks)
        with contextlib.suppress(UserError), _namespace(pid if alive else 0, data) as namespace:
            netavark.disconnect(namespace, data)
    if alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    prepare.kill_cgroup(container)
    _await_empty(container)
    if alive:
        _await_end(pid, state.get("PidStart"))
    with contextlib.suppress(UserError):
        runtime.find(container.record.get("Runtime")).delete(container.id, force=True)
    prepare.remove_cgroup(container)


@contextlib.contextmanager
def _namespace(pid: int, data: netavark.Data) -> Iterator[str]:
    """The path of a process's network namespace; of one that stands in for it where it has gone."""
    try:
        opened = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # or it has ended, and nobody has waited for it yet
        interfaces = [one["interface_name"] for one in data["networks"].values()]
        with netavark.empty_namespace(interfaces) as namespace:
            yield namespace
        return
    try:
        yield f"/proc/{os.getpid()}/fd/{opened}"
    finally:
        os.close(opened)


def _forget_runtime(container: Container) -> None:
    """Remove what a runtime noted before a reboot, where that is not on a tmpfs.

    Its own `delete` is not asked: the pids that it noted belong to others now.
    """
    with contextlib.suppress(UserError):
        chosen = runtime.find(container.record.get("Runtime"))
        remove_tree(Path(chosen.state, container.id))


def _await_empty(container: Container) -> None:
    """Wait until what was killed in a container's cgroup has left it."""
    import time

    for _ in range(200):
        if not any((path / "cgroup.procs").read_text() for path in prepare.cgroups_of(container)):
            return
        time.sleep(0.01)


def _await_end(pid: int, start: int | None) -> None:
    """Wait until a killed process is gone; it is not our child."""
    import time

    for _ in range(200):
        if not started_by(pid, start):
            return
        time.sleep(0.01)
