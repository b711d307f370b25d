"""What the Space shows: HTML fragments, style and the few lines of JavaScript. Every text from outside is escaped."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from .batch import BatchRow, rows_to_csv
from .growth_plot import growth_plot_svg
from .radiograph import Prefill, Radiograph
from .report import (
    DISCLAIMER,
    INTERVAL_PERCENT,
    NOT_CHECKED,
    CheckLine,
    Report,
    check_lines,
    context_rows,
    format_age,
    format_months,
    interval_in_words,
    jpeg_data_uri,
    source_in_words,
    statement,
    verdict_in_words,
)
from .service import OPACITY, not_taken

EMPTY_ANSWER = (
    '<p class="eyebrow">Bone age</p>'
    '<p class="waiting">The answer appears here: bone age with its 90 % interval, the comparison with the '
    "chronological age if one is given, and the attention map over the radiograph.</p>"
)

_MARKS = {"pass": ("ok", "Passed"), "warn": ("warn", "Warning"), "refuse": ("bad", "Refused")}


def header_html() -> str:
    return (
        '<header class="head"><h1>Bone age from a hand radiograph</h1>'
        f'<p class="badge">{escape(DISCLAIMER)}</p></header>'
    )


def footer_html(*, source: Mapping[str, str]) -> str:
    """
    Args:
        source: see `report.provenance`.
    """
    return (
        f"<p>{escape(source_in_words(source))}</p>"
        "<p>Files are deleted as soon as they have been read; pictures and answers stay in memory until the page is "
        "closed.</p>"
    )


def problem_html(sentence: str, quality: Any = None) -> str:
    """Why there is no answer; of a refused image also its checks, of which one says the sentence itself."""
    if quality is None:
        return f"<p>{escape(sentence)}</p>"
    checks = check_lines(quality)
    told = "" if any(check.sentence == sentence for check in checks) else f" {escape(sentence)}"
    return f"<p><strong>Not read.</strong>{told}</p>{_checks_html(checks)}"


def remark_html(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def preview_html(radiograph: Radiograph, picture: Image.Image, *, phantom: bool) -> str:
    image = radiograph.image
    what = "Drawn phantom, not a radiograph" if phantom else "Radiograph"
    caption = f"{what}: {radiograph.file_format}, {radiograph.bits_stored} bit, {image.width} x {image.height} px"
    return (
        f'<figure class="picture"><img src="{jpeg_data_uri(picture)}" alt="{escape(what)} as it was read">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def prefill_html(prefill: Prefill) -> str:
    """What was taken from a DICOM header and what was no use there, in words; empty if it says nothing."""
    age = prefill.chronological_age_months
    told = [f"sex {prefill.sex}"] if prefill.sex else []
    told += [] if age is None else [f"chronological age {format_age(age)}"]
    told += [f"{prefill.laterality} hand"] if prefill.laterality else []
    taken = (
        f"<p>From the DICOM header, filled in where nothing was chosen: {escape(', '.join(told))}. "
        "Check it, and change what is wrong.</p>"
    )
    left = "".join(f"<p>{escape(sentence)} Enter it yourself.</p>" for sentence in not_taken(prefill))
    return (taken if told else "") + left


def answer_html(report: Report, seen: Image.Image, colours: Image.Image, attention: Any) -> str:
    """The answer: bone age, interval, verdict, growth plot, map over the radiograph, checks, and where it is from."""
    age = report.chronological_age_months
    given = {
        "Sex": "not given" if report.sex is None else report.sex.capitalize(),
        "Chronological age": "not given" if age is None else f"{format_age(age)} ({format_months(age)})",
        "Hand shown": (report.hand or "not stated").capitalize(),
    }
    verdict = report.assessment.verdict if report.assessment else None
    # That of the rotation says what its correction says.
    warnings = [
        check.sentence for check in report.checks or () if check.verdict == "warn" and check.name != "Rotation"
    ]
    told = remark_html([*report.remarks, *report.corrections, *warnings])
    remarks = f'<div class="remarks">{told}</div>' if told else ""
    corrections = "".join(
        f'<li><span class="mark warn">Corrected</span> {escape(one)}</li>' for one in report.corrections
    )
    plot = ""
    if report.assessment is not None:
        drawn = growth_plot_svg(report.assessment)
        plot = f'<figure class="plot" role="region" tabindex="0" aria-label="Growth plot">{drawn}</figure>'
    return (
        '<p class="eyebrow">Bone age</p>'
        f'<p class="age">{escape(format_age(report.bone_age_months))}</p>'
        f'<p class="months">{escape(format_months(report.bone_age_months))}</p>'
        f'<p class="interval"><span>{INTERVAL_PERCENT} % interval</span> {escape(interval_in_words(report))}</p>'
        f'<div class="verdict {verdict or "open"}"><p class="said">{escape(verdict_in_words(report))}</p>'
        f"<p>{escape(statement(report))}</p></div>"
        f"{remarks}{_list_html(given)}"
        f"{plot}{_map_html(seen, colours, attention)}"
        f"<h2>Image checks</h2>{_checks_html(report.checks, corrections)}"
        f"<h2>Where this comes from</h2>{_list_html(dict(context_rows(report)))}"
        f'<p class="notice">{escape(DISCLAIMER)}</p>'
    )


def _map_html(seen: Image.Image, colours: Image.Image, attention: Any) -> str:
    percent = round(100 * OPACITY)
    return (
        '<figure class="picture map"><div class="stack">'
        f'<img src="{jpeg_data_uri(seen)}" alt="Radiograph as the model saw it">'
        f'<img class="colours" src="{jpeg_data_uri(colours, quality=80)}" style="opacity:{OPACITY}" '
        'alt="Attention map: bright where the model gives most weight"></div>'
        f'<label class="slider">Attention map <input type="range" class="opacity" min="0" max="100" step="5" '
        f'value="{percent}" aria-label="Opacity of the attention map in percent"> '
        f"<output>{percent} %</output></label>"
        '<figcaption><span class="scale" aria-hidden="true"></span>'
        "Attention: dark little weight, bright most. These are weights, not reasons, and need not lie on bones. "
        "Colours span this image's own range, "
        f"{attention.min():.2g} to {attention.max():.2g}.</figcaption></figure>"
    )


def _checks_html(checks: Sequence[CheckLine] | None, corrections: str = "") -> str:
    """What was put right and what failed or warns in sight, what passed behind a line that opens."""
    if checks is None:
        return f"<p>{NOT_CHECKED}</p>"
    lines = {
        verdict: "".join(
            f'<li><span class="mark {kind}">{word}</span> {escape(check.name)}: {escape(check.sentence)}</li>'
            for check in checks
            if check.verdict == verdict
        )
        for verdict, (kind, word) in _MARKS.items()
    }
    in_sight = corrections + lines["refuse"] + lines["warn"]
    passed = sum(check.verdict == "pass" for check in checks)
    hidden = ""
    if passed:
        summary = f"{passed} {'check' if passed == 1 else 'checks'} passed"
        hidden = f'<details><summary>{summary}</summary><ul class="checks">{lines["pass"]}</ul></details>'
    return (f'<ul class="checks">{in_sight}</ul>' if in_sight else "") + hidden


def _list_html(rows: dict[str, str]) -> str:
    pairs = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in rows.items())
    return f"<dl>{pairs}</dl>"


# --- the batch ------------------------------------------------------------------------------------------------------

_BATCH_COLUMNS = (
    *("File", "Bone age", "90 % interval (months)", "Sex", "Chronological age"),
    *("SDS (range)", "Assessment", "To check"),
)


def waiting_html(files: int, table_rows: int | None) -> str:
    """What a batch has been given so far."""
    if not files and table_rows is None:
        return ""
    told = [f"{files} {'file' if files == 1 else 'files'} ready"] if files else ["no files yet"]
    if table_rows is not None:
        told.append(f"a table of {table_rows} {'row' if table_rows == 1 else 'rows'}")
    return f"<p>{escape('; '.join(told))}.</p>"


#: Stands in the place of the progress until it is a batch's turn.
BATCH_WAITS = "<p>Waiting for other batches ...</p>"


def progress_html(done: int, total: int, failed: int) -> str:
    ended = "" if done < total else " Finished."
    return (
        f'<progress max="{total}" value="{done}" aria-label="Files read"></progress>'
        f"<p>{done} of {total} read, {done - failed} answered, {failed} without an answer.{ended}</p>"
    )


def batch_html(rows: Sequence[BatchRow], *, source: Mapping[str, str], finished: bool) -> str:
    """The table of a batch and, once it is finished, the link that saves it as CSV (held by the page itself).

    Args:
        source: see `report.provenance`.
    """
    heads = "".join(f'<th scope="col">{name}</th>' for name in _BATCH_COLUMNS)
    body = "".join(_row_html(row) for row in rows)
    table = (
        '<div class="scroll" role="region" tabindex="0" aria-label="Answers by file">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    if not finished:
        return table
    content = base64.b64encode(rows_to_csv(rows, source=source).encode("utf-8")).decode("ascii")
    return (
        f'<p><a class="save" download="bone-age.csv" href="data:text/csv;charset=utf-8;base64,{content}">'
        f"Save as CSV</a></p>{table}"
        f"<p>{escape(source_in_words(source))}</p>"
    )


def _row_html(row: BatchRow) -> str:
    name = f'<th scope="row">{escape(row.file)}</th>'
    if row.bone_age_months is None:
        reasons = (row.quality_reasons or "").removeprefix(row.problem or "")
        told = " ".join(filter(None, (row.problem, row.warnings, reasons.strip())))
        return (
            f'<tr class="failed">{name}<td colspan="{len(_BATCH_COLUMNS) - 1}">'
            f'<span class="mark bad">No answer</span> {escape(told)}</td></tr>'
        )
    to_check = " ".join(filter(None, (row.warnings, row.corrections, row.quality_reasons)))
    low, high = row.interval_low_months, row.interval_high_months
    age = row.chronological_age_months
    sources = {"table": "table", "dicom": "DICOM", "common": "given for all"}
    sex = "" if row.sex is None else f"{row.sex} ({sources.get(row.sex_source or '', '')})"
    verdict = "" if row.sds is None else (row.verdict or "not decided").capitalize()
    cells = (
        f"{format_age(row.bone_age_months)} ({row.bone_age_months:z.1f})",
        "" if low is None or high is None else f"{low:z.1f} to {high:z.1f}",
        sex,
        "" if age is None else format_age(age),
        "" if row.sds is None else f"{row.sds:+z.2f}{_sds_range(row)}",
        verdict,
        to_check,
    )
    return f"<tr>{name}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _sds_range(row: BatchRow) -> str:
    return "" if row.sds_low is None or row.sds_high is None else f" ({row.sds_low:+z.2f} to {row.sds_high:+z.2f})"


# --- the benchmark and the card -------------------------------------------------------------------------------------


def benchmark_html(report_page: str, pictures: Sequence[Path]) -> str:
    """The inside of the benchmark's own HTML report, and its pictures, for a tab."""
    inside = report_page.split("<main>", 1)[1].split("</main>", 1)[0]
    inside = inside.replace("<h2", "<h3").replace("</h2>", "</h3>").replace("<h1", "<h2").replace("</h1>", "</h2>")
    kinds = {".svg": "image/svg+xml", ".png": "image/png"}
    figures = ""
    for path in pictures:
        content = base64.b64encode(path.read_bytes()).decode("ascii")
        if content in inside:  # the report shows it already
            continue
        name = path.stem.replace("_", " ").replace("-", " ")
        figures += (
            f'<figure><img src="data:{kinds[path.suffix]};base64,{content}" alt="{escape(name)}">'
            f"<figcaption>{escape(name.capitalize())}</figcaption></figure>"
        )
    return f'<div class="benchmark">{inside}{figures}</div>'


