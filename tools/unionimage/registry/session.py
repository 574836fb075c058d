"""From a reference to the repositories that may have it: mirrors, insecure hosts, credentials.

One `Session` lives as long as one command; `stop` ends whatever waits or reads in its threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar
from urllib.parse import urlsplit

from unionimage.config import Config
from unionimage.reference import DEFAULT_REGISTRY, Reference
from unionimage.registry.auth import Authorizer
from unionimage.registry.client import Repository
from unionimage.registry.credentials import Credential, CredentialFile
from unionimage.registry.errors import RegistryError
from unionimage.registry.transport import Transport

DOCKER_HUB_HOST = "registry-1.docker.io"
SIDE_BY_SIDE = 4  # layers that move at once

Job = TypeVar("Job")
Result = TypeVar("Result")


class Session:
    """The connections of one command; a context manager.

    Args:
        config: mirrors, insecure registries and trusted token servers.
        insecure: plain HTTP and unverified certificates are fine for every registry named.
        credentials: where passwords are found; docker's file if None.
    """

    def __init__(
        self,
        config: Config,
        *,
        insecure: bool = False,
        credentials: CredentialFile | None = None,
    ) -> None:
        self._config = config
        self._insecure = insecure
        self._credentials = credentials or CredentialFile()
        self._open: dict[str, tuple[Transport, Authorizer]] = {}
        self.stopped = threading.Event()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        for transport, authorizer in self._open.values():
            authorizer.close()
            transport.close()

    def repository(self, reference: Reference) -> Repository:
        """The repository that `reference` names, in its own registry."""
        host = DOCKER_HUB_HOST if reference.registry == DEFAULT_REGISTRY else reference.registry
        return self._repository(host, reference.registry, reference.path)

    def sources(self, reference: Reference) -> list[Repository]:
        """Where to pull from: the configured mirrors in order, then the registry itself."""
        mirrors = self._config.mirrors.get(reference.registry, ())
        return [self._mirror(mirror, reference) for mirror in mirrors] + [
            self.repository(reference)
        ]

    def connect(
        self,
        host: str,
        credential: Credential | None,
        name: str | None = None,
        plain: bool = False,
    ) -> tuple[Transport, Authorizer]:
        """A connection with a given credential (login); it is closed with the session.

        Args:
            host: where to connect to.
            name: what the configuration calls the registry, if not `host`.
            plain: plain HTTP is fine for it.
        """
        name = name or host
        insecure = bool({host, name} & set(self._config.insecure))
        insecure = insecure or plain or self._insecure
        transport = Transport(host, insecure, sleep=self._pause)
        authorizer = Authorizer(transport, credential, self._config.token_realms.get(name, ()))
        self._open[host] = transport, authorizer
        return transport, authorizer

    def stop(self) -> None:
        """End what other threads wait for: pauses, reads and sends fail at once."""
        self.stopped.set()
        for transport, _ in self._open.values():
            transport.abort()

    def side_by_side(
        self, work: Callable[[Job], Result], jobs: Iterable[Job], workers: int = SIDE_BY_SIDE
    ) -> list[Result]:
        """`work` on every job, some at once; the first failure stops all and is raised."""
        left = list(enumerate(jobs))[::-1]
        results: dict[int, Result] = {}
        problems: list[BaseException] = []

        def worker() -> None:
            while left and not problems:
                try:
                    number, job = left.pop()
                except IndexError:  # another has just taken the last one
                    return
                try:
                    results[number] = work(job)
                except BaseException as error:
                    problems.append(error)
                    self.stop()

        threads = [
            threading.Thread(target=worker, name=f"registry {number}")
            for number in range(min(workers, len(left)) - 1)
        ]
        for thread in threads:
            thread.start()
        try:
            worker()  # this thread is one of them
            for thread in threads:
                thread.join()
        except BaseException as error:  # an interrupt while the others went on
            problems.append(error)
            self.stop()
            for thread in threads:
                thread.join()
        if problems:
            raise problems[0]
        return [results[number] for number in sorted(results)]

    def _pause(self, seconds: float) -> None:
        if self.stopped.wait(seconds):
            raise RegistryError("transfer", "was stopped")

    def _repository(self, host: str, name: str, path: str, plain: bool = False) -> Repository:
        if host not in self._open:
            self.connect(host, self._credentials.get(name), name, plain)
        return Repository(*self._open[host], path)

    def _mirror(self, mirror: str, reference: Reference) -> Repository:
        url = urlsplit(mirror if "://" in mirror else f"https://{mirror}")
        if url.scheme not in ("http", "https") or not url.netloc or "@" in url.netloc:
            raise RegistryError(
                mirror, "is no mirror (HOST[:PORT][/PREFIX])", "mend it in the configuration"
            )
        prefix = url.path.strip("/")
        path = f"{prefix}/{reference.path}" if prefix else reference.path
        return self._repository(url.netloc, url.netloc, path, plain=url.scheme == "http")
