"""Docker's config.json: what is read, what is written, and what is left alone."""

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unionimage.registry.auth import _same_site
from unionimage.registry.credentials import Credential, CredentialFile, registry_of
from unionimage.registry.errors import RegistryError


@pytest.fixture
def file(tmp_path: Path) -> CredentialFile:
    return CredentialFile(str(tmp_path / "deep/config.json"))


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("https://index.docker.io/v1/", "docker.io"),
        ("index.docker.io", "docker.io"),
        ("localhost:5000", "localhost:5000"),
        ("https://quay.io", "quay.io"),
        ("http://Registry.LAN:80/v2/", "registry.lan:80"),
    ],
)
def test_every_form_of_key_is_found(tmp_path: Path, key: str, host: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {"other": {}, key: {"auth": "am86cDphc3M="}}}))
    assert CredentialFile(str(path)).get(host) == Credential("jo", "p:ass")
    assert CredentialFile(str(path)).get("nobody") is None


def test_tokens_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    entry = {"auth": "am86", "identitytoken": "id", "registrytoken": "reg"}
    path.write_text(json.dumps({"auths": {"h": entry}}))
    assert CredentialFile(str(path)).get("h") == Credential("jo", "", "id", "reg")


def test_what_is_not_ours_is_kept_and_the_file_is_private(file: CredentialFile) -> None:
    path = Path(file.path)
    path.parent.mkdir()
    path.write_text('{"HttpHeaders": {"A": "b"}, "auths": {"x": {"auth": "YTpi"}}}')
    path.chmod(0o644)
    assert file.put("docker.io", Credential("jo", "pässword")) == file.path
    config = json.loads(path.read_text())
    assert config["HttpHeaders"] == {"A": "b"} and config["auths"]["x"] == {"auth": "YTpi"}
    assert "https://index.docker.io/v1/" in config["auths"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert file.get("docker.io") == Credential("jo", "pässword")
    assert file.remove("docker.io") and not file.remove("docker.io")
    assert json.loads(path.read_text())["auths"] == {"x": {"auth": "YTpi"}}


def test_a_link_to_the_file_stays_one(file: CredentialFile, tmp_path: Path) -> None:
    real = tmp_path / "real.json"
    real.write_text("{}")
    Path(file.path).parent.mkdir()
    Path(file.path).symlink_to(real)
    file.put("h", Credential("jo", "pw"))
    assert Path(file.path).is_symlink() and "auths" in real.read_text()


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "[" * 100_000])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(RegistryError, match=str(path)):
        CredentialFile(str(path)).get("h")


@pytest.mark.parametrize("auth", ["&&&", "am8", "/w==", 5])
def test_a_broken_entry_is_named(tmp_path: Path, auth: object) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {"h": {"auth": auth}}}))
    with pytest.raises(RegistryError, match="holds no valid entry for h"):
        CredentialFile(str(path)).get("h")


@given(st.text(st.characters(exclude_characters=":\0", codec="utf-8")), st.text())
def test_any_name_and_password_come_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, password: str
) -> None:
    file = CredentialFile(str(tmp_path_factory.mktemp("c") / "config.json"))
    file.put("h", Credential(name, password))
    assert file.get("h") == Credential(name, password.rstrip("\0"))


@pytest.mark.parametrize(
    ("server", "host"),
    [
        (None, "docker.io"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("registry-1.docker.io", "docker.io"),
        ("https://Quay.io/", "quay.io"),
        ("localhost:5000", "localhost:5000"),
    ],
)
def test_the_server_of_login(server: str | None, host: str) -> None:
    assert registry_of(server) == host


@pytest.mark.parametrize("server", ["https://", "jo@host", "a b", "\x1b[0m"])
def test_a_server_that_is_none_is_refused(server: str) -> None:
    with pytest.raises(RegistryError, match="is no registry"):
        registry_of(server)


@pytest.mark.parametrize(
    ("realm", "registry", "same"),
    [
        ("auth.docker.io", "registry-1.docker.io", True),
        ("gitlab.com", "registry.gitlab.com", True),
        ("ghcr.io", "ghcr.io", True),
        ("auth.quay.io", "quay.io", True),
        ("127.0.0.1", "127.0.0.1:5000", True),
        ("evil.io", "registry-1.docker.io", False),
        ("docker.io.evil.com", "registry-1.docker.io", False),
        ("evildocker.io", "registry-1.docker.io", False),
        ("evil.com", "example.com", False),
        ("10.0.0.2", "10.0.0.1", False),
        ("0.1.10", "10.0.1.10", False),
        ("localhost", "127.0.0.1:5000", False),
    ],
)
def test_whom_a_password_may_go_to(realm: str, registry: str, same: bool) -> None:
    assert _same_site(realm, registry) is same
