"""Parse a report page as a browser does, and check what must hold for every page."""

from html.parser import HTMLParser

from pipelines.tables.table import Table


class Page(HTMLParser):
    """Collects a page's elements and text; checks that every element is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(html)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_page(html: str, table: Table | None = None) -> Page:
    """Check what holds for every page; return the parsed page."""
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object")
        for name in ("src", "href", "srcset"):
            value = attributes.get(name, "")
            assert value.startswith("data:") or "//" not in value
    assert "url(" not in html and "@import" not in html
    assert all(image["alt"] for image in page.all("img"))
    assert all(chart["aria-label"] for chart in page.all("svg"))
    if table is not None:
        manifest = table.require()
        assert manifest.fingerprint[:12] in page.text
        assert table.dataset_uri in page.text
    return page
