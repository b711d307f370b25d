"""The Space: read a child's hand radiograph, or many; the benchmark; the card. Layout and wiring only.

Nothing of a patient is kept. An upload is deleted as soon as it has been read; the radiograph and the answer of an
open page stay in memory until the page is closed; pictures and reports reach the browser inside the page, never as
files. The page makes no request to any other host.
"""

import base64
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gradio as gr
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from benchmarks.measured import RESULTS, load_measured
from benchmarks.registry import load_published, load_reference_table
from benchmarks.report import build_sections, to_html
from boneage_hf import __version__, page
from boneage_hf.batch import read_table, rows_to_csv
from boneage_hf.clinical import age_from_typed_dates, age_from_years_and_months, check_chronological_age
from boneage_hf.errors import InputError
from boneage_hf.memory import share_arenas
from boneage_hf.phantom import draw, is_phantom, png_bytes
from boneage_hf.quality import RefusedError
from boneage_hf.radiograph import Prefill, read, read_prefill
from boneage_hf.report import (
    DISCLAIMER,
    MEDIA_TYPES,
    Hand,
    answer_as_json,
    assessment_as_json,
    clean_label,
    format_age,
    jpeg_data_uri,
    make_report,
    provenance,
    report_as_json,
    report_file,
)
from boneage_hf.service import (
    UNCHECKED,
    Reader,
    Reading,
    contradictions,
    display,
    model_name,
    not_taken,
    timed_read,
)
from boneage_hf.sex import Sex, parse_sex
from boneage_hf.uploads import (
    MAX_UPLOAD_BYTES,
    UPLOAD_ROUTE,
    BodyLimit,
    Case,
    HeldCases,
    Upload,
    WaitingBatch,
    batch_items,
    content_of_data_uri,
    forget_closed_pages,
    guard_fields,
    keep_unread,
    receive_upload,
    upload_field,
    upload_folder,
)

if TYPE_CHECKING:
    from boneage_hf.pipeline_boneage import BoneAgePipeline
    from boneage_hf.report import Report

#: Requests that may wait; further ones are refused at once.
MAX_WAITING = 32

#: Events that read or answer run one after the other: so an answer never lands beside a newer radiograph or sex, and
#: the network has all cores.
_ONE_BY_ONE = "radiograph"

#: A running batch brings its table up to date this often.
_TABLE_SECONDS = 1.0

_NO_RADIOGRAPH = "No radiograph is loaded: drop a file, or take a drawn phantom."
_CASE_GONE = "The radiograph of this page is no longer there: give the file again."
_CASE_CHANGED = "The radiograph changed meanwhile: check sex and age, and ask again."
_PAGE_CLOSED = "The connection was lost, and with it what this page had been given: load the page again."
_NO_FILES = "No files are loaded: drop radiographs or a ZIP archive."
_NO_ANSWER = "There is no answer to report yet: estimate the bone age first."

_SEXES = [("Female", "female"), ("Male", "male")]
_BY_AGE, _BY_DATES = "age", "dates"


@dataclass(frozen=True)
class Example:
    """A drawn phantom of the page."""

    title: str
    age_months: int
    sex: Sex


EXAMPLES = (
    Example("Girl, 4 years", 48, "female"),
    Example("Boy, 9 years", 108, "male"),
    Example("Girl, 14 years", 168, "female"),
)


