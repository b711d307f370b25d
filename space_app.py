"""The Space: drop a hand radiograph, choose sex, see the bone age and the attention map. Layout and wiring only.

Nothing of a patient is kept. An upload is deleted as soon as it has been read; the radiograph of an open page stays in
memory until the page is closed; pictures reach the browser inside the page, never as files. The page makes no request
to any other host.
"""

import base64
import io
import os
import signal
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from boneage_hf.errors import InputError
from boneage_hf.explain import overlay, part_of_map
from boneage_hf.phantom import draw, is_phantom, png_bytes
from boneage_hf.radiograph import MAX_FILE_BYTES, Radiograph, read
from boneage_hf.report import DISCLAIMER, INTERVAL_PERCENT, answer_as_json, format_age, format_months
from boneage_hf.sex import Sex

if TYPE_CHECKING:
    from boneage_hf.pipeline_boneage import BoneAgePipeline

#: Largest side of the pictures in the page, px; they are for looking, the model gets the whole radiograph.
DISPLAY_SIDE = 1000

#: Pixels of radiographs of open pages that are held in memory, 1 byte each; the oldest give way.
MAX_HELD_PIXELS = 400_000_000

#: Requests that may wait; further ones are refused at once.
MAX_WAITING = 32

#: An upload that no request has fetched by then (a broken connection) is deleted.
_ORPHAN_SECONDS = 120.0

#: Events that read or answer run one after the other: so an answer never lands beside a newer radiograph or sex, and
#: the network has all cores.
_ONE_BY_ONE = "radiograph"

_NO_RADIOGRAPH = "No radiograph is loaded: drop a file, or take a drawn phantom."
_NO_SEX = "Choose the child's sex first: girls' and boys' bones mature at different ages."
_UPLOAD_GONE = "The upload is no longer there: give the file again."
_NOT_AN_UPLOAD = "Only an uploaded file is read: give the file itself, not a URL or a path."


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


# --- what is held, and for how long ---------------------------------------------------------------------------------


class HeldRadiographs:
    """The radiograph of each open page by session, in memory only. Safe to use from several threads."""

    def __init__(self, max_pixels: int = MAX_HELD_PIXELS) -> None:
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Radiograph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, session: str, radiograph: Radiograph) -> None:
        """Replace the session's radiograph; with too many pixels, the oldest of other sessions are forgotten."""
        with self._lock:
            self._held.pop(session, None)
            self._held[session] = radiograph
            while len(self._held) > 1 and sum(_pixels(one) for one in self._held.values()) > self._max_pixels:
                self._held.popitem(last=False)

    def get(self, session: str) -> Radiograph | None:
        return self._held.get(session)

    def forget(self, session: str) -> None:
        with self._lock:
            self._held.pop(session, None)


def _pixels(radiograph: Radiograph) -> int:
    return radiograph.image.width * radiograph.image.height


def upload_once(**options: Any) -> gr.File:
    """A `gr.File` that hands on the content and deletes the upload. It reads uploads only: no URL, no server path.

    Not a subclass: Gradio writes a .pyi file beside the source of every subclass of a component.
    """
    file = gr.File(**options)
    folder = Path(file.GRADIO_CACHE).resolve()

    async def stay_in_cache(url_or_file_path: str | Path | None) -> str | None:
        # Gradio's own would download a URL. Uploads lie in its cache already; other paths were refused before.
        if url_or_file_path is not None and "://" in str(url_or_file_path):
            raise gr.Error(_NOT_AN_UPLOAD, print_exception=False)
        return None if url_or_file_path is None else str(url_or_file_path)

    def take(payload: Any) -> bytes | None:
        if payload is None:
            return None
        path = Path(payload.path).resolve()
        if folder not in path.parents or not path.is_file():
            raise gr.Error(_UPLOAD_GONE, print_exception=False)
        try:
            return path.read_bytes()
        except OSError:
            raise gr.Error(_UPLOAD_GONE, print_exception=False) from None
        finally:
            path.unlink(missing_ok=True)
            if path.parent != folder:
                _remove_if_empty(path.parent)

    file.async_move_resource_to_block_cache = stay_in_cache  # type: ignore[method-assign]
    file.preprocess = take  # type: ignore[method-assign]
    return file


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # another upload of the same content is there, or was quicker to clean up
        folder.rmdir()