def card_markdown(card: str | None) -> str:
    """A model card without the metadata in front, for a tab."""
    if card is None:
        return "This checkpoint has no card."
    parts = card.split("\n---\n", 1)
    return (parts[1] if card.startswith("---\n") and len(parts) == 2 else card).strip()


# --- looks ----------------------------------------------------------------------------------------------------------


def theme() -> gr.themes.Base:
    """Fonts of the reader's own system: others would have to be fetched."""
    return gr.themes.Default(
        primary_hue=gr.themes.colors.sky,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_sm,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_400",
        border_color_primary="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
    )


# Gradio's fieldsets have no legend: a screen reader would say "Female" without saying of what. Its text fields have no
# type for dates: the browser's own date picker writes year-month-day, which is also what may be typed without it.
# Slider and pictures lie in HTML that is replaced with each answer, so the page listens for all of them.
ON_LOAD = """() => {
  const dress = () => {
    for (const [id, name] of [["sex", "Sex of the child"], ["hand", "Hand shown"], ["age-mode", "Chronological age"],
                              ["batch-sex", "Sex where neither table nor DICOM header says it"]]) {
      const group = document.querySelector(`fieldset#${id}`);
      if (group) group.setAttribute("aria-label", name);
    }
    for (const field of document.querySelectorAll("#birth input, #study input, #birth textarea, #study textarea")) {
      if (field.tagName === "INPUT" && field.type !== "date") field.type = "date";
    }
  };
  dress();
  new MutationObserver(dress).observe(document.body, { childList: true, subtree: true });
  document.addEventListener("input", (event) => {
    if (!event.target.matches || !event.target.matches("input.opacity")) return;
    const figure = event.target.closest("figure");
    figure.querySelector(".colours").style.opacity = event.target.value / 100;
    figure.querySelector("output").textContent = `${event.target.value} %`;
  });
}"""