def build_demo(pipe: "BoneAgePipeline", *, revision: str) -> gr.Blocks:
    """The page and its endpoints, with a warmed model; open it with `launch`.

    * `/predict` takes `file` (an upload), `sex` (`"female"`, `"male"`, or None: that of the DICOM header) and
      `chronological_age_months` (or None: that of the header). It answers with a JSON object: the keys of
      `answer_as_json`, `bone_age` in words, `chronological_age_months`, `assessment`, `hand`, `checks`, `corrections`,
      `remarks`, the keys of `report.provenance`, `seconds` by stage, and `overlay`, a JPEG as a data URI.
    * `/predict_batch` takes `files` (uploads, ZIP archives too), `table` (a CSV upload or None) and `sex` for all; it
      answers with `rows` (the fields of `batch.BatchRow`), `csv` and the keys of `report.provenance`.
    * `/read_bone_age` takes `image`, a file as a data URI, `sex` and `chronological_age_months`; with the extra `mcp`
      it is a tool for language models.

    Args:
        pipe: used by one request at a time.
        revision: of the weights, shown beside every answer.
    """
    reader = Reader(pipe)
    model = model_name(pipe)
    held = HeldCases()
    waiting: dict[str, WaitingBatch] = {}
    drawings = [png_bytes(draw(example.age_months, example.sex, seed=7)) for example in EXAMPLES]

    def report_of(reading: Reading, age: float | None, hand: Hand | None, remarks: list[str]) -> "Report":
        return make_report(
            reading.answer,
            chronological_age_months=age,
            hand=hand,
            remarks=remarks,
            model=model,
            revision=revision,
            day=date.today(),
        )

    # The first call of network and drawings costs seconds that no reader should wait for.
    warm = reader.answer(read(drawings[0]), EXAMPLES[0].sex)
    warm_report = report_of(warm, 50.0, None, [])
    page.answer_html(warm_report, warm.seen, warm.colours, warm.answer["attention"])

    def source() -> dict[str, str]:
        return provenance(model=model, revision=revision, day=date.today())

    # --- one radiograph in the page ---------------------------------------------------------------------------------

    def disputed(prefill: Prefill, sex: Sex | None, age: float | None, hand: Hand | Literal[""]) -> str:
        return page.remark_html(contradictions(prefill, sex=sex, chronological_age_months=age, hand=hand or None))

    def shown(case: Case, *, phantom: bool) -> str:
        return page.preview_html(case.radiograph, display(case.radiograph.image), phantom=phantom)

    def case_shown(session: str, token: str) -> Case:
        """The session's case, if it is the one that the browser showed when it asked.

        Raises:
            InputError: it is another one, or there is none.
        """
        case = held.get(session)
        if held.is_closed(session):
            raise InputError(_PAGE_CLOSED)
        if case is None:
            raise InputError(_CASE_GONE if token else _NO_RADIOGRAPH)
        if case.token != token:
            raise InputError(_CASE_CHANGED)
        return case

    def show(
        content: bytes | None,
        token: str,
        sex: Sex | None,
        mode: str,
        years: float | None,
        months: float | None,
        birth: str,
        study: str,
        hand: Hand | Literal[""],
        request: gr.Request,
    ) -> tuple[Any, ...]:
        """Upload, case that is shown, the child's data -> drop area (emptied), case, preview, what was filled in, sex,
        the child, problem, remarks, answer."""
        session = str(request.session_hash)
        # What was entered for one child must not slip over to the next; what was entered before its radiograph stays.
        # The browser says what it shows; the server knows of a case that the browser has not been told of yet.
        is_next = bool(token) or session in held
        held.forget(session)
        problem, preview, prefill, token = "", "", Prefill(), ""
        try:
            if held.is_closed(session):
                raise InputError(_PAGE_CLOSED)
            if content is None:
                raise InputError(_NO_RADIOGRAPH)
            radiograph = read(content)
            prefill = read_prefill(content)
            case = Case(radiograph, prefill)
            held.hold(session, case)
            preview = shown(case, phantom=radiograph.file_format == "PNG" and is_phantom(content))
            token = case.token
        except InputError as error:
            problem = page.problem_html(str(error))
        chosen: Any
        if is_next:
            chosen, child, told = prefill.sex, _child(prefill), ""
        else:
            # Left as it is, not set to what was sent: it may have been chosen while the file was read.
            chosen = gr.skip() if prefill.sex is None or sex is not None else prefill.sex
            entered = (birth, study) if mode == _BY_DATES else (years, months)
            has_age = any(value not in (None, "") for value in entered)
            child = _child(
                prefill,
                keep_age=has_age or prefill.chronological_age_months is None,
                keep_hand=bool(hand) or prefill.laterality is None,
            )
            told = disputed(prefill, sex, _age_so_far(mode, years, months, birth, study), hand)
        told_of_it = (preview, page.prefill_html(prefill), chosen, *child, problem, told)
        return None, token, *told_of_it, *_no_answer(another=True)

    def show_example(position: int) -> Callable[..., Any]:
        def show_drawing(request: gr.Request) -> tuple[Any, ...]:
            """-> as `show`, without the drop area"""
            case = Case(read(drawings[position]))
            held.hold(str(request.session_hash), case)
            chosen = EXAMPLES[position].sex
            told_of_it = (shown(case, phantom=True), "", chosen, *_child(Prefill()), "", "")
            return case.token, *told_of_it, *_no_answer(another=True)

        return show_drawing

    def changed(
        token: str,
        sex: Sex | None,
        mode: str,
        years: float | None,
        months: float | None,
        birth: str,
        study: str,
        hand: Hand | Literal[""],
        request: gr.Request,
    ) -> tuple[Any, ...]:
        """Case that is shown, the child's data -> problem, contradictions to the header, answer (emptied)."""
        session = str(request.session_hash)
        case = held.get(session)
        if token:
            try:
                case = case_shown(session, token)
            except InputError as error:
                return page.problem_html(str(error)), "", *_no_answer()
        # Without a token it was entered before the first radiograph was shown, and stays for it.
        if case is not None:
            held.update(session, case, replace(case, report=None, overlay=None))
        prefill = Prefill() if case is None else case.prefill
        age = _age_so_far(mode, years, months, birth, study)
        return "", disputed(prefill, sex, age, hand), *_no_answer()

    def answerer(*, check_quality: bool) -> Callable[..., Any]:
        def answer_page(
            token: str,
            sex: Sex | None,
            mode: str,
            years: float | None,
            months: float | None,
            birth: str,
            study: str,
            hand: Hand | Literal[""],
            request: gr.Request,
        ) -> tuple[Any, ...]:
            """Case that is shown, the child's data -> problem, answer."""
            session = str(request.session_hash)
            try:
                case = case_shown(session, token)
                age = _typed_age(mode, years, months, birth, study)
                reading = reader.answer(case.radiograph, sex, check_quality=check_quality)
                remarks = contradictions(case.prefill, sex=sex, chronological_age_months=age, hand=hand or None)
                remarks += [] if check_quality else [UNCHECKED, *reading.corrections]
                report = report_of(reading, age, hand or None, remarks)
            except RefusedError as error:
                return page.problem_html(str(error), error.quality), *_no_answer(may_insist=_may_be_a_hand(error))
            except InputError as error:
                return page.problem_html(str(error)), *_no_answer()
            held.update(session, case, replace(case, report=report, overlay=reading.overlay()))
            answer = page.answer_html(report, reading.seen, reading.colours, reading.answer["attention"])
            return "", answer, gr.update(visible=True), gr.update(visible=True), gr.update(visible=False)

        return answer_page

    def saver(kind: str) -> Callable[..., Any]:
        def save(label: str, request: gr.Request) -> tuple[dict[str, str] | None, str]:
            """-> a file for the browser to save, problem"""
            case = held.get(str(request.session_hash))
            if case is None or case.report is None:
                return None, page.problem_html(_NO_ANSWER)
            try:
                content = report_file(replace(case.report, label=clean_label(label)), kind, overlay=case.overlay)
            except InputError as error:
                return None, page.problem_html(str(error))
            coded = base64.b64encode(content).decode("ascii")
            return {"name": f"bone-age-report.{kind}", "type": MEDIA_TYPES[kind], "content": coded}, ""

        return save

    # --- many radiographs in the page -------------------------------------------------------------------------------

    def keep_waiting(session: str, batch: WaitingBatch) -> str:
        """-> problem: of a page that is closed nothing is kept, even if it was closed just now."""
        waiting[session] = batch
        if not held.is_closed(session):
            return ""
        waiting.pop(session, WaitingBatch()).delete()
        return page.problem_html(_PAGE_CLOSED)

    def take_files(uploads: list[Upload], request: gr.Request) -> tuple[None, str, str]:
        """Upload -> drop area (emptied), what is waiting, problem."""
        session = str(request.session_hash)
        batch = waiting.get(session, WaitingBatch())
        try:
            batch = replace(batch, uploads=(*batch.uploads, *(upload.waiting() for upload in uploads)))
            problem = ""
        except InputError as error:
            problem = page.problem_html(str(error))
        closed = keep_waiting(session, batch)
        return None, "" if closed else _waiting_html(batch), closed or problem

    def take_table(content: bytes | None, request: gr.Request) -> tuple[None, str, str]:
        """Upload -> drop area (emptied), what is waiting, problem."""
        session = str(request.session_hash)
        batch = waiting.get(session, WaitingBatch())
        try:
            batch = replace(batch, table=None if content is None else read_table(content))
            problem = ""
        except InputError as error:
            problem = page.problem_html(str(error))
        closed = keep_waiting(session, batch)
        return None, "" if closed else _waiting_html(batch), closed or problem

    def answer_batch(sex: str, request: gr.Request) -> Iterator[tuple[str, str, str, str]]:
        """Sex for all -> what is waiting (emptied), problem, progress, table; again and again until it is finished."""
        session = str(request.session_hash)
        batch = waiting.pop(session, WaitingBatch())
        try:
            if not batch.uploads:
                closed = keep_waiting(session, batch)
                yield "" if closed else _waiting_html(batch), closed or page.problem_html(_NO_FILES), "", ""
                return
            items = batch_items(batch.uploads)
            rows = []
            total = len(items)
            yield "", "", page.progress_html(0, total, 0), ""
            shown_at = time.monotonic()
            answers = reader.rows(items, table=batch.table, sex=parse_sex(sex) if sex else None)
            for row in keep_unread(answers, batch.uploads):
                rows.append(row)
                if time.monotonic() - shown_at >= _TABLE_SECONDS and len(rows) < total:
                    failed = sum(one.problem is not None for one in rows)
                    table = page.batch_html(rows, source=source(), finished=False)
                    yield "", "", page.progress_html(len(rows), total, failed), table
                    shown_at = time.monotonic()
            failed = sum(one.problem is not None for one in rows)
            table = page.batch_html(rows, source=source(), finished=True)
            yield "", "", page.progress_html(len(rows), len(rows), failed), table
        except InputError as error:
            yield "", page.problem_html(str(error)), "", ""
        finally:
            batch.delete()

    # --- for programs -----------------------------------------------------------------------------------------------

    def answer_content(content: bytes, sex: Sex | None, age: float | None) -> dict[str, Any]:
        if age is not None:
            check_chronological_age(age)
        radiograph, seconds = timed_read(content)
        prefill = read_prefill(content)
        reading = reader.answer(radiograph, sex or prefill.sex)
        remarks = [*contradictions(prefill, sex=sex, chronological_age_months=age), *not_taken(prefill)]
        report = report_of(
            reading, prefill.chronological_age_months if age is None else age, prefill.laterality, remarks
        )
        began = time.perf_counter()
        overlay = jpeg_data_uri(reading.overlay())
        drawing = reading.seconds["drawing"] + time.perf_counter() - began
        told = report_as_json(report)
        stages = {"read": seconds, **reading.seconds, "drawing": drawing}
        return answer_as_json(reading.answer) | {
            "bone_age": format_age(report.bone_age_months),
            "chronological_age_months": told["chronological_age_months"],
            "assessment": assessment_as_json(report),
            **{key: told[key] for key in ("hand", "checks", "corrections", "remarks")},
            **source(),
            "seconds": {stage: round(value, 4) for stage, value in stages.items()},
            "overlay": overlay,
        }

    def predict(
        file: bytes | None, sex: Sex | None = None, chronological_age_months: float | None = None
    ) -> dict[str, Any]:
        """Bone age of an uploaded radiograph (PNG, JPEG, TIFF or DICOM) of a child of the given sex."""
        with _sentences():
            if file is None:
                raise InputError(_NO_RADIOGRAPH)
            return answer_content(file, sex, chronological_age_months)

    def predict_batch(files: list[Upload], table: bytes | None, sex: Sex | None = None) -> dict[str, Any]:
        """Bone age of many uploaded radiographs and ZIP archives: a row for each, with an answer or the reason."""
        with _sentences():
            try:
                if not files:
                    raise InputError(_NO_FILES)
                for position, upload in enumerate(files):
                    files[position] = upload.waiting()
                known = None if table is None else read_table(table)
                rows = list(keep_unread(reader.rows(batch_items(files), table=known, sex=sex), files))
                about = source()
                return {"rows": [vars(row) for row in rows], "csv": rows_to_csv(rows, source=about), **about}
            finally:
                for upload in files:
                    upload.delete()

    def read_bone_age(image: str, sex: str, chronological_age_months: float | None = None) -> dict[str, Any]:
        """Bone age in months from a child's hand radiograph. Research use only, not a medical device.

        Args:
            image: the file (PNG, JPEG, TIFF or DICOM) as a data URI: data:image/png;base64,...
            sex: of the child, "female" or "male"
            chronological_age_months: age of the child at the study in months, if it is known
        """
        with _sentences():
            answer = answer_content(content_of_data_uri(image), parse_sex(sex), chronological_age_months)
            return {key: value for key, value in answer.items() if key != "overlay"}

    def forget(request: gr.Request) -> None:
        session = str(request.session_hash)
        held.close(session)
        waiting.pop(session, WaitingBatch()).delete()

    # --- layout -----------------------------------------------------------------------------------------------------

    with gr.Blocks(title="Bone age", analytics_enabled=False) as demo:
        gr.HTML(page.header_html(), elem_id="head", js_on_load=None)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Read", id="read"), gr.Row(elem_id="columns", equal_height=False):
                with gr.Column(scale=5, min_width=320, elem_id="question"):
                    upload = upload_field(
                        label="Hand radiograph: PNG, JPEG, TIFF or DICOM",
                        elem_id="upload",
                        height=150,
                        interactive=True,
                    )
                    preview = gr.HTML("", elem_id="preview", js_on_load=None)
                    # In the browser, not on the server: it goes with every question, as old as the fields beside it.
                    token = gr.Textbox("", visible=False)
                    prefilled = gr.HTML("", elem_id="prefill", js_on_load=_STATUS)
                    sex = gr.Radio(choices=_SEXES, value=None, label="Sex of the child", elem_id="sex")
                    mode = gr.Radio(
                        choices=[("Years and months", _BY_AGE), ("Two dates", _BY_DATES)],
                        value=_BY_AGE,
                        label="Chronological age (optional)",
                        elem_id="age-mode",
                    )
                    with gr.Row(elem_id="age-parts") as parts:
                        years = gr.Number(label="Years", value=None, elem_id="years", min_width=100)
                        months = gr.Number(label="Months", value=None, elem_id="months", min_width=100)
                    with gr.Row(elem_id="age-dates", visible=False) as dates:
                        birth = gr.Textbox(
                            label="Date of birth",
                            placeholder="year-month-day",
                            elem_id="birth",
                            max_lines=1,
                            min_width=130,
                        )
                        study = gr.Textbox(
                            label="Date of study",
                            placeholder="year-month-day",
                            elem_id="study",
                            max_lines=1,
                            min_width=130,
                        )
                    hand = gr.Radio(
                        choices=[("Left", "left"), ("Right", "right"), ("Not stated", "")],
                        value="",
                        label="Hand shown",
                        elem_id="hand",
                    )
                    remarks = gr.HTML("", elem_id="remarks", js_on_load=_STATUS)
                    problem = gr.HTML("", elem_id="problem", js_on_load=_ALERT)
                    insist = gr.Button(
                        "It is one hand radiograph: read it all the same", visible=False, elem_id="insist"
                    )
                    ask = gr.Button("Estimate bone age", variant="primary", size="lg", elem_id="ask")
                with gr.Column(scale=7, min_width=320, elem_id="reply"):
                    result = gr.HTML(page.EMPTY_ANSWER, elem_id="answer", js_on_load=_STATUS)
                    label = gr.Textbox(
                        label="Name or number on the report (optional; stays empty unless you type it)",
                        elem_id="report-label",
                        max_lines=1,
                        visible=False,
                    )
                    with gr.Row(elem_id="save", visible=False) as save_row:
                        savers = {kind: gr.Button(f"Save {kind.upper()}", size="sm") for kind in MEDIA_TYPES}
                        copy = gr.Button("Copy text", size="sm", elem_id="copy")
                    report_problem = gr.HTML("", elem_id="report-problem", js_on_load=_ALERT)
                    saved = gr.JSON(visible=False)
                with gr.Column(min_width=280, elem_id="examples"):
                    gr.HTML(
                        '<p class="label">No radiograph at hand? Take a drawn phantom: it shows how the page works; '
                        "its answer has no meaning.</p>",
                        js_on_load=None,
                    )
                    with gr.Row(elem_id="drawings"):
                        buttons = [_example_button(*pair) for pair in zip(EXAMPLES, drawings, strict=True)]
            with gr.Tab("Batch", id="batch"):
                batch_upload = upload_field(
                    label="Radiographs, or ZIP archives of them",
                    file_count="multiple",
                    elem_id="batch-upload",
                    height=150,
                    interactive=True,
                )
                with gr.Row():
                    table_upload = upload_field(
                        label="Table (optional CSV: file, sex, chronological_age_months)",
                        elem_id="table-upload",
                        height=150,
                        interactive=True,
                    )
                    batch_sex = gr.Radio(
                        choices=[*_SEXES, ("Not given", "")],
                        value="",
                        label="Sex where neither table nor DICOM header says it",
                        elem_id="batch-sex",
                    )
                ready = gr.HTML("", elem_id="waiting", js_on_load=_STATUS)
                batch_problem = gr.HTML("", elem_id="batch-problem", js_on_load=_ALERT)
                ask_batch = gr.Button("Read all", variant="primary", size="lg", elem_id="ask-batch")
                progress = gr.HTML("", elem_id="progress", js_on_load=_STATUS)
                batch_table = gr.HTML("", elem_id="batch-table", js_on_load=None)
            with gr.Tab("Benchmark", id="benchmark"):
                gr.HTML(_benchmark(), js_on_load=None)
            with gr.Tab("About", id="about"):
                gr.Markdown(page.card_markdown(_card_of(pipe)), elem_id="card")
        footer = gr.HTML(page.footer_html(source=source()), elem_id="footer", js_on_load=None)

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        one_by_one: dict[str, Any] = {"concurrency_id": _ONE_BY_ONE, "concurrency_limit": 1}
        answered = [result, save_row, label, insist]
        child: list[Any] = [mode, years, months, birth, study, hand]
        shown_parts = [token, preview, prefilled, sex, *child, parts, dates, problem, remarks, *answered]
        upload.upload(show, [upload, token, sex, *child], [upload, *shown_parts], **private, **one_by_one)
        for position, button in enumerate(buttons):
            button.click(show_example(position), None, shown_parts, **private, **one_by_one)
        mode.input(
            lambda chosen: (gr.update(visible=chosen == _BY_AGE), gr.update(visible=chosen == _BY_DATES)),
            mode,
            [parts, dates],
            queue=False,
            **private,
        )
        for field in (sex, *child):
            field.input(
                changed,
                [token, sex, *child],
                [problem, remarks, *answered],
                trigger_mode="multiple",  # all are sent, in order: none may come after an answer
                **private,
                **one_by_one,
            )
        for button, check_quality in ((ask, True), (insist, False)):
            button.click(
                answerer(check_quality=check_quality),
                [token, sex, *child],
                [problem, *answered],
                **private | {"show_progress": "minimal"},
                show_progress_on=result,
                **one_by_one,
            ).then(None, None, None, js=page.SHOW_ANSWER, api_visibility="private")
        for button, kind, use in (
            *((button, kind, page.SAVE_FILE) for kind, button in savers.items()),
            (copy, "txt", page.COPY_TEXT),
        ):
            button.click(saver(kind), label, [saved, report_problem], **private, **one_by_one).then(
                None, saved, None, js=use, api_visibility="private"
            )
        batch_upload.upload(take_files, batch_upload, [batch_upload, ready, batch_problem], **private)
        table_upload.upload(take_table, table_upload, [table_upload, ready, batch_problem], **private)
        # In the browser at once: the server says nothing before it is this batch's turn.
        ask_batch.click(None, None, progress, js=f"() => {json.dumps(page.BATCH_WAITS)}", api_visibility="private")
        ask_batch.click(
            answer_batch, batch_sex, [ready, batch_problem, progress, batch_table], concurrency_limit=2, **private
        ).failure(None, None, progress, js='() => ""', api_visibility="private")
        demo.unload(forget)
        # Gradio sends 0 for a number that nobody has typed, unless it was told once that there is none; told by the
        # server, that would come too late on a busy machine and delete what has been typed meanwhile.
        demo.load(None, None, [years, months], js="() => [null, null]", api_visibility="private")
        # The date is that of today, not of the day on which the Space was opened.
        demo.load(lambda: page.footer_html(source=source()), None, footer, queue=False, **private)

        # The endpoints for programs hang on buttons that no page shows.
        api_answer = gr.JSON(visible=False)
        api_sex = gr.Radio(choices=_SEXES, value=None, visible=False, label="Sex of the child")
        api_age = gr.Number(visible=False, value=None, label="Chronological age in months")
        api_file = upload_field(visible=False, label="Radiograph")
        gr.Button(visible=False).click(
            predict, [api_file, api_sex, api_age], api_answer, api_name="predict", **one_by_one
        )
        api_files = upload_field(visible=False, file_count="multiple", label="Radiographs and ZIP archives")
        api_table = upload_field(visible=False, label="Table")
        gr.Button(visible=False).click(
            predict_batch, [api_files, api_table, api_sex], api_answer, api_name="predict_batch", concurrency_limit=1
        )
        gr.api(read_bone_age, api_name="read_bone_age", **one_by_one)
    guard_fields(demo)
    forget_closed_pages(demo, held.is_closed)
    demo.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return demo