@contextmanager
def upload_folder() -> Iterator[Path]:
    """A private folder for uploads: what no request fetches within two minutes is deleted, all of it at the end."""
    stop = threading.Event()
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="boneage-uploads-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ["GRADIO_TEMP_DIR"] = name

        def sweep() -> None:
            while not stop.wait(_ORPHAN_SECONDS / 4):
                delete_older(folder, seconds=_ORPHAN_SECONDS)

        threading.Thread(target=sweep, daemon=True).start()
        try:
            yield folder
        finally:
            stop.set()
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Ended from outside (a container stops), the program cleans up as after Ctrl-C: uploads go too."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def delete_older(folder: Path, *, seconds: float) -> None:
    """Delete the files below `folder` that were last written more than `seconds` ago, and folders left empty."""
    limit = time.time() - seconds
    for path in sorted(folder.rglob("*"), reverse=True):
        try:
            if path.is_dir():
                _remove_if_empty(path)
            elif path.stat().st_mtime < limit:
                path.unlink()
        except FileNotFoundError:
            pass  # read and deleted meanwhile


# --- what a person sees ---------------------------------------------------------------------------------------------


def _display(image: Image.Image) -> Image.Image:
    shown = image.copy()
    shown.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return shown


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _model_name(pipe: "BoneAgePipeline") -> str:
    """Hub id, or the name of the checkpoint folder (never its path), with backbone and input size."""
    source = str(pipe.model.name_or_path)
    name = Path(source).name if Path(source).exists() else source
    config = pipe.model.config
    return f"{name} ({config.backbone}, {config.image_size} px)"


def _overlay(pipe: "BoneAgePipeline", radiograph: Radiograph, answer: dict[str, Any]) -> Image.Image:
    processor: Any = pipe.image_processor
    part = part_of_map(radiograph.image.size, size=processor.size, resize_mode=processor.resize_mode)
    return overlay(_display(radiograph.image), answer["attention"], part=part)


def _preview_html(radiograph: Radiograph, *, phantom: bool) -> str:
    image = radiograph.image
    what = "Drawn phantom, not a radiograph" if phantom else "Radiograph"
    caption = f"{what}: {radiograph.file_format}, {radiograph.bits_stored} bit, {image.width} x {image.height} px"
    return (
        f'<figure class="picture"><img src="{_data_uri(_display(image))}" alt="{escape(what)} as it was read">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _answer_html(answer: dict[str, Any], picture: Image.Image, *, model: str, revision: str) -> str:
    months = answer["bone_age_months"]
    if answer["interval_months"] is None:
        interval = "not available for this model"
    else:
        low, high = answer["interval_months"]
        interval = f"{format_age(low)} to {format_age(high)} ({low:.1f} to {format_months(high)})"
    attention = answer["attention"]
    rows = {
        "Sex": str(answer["sex"] or "not given").capitalize(),
        f"{INTERVAL_PERCENT} % interval": interval,
        "Model": model,
        "Revision": revision,
    }
    table = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows.items())
    return (
        '<p class="eyebrow">Bone age</p>'
        f'<p class="age">{escape(format_age(months))}</p>'
        f'<p class="months">{escape(format_months(months))}</p>'
        f"<dl>{table}</dl>"
        f'<figure class="picture"><img src="{_data_uri(picture)}" '
        'alt="Attention map over the radiograph: bright where the model gives most weight">'
        '<figcaption><span class="scale" aria-hidden="true"></span>'
        "Attention: dark little weight, bright most. These are weights, not reasons, and need not lie on bones. "
        "Colours span this image's own range, "
        f"{attention.min():.2g} to {attention.max():.2g}.</figcaption></figure>"
        f'<p class="notice">{escape(DISCLAIMER)}</p>'
    )


_EMPTY_ANSWER = (
    '<p class="eyebrow">Bone age</p>'
    '<p class="waiting">The answer appears here, with the attention map over the radiograph.</p>'
)


def _problem_html(sentence: str) -> str:
    return f"<p>{escape(sentence)}</p>"


