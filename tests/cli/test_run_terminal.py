"""A person at a terminal: `run -it`, detach, attach, resize, Ctrl-C; typed by tmux."""

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.containers import COMMAND, Box
from harness.waiting import wait_until


class Screen:
    """A terminal of 80 by 24 with a shell, on a tmux server of its own."""

    def __init__(self, directory: Path, box: Box) -> None:
        self._tmux = ["tmux", "-f", "/dev/null", "-S", str(directory / "tmux")]
        names = ("UNIONFUSE_ROOT", "UNIONFUSE_RUNROOT", "UNIONFUSE_CONFIG")
        variables = [f"{name}={box.environment[name]}" for name in names]
        shell = shlex.join(["env", *variables, f"U={COMMAND}", "PS1=$ ", "sh"])
        self("new-session", "-d", "-x", "80", "-y", "24", shell)

    def __call__(self, *words: str) -> str:
        return subprocess.run(
            [*self._tmux, *words], check=True, capture_output=True, text=True
        ).stdout

    def type(self, text: str) -> None:
        self("send-keys", "-l", text)
        self("send-keys", "Enter")

    def press(self, *keys: str) -> None:
        self("send-keys", *keys)

    def text(self) -> str:
        return self("capture-pane", "-p")

    def see(self, wanted: str) -> None:
        wait_until(lambda: wanted in self.text(), 15, f"{wanted!r} on:\n{self.text()}")

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True)


@pytest.fixture
def screen(box: Box, tmp_path: Path) -> Iterator[Screen]:
    made = Screen(tmp_path, box)
    yield made
    made.close()


def test_run_detach_attach_and_exit(box: Box, screen: Screen) -> None:
    screen.type("$U run -it --name shell --network none busybox sh; echo code=$?")
    screen.see("/ #")
    screen.type("tty; stty size; echo sum=$((20+22))")
    screen.see("sum=42")
    assert "/dev/pts/0" in screen.text() and "24 80" in screen.text()
    screen("resize-window", "-x", "100", "-y", "30")
    screen.type("clear; stty size")
    screen.see("30 100")
    screen.press("C-p", "C-q")
    screen.see("code=0")
    assert box.names() == ["shell"]
    screen.type("clear; $U attach shell; echo again=$?")
    screen.press("Enter")
    screen.see("/ #")
    screen.type("sleep 777")
    wait_until(lambda: "sleep 777" in box.out("top", "shell"))
    screen.press("C-c")
    wait_until(lambda: "sleep 777" not in box.out("top", "shell"))
    screen.type("exit 5")
    screen.see("again=5")
    # the terminal is as it was: what is typed is seen
    screen.type("echo still-here")
    screen.see("echo still-here")


def test_other_detach_keys_and_start(box: Box, screen: Screen) -> None:
    run = "$U run -it --detach-keys ctrl-x,q --name keys --network none busybox sh"
    screen.type(f"{run}; echo left=$?")
    screen.see("/ #")
    screen.press("C-p")
    screen.type("echo not-detached")
    screen.see("not-detached")
    screen.press("C-x", "q")
    screen.see("left=0")
    box("stop", "-t", "0", "keys")
    screen.type("clear; $U start -ai keys; echo code=$?")
    screen.see("/ #")
    screen.type("exit 3")
    screen.see("code=3")


def test_exec_on_a_terminal(box: Box, screen: Screen) -> None:
    box.start("host")
    screen.type("$U exec -it host sh; echo code=$?")
    screen.see("/ #")
    screen.type("tty; stty size; echo $TERM")
    screen.see("xterm")
    assert "24 80" in screen.text()
    screen.press("C-p", "C-q")
    screen.see("code=0")
    assert "sh" in box.out("top", "host", "-eo", "pid,args")
    screen.type("clear; $U exec -it host sh -c 'exit 8'; echo code=$?")
    screen.see("code=8")


def test_the_container_goes_on_when_the_terminal_closes(box: Box, screen: Screen) -> None:
    screen.type("$U run -it --name lonely --network none busybox sh")
    screen.see("/ #")
    screen.close()
    assert box.names() == ["lonely"]
    assert box.out("exec", "lonely", "echo", "alive") == "alive\n"


def test_a_terminal_is_needed_to_type_on(box: Box) -> None:
    done = box("run", "--rm", "-it", "--network", "none", "busybox", "sh", input="", code=125)
    assert "not a TTY" in done.stderr
    assert box.names("-a") == []
    out = box.out("run", "--rm", "-t", "--network", "none", "busybox", "tty")
    assert out == "/dev/pts/0\r\n"
