"""Listings: docker's tables, `--format` with a subset of its Go templates, and JSON.

The subset: `{{.Field}}`, nested fields, `{{json .X}}`, `{{upper lower title len println join split
index}}`, `{{range .X}}…{{end}}` (also `$k, $v :=`), `{{if}}…{{else}}…{{end}}`, comparisons
(`eq ne lt le gt ge`), `and or not`, `printf "%s %d %v %q"`, pipes. The rest is refused by name.
Sources: Go's text/template; docker's "Format command and log output".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from unionimage.errors import UserError

Row = Mapping[str, Any]


def add_format_options(parser: argparse.ArgumentParser) -> None:
    """Add `--format` and `--json`."""
    parser.add_argument(
        "--format", metavar="TEMPLATE", help="table (the default), json, or a template: '{{.ID}}'"
    )
    add_json_option(parser)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, which is short for `--format json`."""
    parser.add_argument(
        "--json",
        dest="format",
        action="store_const",
        const="json",
        help="the same as --format json",
    )


def add_filter_option(
    parser: argparse.ArgumentParser, known: Sequence[str], short: str = ""
) -> None:
    """Add `--filter`; `filters` reads what it collects.

    Args:
        known: the keys, for the help.
        short: another spelling: `-f`.
    """
    names = [short, "--filter"] if short else ["--filter"]
    parser.add_argument(
        *names,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only what matches: " + ", ".join(known),
    )


def show(rows: Sequence[Row], columns: Mapping[str, str], form: str | None) -> None:
    """Print a listing.

    Args:
        rows: field -> value; docker's field names.
        columns: field -> heading of the table's columns, in order.
        form: `--format`; None: the table.

    Raises:
        UserError: the template is wrong or names a field that no row has.
    """
    if form is None or form == "table":
        print(table([[str(row[field]) for field in columns] for row in rows], [*columns.values()]))
    elif form == "json":
        from unionimage.json_object import json_line

        for row in rows:
            print(json_line(row))
    elif form.startswith("table "):
        _template_table(rows, columns, unescape(form.removeprefix("table ")))
    else:
        from unionimage.cli.template import Template

        template = Template(unescape(form))
        for row in rows:
            print(template.render(row))


def table(rows: Sequence[Sequence[str]], headings: Sequence[str]) -> str:
    """Columns of their widest cell and three spaces, ten at least, as docker's tabwriter does."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(7, *(len(line[n]) for line in lines)) + 3 for n in range(len(headings))]
    return "\n".join(
        "".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def unescape(text: str) -> str:
    """`\\t` and `\\n` as docker takes them on the command line."""
    return text.replace("\\t", "\t").replace("\\n", "\n")


def _template_table(rows: Sequence[Row], columns: Mapping[str, str], form: str) -> None:
    from unionimage.cli.template import Template

    template = Template(form)
    headings = dict(columns)
    for row in rows[:1]:
        headings = {field: field.upper() for field in row} | headings
    lines = [template.render(headings)] + [template.render(row) for row in rows]
    cells = [line.split("\t") for line in lines]
    width = max(map(len, cells))
    padded = [line + [""] * (width - len(line)) for line in cells]
    print(table(padded[1:], padded[0]))


def inspect_each(
    verb: str, names: Iterable[str], find: Callable[[str], dict[str, Any]], template: str | None
) -> int:
    """Show what is found, then complain of the others; the exit code."""
    from unionimage.errors import NotFound

    found, problems = [], []
    for name in names:
        try:
            found.append(find(name))
        except NotFound as error:
            problems.append(error)
    show_objects(found, template)
    for problem in problems:
        print(f"unionfuse {verb}: {problem}", file=sys.stderr)
    return 1 if problems else 0


def show_objects(objects: Sequence[Any], form: str | None) -> None:
    """Print what `inspect` found: an indented JSON list, or one template line an object."""
    if form is None or form == "table":
        import json

        print(json.dumps(objects, indent=4, ensure_ascii=False))
    elif form == "json":
        from unionimage.json_object import json_line

        print(json_line(objects))
    else:
        from unionimage.cli.template import Template

        template = Template(unescape(form))
        for one in objects:
            print(template.render(one))


def filters(given: Sequence[str] | None, known: Sequence[str]) -> dict[str, list[str]]:
    """`--filter KEY=VALUE`, several times. Raises UserError for a key that is not known."""
    table: dict[str, list[str]] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"bad filter {text!r}: it must be KEY=VALUE", exit_code=125)
        if key not in known:
            raise UserError(f"invalid filter {key!r}; there are: {', '.join(known)}")
        table.setdefault(key, []).append(value)
    return table
