"""The registry client against a registry that misbehaves."""

import base64
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness.hostile import Handler, Hostile, cut_after, cut_upload, drip, stall_after, status
from hypothesis import given
from hypothesis import strategies as st
from unionimage.digest import Digest
from unionimage.errors import BadContent, UserError
from unionimage.registry.auth import Authorizer, Challenge, parse_challenges
from unionimage.registry.client import Repository
from unionimage.registry.credentials import Credential
from unionimage.registry.errors import RegistryError, RegistryStatusError, printable
from unionimage.registry.transport import Limits, Transport
from unionimage.spec import Descriptor

BLOB = bytes(range(256)) * 4096
LAYER = "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    with Hostile() as registry:
        yield registry


@pytest.fixture
def elsewhere() -> Iterator[Hostile]:
    with Hostile(address="127.0.0.2") as registry:
        yield registry


class Client:
    """A client with short patience that counts its pauses instead of sleeping."""

    def __init__(self, host: str, credential: Credential | None = None, **options: object):
        self.pauses: list[float] = []
        self.transport = Transport(
            host, limits=Limits(connect=2, stall=0.4, pause=0.01), sleep=self.pauses.append
        )
        self.authorizer = Authorizer(self.transport, credential, **options)
        self.repository = Repository(self.transport, self.authorizer, "team/app")

    def close(self) -> None:
        self.authorizer.close()
        self.transport.close()


@pytest.fixture
def client(hostile: Hostile) -> Iterator[Client]:
    made = Client(hostile.host)
    yield made
    made.close()


def descriptor(data: bytes, size: int | None = None) -> Descriptor:
    return Descriptor(LAYER, Digest.of(data), len(data) if size is None else size)


def read(client: Client, data: bytes = BLOB) -> bytes:
    return client.repository.small_blob(descriptor(data))


# -- blobs -------------------------------------------------------------------------------------


def test_a_cut_is_resumed_with_a_range(hostile: Hostile, client: Client) -> None:
    hostile.add_blob(BLOB)
    hostile.trap("GET .*/blobs/", cut_after(BLOB, 300_000))
    assert read(client) == BLOB
    first, second = hostile.asked_for("GET .*/blobs/")
    assert "Range" not in first.headers
    start = int(second.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= 300_000


def test_a_registry_without_ranges_is_read_again_from_the_start(
    hostile: Hostile, client: Client
) -> None:
    hostile.ranges = False
    hostile.add_blob(BLOB)
    hostile.trap("GET .*/blobs/", cut_after(BLOB, 300_000), times=2)
    assert read(client) == BLOB


def test_a_stall_is_resumed(hostile: Hostile, client: Client) -> None:
    hostile.add_blob(BLOB)
    hostile.trap("GET .*/blobs/", stall_after(BLOB, 200_000))
    assert read(client) == BLOB
    assert len(hostile.asked_for("GET .*/blobs/")) == 2


def test_a_trickle_counts_as_a_stall(hostile: Hostile, client: Client) -> None:
    hostile.add_blob(BLOB)
    hostile.trap("GET .*/blobs/", drip(BLOB, 0.05))
    assert read(client) == BLOB
    assert len(hostile.asked_for("GET .*/blobs/")) == 2


def test_a_registry_that_always_stalls_is_given_up(hostile: Hostile, client: Client) -> None:
    hostile.trap("GET .*/blobs/", stall_after(BLOB, 0), times=-1)
    with pytest.raises(RegistryError, match=r"no byte came for 0\.4 seconds"):
        read(client)
    assert len(hostile.asked_for("GET .*/blobs/")) == client.transport.limits.attempts


def test_a_range_from_the_wrong_place_is_refused(hostile: Hostile, client: Client) -> None:
    hostile.trap("GET .*/blobs/", cut_after(BLOB, 300_000))
    hostile.trap(
        "GET .*/blobs/", status(206, BLOB[900_000:], Content_Range="bytes 900000-1048575/1048576")
    )
    with pytest.raises(BadContent, match="wrong place"):
        read(client)


@pytest.mark.parametrize("served", [BLOB + b"x", BLOB[:-1], b"", BLOB[:-1] + b"?"])
def test_a_blob_of_another_size_or_digest_is_refused(
    hostile: Hostile, client: Client, served: bytes
) -> None:
    hostile.blobs[Digest.of(BLOB)] = served
    with pytest.raises(BadContent, match=r"longer than|ends after|has digest"):
        read(client)


def test_a_size_that_lies_is_refused(hostile: Hostile, client: Client) -> None:
    hostile.add_blob(BLOB)
    with pytest.raises(BadContent, match="longer than"):
        client.repository.small_blob(descriptor(BLOB, len(BLOB) - 5))
    with pytest.raises(BadContent, match="ends after"):
        client.repository.small_blob(descriptor(BLOB, len(BLOB) + 5))
    with pytest.raises(BadContent, match="at most"):
        client.repository.small_blob(descriptor(BLOB, 1 << 40))


# -- back-off ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_trouble_is_tried_again_with_growing_pauses(
    hostile: Hostile, client: Client, code: int
) -> None:
    hostile.add_manifest("1", {"schemaVersion": 2})
    hostile.trap("GET .*/manifests/1", status(code), times=3)
    assert client.repository.manifest("1").data == b'{"schemaVersion": 2}'
    assert len(client.pauses) == 3
    assert client.pauses[0] < client.pauses[1] < client.pauses[2]


