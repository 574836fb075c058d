"""unionfuse login: store a password for a registry."""

from __future__ import annotations

import argparse
import sys

EXAMPLE = """\
unionfuse login -u jo localhost:5000
pass show registry | unionfuse login -u jo --password-stdin registry.example.com"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("server", nargs="?", help="the registry (default: docker.io)")
    parser.add_argument("-u", "--username", help="the user's name; asked for if not given")
    parser.add_argument("-p", "--password", help="refused: process lists show it")
    parser.add_argument(
        "--password-stdin", action="store_true", help="read the password from standard input"
    )
    parser.add_argument(
        "--insecure", action="store_true", help="allow plain HTTP and unverified certificates"
    )


def run(args: argparse.Namespace) -> int:
    from unionimage import config
    from unionimage.errors import UserError
    from unionimage.registry.credentials import Credential, CredentialFile, registry_of
    from unionimage.registry.login import check_login
    from unionimage.registry.session import Session

    if args.password is not None:
        raise UserError("--password is refused: process lists show it; use --password-stdin")
    registry = registry_of(args.server)
    username = args.username or _ask_name(args.password_stdin)
    password = _read_password() if args.password_stdin else _ask_password()
    if not password:
        raise UserError("the password is empty")
    credential = Credential(username, password)
    with Session(config.load(), insecure=args.insecure) as session:
        check_login(session, registry, credential)
    path = CredentialFile().put(registry, credential)
    if path is not None:
        print(
            f"WARNING! Your password will be stored unencrypted in {path}.\n"
            "A credential helper (credsStore) would keep it safer.",
            file=sys.stderr,
        )
    print("Login Succeeded")
    return 0


def _ask_name(password_is_piped: bool) -> str:
    from unionimage.errors import UserError

    if password_is_piped:
        raise UserError("--password-stdin needs --username")
    if not sys.stdin.isatty():
        raise UserError("cannot ask for a name: no terminal; use --username and --password-stdin")
    name = input("Username: ").strip()
    if not name:
        raise UserError("a username is needed")
    return name


def _ask_password() -> str:
    import getpass

    from unionimage.errors import UserError

    if not sys.stdin.isatty():
        raise UserError("cannot ask for the password: no terminal; use --password-stdin")
    return getpass.getpass("Password: ")


def _read_password() -> str:
    """The password from standard input, without the newline at its end."""
    return sys.stdin.read(1 << 16).removesuffix("\n").removesuffix("\r")
