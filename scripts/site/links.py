"""Let links that lead out of docs/ work in the site as they do on GitHub; mkdocs calls this.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages. So does any other file that a page links
to, such as ../../conf/method/mezo.yaml, with its text as it is.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
# Files at the top of the repository, and the pages of the site that they are.
TOP = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json", ".toml": "toml"}


def page_of(path: str) -> str | None:
    """Return the place in the site of a file named from the root; None: it has none."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in TOP:
        return TOP[path]
    return f"files/{path}.md" if (ROOT / path).is_file() else None


def source_of(place: str) -> str:
    """Return the file, named from the root, that a page of the site is made from."""
    known = {page: path for path, page in TOP.items()}
    return known.get(place) or f"docs/{place}"


def targets(text: str, source: str) -> Iterator[str]:
    """Yield the files, named from the root, that the links of a page lead to."""
    for link in LINK.findall(text):
        if "://" not in link:
            yield posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that is linked to."""
    for path, place in TOP.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text))
    outside = {
        path
        for page in files.documentation_pages()
        for path in targets(page.content_string, source_of(page.src_uri))
        if not path.startswith("docs/") and path not in TOP and (ROOT / path).is_file()
    }
    for path in sorted(outside):
        text = (ROOT / path).read_text(encoding="utf-8")
        language = LANGUAGES.get(Path(path).suffix, "text")
        content = f"# {path}\n\n````{language}\n{text}````\n"
        place = page_of(path)
        assert place is not None
        hidden = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, place, content=content, inclusion=hidden))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page into links between places of the site."""
    here, source = page.file.src_uri, source_of(page.file.src_uri)
    if here.startswith("files/"):
        return markdown

    def moved(found: re.Match[str]) -> str:
        link = found.group()
        if "://" in link:
            return link
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        place = page_of(path)
        return posixpath.relpath(place, posixpath.dirname(here) or ".") if place else link

    return LINK.sub(moved, markdown)