def _header_html() -> str:
    return (
        '<header class="head"><h1>Bone age from a hand radiograph</h1>'
        f'<p class="badge">{escape(DISCLAIMER)}</p></header>'
    )


def _about_html(*, model: str, revision: str) -> str:
    return (
        f"<p>Model {escape(model)}, revision {escape(revision)}.</p>"
        "<p>Files are deleted as soon as they have been read; pictures stay in memory until the page is closed.</p>"
    )


# --- the page -------------------------------------------------------------------------------------------------------


def build_demo(pipe: "BoneAgePipeline", *, revision: str) -> gr.Blocks:
    """The page and its endpoint `/predict`, with a warmed model; open it with `launch`.

    `/predict` takes `file` (an upload) and `sex` (`"female"` or `"male"`) and answers with a JSON object: the keys of
    `answer_as_json`, `bone_age` in words, `model`, `revision`, `notice`, and `overlay`, a JPEG as a data URI.

    Args:
        pipe: used by one request at a time.
        revision: of the weights, shown beside every answer.
    """
    model = _model_name(pipe)
    held = HeldRadiographs()
    needs_sex = pipe.model.config.uses_sex
    drawings = [png_bytes(draw(example.age_months, example.sex, seed=7)) for example in EXAMPLES]

    def estimate(radiograph: Radiograph, sex: Sex | None) -> tuple[dict[str, Any], Image.Image]:
        if sex is None and needs_sex:
            raise InputError(_NO_SEX)
        answer = pipe(radiograph, sex=sex)
        return answer, _overlay(pipe, radiograph, answer)

    # The first call of network and drawing costs a second that no reader should wait for.
    estimate(read(drawings[0]), EXAMPLES[0].sex)

    def show(content: bytes | None, sex: Sex | None, request: gr.Request) -> tuple[None, str, Sex | None, str, str]:
        """Upload -> drop area (emptied), preview, sex, problem, answer."""
        session = str(request.session_hash)
        # The sex chosen for one child must not slip over to the next.
        kept_sex = None if held.get(session) else sex
        held.forget(session)
        if content is None:
            return None, "", kept_sex, _problem_html(_NO_RADIOGRAPH), _EMPTY_ANSWER
        try:
            radiograph = read(content)
        except InputError as error:
            return None, "", kept_sex, _problem_html(str(error)), _EMPTY_ANSWER
        held.hold(session, radiograph)
        phantom = radiograph.file_format == "PNG" and is_phantom(content)
        return None, _preview_html(radiograph, phantom=phantom), kept_sex, "", _EMPTY_ANSWER

    def show_example(position: int) -> Callable[[gr.Request], tuple[str, Sex, str, str]]:
        def show_drawing(request: gr.Request) -> tuple[str, Sex, str, str]:
            """-> preview, sex, problem, answer"""
            radiograph = read(drawings[position])
            held.hold(str(request.session_hash), radiograph)
            return _preview_html(radiograph, phantom=True), EXAMPLES[position].sex, "", _EMPTY_ANSWER

        return show_drawing

    def answer_page(sex: Sex | None, request: gr.Request) -> tuple[str, str]:
        """Sex -> problem, answer."""
        radiograph = held.get(str(request.session_hash))
        if radiograph is None:
            return _problem_html(_NO_RADIOGRAPH), _EMPTY_ANSWER
        try:
            answer, picture = estimate(radiograph, sex)
            return "", _answer_html(answer, picture, model=model, revision=revision)
        except InputError as error:
            return _problem_html(str(error)), _EMPTY_ANSWER

    def predict(file: bytes | None, sex: Sex | None) -> dict[str, Any]:
        """Bone age of an uploaded radiograph (PNG, JPEG, TIFF or DICOM) of a child of the given sex."""
        try:
            if file is None:
                raise InputError(_NO_RADIOGRAPH)
            answer, picture = estimate(read(file), sex)
            return answer_as_json(answer) | {
                "bone_age": format_age(answer["bone_age_months"]),
                "model": model,
                "revision": revision,
                "notice": DISCLAIMER,
                "overlay": _data_uri(picture),
            }
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def forget(request: gr.Request) -> None:
        session = str(request.session_hash)
        held.forget(session)
        # Gradio would keep what the page showed for as long as it runs.
        demo.state_holder.session_data.pop(session, None)

    with gr.Blocks(title="Bone age", analytics_enabled=False) as demo:
        gr.HTML(_header_html(), elem_id="head", js_on_load=None)
        with gr.Row(elem_id="columns", equal_height=False):
            with gr.Column(scale=5, min_width=320, elem_id="question"):
                upload = upload_once(
                    label="Hand radiograph: PNG, JPEG, TIFF or DICOM", elem_id="upload", height=170, interactive=True
                )
                preview = gr.HTML("", elem_id="preview", js_on_load=None)
                sex = gr.Radio(
                    choices=[("Female", "female"), ("Male", "male")],
                    value=None,
                    label="Sex of the child",
                    elem_id="sex",
                )
                problem = gr.HTML("", elem_id="problem", js_on_load="element.setAttribute('role', 'alert')")
                ask = gr.Button("Estimate bone age", variant="primary", size="lg", elem_id="ask")
            with gr.Column(scale=6, min_width=320, elem_id="reply"):
                result = gr.HTML(
                    _EMPTY_ANSWER,
                    elem_id="answer",
                    js_on_load="element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite')",
                )
            with gr.Column(min_width=280, elem_id="examples"):
                gr.HTML(
                    '<p class="label">No radiograph at hand? Take a drawn phantom: it shows how the page works; '
                    "its answer has no meaning.</p>",
                    js_on_load=None,
                )
                with gr.Row(elem_id="drawings"):
                    buttons = [_example_button(*pair) for pair in zip(EXAMPLES, drawings, strict=True)]
        gr.HTML(_about_html(model=model, revision=revision), elem_id="about", js_on_load=None)

        page_event: dict[str, Any] = {
            "api_visibility": "private",
            "concurrency_id": _ONE_BY_ONE,
            "concurrency_limit": 1,
        }
        upload.upload(
            show, [upload, sex], [upload, preview, sex, problem, result], show_progress="hidden", **page_event
        )
        for position, button in enumerate(buttons):
            button.click(
                show_example(position),
                None,
                [preview, sex, problem, result],
                show_progress="hidden",
                **page_event,
            )
        sex.input(lambda: ("", _EMPTY_ANSWER), None, [problem, result], show_progress="hidden", **page_event)
        ask.click(
            answer_page,
            sex,
            [problem, result],
            show_progress="minimal",
            show_progress_on=result,
            **page_event,
        ).then(None, None, None, js=_SHOW_ANSWER, api_visibility="private")
        demo.unload(forget)

        # The endpoint for programs hangs on a button that no page shows.
        api_answer = gr.JSON(visible=False)
        gr.Button(visible=False).click(
            predict,
            [upload, sex],
            api_answer,
            api_name="predict",
            concurrency_id=_ONE_BY_ONE,
            concurrency_limit=1,
        )
    demo.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return demo


