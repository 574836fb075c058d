"""Connections and their reuse against answers of every form, one canned answer after another."""

import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unionimage.registry import http

PATIENCE = http.Patience(2, 2)
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


class Server:
    """Takes connections one after the other and answers each request with the next answer.

    An answer of None ends the connection.
    """

    def __init__(self, answers: Sequence[bytes | None]) -> None:
        self._answers = list(answers)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/x"
        self.heads: list[bytes] = []
        self.connections = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while self._answers:
            connected, _ = self._listener.accept()
            self.connections += 1
            with connected, connected.makefile("rb") as file:
                while self._answers and (head := self._head(file)):
                    self.heads.append(head)
                    answer = self._answers.pop(0)
                    if answer is None:
                        break
                    connected.sendall(answer)

    @staticmethod
    def _head(file: object) -> bytes:
        lines = []
        while (line := file.readline()).strip():
            lines.append(line)
        return b"".join(lines)

    def close(self) -> None:
        self._answers.clear()
        with socket.create_connection(("127.0.0.1", self.port)):
            pass
        self._thread.join()
        self._listener.close()


@contextmanager
def serving(*answers: bytes | None) -> Iterator[Server]:
    server = Server(answers)
    try:
        yield server
    finally:
        server.close()


def no_tls() -> ssl.SSLContext:
    raise AssertionError("TLS is not asked for here")


def read(response: http.Response) -> bytes:
    try:
        return b"".join(iter(lambda: response.read1(7), b""))
    finally:
        response.release()


def get(url: str, pool: http.Pool | None = None, method: str = "GET") -> bytes:
    made = pool or http.Pool(no_tls)
    try:
        return read(made.request(method, url, {}, None, PATIENCE))
    finally:
        if pool is None:
            made.close()


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 11\r\n\r\nhello world",
        OK + b"Connection: close\r\n\r\nhello world",
        b"HTTP/1.0 200 fine\n\nhello world",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 11\r\n\r\nhello world",
        OK
        + b"Transfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nA: b\r\n\r\n",
        OK
        + b"transfer-encoding:Chunked\r\nContent-Length: 3\r\n\r\nB\r\n"
        + b"hello world\r\n0\r\n\r\n",
    ],
)
def test_a_body_is_read_in_every_form(answer: bytes) -> None:
    with serving(answer, None) as server:
        if b"Length: 11" in answer or b"chunked" in answer.lower():
            assert get(server.url) == b"hello world"
            return
    # without a length, the end of the connection ends it
    with serving(answer) as server:
        assert get(server.url) == b"hello world"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        OK + b"Content-Length: 5\r\n\r\nhell",
        OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        CHUNKED + b"f" * 40 + b"\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
        OK + b"A: b\r\n" * 101 + b"\r\n",
        OK + b"A: " + b"b" * 70000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 101,
    ],
)
def test_an_answer_that_is_none_is_an_error(answer: bytes) -> None:
    with serving(answer) as server, pytest.raises((http.HttpError, ConnectionError)):
        get(server.url)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), max_size=8))
def test_any_body_comes_whole_in_chunks_and_the_connection_lives(pieces: list[bytes]) -> None:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    answer = CHUNKED + chunks + b"0\r\n\r\n"
    pool = http.Pool(no_tls)
    with serving(answer, answer) as server:
        assert get(server.url, pool) == b"".join(pieces) == get(server.url, pool)
        assert server.connections == 1
        pool.close()


def test_what_has_no_body_is_not_waited_for() -> None:
    pool = http.Pool(no_tls)
    with serving(
        OK + b"Content-Length: 9\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
    ) as server:
        assert get(server.url, pool, "HEAD") == b""
        assert get(server.url, pool) == get(server.url, pool) == b""
        assert server.connections == 1
        pool.close()


def test_a_connection_that_was_dropped_while_idle_is_made_anew() -> None:
    pool = http.Pool(no_tls)
    answer = OK + b"Content-Length: 1\r\n\r\nx"
    with serving(answer) as server:
        get(server.url, pool)
        url = server.url
    again = socket.create_server(("127.0.0.1", server.port))
    thread = threading.Thread(target=_answer_once, args=(again, answer))
    thread.start()
    assert get(url, pool) == b"x"
    thread.join()
    again.close()
    pool.close()