# --- parts of the page ----------------------------------------------------------------------------------------------

_STATUS = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite')"
_ALERT = "element.setAttribute('role', 'alert')"


def _no_answer(*, may_insist: bool = False, another: bool = False) -> tuple[Any, ...]:
    """-> answer (emptied), buttons of the report and its label (hidden), button to read it all the same

    Args:
        another: a radiograph of another child: the label of the last report goes too.
    """
    label = gr.update(visible=False, value="") if another else gr.update(visible=False)
    return page.EMPTY_ANSWER, gr.update(visible=False), label, gr.update(visible=may_insist)


def _may_be_a_hand(error: RefusedError) -> bool:
    """Whether only the network's features speak against it: a person may know better, not so of a colour picture."""
    return {check.name for check in error.quality.checks if check.verdict == "refuse"} == {"hand"}


def _child(prefill: Prefill, *, keep_age: bool = False, keep_hand: bool = False) -> tuple[Any, ...]:
    """-> kind of age, years, months, two dates (emptied), hand, the fields of the two kinds (shown, hidden)

    Args:
        keep_age: leave the age as it is, whatever the header says; `keep_hand` likewise.
    """
    age = prefill.chronological_age_months
    hand = gr.skip() if keep_hand else prefill.laterality or ""
    if keep_age:
        return *(gr.skip() for _ in range(5)), hand, gr.skip(), gr.skip()
    years, months = (None, None) if age is None else (int(age // 12), round(age % 12, 2))
    return _BY_AGE, years, months, "", "", hand, gr.update(visible=True), gr.update(visible=False)


def _typed_age(mode: str, years: float | None, months: float | None, birth: str, study: str) -> float | None:
    return age_from_typed_dates(birth, study) if mode == _BY_DATES else age_from_years_and_months(years, months)


def _age_so_far(mode: str, years: float | None, months: float | None, birth: str, study: str) -> float | None:
    try:
        return _typed_age(mode, years, months, birth, study)
    except InputError:
        return None  # it is said when the answer is asked for; half a date is no mistake yet


def _waiting_html(batch: WaitingBatch) -> str:
    return page.waiting_html(len(batch.uploads), None if batch.table is None else len(batch.table))


def _example_button(example: Example, drawing: bytes) -> gr.Button:
    uri = "data:image/png;base64," + base64.b64encode(drawing).decode("ascii")
    with gr.Column(min_width=90):
        gr.HTML(f'<img src="{uri}" alt="">', elem_classes="thumbnail", js_on_load=None)
        return gr.Button(f"{example.title} (drawn)", size="sm")


def _benchmark() -> str:
    """The report as it is committed; where there is none, its tables without what was measured."""
    written = RESULTS / "report" / "report.html"
    if written.is_file():
        return page.benchmark_html(written.read_text(encoding="utf-8"), [])
    return page.benchmark_html(to_html(build_sections(load_reference_table(), load_published(), load_measured())), [])


def _card_of(pipe: "BoneAgePipeline") -> str | None:
    """The README.md of the checkpoint, from its folder or the Hub, there of the weights' own commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    source = str(pipe.model.name_or_path)
    path = Path(source) / "README.md"
    if not Path(source).is_dir():
        try:
            commit = getattr(pipe.model.config, "_commit_hash", None)  # missing where the model was not loaded by id
            path = Path(hf_hub_download(source, "README.md", revision=commit))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            return None
    return path.read_text(encoding="utf-8") if path.is_file() else None


@contextmanager
def _sentences() -> Iterator[None]:
    """What is wrong with a request reaches the one who asked, and no log."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), print_exception=False) from None


# --- serving --------------------------------------------------------------------------------------------------------


#: Routes of Gradio's that nothing here uses. These fetch the URL or hand out the file that a request names, or print
#: the request; and these write to the disk: the state of an open page, and any file sent.
_CLOSED = (
    *("file={name:path}", "file/{name:path}", "proxy={name:path}", "custom_component/{name:path}"),
    *("deep_link", "process_recording", "component_server", "component_server/"),
)


async def _closed(request: Request) -> JSONResponse:
    return JSONResponse({"detail": "Not Found"}, status_code=404)


async def _health(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok", "version": __version__})


def launch(demo: gr.Blocks, **options: Any) -> None:
    """`demo.launch` with everything off that would keep something, show files or ask another host.

    With the extra `mcp` the endpoint `/read_bone_age`, and only that, is a tool at `/gradio_api/mcp/`.
    """
    demo.launch(
        **options,
        theme=page.theme(),
        css=page.CSS,
        js=page.ON_LOAD,
        app_kwargs={
            "middleware": [Middleware(BodyLimit)],
            "routes": [
                Route("/healthz", _health),
                Route(UPLOAD_ROUTE, receive_upload, methods=["POST"]),
                *(Route(f"/gradio_api/{path}", _closed, methods=["GET", "HEAD", "POST"]) for path in _CLOSED),
            ],
        },
        mcp_server=find_spec("mcp") is not None,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        share=False,
        ssr_mode=False,
        pwa=False,
        show_error=False,
        quiet=True,
        max_file_size=MAX_UPLOAD_BYTES,
        state_session_capacity=2 * MAX_WAITING,
    )
    if demo.mcp_server_obj is not None:
        # Tools with files would fetch URLs and write what they are given to disk.
        tools = demo.mcp_server_obj.tool_to_endpoint
        for name in [name for name, endpoint in tools.items() if endpoint != "/read_bone_age"]:
            del tools[name]


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Ended from outside (a container stops), the program cleans up as after Ctrl-C: uploads go too."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(*, model: str = "default", port: int = 7860, open_browser: bool = False) -> int:
    """Open the Space until Ctrl-C.

    On the loopback interface, unless the environment variable GRADIO_SERVER_NAME says otherwise (a Hugging Face Space
    sets it).

    Args:
        model: `"default"`, a checkpoint folder or a Hub id.

    Raises:
        InputError: the model cannot be loaded, or the port is in use.
    """
    from boneage_hf import load_pipeline
    from boneage_hf.hub import checkpoint_revision

    share_arenas()
    print("Loading the model ...", flush=True)
    with upload_folder(), _ending_in_order():
        pipe = load_pipeline(model)
        demo = build_demo(pipe, revision=checkpoint_revision(pipe))
        try:
            launch(demo, server_port=port, inbrowser=open_browser, prevent_thread_lock=True)
        except OSError as error:
            if "empty port" not in str(error):
                raise
            raise InputError(f"Port {port} is in use: close what uses it, or give another one with --port.") from None
        print(f"The Space is open at {demo.local_url} (Ctrl-C ends it). {DISCLAIMER}", flush=True)
        demo.block_thread()
        demo.close(verbose=False)
    return 0


def _own_model() -> str:
    """`"default"`, or in a published Space the Hub id and commit that `boneage push space` wrote beside this file."""
    pinned = Path(__file__).resolve().with_name("space_model.txt")
    return pinned.read_text(encoding="utf-8").strip() if pinned.is_file() else "default"


if __name__ == "__main__":
    try:
        wanted_port = os.environ.get("GRADIO_SERVER_PORT", "7860")
        if not wanted_port.isdecimal():
            raise InputError(f"GRADIO_SERVER_PORT must be a number, not {wanted_port!r}.")
        raise SystemExit(main(model=_own_model(), port=int(wanted_port)))
    except InputError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None
