"""Links between the pages lead somewhere; `make docs` checks more, but continuous integration does not run it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [link for link in LINK.findall(text) if "://" not in link]
    assert [link for link in targets if not (page.parent / link).exists()] == []
    if page.is_relative_to(DOCS):  # the site has no other pages
        pages = [link for link in targets if link.endswith(".md")]
        assert [link for link in pages if not (page.parent / link).resolve().is_relative_to(DOCS)] == []
