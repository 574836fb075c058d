"""unionfuse logout: forget the password of a registry."""

from __future__ import annotations

import argparse

EXAMPLE = "unionfuse logout localhost:5000"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("server", nargs="?", help="the registry (default: docker.io)")


def run(args: argparse.Namespace) -> int:
    from unionimage.registry.credentials import (
        DOCKER_HUB,
        DOCKER_HUB_KEY,
        CredentialFile,
        registry_of,
    )

    registry = registry_of(args.server)
    shown = DOCKER_HUB_KEY if registry == DOCKER_HUB else registry
    if CredentialFile().remove(registry):
        print(f"Removing login credentials for {shown}")
    else:
        print(f"Not logged in to {shown}")
    return 0
