"""A token server for docker-registry: who may do what, signed as JSON web tokens.

Protocol: https://distribution.github.io/distribution/spec/auth/token/ and …/jwt/.
"""

import base64
import json
import subprocess
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from harness.registry import make_certificate

SERVICE = "test-registry"
ISSUER = "test-issuer"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


class TokenServer:
    """Gives anyone tokens to pull from `public/…`, and `jo` tokens for everything of `jo/…` too.

    A context manager.

    Args:
        folder: an empty directory for its key.
        password: of `jo`.
        life: seconds that a token lasts.
    """

    def __init__(self, folder: Path, password: str, life: int = 300) -> None:
        self.folder, self.password, self.life = folder, password, life
        self.asked: list[dict[str, list[str]]] = []

    def __enter__(self) -> "TokenServer":
        self.folder.mkdir(parents=True, exist_ok=True)
        make_certificate(self.folder)
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def registry_config(self) -> dict[str, Any]:
        """The `auth` section for a registry that trusts this server."""
        return {
            "token": {
                "realm": f"http://127.0.0.1:{self.server.server_port}/token",
                "service": SERVICE,
                "issuer": ISSUER,
                "rootcertbundle": str(self.folder / "cert.pem"),
            }
        }

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(handler.path).query)
        self.asked.append(query)
        secret = handler.headers.get("Authorization", "")
        wanted = "Basic " + base64.b64encode(f"jo:{self.password}".encode()).decode()
        known = secret == wanted
        if secret and not known:
            status, body = 401, b'{"errors":[{"code":"UNAUTHORIZED","message":"who?"}]}'
        else:
            access = [self._grant(scope, known) for scope in query.get("scope", [])]
            token = self._sign("jo" if known else "", [one for one in access if one["actions"]])
            status, body = 200, json.dumps({"token": token, "expires_in": self.life}).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _grant(self, scope: str, known: bool) -> dict[str, Any]:
        kind, name, actions = scope.split(":")
        allowed = {"pull"} if name.startswith("public/") else set()
        if known and name.startswith("jo/"):
            allowed = {"pull", "push"}
        granted = [action for action in actions.split(",") if action in allowed]
        return {"type": kind, "name": name, "actions": granted}

    def _sign(self, subject: str, access: list[dict[str, Any]]) -> str:
        certificate = (self.folder / "cert.pem").read_text()
        chain = "".join(certificate.splitlines()[1:-1])
        now = int(time.time())
        head = {"typ": "JWT", "alg": "RS256", "x5c": [chain]}
        claims = {
            "iss": ISSUER,
            "sub": subject,
            "aud": SERVICE,
            "exp": now + self.life,
            "nbf": now - 10,
            "iat": now,
            "jti": str(len(self.asked)),
            "access": access,
        }
        text = ".".join(_base64(json.dumps(part).encode()) for part in (head, claims))
        signed = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self.folder / "key.pem")],
            input=text.encode(),
            capture_output=True,
            check=True,
        )
        return f"{text}.{_base64(signed.stdout)}"