def test_retry_after_is_honoured_and_a_long_one_is_told(hostile: Hostile, client: Client) -> None:
    hostile.add_manifest("1", {"schemaVersion": 2})
    hostile.trap("GET .*/manifests", status(429, Retry_After="7"))
    client.repository.manifest("1")
    assert client.pauses == [7.0]
    hostile.trap("GET", status(429, Retry_After="3600"), times=-1)
    with pytest.raises(RegistryStatusError, match=r"too many requests; try again in 3600 seconds"):
        client.repository.manifest("1")
    assert client.pauses == [7.0]


def test_trouble_that_stays_is_told_in_one_line(hostile: Hostile, client: Client) -> None:
    body = json.dumps({"errors": [{"code": "X", "message": "disk \x1b[31mfull\nindeed"}]}).encode()
    hostile.trap("GET", status(503, body), times=-1)
    with pytest.raises(RegistryStatusError) as caught:
        client.repository.manifest("1")
    assert caught.value.message == (
        f"{hostile.host}: is in trouble (503: disk [31mfull indeed); try again later"
    )


def test_which_scheme_it_speaks_is_asked_once(hostile: Hostile, client: Client) -> None:
    """However many layers are asked for at once."""
    hostile.trap("GET /v2/$", lambda handler: time.sleep(0.2) or status(200)(handler))
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: client.transport.base, range(4)))) == 1
    assert len(hostile.asked_for("GET /v2/$")) == 1


def test_nobody_there_is_told_at_once() -> None:
    client = Client("127.0.0.1:1")
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:1: cannot connect: Connection refused"):
        client.repository.manifest("1")
    assert client.pauses == []
    client.close()


# -- secrets -----------------------------------------------------------------------------------

SECRET = Credential("jo", "s3cret")
BASIC = "Basic " + base64.b64encode(b"jo:s3cret").decode()


def test_basic_auth_is_sent_only_when_asked_for(hostile: Hostile) -> None:
    client = Client(hostile.host, SECRET)
    hostile.add_manifest("1", {"schemaVersion": 2})
    hostile.trap("GET .*/manifests", status(401, WWW_Authenticate='Basic realm="x"'))
    client.repository.manifest("1")
    first, second = hostile.asked_for("GET .*/manifests")
    assert "Authorization" not in first.headers
    assert second.headers["Authorization"] == BASIC
    client.close()


def test_a_wrong_password_is_tried_once(hostile: Hostile) -> None:
    client = Client(hostile.host, SECRET)
    hostile.trap("GET .*/manifests", status(401, WWW_Authenticate='Basic realm="x"'), times=-1)
    with pytest.raises(RegistryStatusError, match="use unionfuse login"):
        client.repository.manifest("1")
    assert len(hostile.asked_for("GET .*/manifests")) == 2
    client.close()


