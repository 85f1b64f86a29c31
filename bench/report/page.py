"""Write one page of all records, as HTML and as Markdown: pictures, tables, and where each of them comes from.

The HTML page is one file that loads nothing: it contains the pictures as SVG. The Markdown has the same words and
tables, and its pictures lie beside it.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ... import _files
from ..harness import record
from ..harness.record import Record
from ..harness.tables import markdown
from ..planner import plan
from .views import VIEWS, View, of

PAGE, NOTES = "index.html", "report.md"
TITLE = "rjepa-triton: what learning while running costs"
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { margin: 0 auto; max-width: 1100px; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 2px solid #0072b2; }
nav a { display: inline-block; margin: 0 .9rem .3rem 0; } a { color: #0072b2; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.wide img { display: block; width: 100%; min-width: 640px; height: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0 1.2rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .2rem .55rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { background: #f3f6f9; } td.text, th.text { text-align: left; }
.from { font-size: .85rem; color: #555; overflow-wrap: anywhere; } code { background: #f3f6f9; padding: 0 .2rem; }
summary { cursor: pointer; color: #0072b2; }
"""


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
    model = plan.check_table(checked) if checked else None
    page, notes = out / PAGE, out / NOTES
    with record.named_errors([r for section in found for r in section.records]):
        pages = _html(found, pictures, model), _markdown(found, pictures, model)
    _files.write_text(page, pages[0])
    _files.write_text(notes, pages[1])
    return [page, notes, *(picture for drawn in pictures for picture in drawn)]


# --- HTML --------------------------------------------------------------------------------------------------


def _html(found: Sequence[Section], pictures: Sequence[Sequence[Path]], model: Table | None) -> str:
    devices = ", ".join(dict.fromkeys(section.device for section in found))
    links = [f'<a href="#{section.stem}">{html.escape(_heading(section, found))}</a>' for section in found]
    body = [_html_section(section, found, drawn) for section, drawn in zip(found, pictures, strict=True)]
    if model is not None:
        links.append('<a href="#model">The model of cost</a>')
        body.append(
            '<section id="model"><h2>The model of cost</h2><p>What <code>rjepa bench plan</code> and the online '
            f"learner predict, against these records.</p>{_html_table(model)}</section>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(TITLE)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{html.escape(TITLE)}</h1><p>Measured on {html.escape(devices)}. Every number is from a record, and every "
        "record from the command that is given with it.</p>\n"
        f"<nav>{''.join(links)}</nav>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _html_section(section: Section, found: Sequence[Section], drawn: Sequence[Path]) -> str:
    heading = _heading(section, found)
    parts = [
        f'<section id="{section.stem}"><h2>{html.escape(heading)}</h2><p>{html.escape(section.view.about)}</p>'
    ]
    for picture in drawn:
        if picture.suffix == ".svg":
            data = base64.b64encode(picture.read_bytes()).decode()
            parts.append(
                f'<div class="wide"><img alt="{html.escape(heading)}" src="data:image/svg+xml;base64,{data}"></div>'
            )
    commands = " ".join(f"<code>{html.escape(command)}</code>" for command in section.commands)
    parts.append(
        f'<p class="from">{commands}, records <code>{html.escape(section.file)}</code>: '
        f"{html.escape(', '.join(section.source()))}</p>"
    )
    tables = "".join(map(_html_table, section.view.tables(section.records)))
    # a picture says more than the numbers, which are folded away beneath it
    parts.append(f"<details><summary>Numbers</summary>{tables}</details>" if drawn else tables)
    return "".join(parts) + "</section>"


def _html_table(table: Table) -> str:
    kinds = [' class="text"' if column.justify == "left" else "" for column in table.columns]
    head = "".join(
        f"<th{kind}>{html.escape(str(column.header))}</th>"
        for kind, column in zip(kinds, table.columns, strict=True)
    )
    rows = zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{html.escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    note = f'<p class="from">{html.escape(str(table.caption))}</p>' if table.caption else ""
    return (
        f'<div class="wide"><table><caption>{html.escape(str(table.title))}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


# --- Markdown ----------------------------------------------------------------------------------------------


def _markdown(found: Sequence[Section], pictures: Sequence[Sequence[Path]], model: Table | None) -> str:
    devices = ", ".join(dict.fromkeys(section.device for section in found))
    parts = [
        f"# {TITLE}",
        f"Measured on {devices}. Written by `rjepa bench report`; the same as one page: [{PAGE}]({PAGE}).",
    ]
    for section, drawn in zip(found, pictures, strict=True):
        parts += [f"## {_heading(section, found)}", section.view.about]
        parts += [f"![{_heading(section, found)}]({p.name})" for p in drawn if p.suffix == ".png"]
        commands = "  \n".join(f"`{command}`" for command in section.commands)
        parts.append(f"{commands}  \nRecords: `{section.file}`: {', '.join(section.source())}")
        for table in section.view.tables(section.records):
            parts.append(markdown(table))
            parts += [str(table.caption)] if table.caption else []
    if model is not None:
        told = "What `rjepa bench plan` and the online learner predict, against these records."
        parts += ["## The model of cost", told, markdown(model)]
    return "\n\n".join(parts) + "\n"


def _heading(section: Section, found: Sequence[Section]) -> str:
    """The view's title; with file and device if several files or devices have records of the benchmark."""
    others = [other for other in found if other.name == section.name]
    if len(others) == 1:
        return section.view.title
    files, devices = ({getattr(other, what) for other in others} for what in ("file", "device"))
    parts = [Path(section.file).stem] * (len(files) > 1) + [section.device] * (len(devices) > 1)
    return f"{section.view.title}: {', '.join(parts)}"
