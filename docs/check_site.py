"""Check the built site without a network: `python docs/check_site.py docs/_build/html`.

Every link and picture of a page that points into the site must lead to a file, and to an anchor in it where it names one.
Nothing that a browser loads by itself (scripts, styles, pictures, fonts) may come from the network. Links to other sites
are listed in `external.txt` beside the pages: there is no network here to try them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

LOADED = {("img", "src"), ("script", "src"), ("iframe", "src"), ("source", "src"), ("video", "src"), ("embed", "src")}
STYLE_URL = re.compile(r"""(?:url\(|@import)\s*["']?(https?:|//)[^)"';]*""")


@dataclass
class Page(HTMLParser):
    """The anchors of a page, what it links to, and what a browser loads with it."""

    file: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Read the file."""
        super().__init__()
        self.feed(self.file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the anchors and the addresses of a tag."""
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and "href" in values and values.get("rel") not in {"canonical", "author", "license"}:
            self.loaded.append(values["href"])
        self.loaded += [values[name] for kind, name in LOADED if kind == tag and name in values]


def is_external(address: str) -> bool:
    """Return whether an address leaves the site."""
    return bool(urlsplit(address).scheme in {"http", "https", "mailto", "ftp"} or address.startswith("//"))


def lost(page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    """Yield what is wrong with the links of a page."""
    for address in [*page.links, *page.loaded]:
        if is_external(address) or address.startswith(("data:", "javascript:")):
            continue
        path, anchor = urldefrag(address)
        target = (page.file.parent / unquote(path.partition("?")[0])).resolve() if path else page.file
        if not target.is_file():
            yield f"{page.file}: {address} leads to no file"
        elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
            yield f"{page.file}: {address} leads to no anchor"


def network(page: Page) -> Iterator[str]:
    """Yield what a browser would load from the network with a page."""
    for address in page.loaded:
        if is_external(address):
            yield f"{page.file}: a browser would load {address}"


def network_of_styles(site: Path) -> Iterator[str]:
    """Yield what a style sheet of the site would load from the network."""
    for file in site.rglob("*.css"):
        for found in STYLE_URL.finditer(file.read_text(encoding="utf-8", errors="replace")):
            yield f"{file}: {found[0]}"


def check(site: Path) -> tuple[list[str], set[str], int]:
    """Return the mistakes of a site, its external links, and its number of pages."""
    files = [file.resolve() for file in site.rglob("*.html") if "_static" not in file.parts]  # there lie templates
    pages = {file: Page(file) for file in files}
    mistakes = [mistake for page in pages.values() for mistake in (*lost(page, pages), *network(page))]
    external = {address for page in pages.values() for address in page.links if is_external(address)}
    return mistakes + list(network_of_styles(site)), external, len(pages)


def main(site: Path) -> int:
    """Print what was found, and return 1 if something is wrong."""
    mistakes, external, number = check(site)
    (site / "external.txt").write_text("\n".join(sorted(external)) + "\n", encoding="utf-8")
    print("\n".join(mistakes) or f"{number} pages: all links lead somewhere, nothing is loaded from the network.")
    print(f"{len(external)} links to other sites, which nobody tried: {site / 'external.txt'}")
    return 1 if mistakes or not number else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
