"""The explore page in a real Chromium: what people see, click and type."""

import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.browser import Browser
from harness.command import Command, make_command, make_image
from harness.registry import layer_tar

EVIL = "<img src=x onerror=alert(1)>"
BASE = layer_tar(
    {
        "etc": None,
        "etc/hosts": b"h" * 300,
        "etc/old": b"x" * 5000,
        "usr": None,
        "usr/lib": None,
        "usr/lib/big": b"b" * 200_000,
        f"usr/lib/{EVIL}": b"1",
    }
)
UPPER = layer_tar(
    {"etc": None, "etc/.wh.old": b"", "etc/new": b"new\n", "usr": None, "usr/lib": None}
    | {"usr/lib/big": b"B" * 100_000}
)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    made = make_command(tmp_path_factory.mktemp("explore"), "store")
    make_image(made, "shop/app:1", [BASE, UPPER])
    return made


@pytest.fixture(scope="module")
def page(command: Command) -> Path:
    path = command.root.parent / "page.html"
    assert command("explore", "-o", str(path), "shop/app:1") == f"{path}\n"
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


def labels(browser: Browser) -> list[str]:
    return browser.texts(".row .label")


def test_the_page_shows_layers_sizes_and_changes(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    assert browser.text("#title") == "shop/app:1"
    figures = browser.texts(".figure")
    assert figures[0].split("\n") == ["305 kB", "in all layers"]
    assert figures[1].split("\n") == ["2", "layers"]
    assert figures[2].split("\n") == ["205 kB", "wasted"]
    cards = browser.texts(".layer")
    assert cards[0].startswith("layer 2") and "100 kB" in cards[0]
    assert "1 added" in cards[0] and "1 changed" in cards[0] and "1 deleted" in cards[0]
    assert labels(browser) == ["etc/", "new", "old", "usr/", "lib/", "big"]
    assert browser.texts(".row .mark") == ["A", "D", "C"]
    browser.click(".layer:last-child")
    assert set(labels(browser)) == {
        *("etc/", "hosts", "old", "usr/", "lib/", "big", EVIL)
    }  # a hostile name is text
    assert browser.run("return document.images.length") == 0
    assert browser.complaints() == []


def test_search_filters_and_counts(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    browser.type("#search", "big")
    browser.until("return document.querySelector('#heading').innerText.includes('1 FOUND')")
    assert labels(browser) == ["usr/", "lib/", "big"]
    assert browser.texts(".hits:not([hidden])") == ["1", "1"]
    assert browser.texts(".row mark") == ["big"]
    browser.open(page.as_uri())
    browser.click("#changes .A")
    browser.click("#changes .C")
    assert labels(browser) == ["etc/", "old"]
    browser.type("#search", "/usr")
    browser.until("return document.querySelector('.empty') !== null")


def test_a_file_tells_which_layers_have_it(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    browser.run(
        "[...document.querySelectorAll('.row')].find(r => r.innerText.includes('big')).click()"
    )
    assert browser.text("#detail code") == "/usr/lib/big"
    assert browser.texts("#detail .chip") == ["added in layer 1", "changed in layer 2"]
    assert "hides 200 kB below" in browser.text("#detail")
    browser.click("#detail .chip")
    assert browser.text(".layer[aria-current=true] .top span") == "layer 1"
    assert browser.text(".row.selected .label") == "big"


def test_the_image_so_far_and_the_order_by_size(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    browser.click("[data-view=image]")
    assert labels(browser) == ["etc/", "hosts", "new", "usr/", "lib/", EVIL, "big"]
    browser.click("[data-order=size]")
    assert labels(browser) == ["usr/", "lib/", "big", EVIL, "etc/", "hosts", "new"]
    assert browser.texts(".row .size")[2] == "100 kB"


def test_wasted_space_names_the_files(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    browser.click("[data-view=waste]")
    assert browser.texts("#wasteRows tr td:first-child") == ["/usr/lib/big", "/etc/old"]
    assert browser.texts("#wasteRows td.n") == ["300 kB", "200 kB", "5.00 kB", "5.00 kB"]
    browser.click("#wasteRows td.path button")
    assert browser.text(".row.selected .label") == "big"


def test_the_keyboard_walks_the_tree(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    browser.click("#collapse")
    assert labels(browser) == ["etc/", "usr/"]
    down, right, left = "\ue015", "\ue014", "\ue012"
    browser.type("#tree", down + right + down)
    assert browser.text(".row.selected .label") == "new"
    browser.type("#tree", left + left)
    assert labels(browser) == ["etc/", "usr/"]


def test_a_big_image_is_quick_and_light(browser: Browser, command: Command, tmp_path: Path) -> None:
    files: dict[str, bytes | None] = {}
    for d in range(200):
        files[f"d{d:03}"] = None
        files.update({f"d{d:03}/module_{n:04}.py": b"" for n in range(1000)})
    make_image(command, "big:1", [layer_tar(files)])
    path = tmp_path / "big.html"
    command("explore", "-o", str(path), "big:1")
    assert path.stat().st_size < 3_000_000
    browser.open(path.as_uri())
    expand = """const begun = performance.now(); document.querySelector('#expand').click();
        document.body.offsetHeight; return performance.now() - begun"""
    assert browser.run(expand) < 500
    assert browser.run("return document.querySelectorAll('.row').length") < 100
    browser.run("document.querySelector('#tree').scrollTop = 1e9")
    browser.until("return [...document.querySelectorAll('.label')].some("
                  "l => l.innerText === 'module_0999.py')")  # fmt: skip
    browser.type("#search", "module_0042")
    browser.until("return document.querySelector('#heading').innerText.includes('200 FOUND')", 5)
    assert browser.run("return performance.memory.usedJSHeapSize") < 300_000_000


def test_an_image_without_layers_and_one_without_waste(
    browser: Browser, command: Command, tmp_path: Path
) -> None:
    make_image(command, "empty:1", [])
    path = tmp_path / "empty.html"
    command("explore", "-o", str(path), "empty:1")
    browser.open(path.as_uri())
    assert browser.text(".empty") == "This layer holds no files."
    browser.click("[data-view=waste]")
    assert browser.text("#wasteNote") == "No byte of this image is hidden by a later layer."
    assert browser.complaints() == []


def test_the_page_needs_no_network_and_is_always_the_same(command: Command, page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"""(?:src|href)=["']|url\(|@import|https?://""", text)
    assert command("explore", "shop/app:1") == text  # piped: to standard output


def test_serve_answers_on_loopback_only_and_to_no_other_name(command: Command, page: Path) -> None:
    with subprocess.Popen(
        command.line("explore", "--serve", "shop/app:1"),
        env=command.environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[0]
            assert url.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(url) as answer:
                assert answer.read() == page.read_bytes()
            rebound = urllib.request.Request(url, headers={"Host": "evil.example:80"})
            for request, code in ((rebound, 403), (url + "etc/passwd", 404)):
                with pytest.raises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(request)
                assert caught.value.code == code
                caught.value.close()
        finally:
            process.send_signal(2)
        assert process.wait(10) == 0


def test_mistakes_get_one_line(command: Command, tmp_path: Path) -> None:
    assert "no such image: nope" in command("explore", "nope", code=1)
    error = command("explore", "-o", str(tmp_path / "no/where.html"), "shop/app:1", code=1)
    assert "No such file or directory" in error and error.count("\n") == 1
