"""A hook of MkDocs: pages of the repository that are outside docs/ become pages of the site, too.

Links in the Markdown files are those of the repository, so that they work where the files are read there. This hook
turns them into links within the site; a link to a file that is not in the site becomes plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

ROOT = Path(__file__).resolve().parent.parent
EXTRA_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def site_path(path: str) -> str | None:
    """The path within the site of a file of the repository (`docs/data.md`), or None if it is not in the site."""
    inside = path.removeprefix("docs/") if path.startswith("docs/") else None
    return EXTRA_PAGES.get(path, inside)


def on_files(files: Any, config: Any) -> Any:
    """Add the extra pages (an event of MkDocs)."""
    from mkdocs.structure.files import File

    for source, page in EXTRA_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links within the repository into links within the site (an event of MkDocs)."""
    sources = {name: source for source, name in EXTRA_PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(link: re.Match[str]) -> str:
        text, address = link.groups()
        path, hash_sign, anchor = address.partition("#")
        if urlparse(address).scheme or not path:
            return link[0]
        target = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        return f"[{text}]({target}{hash_sign}{anchor})" if target else text

    return _LINK.sub(rewrite, markdown)
