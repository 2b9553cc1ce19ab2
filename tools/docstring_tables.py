"""Aligned lists in docstrings become tables on the site. An extension of griffe, named in zensical.toml.

name      what it is, and
          a continued line
other     two spaces or more part names from texts
"""

import re
from typing import Any

import griffe

_ROW = re.compile(r"^([\w\"`'./+*{(\[-][^\n]*?)(\s{2,})(\S.*)$")


def with_tables(text: str) -> str:
    """The docstring with each aligned list of two rows or more as a Markdown table."""
    lines, made, index = text.splitlines(), [], 0
    while index < len(lines):
        rows, end = _aligned(lines, index)
        if rows:
            made += ["", "| | |", "|---|---|", *(f"| `{name}` | {about} |" for name, about in rows), ""]
            index = end
        else:
            made.append(lines[index])
            index += 1
    return "\n".join(made)


def _aligned(lines: list[str], start: int) -> tuple[list[tuple[str, str]], int]:
    """Rows of the list that starts at a line, and the line after it; no rows if none starts there."""
    rows: list[tuple[str, str]] = []
    column, index = None, start
    while index < len(lines):
        line = lines[index]
        match = _ROW.match(line)
        if match and (column is None or match.start(3) == column):
            column = match.start(3)
            rows.append((match[1].strip(), match[3].strip()))
        elif column is not None and line[:column].strip() == "" and line.strip():
            name, about = rows[-1]
            rows[-1] = (name, f"{about} {line.strip()}")
        elif column is not None and re.match(r"^[\w_]+$", line.strip()) and index + 1 < len(lines):
            if lines[index + 1][:column].strip() or not lines[index + 1].strip():
                break
            rows.append((line.strip(), ""))
        else:
            break
        index += 1
    escaped = [(name.replace("|", "\\|"), about.strip().replace("|", "\\|")) for name, about in rows]
    return (escaped, index) if column is not None and len(rows) > 1 else ([], start)


class DocstringTables(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_tables(obj.docstring.value)