def _example_button(example: Example, drawing: bytes) -> gr.Button:
    uri = "data:image/png;base64," + base64.b64encode(drawing).decode("ascii")
    with gr.Column(min_width=90):
        gr.HTML(f'<img src="{uri}" alt="">', elem_classes="thumbnail", js_on_load=None)
        return gr.Button(f"{example.title} (drawn)", size="sm")


def launch(demo: gr.Blocks, **options: Any) -> None:
    """`demo.launch` with everything off that would keep something, show files or ask another host."""
    demo.launch(
        **options,
        theme=_theme(),
        css=_CSS,
        js=_NAME_GROUP,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        share=False,
        ssr_mode=False,
        pwa=False,
        show_error=False,
        quiet=True,
        max_file_size=MAX_FILE_BYTES,
        state_session_capacity=200,
    )


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


# --- looks ----------------------------------------------------------------------------------------------------------


def _theme() -> gr.themes.Base:
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


# Gradio's fieldset has no legend: a screen reader would say "Female" without saying of what.
_NAME_GROUP = """() => {
  const name = () => {
    const group = document.querySelector("fieldset#sex");
    if (group) group.setAttribute("aria-label", "Sex of the child"); else setTimeout(name, 100);
  };
  name();
}"""

# On a phone the answer lies below the button, out of sight.
_SHOW_ANSWER = """() => {
  const reply = document.querySelector("#reply");
  if (reply.querySelector(".age") && window.matchMedia("(max-width: 767px)").matches) {
    reply.scrollIntoView({ block: "start" });
  }
}"""

