"""Sections of a report as Markdown and as one HTML page that needs nothing from elsewhere."""

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .registry import STATUSES

#: What a reader sees where a source gives no number.
MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Table:
    """Text cells under column heads; `numeric` are the columns that are set flush right."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Picture:
    """An SVG, drawn when it is needed: `name` is that of its file without suffix, `alt` says what it shows."""

    name: str
    alt: str
    draw: Callable[[], str]


@dataclass(frozen=True)
class Section:
    """`upright`: printed on pages of their own in portrait, for what is taller than wide."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    table: Table | None = None
    notes: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    upright: bool = False


def to_markdown(sections: Sequence[Section]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", r"\|")

    lines: list[str] = []
    for index, section in enumerate(sections):
        lines += [f"{'#' if index == 0 else '##'} {section.heading}", ""]
        for paragraph in section.paragraphs:
            lines += [paragraph, ""]
        for picture in section.pictures:
            lines += [f"![{picture.alt}]({picture.name}.svg)", ""]
        if section.table is not None:
            table = section.table
            rules = ("--:" if column in table.numeric else "---" for column in table.columns)
            lines += [f"| {' | '.join(table.columns)} |", f"| {' | '.join(rules)} |"]
            lines += [f"| {' | '.join(cell(text) for text in row)} |" for row in table.rows]
            lines.append("")
        if section.notes:
            lines += [f"{number}. {note}" for number, note in enumerate(section.notes, start=1)]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 78rem; margin: 0 auto;
  padding: 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-top: 1px solid #767676; padding-top: .8rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 3px solid #0b57d0; }
table { border-collapse: collapse; font-size: .875rem; }
.wide { min-width: 64rem; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; }
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 3rem); }
th, td { border-bottom: 1px solid #bbb; padding: .35rem .6rem; text-align: left; vertical-align: top; }
.wide th, .wide td { padding: .35rem .45rem; }
thead th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }
tbody th { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; min-width: 3.5rem; }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; }
.unconfirmed { font-weight: 600; font-style: italic; }
a { color: #0b4aa2; overflow-wrap: anywhere; }
@media screen and (max-width: 48rem) {
  img { max-width: none; width: 48rem; }
  tbody th { position: sticky; left: 0; background: #fff; }
}
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  @page upright { size: A4 portrait; }
  .upright { page: upright; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  table { font-size: 8pt; }
  .wide { min-width: 0; width: 100%; }
  .scroll { overflow: visible; }
  h2, caption, thead, tbody tr:first-child, p:has(+ .scroll), p:has(+ figure) { break-after: avoid; }
  tbody tr:last-child { break-before: avoid; }
  tr, figure, p { break-inside: avoid; }
  img { max-height: 165mm; }
  .upright img { max-height: 225mm; }
  thead { display: table-header-group; }
  a { color: inherit; }
}
"""


def to_html(sections: Sequence[Section], drawn: Mapping[str, str] | None = None) -> str:
    """One page without any external resource; links to sources are only followed when a reader clicks them.

    Args:
        drawn: name of a picture -> SVG, where they are drawn already.
    """

    def text(raw: str) -> str:
        # A full stop, comma or closing bracket behind a link belongs to the sentence.
        return re.sub(r"https://doi\.org/[^\s<]*[^\s<.,;:)]", r'<a href="\g<0>">\g<0></a>', html.escape(raw))

    title = text(sections[0].heading)
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head>",
        "<body><main>",
    ]
    for index, section in enumerate(sections):
        level = "h1" if index == 0 else "h2"
        parts.append('<section class="upright">' if section.upright else "<section>")
        parts.append(f"<{level}>{text(section.heading)}</{level}>")
        parts += [f"<p>{text(paragraph)}</p>" for paragraph in section.paragraphs]
        for picture in section.pictures:
            svg = drawn[picture.name] if drawn is not None else picture.draw()
            content = base64.b64encode(svg.encode()).decode()
            alt = html.escape(picture.alt)
            parts.append(
                f'<figure class="scroll" role="region" tabindex="0" aria-label="Picture {picture.name}">'
                f'<img alt="{alt}" src="data:image/svg+xml;base64,{content}"></figure>'
            )
        if section.table is not None:
            parts += _html_table(section.table, f"table-{index}", text)
        if section.notes:
            parts.append("<ol>" + "".join(f"<li>{text(note)}</li>" for note in section.notes) + "</ol>")
        parts.append("</section>")
    parts.append("</main></body></html>")
    return "\n".join(parts) + "\n"


def _html_table(table: Table, name: str, text: Callable[[str], str]) -> list[str]:
    # The first column that names a system heads its row for a screen reader.
    heads_row = next((column for column in table.columns if column in ("Method", "System")), table.columns[0])

    def cell(column: str, raw: str) -> str:
        classes = ["number"] if column in table.numeric else []
        if column == "Status" and raw in STATUSES and raw != "confirmed":
            classes.append("unconfirmed")
        attributes = f' class="{" ".join(classes)}"' if classes else ""
        if column == heads_row:
            return f'<th scope="row"{attributes}>{text(raw)}</th>'
        return f"<td{attributes}>{text(raw)}</td>"

    number = ' class="number"'
    heads = "".join(
        f'<th scope="col"{number if column in table.numeric else ""}>{text(column)}</th>' for column in table.columns
    )
    wide = ' class="wide"' if len(table.columns) > 6 else ""
    # A scrolling region must be reachable by keyboard and have a name.
    return [
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}">',
        f'<table{wide}><caption id="{name}"><span>{text(table.caption)}</span></caption>',
        f"<thead><tr>{heads}</tr></thead><tbody>",
        *(
            f"<tr>{''.join(cell(column, raw) for column, raw in zip(table.columns, row, strict=True))}</tr>"
            for row in table.rows
        ),
        "</tbody></table></div>",
    ]
