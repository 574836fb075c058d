"""A headless Chromium, driven through chromedriver by the W3C WebDriver protocol."""

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


class Browser:
    """A browser window; a context manager.

    Args:
        size: of the window.
        dark: whether it prefers dark colours.
    """

    def __init__(self, size: tuple[int, int] = (1440, 900), dark: bool = False) -> None:
        self.size, self.dark = size, dark

    def __enter__(self) -> "Browser":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.base = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        self.driver = subprocess.Popen(
            ["chromedriver", "--port=" + self.base.rpartition(":")[2]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self.session = ""
            flags = [
                *FLAGS,
                f"--user-data-dir={self.profile}",
                f"--window-size={self.size[0]},{self.size[1]}",
                *(["--blink-settings=preferredColorScheme=0"] if self.dark else []),
            ]
            options = {"args": flags, "binary": "/usr/bin/chromium"}
            wanted = {
                "alwaysMatch": {
                    "goog:chromeOptions": options,
                    "goog:loggingPrefs": {"browser": "ALL"},
                }
            }
            self._wait_for_driver()
            self.session = self._call("POST", "/session", {"capabilities": wanted})["sessionId"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if self.session:
                self._call("DELETE", f"/session/{self.session}")
        finally:
            self.driver.terminate()
            self.driver.wait(10)
            shutil.rmtree(self.profile, ignore_errors=True)

    def open(self, url: str) -> None:
        """Load a page and wait until it says that it is ready."""
        self._session("POST", "/url", {"url": url})
        self.until("return document.body.dataset.ready !== undefined")
        assert self.run("return document.body.dataset.ready") == "true", self.text("#title")

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript and give back what it returns."""
        return self._session("POST", "/execute/sync", {"script": script, "args": arguments})

    def until(self, script: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).innerText", selector))

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
        return list(self.run(script, selector))

    def click(self, selector: str) -> None:
        """A real click with the pointer."""
        self._session("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Real key strokes."""
        self._session("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._session("GET", "/screenshot")))

    def complaints(self) -> list[str]:
        """What the page wrote to the console: errors, and loads that were refused."""
        entries = self._session("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries]

    def _find(self, selector: str) -> str:
        found = self._session("POST", "/element", {"using": "css selector", "value": selector})
        return str(next(iter(found.values())))

    def _session(self, method: str, path: str, body: Any = None) -> Any:
        return self._call(method, f"/session/{self.session}{path}", body)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(json.load(error)["value"]["message"]) from None

    def _wait_for_driver(self) -> None:
        port = int(self.base.rpartition(":")[2])
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError("chromedriver does not start")