# The two ends of the gradient and the four colours between are those of matplotlib's inferno at fifths.
_CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; overflow: clip !important; }
.gradio-container .html-container { padding: 0; }
#head { position: sticky; top: 0; z-index: 20; overflow: visible; background: var(--body-background-fill);
  border-bottom: 1px solid var(--border-color-primary); border-radius: 0; }
.head { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: 0 24px;
  padding: 10px 0; }
.head h1 { font-size: 1.25rem; font-weight: 600; margin: 0; color: var(--body-text-color); }
.badge, .notice { font-weight: 600; color: #9a3412 !important; margin: 0; }
.dark .badge { color: #fdba74 !important; }
.dark .notice { color: #fdba74 !important; }
#columns { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); grid-template-rows: auto 1fr;
  gap: 20px 28px; align-items: start; }
#question { grid-area: 1 / 1; }
#reply { grid-area: 1 / 2 / 3 / 3; scroll-margin-top: 96px; padding: 20px 24px; min-height: 240px;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-md); }
#examples { grid-area: 2 / 1; }
#preview:not(:has(img)), #problem:not(:has(p)) { display: none; }
#answer p { margin: 0; }
#answer .eyebrow { font-size: .875rem; color: var(--body-text-color-subdued); }
#answer .age { font-size: 2rem; line-height: 1.25; font-weight: 600; }
#answer .months { font-size: 1.1rem; color: var(--body-text-color-subdued); }
#answer .waiting { color: var(--body-text-color-subdued); padding-top: 8px; }
#answer dl { margin: 14px 0 16px; }
#answer dl div { display: flex; gap: 12px; padding: 5px 0; border-top: 1px solid var(--border-color-primary); }
#answer dt { flex: 0 0 6.5rem; color: var(--body-text-color-subdued); }
#answer dd { margin: 0; overflow-wrap: anywhere; }
#answer .notice { margin-top: 12px; }
.picture { margin: 0; }
.picture img { display: block; margin: 0 auto; max-width: 100%; border-radius: var(--radius-sm); background: #000; }
#preview .picture img { max-height: 320px; }
#answer .picture img { max-height: 520px; }
.picture figcaption { font-size: .875rem; color: var(--body-text-color-subdued); margin-top: 6px; }
#preview figcaption { text-align: center; }
#answer .scale { display: block; height: 8px; margin: 0 0 8px; border-radius: 2px;
  background: linear-gradient(90deg, #000004, #420a68, #932667, #dd513a, #fca50a, #fcffa4); }
#problem p { margin: 0; padding: 10px 12px; border-left: 4px solid #c2410c; background: #fff7ed; color: #7c2d12; }
.dark #problem p { background: #431407; color: #fed7aa; }
.label { font-size: .875rem; color: var(--body-text-color-subdued); margin: 0; }
#drawings { gap: 10px; flex-wrap: nowrap; }
#drawings .column { gap: 6px; }
.thumbnail img { display: block; width: 100%; border-radius: var(--radius-sm); }
#drawings button { white-space: normal; font-weight: 400; line-height: 1.3; }
#about { border-top: 1px solid var(--border-color-primary); border-radius: 0; }
#about p { margin: 8px 0 0; font-size: .875rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
@media (max-width: 767px) {
  #columns { display: flex; flex-direction: column; align-items: stretch; gap: 16px; }
  .head { padding: 6px 0; }
  .head h1 { font-size: 1.05rem; }
  .badge { font-size: .875rem; }
  #reply { padding: 16px; min-height: 0; }
  #answer .age { font-size: 1.6rem; }
  #answer dl div { display: block; }
}
"""


if __name__ == "__main__":
    try:
        wanted_port = os.environ.get("GRADIO_SERVER_PORT", "7860")
        if not wanted_port.isdecimal():
            raise InputError(f"GRADIO_SERVER_PORT must be a number, not {wanted_port!r}.")
        raise SystemExit(main(model=_own_model(), port=int(wanted_port)))
    except InputError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None
