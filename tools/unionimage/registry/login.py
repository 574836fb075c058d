"""Login: try a password at its registry before it is stored."""

from __future__ import annotations

from unionimage.reference import DEFAULT_REGISTRY
from unionimage.registry.auth import parse_challenges
from unionimage.registry.credentials import Credential
from unionimage.registry.errors import RegistryError, RegistryStatusError
from unionimage.registry.session import DOCKER_HUB_HOST, Session
from unionimage.registry.transport import finish, status_error


def check_login(session: Session, registry: str, credential: Credential) -> None:
    """Ask the registry whether it accepts a credential.

    Raises:
        RegistryError: it does not, it cannot be reached, or it is no registry.
    """
    host = DOCKER_HUB_HOST if registry == DEFAULT_REGISTRY else registry
    transport, authorizer = session.connect(host, credential, registry)
    used: str | None = None
    for _ in range(2):
        headers = {"Authorization": used} if used else {}
        response = transport.request("GET", "/v2/", headers=headers)
        if response.status == 200:
            finish(response)
            return
        challenges = response.headers.get_all("WWW-Authenticate", [])
        problem = status_error(response, registry)
        if response.status != 401:
            raise _explain(problem, registry)
        parsed = [one for header in challenges for one in parse_challenges(header)]
        if not authorizer.renew(parsed, (), used):
            break
        used = authorizer.header(())
    raise RegistryError(
        registry, "unauthorized: incorrect username or password", "check both, and try again"
    )


def _explain(problem: RegistryStatusError, registry: str) -> RegistryError:
    if problem.status == 404:
        return RegistryError(registry, "is no registry (it has no /v2/)", "check the address")
    return problem
