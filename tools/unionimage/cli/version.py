"""`unionfuse version`: of this program and of what it runs on."""

from __future__ import annotations

import argparse
import os
import platform

import unionfuse
from unionimage.cli.format import add_json_option

EXAMPLE = """unionfuse version
unionfuse version --format '{{.Version}}'"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--format", metavar="TEMPLATE", help="json, or a template")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    system = os.uname()
    facts = {
        "Version": unionfuse.__version__,
        "Python": platform.python_version(),
        "Os": system.sysname.lower(),
        "Arch": system.machine,
        "KernelVersion": system.release,
    }
    if args.format == "json":
        from unionimage.json_object import json_line

        print(json_line(facts))
    elif args.format:
        from unionimage.cli.format import show_objects

        # Docker's templates ask for the client's or the server's; here both are this program.
        show_objects([facts | {"Client": facts, "Server": facts}], args.format)
    else:
        width = max(map(len, facts)) + 2
        for name, value in facts.items():
            print(f"{name + ':':<{width}}{value}")
    return 0