def _answer_once(listener: socket.socket, answer: bytes) -> None:
    connected, _ = listener.accept()
    with connected:
        connected.recv(65536)
        connected.sendall(answer)


def test_an_answer_before_all_was_sent_is_heard() -> None:
    hung_up = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        connected, _ = listener.accept()
        with connected:
            connected.recv(64)  # with more unread, so that the end is a reset
            connected.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
        hung_up.set()

    def pieces() -> Iterator[bytes]:
        yield bytes(1000)
        assert hung_up.wait(10)
        yield from (bytes(1000) for _ in range(1000))

    pool = http.Pool(no_tls)
    thread = threading.Thread(target=refuse)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
    try:
        sent = {"Content-Length": "1001000"}
        response = pool.request("PUT", url, sent, pieces(), PATIENCE)
        assert response.status == 401
        response.close()
    finally:
        thread.join()
        listener.close()
        pool.close()


def test_a_url_and_its_headers_go_out_clean() -> None:
    pool = http.Pool(no_tls)
    with serving(OK + b"Content-Length: 0\r\n\r\n") as server:
        pool.request(
            "GET", f"http://jo:pw@127.0.0.1:{server.port}/a b\x7fü?q=\r\nx y#f", {}, None, PATIENCE
        ).release()
        with pytest.raises(http.HttpError, match="Invalid header"):
            pool.request("GET", server.url, {"A": "b\r\nC: d"}, None, PATIENCE)
        first, *rest = server.heads[0].decode("ascii").splitlines()
        assert first == "GET /a%20b%7F%C3%BC?q=x%20y HTTP/1.1"
        assert f"Host: 127.0.0.1:{server.port}" in rest
        pool.close()


@pytest.mark.parametrize("url", ["ftp://x/", "http://", "http://x:99999/", "http://[::1/", "x"])
def test_an_address_that_is_none_is_told(url: str) -> None:
    with pytest.raises(http.HttpError, match="an address that is none"):
        http.Address.of(url)


def test_nobody_there_and_no_such_name_are_told() -> None:
    pool = http.Pool(no_tls)
    with pytest.raises(http.NoConnection, match="refused"):
        pool.request("GET", "http://127.0.0.1:1/", {}, None, PATIENCE)
    with pytest.raises(http.NameUnknown):
        pool.request("GET", "http://no.such.name.invalid/", {}, None, PATIENCE)


def test_a_proxy_gets_the_whole_url_and_its_password() -> None:
    with serving(OK + b"Content-Length: 2\r\n\r\nhi", b"HTTP/1.1 403 No\r\n\r\n") as server:
        pool = http.Pool(no_tls, f"jo:p%40w@127.0.0.1:{server.port}")
        assert get("http://far.invalid:81/x?y", pool) == b"hi"
        pool.close()
        pool = http.Pool(ssl.create_default_context, f"jo:p%40w@127.0.0.1:{server.port}")
        with pytest.raises(http.ProxyRefuses, match="403"):
            get("https://far.invalid/", pool)
        plain, tunnel = (head.decode() for head in server.heads)
        assert plain.startswith(
            "GET http://far.invalid:81/x?y HTTP/1.1\r\nHost: far.invalid:81\r\n"
        )
        assert "Proxy-Authorization: Basic am86cEB3\r\n" in plain
        assert tunnel.startswith("CONNECT far.invalid:443 HTTP/1.")
        assert "Proxy-Authorization: Basic am86cEB3\r\n" in tunnel
    with pytest.raises(http.HttpError, match="http://"):
        http.Pool(no_tls, "https://proxy.lan")


def test_an_aborted_pool_makes_no_connection() -> None:
    with serving(None) as server:
        pool = http.Pool(no_tls)
        pool.abort()
        with pytest.raises(http.HttpError, match="stopped"):
            get(server.url, pool)
