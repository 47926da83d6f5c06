"""The pages: generated parts are current, links and anchors lead somewhere, and each page says what it is for."""

import ast
import re
from collections import defaultdict

import pytest

from docs.generate import PARTS, pages, with_parts
from tests.conftest import ROOT

PAGES = [page for page in pages() if "_build" not in page.parts]
ELSEWHERE = ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "CITATION.cff")  # at the root; what is there is linked
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """A page without its code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!\[)`[^`\n]*`(?!\])", "", text)


def anchors(page):
    """As GitHub makes them of headings, and MyST after it."""
    text, found = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_is_generated_is_current(page):
    written = page.read_text()
    assert with_parts(written) == written, "run `python -m docs.generate`"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file.parent == ROOT and file.name in ELSEWHERE:
            continue
        assert file.exists(), f"{name(page)} links to {target}"
        assert file.is_relative_to(ROOT), f"{name(page)} links out of the repository: {target}"
        assert not anchor or anchor in anchors(file), f"{name(page)} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ("README.md", "log.md", "index.md",
                                                                             "architectures.md")], ids=name)
def test_a_page_opens_with_what_its_reader_will_have(page):
    title, empty, first = page.read_text().split("\n")[:3]
    assert title.startswith("# ") and not empty and first.startswith("After this page"), f"{name(page)}: {first}"


def test_readme_is_short_and_has_a_picture():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 180
    [picture] = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", readme)
    assert (ROOT / picture).read_bytes()[:4] == b"\x89PNG" and (ROOT / picture).stat().st_size < 100_000
    assert readme.count("| `python -m benchmarks.") == 6


def test_every_page_is_in_the_contents():
    contents = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES:
        if page.parent != ROOT and page.name != "index.md":
            listed = str(page.relative_to(ROOT / "docs").with_suffix(""))
            assert re.search(rf"^{re.escape(listed)}$", contents, re.M), f"{listed} is in no toctree of docs/index.md"


def test_every_generated_part_has_a_place():
    mark = re.compile(r"<!-- python -m docs\.generate ([\w-]+) -->")
    marked = {part for page in PAGES for part in mark.findall(page.read_text())}
    assert marked == set(PARTS)


def test_the_three_answers_are_two_clicks_away():
    """How to fit 24 GB, what exit code 75 means, how to use the loss in an own loop: in a page the README links to."""
    def within(page, clicks):
        found = {page}
        for target in LINK.findall(prose(page)) if clicks else ():
            file = (page.parent / target.partition("#")[0]).resolve()
            if file.suffix == ".md" and file.exists():
                found |= within(file, clicks - 1)
        return found

    near = {page: page.read_text() for page in within(ROOT / "README.md", 1)}
    for words in (r"memory\.device=rtx4090", r"\| 75 \|", r"objective\(student_logits"):
        assert any(re.search(words, text) for text in near.values()), words


def test_the_diagram_equals_the_imports():
    """Read from the page alone: every arrow is an import, and along arrows is reached whatever imports reach."""
    packages = defaultdict(set)
    for home in ("trainer", "strategies"):
        for file in (ROOT / home).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if parts[1] == "__init__":
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else \
                    [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                whole = [f"{module}.{alias.name}" for module in modules for alias in node.names] \
                    if isinstance(node, ast.ImportFrom) else modules
                packages[".".join(parts[:2])] |= {".".join(one.split(".")[:2]) for one in whole
                                                  if one.startswith(("trainer.", "strategies."))}
    imports = {one: others - {one} for one, others in packages.items()}
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    arrows = defaultdict(set)
    for start, end in re.findall(r"^  (\w+) --> (\w+)$", page, re.M):
        arrows[start.replace("_", ".", 1)].add(end.replace("_", ".", 1))
    shown = {one.replace("_", ".", 1) for one in re.findall(r"^    (\w+)\[", page, re.M)}

    def reach(graph, start, seen=None):
        seen = set() if seen is None else seen
        for other in graph.get(start, set()) - seen:
            seen.add(other)
            reach(graph, other, seen)
        return seen

    assert all(end in imports[start] for start, ends in arrows.items() for end in ends)
    for start in shown:
        assert reach(arrows, start) == reach({one: others & shown for one, others in imports.items()}, start), start
    assert {one for one in imports if (ROOT / one.replace(".", "/")).is_dir()} <= shown
