"""The Space: what its endpoint answers, what it refuses, what it leaves on the disk, and how it looks in a browser."""

import base64
import gc
import io
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import httpx
import numpy as np
import pytest
from drawn import PATIENT_NAME, dicom
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import space_app
from boneage_hf import load_pipeline, read
from boneage_hf.errors import InputError
from boneage_hf.hub import checkpoint_revision
from boneage_hf.phantom import draw, png_bytes
from boneage_hf.pipeline_boneage import BoneAgePipeline
from boneage_hf.report import DISCLAIMER, answer_as_json, format_age, format_months

TINY = Path(__file__).parent / "checkpoints" / "tiny"
SCREENSHOTS = Path(__file__).parents[1] / "test-output"
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


@dataclass(frozen=True)
class Space:
    """A Space that is open, and every folder in which it could leave something."""

    url: str
    demo: gr.Blocks
    pipe: BoneAgePipeline
    revision: str
    temporary: Path

    def files_left(self) -> list[str]:
        return [path.name for path in self.temporary.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def pipe() -> BoneAgePipeline:
    return load_pipeline(TINY)


@pytest.fixture(scope="module")
def space(pipe: BoneAgePipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Space]:
    temporary = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        with space_app.upload_folder():
            revision = checkpoint_revision(pipe)
            demo = space_app.build_demo(pipe, revision=revision)
            space_app.launch(demo, prevent_thread_lock=True)
            yield Space(str(demo.local_url), demo, pipe, revision, temporary)
            demo.close(verbose=False)


@pytest.fixture(scope="module")
def client(space: Space, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(space.url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture
def hand_png(tmp_path: Path) -> Path:
    path = tmp_path / "Secretname <b>Zaphod.png"
    path.write_bytes(png_bytes(draw(110, "female", seed=3, size=300)))
    return path


@pytest.fixture
def hand_dicom(tmp_path: Path) -> Path:
    path = tmp_path / "IM000001"
    path.write_bytes(dicom(np.asarray(draw(110, "female", seed=3, size=300)).astype(np.uint16) * 16, bits_stored=12))
    return path


def call(space: Space, file: object, sex: object) -> str:
    """The event stream of `/predict` for arguments that gradio_client would not send."""
    address = f"{space.url}gradio_api/call/predict"
    event = httpx.post(address, json={"data": [file, sex]}).json()["event_id"]
    return httpx.get(f"{address}/{event}", timeout=30).text


def wait_until(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    assert condition()


# --- the endpoint ---------------------------------------------------------------------------------------------------


def test_the_endpoint_answers_what_the_pipeline_answers(space: Space, client: Client, hand_png: Path) -> None:
    result = client.predict(handle_file(hand_png), "male", api_name="/predict")
    answer = space.pipe(str(hand_png), sex="male")
    assert {key: result[key] for key in answer_as_json(answer)} == answer_as_json(answer)
    assert result["bone_age"] == format_age(answer["bone_age_months"])
    assert (result["revision"], result["notice"]) == (space.revision, DISCLAIMER)
    assert result["model"] == space_app._model_name(space.pipe)


def test_the_sex_reaches_the_model(client: Client, hand_png: Path) -> None:
    girl, boy = (client.predict(handle_file(hand_png), sex, api_name="/predict") for sex in ("female", "male"))
    assert girl["bone_age_months"] != boy["bone_age_months"]


def test_the_overlay_has_the_shape_of_the_radiograph(client: Client, tmp_path: Path) -> None:
    wide = draw(110, "female", seed=3, size=300).resize((300, 200))
    wide.save(tmp_path / "wide.png")
    result = client.predict(handle_file(tmp_path / "wide.png"), "female", api_name="/predict")
    kind, _, content = result["overlay"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as overlay:
        assert (overlay.size, overlay.mode) == ((300, 200), "RGB")


def test_a_dicom_file_without_extension_is_read(space: Space, client: Client, hand_dicom: Path) -> None:
    result = client.predict(handle_file(hand_dicom), "female", api_name="/predict")
    answer = space.pipe(str(hand_dicom), sex="female")
    assert result["bone_age_months"] == answer_as_json(answer)["bone_age_months"]


@pytest.mark.parametrize("sex", [None, "", "m", "Female", "other"])
def test_without_one_of_the_two_sexes_there_is_no_answer(
    space: Space, client: Client, hand_png: Path, sex: Any
) -> None:
    with pytest.raises(AppError) as refusal:
        client.predict(handle_file(hand_png), sex, api_name="/predict")
    message = str(refusal.value)
    assert "sex" in message or "not in the list of choices" in message
    assert "Traceback" not in message
    assert "Secretname" not in message


def test_a_file_that_is_no_image_gets_one_sentence(client: Client, tmp_path: Path) -> None:
    (tmp_path / "Secretname.png").write_text("no radiograph")
    with pytest.raises(AppError) as refusal:
        client.predict(handle_file(tmp_path / "Secretname.png"), "female", api_name="/predict")
    assert str(refusal.value) == "This is a text file: give a PNG, JPEG, TIFF or DICOM file."


def test_no_file_gets_one_sentence(client: Client) -> None:
    with pytest.raises(AppError, match="No radiograph is loaded"):
        client.predict(None, "female", api_name="/predict")


@pytest.mark.parametrize("address", ["http", "file"])
def test_a_url_is_refused_and_not_fetched(space: Space, address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        url = f"{address}://127.0.0.1:{listener.getsockname()[1]}/hand.png"
        stream = call(space, {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}, "female")
        with pytest.raises(TimeoutError):
            listener.accept()
    assert "event: error" in stream
    assert "bone_age" not in stream


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
@pytest.mark.parametrize("as_url", [False, True])
def test_a_path_of_the_server_is_refused_and_not_deleted(space: Space, meta: dict, as_url: bool) -> None:
    path = Path(__file__).parent / "golden" / "hand.png"
    where = {"path": str(path), "url": path.as_uri()} if as_url else {"path": str(path)}
    stream = call(space, where | meta, "female")
    assert "event: error" in stream
    assert "bone_age" not in stream
    assert path.is_file()


def test_a_path_out_of_the_upload_folder_is_refused(space: Space, tmp_path: Path, hand_png: Path) -> None:
    crooked = Path(os.environ["GRADIO_TEMP_DIR"]) / ".." / ".." / hand_png.relative_to(hand_png.parents[1])
    stream = call(space, {"path": str(crooked), "meta": {"_type": "gradio.FileData"}}, "female")
    assert "event: error" in stream
    assert hand_png.is_file()


def test_only_the_endpoint_for_programs_is_public(client: Client) -> None:
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/predict"]


# --- nothing is kept ------------------------------------------------------------------------------------------------


def test_nothing_remains_on_the_disk_after_an_answer(space: Space, client: Client, hand_png: Path) -> None:
    client.predict(handle_file(hand_png), "female", api_name="/predict")
    assert space.files_left() == []


def test_nothing_remains_on_the_disk_after_a_refusal(space: Space, client: Client, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no radiograph")
    with pytest.raises(AppError):
        client.predict(handle_file(tmp_path / "text.png"), "female", api_name="/predict")
    assert space.files_left() == []


def test_an_upload_can_be_used_once_only(space: Space, hand_png: Path) -> None:
    content = hand_png.read_bytes()
    upload = httpx.post(f"{space.url}gradio_api/upload", files={"files": ("hand.png", content)}).json()[0]
    file = {"path": upload, "meta": {"_type": "gradio.FileData"}}
    assert "event: complete" in call(space, file, "female")
    assert "event: error" in call(space, file, "female")


def test_an_upload_that_nobody_fetches_is_deleted(tmp_path: Path) -> None:
    old, new = tmp_path / "one" / "old.png", tmp_path / "two" / "new.png"
    for path in (old, new):
        path.parent.mkdir()
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 100, time.time() - 100))
    space_app.delete_older(tmp_path, seconds=60)
    space_app.delete_older(tmp_path, seconds=60)  # folders left empty go with the next round at the latest
    assert not old.parent.exists()
    assert new.is_file()


def test_the_upload_folder_goes_with_the_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/before")
    with space_app.upload_folder() as folder:
        (folder / "left.png").write_bytes(b"x")
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()
    assert os.environ["GRADIO_TEMP_DIR"] == "/before"


def test_held_radiographs_give_way_to_newer_ones() -> None:
    radiograph = read(png_bytes(draw(110, "female", seed=3, size=100)))
    held = space_app.HeldRadiographs(max_pixels=25_000)
    for session in ("a", "b", "c"):
        held.hold(session, radiograph)
    assert [held.get(session) is not None for session in ("a", "b", "c")] == [False, True, True]
    held.forget("b")
    assert held.get("b") is None
    assert len(held) == 1


def test_one_radiograph_above_the_limit_is_held_all_the_same() -> None:
    held = space_app.HeldRadiographs(max_pixels=1)
    held.hold("a", read(png_bytes(draw(110, "female", seed=3, size=100))))
    assert held.get("a") is not None


# --- the page as it is built ----------------------------------------------------------------------------------------


def test_analytics_run_history_and_flagging_are_off(space: Space) -> None:
    config = httpx.get(f"{space.url}config").json()
    assert config["analytics_enabled"] is False
    assert not space.demo.run_history
    assert "flag" not in json.dumps([one.get("api_name") for one in config["dependencies"]])


def test_the_queue_is_bounded(space: Space) -> None:
    assert space.demo._queue.max_size == space_app.MAX_WAITING


def test_no_sex_is_chosen_beforehand(space: Space) -> None:
    config = httpx.get(f"{space.url}config").json()
    (radio,) = [one["props"] for one in config["components"] if one["type"] == "radio"]
    assert radio.get("value") is None
    assert [value for _, value in radio["choices"]] == ["female", "male"]


def test_a_name_from_outside_is_escaped(pipe: BoneAgePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.model, "name_or_path", "evil/<script>alert(1)</script>")
    demo = space_app.build_demo(pipe, revision="<b>main</b>")
    pages = [block.value for block in demo.blocks.values() if isinstance(block, gr.HTML)]
    answer = pipe(draw(110, "female", seed=3), sex="female")
    picture = Image.new("RGB", (8, 8))
    pages.append(space_app._answer_html(answer, picture, model="<script>alert(1)</script>", revision="<b>main</b>"))
    pages.append(space_app._problem_html("<script>alert(1)</script>"))
    text = "".join(str(page) for page in pages)
    assert text.count("&lt;script&gt;alert(1)") == 3
    assert "<script>" not in text
    assert "<b>main" not in text


def test_the_folder_of_a_checkpoint_is_named_without_its_path(pipe: BoneAgePipeline) -> None:
    assert space_app._model_name(pipe) == f"tiny (tiny, {pipe.model.config.image_size} px)"


def test_an_interval_is_shown_in_years_and_months(pipe: BoneAgePipeline) -> None:
    answer = pipe(draw(110, "female", seed=3), sex="female") | {"interval_months": [100.0, 123.4]}
    page = space_app._answer_html(answer, Image.new("RGB", (8, 8)), model="m", revision="r")
    assert "8 years 4 months to 10 years 3 months (100.0 to 123.4 months)" in page
    assert DISCLAIMER in page


def test_the_page_writes_nothing_beside_its_source(space: Space) -> None:
    assert not Path(space_app.__file__).with_suffix(".pyi").exists()


def test_a_port_in_use_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(InputError, match="is in use"):
        space_app.main(model=str(TINY), port=listener.getsockname()[1])


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("there is no chromium on this machine")
    quiet = ["no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"]
    switches = ["headless=new", "no-sandbox", "disable-gpu", "disable-quic", *quiet]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=[f"--{switch}" for switch in switches])
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page of the Space with everything that the browser asked for and complained about."""

    page: Any
    hosts: set[str]
    complaints: list[str]

    def ask(self) -> None:
        self.page.get_by_role("button", name="Estimate bone age").click()

    def upload(self, path: Path) -> None:
        self.page.locator("#upload input[type=file]").set_input_files(path)
        self.page.locator("#preview img").wait_for()

    def answer(self) -> str:
        self.page.locator("#answer .age").wait_for()
        return str(self.page.locator("#answer").inner_text())

    def screenshot(self, name: str) -> None:
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"space-{name}.png", full_page=True)


@pytest.fixture
def visit(space: Space, chromium: Any) -> Iterator[Callable[..., Visit]]:
    visits = []

    def open_page(*, size: dict[str, int] = DESKTOP, scheme: str = "light") -> Visit:
        context = chromium.new_context(viewport=size, color_scheme=scheme)
        context.set_default_timeout(120_000)  # a busy machine is no failure
        page = context.new_page()
        seen = Visit(page, set(), [])
        page.on("request", lambda request: seen.hosts.add(urlsplit(request.url).hostname or "inside the page"))
        page.on("console", lambda entry: seen.complaints.append(entry.text) if entry.type == "error" else None)
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.goto(space.url)
        page.get_by_role("button", name="Estimate bone age").wait_for()
        visits.append((context, seen))
        return seen

    yield open_page
    for context, seen in visits:
        context.close()
        assert seen.hosts <= {urlsplit(space.url).hostname, "inside the page"}
        assert seen.complaints == []


def held_radiographs() -> int:
    return sum(len(one) for one in gc.get_objects() if isinstance(one, space_app.HeldRadiographs))


@pytest.mark.slow
def test_a_png_is_answered_in_the_page(space: Space, visit: Callable[..., Visit], hand_png: Path) -> None:
    seen = visit()
    seen.upload(hand_png)
    assert "Drawn phantom, not a radiograph: PNG, 8 bit, 300 x 300 px" in seen.page.locator("#preview").inner_text()
    seen.page.get_by_label("Female", exact=True).check()
    seen.ask()
    text = seen.answer()
    months = space.pipe(str(hand_png), sex="female")["bone_age_months"]
    for part in (
        format_age(months),
        format_months(months),
        "Female",
        "tiny (tiny, ",
        space.revision,
        DISCLAIMER,
    ):
        assert part in text
    assert seen.page.locator("#answer img").evaluate("image => image.naturalWidth") == 300
    assert "Secretname" not in seen.page.content()
    assert space.files_left() == []
    seen.screenshot("desktop-light")


@pytest.mark.slow
def test_a_dicom_file_is_answered_in_the_page(space: Space, visit: Callable[..., Visit], hand_dicom: Path) -> None:
    seen = visit(scheme="dark")
    seen.upload(hand_dicom)
    assert "Radiograph: DICOM, 12 bit, 300 x 300 px" in seen.page.locator("#preview").inner_text()
    seen.page.get_by_label("Male", exact=True).check()
    seen.ask()
    assert format_months(space.pipe(str(hand_dicom), sex="male")["bone_age_months"]) in seen.answer()
    assert PATIENT_NAME not in seen.page.content()
    assert "IM000001" not in seen.page.content()
    assert space.files_left() == []
    seen.screenshot("desktop-dark")


@pytest.mark.slow
def test_without_sex_the_page_says_so_in_one_sentence(visit: Callable[..., Visit], hand_png: Path) -> None:
    seen = visit()
    seen.upload(hand_png)
    seen.ask()
    seen.page.locator("#problem p").wait_for()
    assert seen.page.get_by_role("alert").inner_text().strip() == space_app._NO_SEX
    assert seen.page.locator("#answer .age").count() == 0


@pytest.mark.slow
def test_a_file_that_is_no_image_gets_one_sentence_in_the_page(visit: Callable[..., Visit], tmp_path: Path) -> None:
    (tmp_path / "Secretname.dcm").write_text("no radiograph")
    seen = visit()
    seen.page.locator("#upload input[type=file]").set_input_files(tmp_path / "Secretname.dcm")
    seen.page.locator("#problem p").wait_for()
    sentence = "This is a text file: give a PNG, JPEG, TIFF or DICOM file."
    assert seen.page.locator("#problem").inner_text().strip() == sentence
    assert seen.page.locator("#preview img").count() == 0
    assert "Secretname" not in seen.page.content()


@pytest.mark.slow
def test_an_answer_goes_when_its_question_changes(visit: Callable[..., Visit], hand_png: Path) -> None:
    seen = visit()
    seen.page.get_by_role("button", name="Boy, 9 years (drawn)").click()
    seen.page.locator("#preview img").wait_for()
    seen.ask()
    seen.answer()
    seen.page.get_by_label("Female", exact=True).check()
    seen.page.locator("#answer .waiting").wait_for()
    seen.ask()
    seen.answer()
    # Another child's radiograph: neither answer nor sex of the last one may stay.
    seen.page.locator("#upload input[type=file]").set_input_files(hand_png)
    seen.page.locator("#answer .waiting").wait_for()
    assert seen.page.locator("input[type=radio]:checked").count() == 0


@pytest.mark.slow
def test_a_phone_shows_one_column_and_always_the_notice(visit: Callable[..., Visit]) -> None:
    seen = visit(size=PHONE)
    seen.page.get_by_role("button", name="Girl, 4 years (drawn)").click()
    seen.page.locator("#preview img").wait_for()
    seen.ask()
    seen.answer()
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    question, reply = (seen.page.locator(name).bounding_box() for name in ("#question", "#reply"))
    assert question["y"] + question["height"] <= reply["y"]
    seen.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    box = seen.page.locator("#head .badge").bounding_box()
    assert 0 <= box["y"] <= PHONE["height"] - box["height"]
    seen.screenshot("phone")


@pytest.mark.slow
def test_the_radiograph_is_forgotten_when_the_page_is_closed(
    space: Space, visit: Callable[..., Visit], hand_png: Path
) -> None:
    wait_until(lambda: held_radiographs() == 0)
    seen = visit()
    seen.upload(hand_png)
    assert held_radiographs() == 1
    seen.page.close()
    wait_until(lambda: held_radiographs() == 0)
