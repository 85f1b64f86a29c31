"""Write one page of all records, as HTML and as Markdown: pictures, tables, and where each of them comes from.

The HTML page is one file that loads nothing: it contains the pictures as SVG. The Markdown has the same words and
tables, and its pictures lie beside it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from rich.table import Table

from ... import _files
from ..harness import record
from ..harness.record import Record
from ..harness.tables import markdown
from ..planner import plan
from .answers import answers
from .views import VIEWS, View, of

PAGE, NOTES = "index.html", "report.md"
TITLE = "rjepa-triton: what learning while running costs"
# Text of records is escaped in the page; Markdown is for a reader of text.
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Section:
    """The records of one benchmark in one file and of one device, and how they are shown.

    number: the device's number among those of the file, from 1.
    """

    name: str
    view: View
    file: str
    number: int
    records: list[Record]

    @property
    def device(self) -> str:
        return self.records[0].device

    @property
    def stem(self) -> str:
        """The name of its anchor and pictures: benchmark, file if that is called otherwise, number of the device."""
        name = f"{self.name}-{Path(self.file).stem}".replace(f"{self.name}-{self.name}", self.name)
        return name if self.number == 1 else f"{name}-{self.number}"

    @property
    def predicted(self) -> bool:
        """Whether its records are predictions, so that no device was measured."""
        return all(r.payload.get("predicted", False) for r in self.records)

    @property
    def tables(self) -> list[Table]:
        """The tables of the records."""
        return list(self.view.tables(self.records))

    @property
    def commands(self) -> list[str]:
        """The command lines that made the records; for records that don't tell it, the benchmark's command."""
        return list(dict.fromkeys(r.command or self.view.command for r in self.records))

    def source(self) -> list[str]:
        """The device, versions, revisions and days of the records, in words."""
        torches = sorted({f"torch {r.versions.get('torch')}" for r in self.records})
        revisions = sorted({r.git[:10] + r.git[40:] for r in self.records if r.git})
        days = sorted({r.run[:10] for r in self.records if r.run})
        threads = sorted({str(r.params["threads"]) for r in self.records if "threads" in r.params})
        return [
            self.device,
            *([f"{'/'.join(threads)} threads"] if threads else []),
            *torches,
            *([f"revision {', '.join(revisions)}"] if revisions else []),
            *([" to ".join(dict.fromkeys((days[0], days[-1])))] if days else []),
            f"{len(self.records)} records",
        ]


def sections(files: Sequence[Path]) -> list[Section]:
    """The sections of files of records, by benchmark, then by number of records. Raises as `record.load` does."""
    found = []
    for file in files:
        by_device: dict[str, list[Record]] = {}
        for made in record.load(file):
            by_device.setdefault(made.device, []).append(made)
        for number, records in enumerate(by_device.values(), 1):
            found += [
                Section(name, VIEWS[name], file.name, number, mine) for name, mine in of(records).items()
            ]
    order = list(VIEWS)
    # among several files of one benchmark, the one with most records comes first
    return sorted(found, key=lambda section: (order.index(section.name), -len(section.records)))


def write(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write the page, the Markdown and the pictures to the folder `out`; returns the files.

    paths: files of records, or folders of them. Raises ValueError, before anything is written, if they have nothing to
    show or a record can't be read; OSError if `out` can't be written. Each file is written whole or not at all.
    """
    files = [file for path in paths for file in record.files_of(path)]
    found = sections(files)
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))} have no records of {', '.join(VIEWS)}")
    checked = plan.against(r for file in files for r in record.latest(record.load(file)))
    out.mkdir(parents=True, exist_ok=True)
    pictures: list[list[Path]] = []
    for section in found:
        draw, says = section.view.draw, section.view.says_something(section.records)
        with record.named_errors(section.records):
            pictures.append(list(draw(section.records, out / section.stem)) if draw and says else [])
    page, notes = out / PAGE, out / NOTES
    shown = {
        "title": TITLE,
        "devices": ", ".join(dict.fromkeys(section.device for section in found if not section.predicted)),
        "sections": [
            (section, _heading(section, found), drawn) for section, drawn in zip(found, pictures, strict=True)
        ],
        "answers": answers([r for file in files for r in record.latest(record.load(file))]),
        "model": plan.check_table(checked) if checked else None,
    }
    with record.named_errors([r for section in found for r in section.records]):
        pages = [TEMPLATES.get_template(path.name).render(shown) for path in (page, notes)]
    for path, text in zip((page, notes), pages, strict=True):
        _files.write_text(path, text)
    return [page, notes, *(picture for drawn in pictures for picture in drawn)]


def _rows(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*(map(str, column.cells) for column in table.columns), strict=True))


def _base64(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


TEMPLATES.filters.update(rows=_rows, base64=_base64, markdown=markdown)


def _heading(section: Section, found: Sequence[Section]) -> str:
    """The view's title; with file and device if several files or devices have records of the benchmark."""
    others = [other for other in found if other.name == section.name]
    if len(others) == 1:
        return section.view.title
    files, devices = ({getattr(other, what) for other in others} for what in ("file", "device"))
    parts = [Path(section.file).stem] * (len(files) > 1) + [section.device] * (len(devices) > 1)
    return f"{section.view.title}: {', '.join(parts)}"
