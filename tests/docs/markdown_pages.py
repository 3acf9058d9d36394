"""The pages of the documentation as data: fenced blocks with their markers, headings, links."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(DOCS.rglob("*.md")),
]

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})\s*([\w+-]*)(.*)$")
_MARKER = re.compile(r"^\s*<!--\s*(no-run|raises|exit|shows):\s*(.*?)\s*-->\s*$")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*$")
_LINK = re.compile(
    r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]*(?:\([^()]*\))?[^()\s]*)\)|<img[^>]*src=\"([^\"]+)\""
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: `info` is what follows the language, `markers` are the comments directly above."""

    page: Path
    line: int
    language: str
    info: str
    text: str
    markers: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def title(self) -> str | None:
        found = re.search(r'title="([^"]+)"', self.info)
        return found[1] if found else None

    def commands(self) -> list[str]:
        """The command lines of a console block: what follows `$ `, with `\\` at a line's end continued."""
        joined = self.text.replace("\\\n", " ")
        return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order. Raises ValueError when a fence is left open."""
    found: list[Block] = []
    markers: dict[str, str] = {}
    lines = page.read_text(encoding="utf-8").splitlines()
    i = 0
    while i < len(lines):
        if fence := _FENCE.match(lines[i]):
            indent, ticks, language, info = fence.groups()
            start = i + 1
            i += 1
            while i < len(lines) and lines[i].strip() != ticks:
                i += 1
            if i == len(lines):
                raise ValueError(f"{page_id(page)}:{start}: a fence is never closed")
            body = [line.removeprefix(indent) for line in lines[start:i]]
            found.append(Block(page, start, language, info, "\n".join(body) + "\n", markers))
            markers = {}
        elif marker := _MARKER.match(lines[i]):
            markers = {**markers, marker[1]: marker[2]}
        else:
            markers = {}  # a marker speaks of the line below it only
        i += 1
    return found


def prose(page: Path) -> list[str]:
    """The lines of a page outside its fenced blocks."""
    out: list[str] = []
    ticks = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = _FENCE.match(line)
        if ticks:
            if line.strip() == ticks:
                ticks = ""
        elif fence:
            ticks = fence[2]
        else:
            out.append(line)
    return out


def slug(heading: str) -> str:
    """The anchor that both mkdocs and GitHub make of a heading, for the headings that these pages use."""
    text = re.sub(r"`|\*|\[([^\]]*)\]\([^)]*\)", lambda m: m[1] or "", heading)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip())


def anchors(page: Path) -> set[str]:
    return {slug(found[1]) for line in prose(page) if (found := _HEADING.match(line))}


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"<!--.*?-->", "", "\n".join(prose(page)), flags=re.DOTALL)
    for line in text.splitlines():
        for found in _LINK.finditer(re.sub(r"`[^`]*`", "", line)):
            yield found[1] or found[2]


def sections(page: Path, level: int) -> dict[str, str]:
    """The text below each heading of one level, headings of lower levels included, by heading text."""
    out: dict[str, str] = {}
    title = None
    mark = "#" * level + " "
    in_fence = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = _FENCE.match(line)
        if fence:
            in_fence = "" if in_fence else fence[2]
        if not in_fence and re.match(rf"#{{1,{level}}} ", line):
            title = line.removeprefix(mark).strip() if line.startswith(mark) else None
        if title is not None:
            out[title] = out.get(title, "") + line + "\n"
    return out