def test_credentials_never_follow_a_redirect_to_another_host(
    hostile: Hostile, elsewhere: Hostile
) -> None:
    client = Client(hostile.host, SECRET)
    elsewhere.add_blob(BLOB)
    hostile.trap("GET .*/blobs", status(401, WWW_Authenticate="Basic"))
    hostile.trap(
        "GET .*/blobs",
        status(307, Location=f"http://{elsewhere.host}/v2/x/blobs/{Digest.of(BLOB)}"),
    )
    assert read(client) == BLOB
    assert hostile.asked[-1].headers["Authorization"] == BASIC
    assert [one.headers.get("Authorization") for one in elsewhere.asked] == [None]
    client.close()


def test_a_challenge_from_another_host_is_not_answered(
    hostile: Hostile, elsewhere: Hostile
) -> None:
    client = Client(hostile.host, SECRET)
    hostile.trap("GET .*/blobs", status(307, Location=f"http://{elsewhere.host}/b"), times=-1)
    elsewhere.trap("GET", status(401, WWW_Authenticate="Basic"), times=-1)
    with pytest.raises(RegistryStatusError):
        read(client)
    assert all("Authorization" not in one.headers for one in elsewhere.asked)
    client.close()


def test_a_redirect_circle_is_left(hostile: Hostile, client: Client) -> None:
    hostile.trap("GET", lambda handler: handler.answer(302, Location=handler.path), times=-1)
    with pytest.raises(RegistryError, match="in a circle"):
        client.repository.manifest("1")
    assert len(hostile.asked_for("GET .*/manifests")) == 6


def bearer(host: str, scope: str = "") -> str:
    return f'Bearer realm="http://{host}/token",service="here",scope="{scope}"'


def test_a_token_is_fetched_once_and_used_for_all(hostile: Hostile) -> None:
    client = Client(hostile.host, SECRET)
    hostile.add_manifest("1", {"schemaVersion": 2})
    hostile.trap("GET .*/manifests", status(401, WWW_Authenticate=bearer(hostile.host)))
    hostile.trap("GET /token", status(200, b'{"token":"T1","expires_in":300}'), times=-1)
    client.repository.manifest("1")
    client.repository.manifest("1")
    (asked,) = hostile.asked_for("GET /token")
    assert asked.headers["Authorization"] == BASIC
    assert "scope=repository%3Ateam%2Fapp%3Apull" in asked.path and "service=here" in asked.path
    sent = [one.headers.get("Authorization") for one in hostile.asked_for("manifests")]
    assert sent == [None, "Bearer T1", "Bearer T1"]
    client.close()


def test_an_expired_token_is_renewed(hostile: Hostile) -> None:
    client = Client(hostile.host)
    hostile.add_manifest("1", {"schemaVersion": 2})
    hostile.trap("GET .*/manifests", status(401, WWW_Authenticate=bearer(hostile.host)), times=2)
    hostile.trap("GET /token", status(200, b'{"access_token":"T1"}'))
    hostile.trap("GET /token", status(200, b'{"access_token":"T2"}'))
    with pytest.raises(RegistryStatusError):
        client.repository.manifest("1")
    client.repository.manifest("1")
    sent = [one.headers.get("Authorization") for one in hostile.asked_for("manifests")]
    assert sent == [None, "Bearer T1", "Bearer T1"]
    hostile.trap("GET .*/manifests", status(401, WWW_Authenticate=bearer(hostile.host)))
    client.repository.manifest("1")
    assert hostile.asked[-1].headers["Authorization"] == "Bearer T2"
    client.close()


