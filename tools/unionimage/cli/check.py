"""`unionfuse check`: verify the store, and repair it."""

from __future__ import annotations

import argparse
import json

from unionimage.cli.common import open_store

EXAMPLE = """
unionfuse check
unionfuse check --repair
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repair", action="store_true", help="repair what can be repaired")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the exit code")
    parser.add_argument("--json", action="store_true", help="a JSON object a problem")


def run(args: argparse.Namespace) -> int:
    from unionimage.store.check import check

    found = left = 0
    with open_store(args) as store:
        for problem in check(store, repair=args.repair):
            found += 1
            left += not problem.repaired
            if args.json:
                print(
                    json.dumps(
                        {
                            "Problem": problem.what,
                            "Images": problem.images,
                            "Repaired": problem.repaired,
                            "Remedy": problem.remedy,
                        }
                    )
                )
            elif not args.quiet:
                line = problem.what
                if problem.images:
                    line += f" (images: {', '.join(problem.images)})"
                if problem.repaired:
                    line += ": repaired"
                elif problem.remedy:
                    line += f"; {problem.remedy}"
                print(line)
        layers, images = len(store.layers()), len(store.images(all=True))
    if not args.quiet and not args.json:
        if not found:
            print(f"The store is whole: {images} images, {layers} layers.")
        else:
            hint = "" if args.repair or not left else "; --repair repairs what it can"
            print(f"{found} problems, {found - left} repaired{hint}")
    return 1 if left else 0
