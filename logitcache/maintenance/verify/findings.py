"""A finding says what is wrong with a cache, where, and what to do about it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

SHOWN_PER_KIND = 20

KINDS = {
    "another": (
        "not the cache that --against names",
        "nothing else was read: ask its maker for the identity, or fetch the cache that has it",
    ),
    "manifest": ("the manifest", "it was altered: fetch it again, or build the cache again"),
    "newer": ("written in a newer format", "install a logitcache that reads it"),
    "missing": ("missing files", "fetch them, or build the cache again"),
    "foreign": ("files that the manifest does not name", "remove them"),
    "swapped": ("files that have another one's name", "give them the manifest's names, fetch what is then missing"),
    "altered": ("files that are not the manifest's", "fetch them again, or build them again"),
    "damaged": (
        "data that cannot be read",
        "fetch the file again, or build it again: its other rows may still be read",
    ),
    "layout": ("columns that are not the manifest's", "the file belongs to another cache: fetch this cache's"),
    "counts": ("counts that are not the manifest's", "fetch the file and the manifest again"),
    "rows": ("rows that contradict themselves", "build the file again"),
    "targets": ("positions that no teacher can have given", "build the file again"),
    "repeated": ("rows that are there twice", "`logitcache merge` keeps one of each"),
    "teacher": ("rows that the teacher scores otherwise", "the cache is another teacher's, or was made wrongly"),
}
"""Kind of finding → what its list is headed, what to do."""


@dataclass(frozen=True)
class Finding:
    """A fault of a cache.

    kind: a key of `KINDS`.  file: its name in the cache.  row_group, row: counted from 0 in the file.  position: the row of the
    logits, as in `CachedSequence.positions`.
    """

    kind: str
    file: str
    what: str
    row_group: int | None = None
    row: int | None = None
    row_id: str = ""
    position: int | None = None

    @property
    def place(self) -> str:
        """The place in the file."""
        places = [
            "" if self.row_group is None else f"row group {self.row_group}",
            "" if self.row is None else f"row {self.row}",
            self.row_id,
            "" if self.position is None else f"position {self.position}",
        ]
        return ", ".join(place for place in places if place)

    @property
    def advice(self) -> str:
        """The advice what to do."""
        return KINDS[self.kind][1]

    def __str__(self) -> str:
        return f"{', '.join(part for part in (self.file, self.place) if part)}: {self.what}; {self.advice}"


class Report:
    """The result of a verification, with the first `SHOWN_PER_KIND` findings of each kind: a cache may have one per position.

    rescored: the teacher's new scores beside the cache's, as text; empty if no row was scored again.  summary: what was
    checked, as one line.
    """

    def __init__(self) -> None:
        self.rescored = self.summary = ""
        self._counts: dict[str, int] = defaultdict(int)
        self._shown: dict[str, list[Finding]] = defaultdict(list)

    def add(self, finding: Finding) -> None:
        """Adds a finding."""
        self._counts[finding.kind] += 1
        if len(self._shown[finding.kind]) < SHOWN_PER_KIND:
            self._shown[finding.kind].append(finding)

    def __len__(self) -> int:
        return sum(self._counts.values())

    @property
    def findings(self) -> list[Finding]:
        """The findings that are kept."""
        return [finding for findings in self._shown.values() for finding in findings]

    def text(self) -> str:
        """Returns a paragraph per kind: what it is, what to do, then file, place and what is wrong, in columns."""
        paragraphs = []
        for kind, findings in sorted(self._shown.items(), key=lambda item: list(KINDS).index(item[0])):
            heading, advice = KINDS[kind]
            lines = [f"{heading} ({self._counts[kind]:,}): {advice}"]
            lines += _columns([(finding.file, finding.place, finding.what) for finding in findings])
            if (more := self._counts[kind] - len(findings)) > 0:
                lines.append(f"  and {more:,} more")
            paragraphs.append("\n".join(lines))
        return "\n\n".join(paragraphs)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    rows = [tuple(_printable(cell) for cell in row) for row in rows]
    file_width, place_width = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"  {file:{file_width}}  {place:{place_width}}  {what}".rstrip() for file, place, what in rows]


def _printable(text: str) -> str:
    """Replaces control characters: names of files and rows may hold anything once they are altered."""
    return "".join(character if character.isprintable() else "?" for character in text)