def test_an_identity_token_is_exchanged(hostile: Hostile) -> None:
    client = Client(hostile.host, Credential(identity_token="refresh-me"))
    hostile.add_manifest("1", {"schemaVersion": 2})
    hostile.trap("GET .*/manifests", status(401, WWW_Authenticate=bearer(hostile.host)))
    bodies = []

    def exchange(handler: object) -> None:
        length = int(handler.headers["Content-Length"])
        bodies.append(handler.rfile.read(length))
        handler.answer(200, b'{"access_token":"T"}')

    hostile.trap("POST /token", exchange)
    client.repository.manifest("1")
    assert b"grant_type=refresh_token" in bodies[0] and b"refresh_token=refresh-me" in bodies[0]
    client.close()


def test_a_password_never_goes_to_a_token_server_elsewhere(
    hostile: Hostile, elsewhere: Hostile
) -> None:
    hostile.add_manifest("1", {"schemaVersion": 2})
    hostile.trap("GET .*/manifests", status(401, WWW_Authenticate=bearer(elsewhere.host)), times=2)
    elsewhere.trap("GET /token", status(200, b'{"token":"T"}'), times=-1)
    client = Client(hostile.host, SECRET)
    with pytest.raises(RegistryError, match="wants your password sent to another site"):
        client.repository.manifest("1")
    assert elsewhere.asked == []
    client.close()
    trusting = Client(hostile.host, SECRET, trusted_realms=["127.0.0.2"])
    trusting.repository.manifest("1")
    assert elsewhere.asked[0].headers["Authorization"] == BASIC
    trusting.close()


def test_an_anonymous_token_may_come_from_elsewhere(hostile: Hostile, elsewhere: Hostile) -> None:
    hostile.add_manifest("1", {"schemaVersion": 2})
    hostile.trap("GET .*/manifests", status(401, WWW_Authenticate=bearer(elsewhere.host)))
    elsewhere.trap("GET /token", status(200, b'{"token":"T"}'))
    client = Client(hostile.host)
    client.repository.manifest("1")
    assert "Authorization" not in elsewhere.asked[0].headers
    client.close()


@pytest.mark.parametrize(
    "answer", [b"no json", b"[]", b"{}", b'{"token": 5}', b'{"token":"a\\r\\nb"}', b"[" * 9999]
)
def test_a_token_answer_that_is_none_is_told(
    hostile: Hostile, client: Client, answer: bytes
) -> None:
    hostile.trap("GET .*/manifests", status(401, WWW_Authenticate=bearer(hostile.host)))
    hostile.trap("GET /token", status(200, answer))
    with pytest.raises(RegistryError, match="token server"):
        client.repository.manifest("1")


@pytest.mark.parametrize("realm", ["", "ftp://x/", "file:///etc/passwd", "http://jo:pw@127.0.0.1/"])
def test_a_realm_that_is_none_is_told(hostile: Hostile, client: Client, realm: str) -> None:
    hostile.trap("GET .*/manifests", status(401, WWW_Authenticate=f'Bearer realm="{realm}"'))
    with pytest.raises(RegistryError, match="token server that is none"):
        client.repository.manifest("1")


def test_secrets_do_not_show() -> None:
    credential = Credential("jo", "s3cret", "identity", "registry")
    assert "s3cret" not in repr(credential) and "identity" not in repr(credential)


# -- manifests and tags ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"no json", {}),
        (b"[1]", {}),
        (b"[" * 100_000, {}),
        (b'{"a":1,"a":2}', {}),
        (b'{"mediaType":7}', {}),
        (b" " * (5 << 20), {}),
        (b"{}", {"Docker_Content_Digest": "sha256:" + "0" * 64}),
        (
            b'{"mediaType":"application/vnd.oci.image.index.v1+json"}',
            {"Content_Type": "application/vnd.oci.image.manifest.v1+json"},
        ),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    hostile: Hostile, client: Client, body: bytes, headers: dict[str, str]
) -> None:
    hostile.trap("GET", status(200, body, **headers), times=-1)
    with pytest.raises(UserError) as caught:
        client.repository.manifest("1")
    assert "\n" not in caught.value.message and len(caught.value.message) < 400