# The answer may lie out of sight: below the button on a phone, above it on a low screen.
SHOW_ANSWER = """() => {
  const reply = document.querySelector("#reply");
  const age = reply.querySelector(".age");
  if (!age) return;
  const place = age.getBoundingClientRect();
  const under = document.querySelector("#head").getBoundingClientRect().bottom;
  if (place.top < under || place.bottom > window.innerHeight) reply.scrollIntoView({ block: "start" });
}"""

# The file lies in the page's own memory; nothing of it is ever a file of the server.
SAVE_FILE = """(file) => {
  if (!file || !file.content) return;
  const bytes = Uint8Array.from(atob(file.content), (letter) => letter.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes], { type: file.type }));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""

# A page of another machine that came without https has no clipboard.
COPY_TEXT = """(file) => {
  if (!file || !file.content) return;
  const text = new TextDecoder().decode(Uint8Array.from(atob(file.content), (letter) => letter.charCodeAt(0)));
  const button = document.querySelector("#copy");
  const tell = (words) => {
    button.textContent = words;
    setTimeout(() => { button.textContent = "Copy text"; }, 4000);
  };
  if (!navigator.clipboard) return tell("No clipboard: use Save TXT");
  navigator.clipboard.writeText(text).then(() => tell("Copied"), () => tell("Not copied: use Save TXT"));
}"""

# Rules for the dark page stand one by one: in a list of selectors Gradio scopes only the first `.dark` rightly. The
# ends of the gradient and the four colours between are those of matplotlib's inferno at fifths.
CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; overflow: clip !important; }
.gradio-container .html-container { padding: 0; }
#head { position: sticky; top: 0; z-index: 60; overflow: visible; background: var(--body-background-fill);
  border-bottom: 1px solid var(--border-color-primary); border-radius: 0; }
.head { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: 0 24px;
  padding: 10px 0; }
.head h1 { font-size: 1.25rem; font-weight: 600; margin: 0; color: var(--body-text-color); }
.badge, .notice { font-weight: 600; color: #9a3412 !important; margin: 0; }
.dark .badge { color: #fdba74 !important; }
.dark .notice { color: #fdba74 !important; }
.tabitem { padding: 16px 0 0 !important; border: 0 !important; }
#columns { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); grid-template-rows: auto 1fr;
  gap: 20px 28px; align-items: start; }
#question { grid-area: 1 / 1; }
#reply { grid-area: 1 / 2 / 3 / 3; scroll-margin-top: 96px; padding: 20px 24px; min-height: 240px;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-md); }
#examples { grid-area: 2 / 1; }
#preview:not(:has(img)), #problem:not(:has(p)), #prefill:not(:has(p)), #remarks:not(:has(p)),
#batch-problem:not(:has(p)), #waiting:not(:has(p)), #progress:not(:has(p)), #batch-table:not(:has(table)),
#report-problem:not(:has(p)) { display: none; }
#answer p { margin: 0; }
#answer h2 { font-size: 1rem; font-weight: 600; margin: 20px 0 4px; }
#answer .eyebrow { font-size: .875rem; color: var(--body-text-color-subdued); }
#answer .age { font-size: 2.25rem; line-height: 1.2; font-weight: 600; }
#answer .months { font-size: 1.1rem; color: var(--body-text-color-subdued); }
#answer .interval { margin-top: 8px; }
#answer .interval span { color: var(--body-text-color-subdued); margin-right: 6px; }
#answer .waiting { color: var(--body-text-color-subdued); padding-top: 8px; }
#answer .verdict { margin: 16px 0 0; padding: 10px 14px; border-left: 4px solid #64748b;
  background: var(--background-fill-secondary); }
#answer .verdict .said { font-size: 1.15rem; font-weight: 600; }
#answer .verdict.normal { border-color: #15803d; }
#answer .verdict.delayed, #answer .verdict.advanced { border-color: #b45309; }
#answer dl { margin: 14px 0 16px; }
#answer dl div { display: flex; gap: 12px; padding: 5px 0; border-top: 1px solid var(--border-color-primary); }
#answer dt { flex: 0 0 9.5rem; color: var(--body-text-color-subdued); }
#answer dd { margin: 0; overflow-wrap: anywhere; }
#answer .notice { margin-top: 12px; }
#answer .plot { margin: 14px 0 20px; overflow-x: auto; }
#answer .plot:focus-visible { outline: 2px solid #0284c7; }
#answer .plot svg { display: block; width: 100%; min-width: 440px; height: auto; background: #fff;
  border-radius: var(--radius-sm); }
.picture { margin: 0; }
.picture img { display: block; margin: 0 auto; max-width: 100%; border-radius: var(--radius-sm); background: #000; }
#preview .picture img { max-height: 240px; }
.picture figcaption { font-size: .875rem; color: var(--body-text-color-subdued); margin-top: 6px; }
#preview figcaption { text-align: center; }
.stack { position: relative; width: fit-content; max-width: 100%; margin: 0 auto; }
.stack img { max-height: 520px; }
.stack .colours { position: absolute; inset: 0; width: 100%; height: 100%; background: none; }
.slider { display: flex; align-items: center; gap: 12px; margin: 10px 0; }
.slider input { flex: 1; min-width: 80px; accent-color: #0369a1; }
.slider input:focus-visible { outline: 2px solid #0284c7; outline-offset: 4px; }
.slider output { min-width: 3.5rem; text-align: right; font-variant-numeric: tabular-nums; }
#answer .scale { display: block; height: 8px; margin: 0 0 8px; border-radius: 2px;
  background: linear-gradient(90deg, #000004, #420a68, #932667, #dd513a, #fca50a, #fcffa4); }
.checks { margin: 4px 0 0; padding: 0; list-style: none; }
.checks li { padding: 4px 0; }
#reply summary, #problem summary { cursor: pointer; padding: 4px 0; }
.mark { display: inline-block; min-width: 5.2rem; font-weight: 600; }
.mark.ok { color: #15803d; } .mark.warn { color: #b45309; } .mark.bad { color: #b91c1c; }
.dark .mark.ok { color: #4ade80; } .dark .mark.warn { color: #fbbf24; } .dark .mark.bad { color: #f87171; }
#problem, #batch-problem, #report-problem { padding: 10px 12px; border-left: 4px solid #c2410c; background: #fff7ed;
  color: #7c2d12; }
#problem p, #batch-problem p, #report-problem p { margin: 0; color: inherit; }
#problem .checks { color: inherit; }
#prefill, #remarks, .remarks { padding: 10px 12px; border-left: 4px solid #0369a1; background: #f0f9ff;
  color: #0c4a6e; }
#remarks, .remarks { border-color: #b45309; background: #fffbeb; color: #78350f; }
.remarks { margin-top: 12px; }
#prefill p, #remarks p, .remarks p { margin: 0; color: inherit; }
.dark #problem { background: #431407; color: #fed7aa; }
.dark #batch-problem { background: #431407; color: #fed7aa; }
.dark #report-problem { background: #431407; color: #fed7aa; }
.dark #prefill { background: #082f49; color: #bae6fd; }
.dark #remarks { background: #451a03; color: #fde68a; }
.dark .remarks { background: #451a03; color: #fde68a; }
.dark #problem .mark { color: inherit; }
.label { font-size: .875rem; color: var(--body-text-color-subdued); margin: 0; }
#drawings { gap: 10px; flex-wrap: nowrap; }
#drawings .column { gap: 6px; }
.thumbnail img { display: block; width: 100%; border-radius: var(--radius-sm); }
#drawings button { white-space: normal; font-weight: 400; line-height: 1.3; }
#age-parts, #age-dates { gap: 10px; }
#birth input, #study input { width: 100%; padding: var(--input-padding); color: var(--body-text-color);
  background: var(--input-background-fill); border: var(--input-border-width) solid var(--input-border-color);
  border-radius: var(--input-radius); }
.dark #birth input { color-scheme: dark; }
.dark #study input { color-scheme: dark; }
#footer { border-top: 1px solid var(--border-color-primary); border-radius: 0; }
#footer p { margin: 8px 0 0; font-size: .875rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
#save { gap: 10px; flex-wrap: wrap; }
#save button { flex: 1 1 6rem; min-width: 6rem; }
progress { width: 100%; height: 10px; border: 0; border-radius: 5px; overflow: hidden; appearance: none; }
progress::-webkit-progress-bar { background: var(--border-color-primary); }
progress::-webkit-progress-value { background: #0369a1; }
progress::-moz-progress-bar { background: #0369a1; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid #0284c7; }
#batch-table table, .benchmark table { border: 0; border-collapse: collapse; font-size: .875rem; width: 100%; }
#batch-table th, #batch-table td, .benchmark th, .benchmark td { border: 0;
  border-bottom: 1px solid var(--border-color-primary); padding: 6px 10px; text-align: left; vertical-align: top; }
#batch-table thead th, .benchmark thead th { border-bottom: 2px solid var(--body-text-color-subdued);
  vertical-align: bottom; }
#batch-table tr, .benchmark tr, #card tr { border: 0; }
#batch-table tbody th { font-weight: 600; overflow-wrap: anywhere; }
#batch-table .save { display: inline-block; padding: 8px 16px; border-radius: var(--radius-sm); font-weight: 600;
  background: #0369a1; color: #fff; text-decoration: none; }
#batch-table > p, #batch-table p { margin: 8px 0; font-size: .875rem; }
.benchmark h2 { font-size: 1.25rem; font-weight: 600; margin: 0 0 8px; }
.benchmark h3 { font-size: 1.05rem; font-weight: 600; margin: 28px 0 8px; padding-top: 12px;
  border-top: 1px solid var(--border-color-primary); }
.benchmark p, .benchmark li { max-width: 46rem; overflow-wrap: anywhere; margin: 6px 0; }
.benchmark caption { text-align: left; font-weight: 600; padding: 6px 0; }
.benchmark .wide { min-width: 84rem; }
.benchmark .number { text-align: right; font-variant-numeric: tabular-nums; min-width: 3.5rem; }
.benchmark .unconfirmed { font-style: italic; }
.benchmark figure { margin: 20px 0; }
.benchmark figure img { max-width: 100%; background: #fff; }
#card .prose { max-width: 52rem; }
#card table { display: block; overflow-x: auto; border: 0; padding: 0; }
#card td { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: 6px 10px; }
#card th { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: 6px 10px; }
@media (max-width: 767px) {
  #columns { grid-template-columns: minmax(0, 1fr); grid-template-rows: none; gap: 16px; }
  #question, #reply, #examples { grid-area: auto; min-width: 0 !important; }
  .head { padding: 6px 0; }
  .head h1 { font-size: 1.05rem; }
  .badge { font-size: .875rem; }
  #reply { padding: 16px; min-height: 0; }
  #answer .age { font-size: 1.75rem; }
  #answer dl div { display: block; }
  /* Small letters, but the child's point is seen at once: an older child's lay beyond the edge. */
  #answer .plot { margin-left: -16px; margin-right: -16px; }
  #answer .plot svg { min-width: 0; border-radius: 0; }
}
"""
