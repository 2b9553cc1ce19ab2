"""The site: `python tools/site.py` puts its pages together in build/docs and builds them strictly into site/.

Pages are those of docs/, the notebooks as they come out when they run, and a few files of the repository. Needs
`pip install -e ".[docs]"`. Links that leave docs/ lead to the page made of that file, or become plain text.
"""

import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SOURCE, PAGES = ROOT / "docs", ROOT / "build" / "docs"

INCLUDED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
    "src/open_gem/towers/embedded/README.md": "validation/embedded-model.md",
}
"""Files of the repository → the pages that stand for them. README.md has none of its own: docs/index.md does."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def assemble() -> None:
    """Write all pages to build/docs."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(SOURCE, PAGES, ignore=shutil.ignore_patterns("*.ipynb"))
    for file, page in INCLUDED.items():
        if not (SOURCE / page).exists():
            (PAGES / page).write_text((ROOT / file).read_text("utf-8"), "utf-8")
    origins = {PAGES / page: ROOT / file for file, page in INCLUDED.items() if not (SOURCE / page).exists()}
    for notebook in sorted(SOURCE.rglob("*.ipynb")):
        page = PAGES / notebook.relative_to(SOURCE).with_suffix(".md")
        page.write_text(executed(notebook, page.with_suffix("")), "utf-8")
        origins[page] = notebook
    for page in PAGES.rglob("*.md"):
        origin = origins.get(page, SOURCE / page.relative_to(PAGES))
        page.write_text(with_page_links(page.read_text("utf-8"), origin, page), "utf-8")


def with_page_links(text: str, origin: Path, page: Path) -> str:
    """The Markdown with links, written for `origin`, that lead to pages seen from `page`."""

    def link(match: re.Match[str]) -> str:
        image, words, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = (origin.parent / target).resolve()
        if path.suffix == ".ipynb":
            path = path.with_suffix(".md")
        if path.is_relative_to(SOURCE):
            destination = PAGES / path.relative_to(SOURCE)
        elif str(path.relative_to(ROOT)) in INCLUDED:
            destination = PAGES / INCLUDED[str(path.relative_to(ROOT))]
        else:
            return words
        return f"{image}[{words}]({Path(os.path.relpath(destination, page.parent)).as_posix()}{anchor})"

    return _LINK.sub(link, text)


def executed(path: Path, images: Path) -> str:
    """A notebook as Markdown, with what its cells print and show; images are written to a folder."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    parts = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        parts += [_output(output, images, number) for output in cell.outputs]
    return "\n\n".join(part for part in parts if part) + "\n"


def _output(output: nbformat.NotebookNode, images: Path, number: int) -> str:
    if output.output_type == "stream":
        return f"```text\n{output.text.rstrip()}\n```" if output.name == "stdout" else ""
    data = output.get("data", {})
    if "image/png" in data:
        images.mkdir(exist_ok=True)
        (images / f"{number}.png").write_bytes(base64.b64decode(data["image/png"]))
        return f"![What the cell shows](../{images.parent.name}/{images.name}/{number}.png)"
    return f"```text\n{data['text/plain']}\n```" if "text/plain" in data else ""


if __name__ == "__main__":
    assemble()
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(ROOT / "zensical.toml")]
    sys.exit(subprocess.run(build, cwd=ROOT).returncode)