def test_a_manifest_of_another_digest_is_refused(hostile: Hostile, client: Client) -> None:
    wanted = Digest.of(b"{}")
    hostile.manifests[wanted] = (LAYER, b'{"other": 1}')
    with pytest.raises(BadContent, match="has digest"):
        client.repository.manifest(wanted)


def test_tags_are_listed_page_by_page(hostile: Hostile, client: Client) -> None:
    more = '</v2/team/app/tags/list?last=b&n=2>; rel="next"'
    hostile.trap("GET .*list.n=", status(200, b'{"tags":["a","b"]}', Link=more))
    hostile.trap("GET .*last=b", status(200, b'{"tags":["c"]}'))
    assert list(client.repository.tags()) == ["a", "b", "c"]


@pytest.mark.parametrize("tag", ["../x", "\x1b[2J", "a b", "a@sha256:1", "", 7, None, "x" * 200])
def test_a_tag_that_is_none_is_refused(hostile: Hostile, client: Client, tag: object) -> None:
    hostile.trap("GET .*tags", status(200, json.dumps({"tags": ["a", tag]}).encode()))
    with pytest.raises(BadContent, match="holds something else"):
        list(client.repository.tags())


def test_a_list_of_tags_that_never_ends_is_left(hostile: Hostile, client: Client) -> None:
    hostile.trap(
        "GET .*tags",
        lambda handler: handler.answer(200, b'{"tags":["a"]}', Link=f"<{handler.path}>; rel=next"),
        times=-1,
    )
    with pytest.raises(RegistryError, match="never ends"):
        list(client.repository.tags())


def test_a_list_of_tags_stays_at_home(hostile: Hostile, elsewhere: Hostile, client: Client) -> None:
    link = f"<http://{elsewhere.host}/v2/team/app/tags/list>; rel=next"
    hostile.trap("GET .*tags", status(200, b'{"tags":null}', Link=link))
    with pytest.raises(RegistryError, match="continues its list"):
        list(client.repository.tags())
    assert elsewhere.asked == []


# -- uploads ------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unionimage.registry.client.UPLOAD_CHUNK", 400_000)


def upload(client: Client, data: bytes = BLOB) -> list[int]:
    """Upload a blob; the progress that was told."""
    told: list[int] = []
    client.repository.upload(Digest.of(data), len(data), lambda: io.BytesIO(data), told.append)
    return told


def test_a_small_blob_goes_in_one_put(hostile: Hostile, client: Client) -> None:
    assert sum(upload(client)) == len(BLOB)
    assert hostile.blobs[Digest.of(BLOB)] == BLOB
    assert [one.method for one in hostile.asked_for("uploads")] == ["POST", "PUT"]


@pytest.mark.usefixtures("small_chunks")
def test_a_large_blob_goes_in_chunks(hostile: Hostile, client: Client) -> None:
    assert sum(upload(client)) == len(BLOB)
    assert hostile.blobs[Digest.of(BLOB)] == BLOB
    patches = hostile.asked_for("PATCH")
    assert [one.headers["Content-Range"] for one in patches] == [
        *("0-399999", "400000-799999", "800000-1048575")
    ]


@pytest.mark.usefixtures("small_chunks")
def test_a_cut_chunk_is_gone_on_with_from_where_the_registry_got(
    hostile: Hostile, client: Client
) -> None:
    hostile.trap("PATCH", cut_upload(150_000))
    assert sum(upload(client)) == len(BLOB)
    assert hostile.blobs[Digest.of(BLOB)] == BLOB
    assert hostile.asked_for("PATCH")[1].headers["Content-Range"] == "150000-549999"


@pytest.mark.usefixtures("small_chunks")
def test_chunks_that_are_refused_go_whole(hostile: Hostile, client: Client) -> None:
    hostile.trap("PATCH", status(405, Connection="close"), times=-1)
    assert sum(upload(client)) == len(BLOB)
    assert hostile.blobs[Digest.of(BLOB)] == BLOB


def test_an_upload_that_broke_is_begun_anew(hostile: Hostile, client: Client) -> None:
    hostile.trap("PUT", lambda handler: handler.cut())
    hostile.trap("PUT", status(502, Connection="close"))
    assert sum(upload(client)) == len(BLOB)
    assert hostile.blobs[Digest.of(BLOB)] == BLOB


def test_an_upload_of_which_only_the_answer_was_lost_is_done(
    hostile: Hostile, client: Client
) -> None:
    def lose(handler: Handler) -> None:
        handler.body = handler.rfile.read(int(handler.headers["Content-Length"]))
        hostile.add_blob(handler.body)
        handler.cut()

    hostile.trap("PUT", lose)
    assert sum(upload(client)) == len(BLOB)
    assert len(hostile.asked_for("PUT")) == 1


def test_connections_are_used_again(hostile: Hostile, client: Client) -> None:
    hostile.add_manifest("1", {"schemaVersion": 2})
    hostile.add_blob(BLOB)
    client.repository.manifest("1")
    client.repository.manifest_digest("1")
    assert client.repository.has_blob(Digest.of(BLOB))
    read(client)
    upload(client, b"other")
    client.repository.put_manifest("2", LAYER, b"{}")
    list(client.repository.tags())
    assert client.pauses == []
    assert hostile.connections <= 2  # the first one asked for TLS


def test_an_upload_that_is_refused_is_told_at_once(hostile: Hostile, client: Client) -> None:
    hostile.trap("POST", status(403, b'{"errors":[{"code":"DENIED","message":"read only"}]}'))
    with pytest.raises(RegistryStatusError, match="read only"):
        upload(client)
    assert client.pauses == []


def test_an_upload_sent_elsewhere_gets_no_credentials(hostile: Hostile, elsewhere: Hostile) -> None:
    client = Client(hostile.host, SECRET)
    elsewhere.uploads["u0"] = b""
    hostile.trap("POST", status(401, WWW_Authenticate="Basic"))
    place = f"http://{elsewhere.host}/v2/team/app/blobs/uploads/u0"
    hostile.trap("POST", status(202, Location=place))
    upload(client)
    assert hostile.asked[-1].headers["Authorization"] == BASIC
    assert elsewhere.blobs[Digest.of(BLOB)] == BLOB
    assert all("Authorization" not in one.headers for one in elsewhere.asked)
    client.close()


def test_a_blob_is_mounted_or_the_offered_upload_given_up(hostile: Hostile, client: Client) -> None:
    digest = Digest.of(BLOB)
    hostile.trap("POST", status(201))
    assert client.repository.mount(digest, "other/app")
    assert f"mount=sha256%3A{digest.hex}&from=other%2Fapp" in hostile.asked[-1].path
    assert not client.repository.mount(digest, "other/app")
    assert hostile.asked[-1].method == "DELETE"
    hostile.trap("POST", status(403))
    assert not client.repository.mount(digest, "other/app")


def test_a_manifest_that_is_stored_as_another_is_told(hostile: Hostile, client: Client) -> None:
    hostile.trap("PUT", status(201, Docker_Content_Digest="sha256:" + "0" * 64))
    with pytest.raises(BadContent, match="stored"):
        client.repository.put_manifest("1", LAYER, b"{}")
    assert client.repository.put_manifest("2", LAYER, b"{}") == Digest.of(b"{}")


# -- small parsers -----------------------------------------------------------------------------


def test_challenges_are_parsed() -> None:
    header = 'Negotiate, Bearer realm="https://a/b?c=\\"d\\"", service=x , Basic realm="y"'
    assert parse_challenges(header) == [
        Challenge("negotiate", {}),
        Challenge("bearer", {"realm": 'https://a/b?c="d"', "service": "x"}),
        Challenge("basic", {"realm": "y"}),
    ]


@given(st.text(max_size=200))
def test_any_challenge_header_is_survived(header: str) -> None:
    for challenge in parse_challenges(header):
        assert challenge.scheme == challenge.scheme.lower()


@given(st.text(max_size=1000))
def test_what_is_printed_is_one_short_line(text: str) -> None:
    clean = printable(text)
    assert clean.isprintable() and len(clean) <= 300
