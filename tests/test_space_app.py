"""The Space: what its endpoint answers, what it refuses, what it leaves on the disk, and how it looks in a browser."""

import ast
import asyncio
import base64
import gc
import io
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import httpx
import numpy as np
import pytest
from drawn import PATIENT_NAME, dicom
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, ImageOps

import space_app
from boneage_hf import load_pipeline, page, read, uploads
from boneage_hf.batch import BatchRow, collect, predict_batch, read_table, rows_to_csv
from boneage_hf.clinical import REFERENCE, assess
from boneage_hf.errors import InputError
from boneage_hf.hub import DEFAULT_CHECKPOINT, checkpoint_revision
from boneage_hf.phantom import draw, png_bytes
from boneage_hf.pipeline_boneage import BoneAgePipeline
from boneage_hf.quality import Check, Quality, RefusedError
from boneage_hf.report import (
    DISCLAIMER,
    NOT_CHECKED,
    CheckLine,
    answer_as_json,
    format_age,
    format_months,
    make_report,
    provenance,
)
from boneage_hf.service import NO_SEX, UNCHECKED, Reader, model_name

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
    with opened(pipe, tmp_path_factory.mktemp("temporary")) as space:
        yield space


@contextmanager
def opened(pipe: BoneAgePipeline, temporary: Path) -> Iterator[Space]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        with uploads.upload_folder():
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
    about = {"PatientSex": "F", "PatientBirthDate": "20100315", "StudyDate": "20190620", "ImageLaterality": "L"}
    pixels = np.asarray(draw(110, "female", seed=3, size=300)).astype(np.uint16) * 16
    path.write_bytes(dicom(pixels, bits_stored=12, elements=about))
    return path


def call(space: Space, file: object, sex: object) -> str:
    """The event stream of `/predict` for arguments that gradio_client would not send."""
    address = f"{space.url}gradio_api/call/predict"
    event = httpx.post(address, json={"data": [file, sex, None]}).json()["event_id"]
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
    assert {key: result[key] for key in source_of(space)} == source_of(space)


def source_of(space: Space) -> dict[str, str]:
    return provenance(model=model_name(space.pipe), revision=space.revision, day=date.today())


def test_the_endpoint_assesses_a_chronological_age(client: Client, hand_png: Path) -> None:
    result = client.predict(handle_file(hand_png), "male", 100.0, api_name="/predict")
    expected = assess(
        bone_age_months=result["bone_age_months"],
        interval_months=None,
        sex="male",
        chronological_age_months=100.0,
    )
    assert result["chronological_age_months"] == 100.0
    assert result["assessment"]["sds"] == pytest.approx(expected.sds, abs=0.01)
    assert result["assessment"]["statement"] == expected.statement


def test_the_endpoint_takes_sex_and_age_from_a_dicom_header(space: Space, client: Client, hand_dicom: Path) -> None:
    result = client.predict(handle_file(hand_dicom), api_name="/predict")
    assert (result["sex"], result["hand"]) == ("female", "left")
    assert result["chronological_age_months"] == pytest.approx(111.17, abs=0.01)
    assert result["remarks"] == []
    other = client.predict(handle_file(hand_dicom), "male", api_name="/predict")
    assert other["sex"] == "male"
    assert other["remarks"] == ["The DICOM header says female, but male was chosen: check which is right."]
    assert PATIENT_NAME not in json.dumps([result, other])


def test_the_endpoint_says_what_a_header_says_in_vain(client: Client, tmp_path: Path) -> None:
    about = {"PatientSex": "F", "PatientBirthDate": "19000101", "StudyDate": "20190620"}
    about |= {"Laterality": "L", "ImageLaterality": "R"}
    content = dicom(np.asarray(draw(110, "female", seed=3, size=300)), elements=about)
    (tmp_path / "hand.dcm").write_bytes(content)
    sentence = (
        "Not taken from the DICOM header, because what it says is impossible or unclear: "
        "chronological age, laterality."
    )
    result = client.predict(handle_file(tmp_path / "hand.dcm"), api_name="/predict")
    assert result["remarks"] == [sentence]
    result = client.predict(data_uri(tmp_path / "hand.dcm"), "female", api_name="/read_bone_age")
    assert result["remarks"] == [sentence]


def test_the_endpoint_says_where_its_time_went(client: Client, hand_png: Path) -> None:
    began = time.perf_counter()
    seconds = client.predict(handle_file(hand_png), "male", api_name="/predict")["seconds"]
    assert list(seconds) == ["read", "gate", "network", "drawing"]
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) < time.perf_counter() - began


@pytest.mark.parametrize(("age", "part"), [(-1.0, "negative"), (241.0, "over 20 years")])
def test_an_impossible_age_is_refused(client: Client, hand_png: Path, age: float, part: str) -> None:
    with pytest.raises(AppError, match=part):
        client.predict(handle_file(hand_png), "male", age, api_name="/predict")


def test_the_batch_endpoint_answers_what_the_batch_of_the_package_answers(
    space: Space, client: Client, hand_png: Path, hand_dicom: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no radiograph")
    (tmp_path / "table.csv").write_text("file,sex,chronological_age_months\nhand.png,male,100\ntext.png,male,\n")
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        archive.write(hand_png, "hand.png")
    files = [tmp_path / "many.zip", hand_dicom, tmp_path / "text.png"]
    result = client.predict(
        [handle_file(file) for file in files], handle_file(tmp_path / "table.csv"), api_name="/predict_batch"
    )
    rows = list(predict_batch(space.pipe, collect(files), table=read_table(tmp_path / "table.csv")))
    assert result["csv"] == rows_to_csv(rows, source=source_of(space))
    assert {key: result[key] for key in source_of(space)} == source_of(space)
    assert [row["file"] for row in result["rows"]] == ["hand.png", "IM000001", "text.png"]
    assert [row["problem"] is None for row in result["rows"]] == [True, True, False]
    assert space.files_left() == []


def data_uri(path: Path) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(path.read_bytes()).decode()


def test_a_data_uri_gets_the_answer_of_the_pipeline(space: Space, client: Client, hand_png: Path) -> None:
    result = client.predict(data_uri(hand_png), "male", api_name="/read_bone_age")
    answer = answer_as_json(space.pipe(str(hand_png), sex="male"))
    assert {key: result[key] for key in answer} == answer
    assert "overlay" not in result


def test_a_language_model_gets_the_answer_of_the_pipeline(space: Space, hand_png: Path) -> None:
    pytest.importorskip("mcp", reason="the extra mcp is not installed")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def ask() -> tuple[list[str], dict[str, Any], bool]:
        async with (
            streamablehttp_client(f"{space.url}gradio_api/mcp/") as (reading, writing, _),
            ClientSession(reading, writing) as session,
        ):
            await session.initialize()
            tools = [tool.name for tool in (await session.list_tools()).tools]
            reply: Any = await session.call_tool("read_bone_age", {"image": data_uri(hand_png), "sex": "male"})
            # A tool with files would fetch what a URL names.
            other = await session.call_tool("predict", {"file": "http://127.0.0.1/hand.png", "sex": "male"})
            return tools, ast.literal_eval(reply.content[0].text), bool(other.isError)

    tools, result, refused = asyncio.run(ask())
    assert tools == ["read_bone_age"]
    answer = answer_as_json(space.pipe(str(hand_png), sex="male"))
    assert {key: result[key] for key in answer} == answer
    assert refused
    assert space.files_left() == []


@pytest.mark.parametrize("image", ["http://127.0.0.1/hand.png", "hand.png", "data:image/png,abc", "data:;base64,*"])
def test_what_is_no_data_uri_is_refused(client: Client, image: str) -> None:
    with pytest.raises(AppError, match="must be a data URI"):
        client.predict(image, "male", api_name="/read_bone_age")


def test_a_sex_that_is_none_is_refused_with_a_data_uri(client: Client, hand_png: Path) -> None:
    with pytest.raises(AppError, match="sex"):
        client.predict(data_uri(hand_png), "boy", api_name="/read_bone_age")


def test_health_is_told_without_the_model(space: Space) -> None:
    assert httpx.get(f"{space.url}healthz").json()["status"] == "ok"


def test_concurrent_requests_are_not_mixed(space: Space, tmp_path: Path) -> None:
    expected = {}
    for months in (40, 80, 120, 160):
        path = tmp_path / f"{months}.png"
        path.write_bytes(png_bytes(draw(months, "female", seed=3, size=200)))
        expected[path] = round(space.pipe(str(path), sex="female")["bone_age_months"], 2)
    client = Client(space.url, verbose=False)
    jobs = [(path, client.submit(handle_file(path), "female", api_name="/predict")) for path in [*expected] * 3]
    assert [job.result()["bone_age_months"] for _, job in jobs] == [expected[path] for path, _ in jobs]
    assert space.files_left() == []


def test_nothing_of_a_patient_is_printed(
    space: Space, client: Client, hand_dicom: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "Secretname.dcm"
    bad.write_bytes(hand_dicom.read_bytes()[:3000])
    client.predict(handle_file(hand_dicom), "female", api_name="/predict")
    for file, sex in ((bad, "female"), (hand_dicom, "Secretname")):
        with pytest.raises((AppError, ValueError)):
            client.predict(handle_file(file), sex, 1.0, api_name="/predict")
    client.predict([handle_file(bad)], None, api_name="/predict_batch")
    call(space, {"path": "Secretname.png", "meta": {"_type": "gradio.FileData"}}, "female")
    printed = "".join(capfd.readouterr())
    assert PATIENT_NAME not in printed
    assert "Secretname" not in printed
    assert "IM000001" not in printed


@pytest.mark.parametrize(
    "value", ["Secretname", {"Secretname": 1}, ["Secretname"], {"path": "Secretname"}, {"path": 1}]
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_a_field_does_not_take_is_not_printed(
    space: Space, capfd: pytest.CaptureFixture[str], place: int, value: Any
) -> None:
    data: list[Any] = [None, None, None]
    data[place] = value
    address = f"{space.url}gradio_api/call/predict"
    event = httpx.post(address, json={"data": data}).json()["event_id"]
    assert "event: error" in httpx.get(f"{address}/{event}", timeout=30).text
    printed = "".join(capfd.readouterr())
    assert "Secretname" not in printed
    assert "Traceback" not in printed


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


ELSEWHERE = "http://elsewhere.example/hand.png"


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of other hosts that somebody in this process looks up, as who fetches a URL must; none is found."""
    names: list[str] = []
    look_up = socket.getaddrinfo

    async def validate(host: str) -> str:  # Gradio's own way, which lets it fetch from public addresses only
        names.append(host)
        raise ValueError("not found")

    def getaddrinfo(host: Any, *rest: Any, **options: Any) -> Any:
        if host not in (None, "127.0.0.1", b"127.0.0.1", "localhost"):
            names.append(host)
            raise socket.gaierror("not found")
        return look_up(host, *rest, **options)

    monkeypatch.setattr("safehttpx.async_validate_url", validate)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


@pytest.mark.parametrize("route", ["file=", "file/", "proxy="])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_route_fetches_a_url_for_a_visitor(space: Space, looked_up: list[str], method: str, route: str) -> None:
    reply = httpx.request(method, f"{space.url}gradio_api/{route}{ELSEWHERE}")
    assert reply.status_code == 404
    assert looked_up == []


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_url_is_fetched_in_no_field_of_an_endpoint(space: Space, looked_up: list[str], place: int) -> None:
    data: list[Any] = [None, None, None]
    data[place] = {"path": ELSEWHERE, "url": ELSEWHERE, "meta": {"_type": "gradio.FileData"}}
    address = f"{space.url}gradio_api/call/predict"
    event = httpx.post(address, json={"data": data}).json()["event_id"]
    stream = httpx.get(f"{address}/{event}", timeout=30).text
    assert "Only an uploaded file is read" in stream
    assert looked_up == []
    assert space.files_left() == []


def test_a_url_is_fetched_in_no_field_of_the_page(space: Space, looked_up: list[str]) -> None:
    file = {"path": ELSEWHERE, "meta": {"_type": "gradio.FileData"}}
    for number, event in space.demo.fns.items():
        if event.fn is None or not event.inputs:
            continue
        session = f"elsewhere{number}"
        request = {"data": [file] * len(event.inputs), "fn_index": number, "session_hash": session}
        route = "queue/join" if event.queue else f"run/{event.api_name}"
        httpx.post(f"{space.url}gradio_api/{route}", json=request)
        if event.queue:
            told = f"{space.url}gradio_api/queue/data?session_hash={session}"
            with httpx.stream("GET", told, timeout=30) as stream:
                assert any("process_completed" in line and '"success":false' in line for line in stream.iter_lines())
    assert looked_up == []
    assert space.files_left() == []


def test_a_file_of_the_server_is_not_handed_out(space: Space, hand_png: Path) -> None:
    files = {"files": ("hand.png", hand_png.read_bytes())}
    (upload,) = httpx.post(f"{space.url}gradio_api/upload", files=files).json()
    for route in ("file=", "file/", "custom_component/"):
        assert httpx.get(f"{space.url}gradio_api/{route}{upload}").status_code == 404
    call(space, {"path": upload, "meta": {"_type": "gradio.FileData"}}, "female")
    assert space.files_left() == []


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


def test_only_the_endpoints_for_programs_are_public(client: Client) -> None:
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == [
        "/predict",
        "/predict_batch",
        "/read_bone_age",
    ]


@pytest.mark.parametrize(
    "route", ["deep_link?session_hash=x", "process_recording", "component_server", "component_server/"]
)
def test_routes_of_gradio_that_write_to_the_disk_are_closed(space: Space, route: str) -> None:
    url = f"{space.url}gradio_api/{route}"
    files = {"video": ("hand.mp4", bytes(1000))}
    assert [httpx.get(url).status_code, httpx.post(url, files=files).status_code] == [404, 404]
    assert space.files_left() == []


def test_a_request_that_is_longer_than_a_radiograph_can_be_is_refused_before_it_is_read(space: Space) -> None:
    head = (
        f"POST /gradio_api/call/read_bone_age HTTP/1.1\r\nHost: x\r\nContent-Length: {uploads.MAX_BODY_BYTES + 1}\r\n"
    )
    with socket.create_connection(("127.0.0.1", urlsplit(space.url).port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_request_of_untold_length_ends_where_it_becomes_too_long() -> None:
    taken, sent = 0, 0

    async def application(scope: Any, receive: Any, send: Any) -> None:
        nonlocal taken
        while (message := await receive())["type"] == "http.request":
            taken += len(message["body"])

    async def endless() -> dict[str, Any]:
        nonlocal sent
        sent += 10
        return {"type": "http.request", "body": bytes(10), "more_body": True}

    async def nothing(message: Any) -> None:
        raise NotImplementedError

    for path in ("/gradio_api/call/predict", "/gradio_api/mcp/gradio_api/upload"):
        taken, sent = 0, 0
        scope: dict[str, Any] = {"type": "http", "path": path, "headers": []}
        asyncio.run(uploads.BodyLimit(application, limit=35)(scope, endless, nothing))
        assert (taken, sent) == (30, 40)


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


def test_uploads_are_counted_and_swept_while_others_delete_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gone", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "upload").write_bytes(bytes(7))
        os.utime(tmp_path / name / "upload", (0, 0))
    scan = os.scandir

    def deleting(folder: Any) -> Any:
        if os.fspath(folder).endswith("gone"):  # by another request, between the listing and its turn
            (Path(folder) / "upload").unlink(missing_ok=True)
            Path(folder).rmdir()
        return scan(folder)

    monkeypatch.setattr(os, "scandir", deleting)
    assert uploads._stored_bytes(tmp_path) == 7
    (tmp_path / "gone").mkdir()
    uploads.delete_older(tmp_path, seconds=60, waiting_seconds=60)
    assert not (tmp_path / "here" / "upload").exists()


def test_an_upload_that_nobody_fetches_is_deleted(tmp_path: Path) -> None:
    old, new = tmp_path / "one" / "old.png", tmp_path / "two" / "new.png"
    for path in (old, new):
        path.parent.mkdir()
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 100, time.time() - 100))
    uploads.delete_older(tmp_path, seconds=60, waiting_seconds=200)
    uploads.delete_older(
        tmp_path, seconds=60, waiting_seconds=200
    )  # folders left empty go with the next round at the latest
    assert not old.parent.exists()
    assert new.is_file()


def test_the_upload_folder_goes_with_the_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/before")
    with uploads.upload_folder() as folder:
        (folder / "left.png").write_bytes(b"x")
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()
    assert os.environ["GRADIO_TEMP_DIR"] == "/before"


def test_a_file_that_waits_for_a_batch_is_kept_for_longer(tmp_path: Path) -> None:
    path = tmp_path / "one" / "upload"
    path.parent.mkdir()
    path.write_bytes(b"x")
    kept = uploads.Upload("hand.png", path).waiting()
    assert not path.parent.exists()
    os.utime(kept.path, (time.time() - 100, time.time() - 100))
    uploads.delete_older(tmp_path, seconds=60, waiting_seconds=200)
    assert kept.path.is_file()
    uploads.delete_older(tmp_path, seconds=60, waiting_seconds=90)
    assert not kept.path.exists()


def test_what_still_arrives_is_not_swept(tmp_path: Path) -> None:
    part = tmp_path / "incoming-x" / "part"
    part.parent.mkdir()
    part.write_bytes(b"x")
    for path in (part, part.parent):
        os.utime(path, (0, 0))
    uploads.delete_older(tmp_path, seconds=60, waiting_seconds=60)
    assert part.is_file()


def test_a_folder_whose_file_is_about_to_come_is_not_swept(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    os.utime(tmp_path / "old", (0, 0))
    uploads.delete_older(tmp_path, seconds=60, waiting_seconds=60)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_file_that_arrived_long_before_the_last_of_its_form_has_its_whole_time(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = uploads._FormParser.parse

    async def slow(self: Any) -> Any:
        parsed = await parse(self)
        for path in Path(self.upload_dir).iterdir():
            os.utime(path, (0, 0))
        return parsed

    monkeypatch.setattr(uploads._FormParser, "parse", slow)
    (path,) = httpx.post(f"{space.url}gradio_api/upload", files={"files": ("hand.png", b"x")}).json()
    assert Path(path).stat().st_mtime > time.time() - 60
    uploads.Upload("hand.png", Path(path)).delete()


def test_the_files_of_a_batch_that_runs_for_long_stay_until_they_are_read(
    space: Space, client: Client, hand_png: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = BoneAgePipeline.__call__

    def late(self: BoneAgePipeline, *arguments: Any, **options: Any) -> Any:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        for path in folder.rglob("upload"):
            os.utime(path, (time.time() - 300, time.time() - 300))
        uploads.delete_older(folder, seconds=200, waiting_seconds=400)
        return answer(self, *arguments, **options)

    monkeypatch.setattr(BoneAgePipeline, "__call__", late)
    files = [handle_file(hand_png)] * 2
    result = client.predict(files, None, "female", api_name="/predict_batch")
    assert [row["problem"] for row in result["rows"]] == [None, None]
    assert space.files_left() == []


def test_a_batch_keeps_the_files_that_it_has_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "WAITING_SECONDS", 0.0)
    (tmp_path / "unread").write_bytes(b"x")
    os.utime(tmp_path / "unread", (0, 0))
    files = [uploads.Upload("a", tmp_path / "read"), uploads.Upload("b", tmp_path / "unread")]
    assert list(uploads.keep_unread(iter("ab"), files)) == ["a", "b"]
    assert (tmp_path / "unread").stat().st_mtime > time.time() - 60
    assert not (tmp_path / "read").exists()


def test_uploads_of_a_space_that_was_killed_go_when_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/before")
    left = tmp_path / "boneage-uploads-left"
    left.mkdir()
    (left / "upload").write_bytes(b"x")
    with uploads.upload_folder():
        assert left.exists()  # so young that its own Space may just be starting
    monkeypatch.setattr(uploads, "_YOUNG_SECONDS", -1.0)
    with uploads.upload_folder() as running, uploads.upload_folder() as second:
        assert sorted(tmp_path.iterdir()) == sorted([running, second])


def test_an_upload_lies_under_no_name_of_its_own(space: Space, hand_png: Path) -> None:
    content = hand_png.read_bytes()
    post = f"{space.url}gradio_api/upload"
    first, second = (httpx.post(post, files={"files": (hand_png.name, content)}).json()[0] for _ in range(2))
    assert first != second
    assert "Secretname" not in first
    assert Path(first).is_relative_to(space.temporary)
    for path in (first, second):
        call(space, {"path": path, "meta": {"_type": "gradio.FileData"}}, "female")
    assert space.files_left() == []


def test_an_upload_that_is_no_form_is_refused(space: Space) -> None:
    reply = httpx.post(f"{space.url}gradio_api/upload", content=b"x", headers={"content-type": "text/plain"})
    assert reply.status_code == 400


def test_an_upload_above_the_limit_is_refused_and_not_kept(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_UPLOAD_BYTES", 1000)
    reply = httpx.post(f"{space.url}gradio_api/upload", files={"files": ("hand.png", bytes(2000))})
    assert reply.status_code == 413
    assert space.files_left() == []


def test_uploads_beyond_the_room_for_them_are_refused(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_STORED_BYTES", 1000)
    reply = httpx.post(f"{space.url}gradio_api/upload", files={"files": ("hand.png", bytes(2000))})
    assert (reply.status_code, space.files_left()) == (413, [])


def form(content: bytes, *, about: str = 'name="files"; filename="hand.png"') -> bytes:
    """A form of one part, with the boundary of FORM."""
    head = f"--b\r\nContent-Disposition: form-data; {about}\r\n\r\n"
    return head.encode() + content + b"\r\n--b--\r\n"


FORM = {"content-type": "multipart/form-data; boundary=b"}


def test_an_upload_of_untold_length_is_refused_beyond_the_room(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_STORED_BYTES", 1000)
    reply = httpx.post(f"{space.url}gradio_api/upload", content=iter([form(bytes(50_000))]), headers=FORM)
    assert (reply.status_code, reply.text) == (413, "Too many uploads are waiting: try again in some minutes.")
    assert space.files_left() == []


def test_an_upload_that_still_arrives_takes_its_room(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_STORED_BYTES", 100_000)
    post, whole = f"{space.url}gradio_api/upload", form(bytes(60_000))
    with socket.create_connection(("127.0.0.1", urlsplit(space.url).port)) as slow:
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: {len(whole)}\r\n"
        slow.sendall(f"{head}Content-Type: {FORM['content-type']}\r\n\r\n".encode() + whole[:-10])
        wait_until(lambda: uploads._room._arriving >= 60_000)
        assert httpx.post(post, content=whole, headers=FORM).status_code == 413
    wait_until(lambda: uploads._room._arriving == 0)  # the slow one is broken off
    wait_until(lambda: space.files_left() == [])
    (path,) = httpx.post(post, content=whole, headers=FORM).json()
    call(space, {"path": path, "meta": {"_type": "gradio.FileData"}}, "female")
    assert space.files_left() == []


def test_uploads_that_have_been_read_give_their_room_back(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_STORED_BYTES", 1000)
    for _ in range(5):
        (path,) = httpx.post(f"{space.url}gradio_api/upload", content=form(bytes(600)), headers=FORM).json()
        call(space, {"path": path, "meta": {"_type": "gradio.FileData"}}, "female")


def test_a_broken_upload_says_nothing_and_leaves_nothing(space: Space, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(space.url).port)) as connection:
        head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        connection.sendall(f"{head}Content-Type: {FORM['content-type']}\r\n\r\n".encode() + form(bytes(50_000)))
        wait_until(lambda: uploads._room._arriving >= 50_000)
    wait_until(lambda: uploads._room._arriving == 0)
    assert space.files_left() == []
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("query", ["", "?upload_id=q1"])
def test_a_long_part_of_a_form_that_is_no_file_is_refused(space: Space, query: str) -> None:
    content = form(bytes(uploads.MAX_FIELD_BYTES + 1), about='name="x"')
    reply = httpx.post(f"{space.url}gradio_api/upload{query}", content=content, headers=FORM)
    assert reply.status_code == 400
    assert reply.text == "A part of the form that is no file has more than 4,096 bytes: send the radiographs as files."


def test_many_parts_of_a_form_that_are_no_files_are_refused(space: Space) -> None:
    fields = {f"x{number}": "abc" for number in range(uploads.MAX_FIELDS + 1)}
    files = {"files": ("hand.png", b"x")}
    reply = httpx.post(f"{space.url}gradio_api/upload", data=fields, files=files)
    assert (reply.status_code, space.files_left()) == (400, [])


def test_a_short_part_of_a_form_that_is_no_file_is_passed_over_even_with_progress(space: Space) -> None:
    reply = httpx.post(
        f"{space.url}gradio_api/upload?upload_id=q2", content=form(b"abc", about='name="x"'), headers=FORM
    )
    assert (reply.status_code, reply.json()) == (200, [])


def test_a_session_whose_case_gave_way_is_still_known_to_have_had_one() -> None:
    case = uploads.Case(read(png_bytes(draw(110, "female", seed=3, size=100))))
    held = uploads.HeldCases(max_pixels=1)
    held.hold("a", case)
    held.hold("b", case)
    assert held.get("a") is None
    assert "a" in held
    held.forget("a")
    assert "a" not in held


def test_a_closed_page_holds_nothing_anew() -> None:
    case = uploads.Case(read(png_bytes(draw(110, "female", seed=3, size=100))))
    held = uploads.HeldCases()
    held.hold("a", case)
    held.close("a")
    held.hold("a", case)
    held.update("a", case, replace(case))
    assert (held.get("a"), len(held), held.is_closed("a")) == (None, 0, True)


def test_an_answer_is_held_only_beside_its_own_radiograph() -> None:
    first, second = (uploads.Case(read(png_bytes(draw(age, "female", seed=3, size=100)))) for age in (60, 110))
    held = uploads.HeldCases()
    held.hold("a", second)
    held.update("a", first, replace(first))
    assert held.get("a") is second


def test_closed_pages_are_remembered_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_CLOSED", 2)
    held = uploads.HeldCases()
    for session in "abc":
        held.close(session)
    assert [held.is_closed(session) for session in "abc"] == [False, True, True]


def test_gradio_keeps_nothing_of_a_page_that_was_closed_while_it_answered() -> None:
    kept = {"closed": 1, "open": 2}

    async def process(session_hash: str | None = None) -> str | None:
        return session_hash

    demo: Any = SimpleNamespace(process_api=process, state_holder=SimpleNamespace(session_data=kept))
    uploads.forget_closed_pages(demo, lambda session: session == "closed")
    for session in ("closed", "open", None):
        assert asyncio.run(demo.process_api(session_hash=session)) == session
    assert kept == {"open": 2}


def test_held_cases_give_way_to_newer_ones() -> None:
    case = uploads.Case(read(png_bytes(draw(110, "female", seed=3, size=100))))
    held = uploads.HeldCases(max_pixels=25_000)
    for session in ("a", "b", "c"):
        held.hold(session, case)
    assert [held.get(session) is not None for session in ("a", "b", "c")] == [False, True, True]
    held.forget("b")
    assert held.get("b") is None
    assert len(held) == 1


def test_one_radiograph_above_the_limit_is_held_all_the_same() -> None:
    held = uploads.HeldCases(max_pixels=1)
    held.hold("a", uploads.Case(read(png_bytes(draw(110, "female", seed=3, size=100)))))
    assert held.get("a") is not None


# --- one page and what it asks ---------------------------------------------------------------------------------------

#: The child's data beside the sex, nothing entered.
NOTHING = ("age", None, None, "", "", "")


@dataclass(frozen=True)
class Events:
    """What the server does for one page, without a browser."""

    demo: gr.Blocks
    session: str

    def __call__(self, name: str, *arguments: Any) -> Any:
        function: Any = next(one.fn for one in self.demo.fns.values() if one.name == name)
        return function(*arguments, request=SimpleNamespace(session_hash=self.session))


@pytest.fixture
def events(space: Space) -> Iterator[Events]:
    wait_until(lambda: held_radiographs() == 0)
    events = Events(space.demo, os.urandom(8).hex())
    yield events
    events("forget")


def test_one_childs_sex_and_age_are_not_used_for_the_next_radiograph(events: Events, hand_png: Path) -> None:
    content = hand_png.read_bytes()
    _, first, *_ = events("show", content, "", "female", *NOTHING)
    _, second, *_ = events("show", content, first, "female", *NOTHING)
    sentence = "The radiograph changed meanwhile: check sex and age, and ask again."
    assert events("answer_page", first, "female", *NOTHING)[0] == page.problem_html(sentence)
    assert events("changed", first, "female", *NOTHING)[0] == page.problem_html(sentence)
    assert events("answer_page", second, "female", *NOTHING)[0] == ""


def test_what_was_asked_before_the_first_radiograph_was_shown_is_not_answered(events: Events, hand_png: Path) -> None:
    events("show", hand_png.read_bytes(), "", "female", *NOTHING)
    assert "changed meanwhile" in events("answer_page", "", "female", *NOTHING)[0]
    assert events("changed", "", "female", *NOTHING)[0] == ""  # stays for it, as it was entered before


def test_a_radiograph_that_gave_way_is_asked_for_again(events: Events) -> None:
    told = page.problem_html("The radiograph of this page is no longer there: give the file again.")
    assert events("answer_page", "token", "female", *NOTHING)[0] == told


def test_a_second_file_is_the_next_childs_even_if_the_server_forgot_the_first(events: Events, hand_png: Path) -> None:
    shown = events("show", hand_png.read_bytes(), "token", "female", "age", 7, None, "", "", "right")
    assert (shown[4], *shown[5:11]) == (None, "age", None, None, "", "", "")


def test_a_second_file_that_is_dropped_before_the_first_is_shown_is_the_next_childs(
    events: Events, hand_png: Path
) -> None:
    events("show", hand_png.read_bytes(), "", "female", *NOTHING)
    assert events("show", hand_png.read_bytes(), "", "female", *NOTHING)[4] is None


@pytest.mark.parametrize("sex", [None, "female"])
def test_a_sex_that_is_chosen_while_the_first_file_is_read_stays(
    events: Events, hand_png: Path, sex: str | None
) -> None:
    assert events("show", hand_png.read_bytes(), "", sex, *NOTHING)[4] == gr.skip()


def test_the_name_on_a_report_goes_with_its_radiograph(events: Events, hand_png: Path) -> None:
    for shown in (events("show", hand_png.read_bytes(), "token", None, *NOTHING), events("show_drawing")):
        assert shown[-2] == gr.update(visible=False, value="")


def test_a_page_whose_connection_was_lost_asks_to_be_loaded_again(events: Events, hand_png: Path) -> None:
    _, token, *_ = events("show", hand_png.read_bytes(), "", "female", *NOTHING)
    events("forget")
    lost = "The connection was lost, and with it what this page had been given: load the page again."
    told = page.problem_html(lost)
    assert told in events("show", hand_png.read_bytes(), token, "female", *NOTHING)
    for name in ("answer_page", "changed"):
        assert events(name, token, "female", *NOTHING)[0] == told
    assert events("take_files", []) == (None, "", told)
    assert held_radiographs() == 0


def test_nothing_is_held_of_a_page_that_is_closed_while_it_is_answered(
    events: Events, hand_png: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = BoneAgePipeline.__call__

    def close(self: BoneAgePipeline, *arguments: Any, **options: Any) -> Any:
        events("forget")
        return answer(self, *arguments, **options)

    monkeypatch.setattr(BoneAgePipeline, "__call__", close)
    _, token, *_ = events("show", hand_png.read_bytes(), "", "female", *NOTHING)
    assert events("answer_page", token, "female", *NOTHING)[0] == ""
    assert held_radiographs() == 0


def test_files_that_a_closed_page_sent_do_not_wait(events: Events, tmp_path: Path) -> None:
    path = tmp_path / "one" / "upload"
    path.parent.mkdir()
    path.write_bytes(b"x")
    events("forget")
    events("take_files", [uploads.Upload("hand.png", path)])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


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
    radios = [one["props"] for one in config["components"] if one["type"] == "radio"]
    of_sex = [radio for radio in radios if "female" in [value for _, value in radio["choices"]]]
    assert len(of_sex) == 3  # one radiograph, a batch, programs
    assert all(not radio.get("value") for radio in of_sex)


def hostile_report(pipe: BoneAgePipeline, **changes: Any) -> Any:
    answer = pipe(draw(110, "female", seed=3), sex="female") | changes
    return answer, make_report(
        answer,
        chronological_age_months=100.0,
        remarks=[EVIL],
        model=EVIL,
        revision=EVIL,
        day=date(2026, 1, 2),
    )


EVIL = "<script>alert(1)</script>"


def test_a_name_from_outside_is_escaped(pipe: BoneAgePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.model, "name_or_path", f"evil/{EVIL}")
    demo = space_app.build_demo(pipe, revision=EVIL)
    pages = [str(block.value) for block in demo.blocks.values() if isinstance(block, gr.HTML)]
    answer, report = hostile_report(pipe)
    picture = Image.new("RGB", (8, 8))
    pages.append(page.answer_html(report, picture, picture, answer["attention"]))
    pages.append(page.problem_html(EVIL))
    pages.append(page.problem_html(EVIL, Refused(checks=(CheckLine(EVIL, "refuse", EVIL),))))
    row = BatchRow(EVIL, problem=EVIL, warnings=EVIL)
    source = provenance(model=EVIL, revision=EVIL, day=date(2026, 1, 2))
    pages.append(page.batch_html([row, replace(row, bone_age_months=1.0)], source=source, finished=True))
    text = "".join(pages)
    assert text.count("&lt;script&gt;alert(1)") >= 10
    assert "<script>" not in text


@dataclass(frozen=True)
class Refused:
    """The shape of the quality gate's verdict."""

    checks: tuple[CheckLine, ...]
    verdict: str = "refuse"
    corrections: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def test_checks_and_corrections_stand_beside_the_answer(pipe: BoneAgePipeline) -> None:
    checks = (CheckLine("One hand", "pass", "It is one."), CheckLine("Phantom", "warn", "It is drawn."))
    quality = Refused(checks, verdict="warn", corrections=("Turned by 90 degrees.",))
    answer, report = hostile_report(pipe, quality=quality)
    picture = Image.new("RGB", (8, 8))
    text = page.answer_html(report, picture, picture, answer["attention"])
    assert '<span class="mark ok">Passed</span> One hand: It is one.' in text
    assert '<span class="mark warn">Warning</span> Phantom: It is drawn.' in text
    assert '<span class="mark warn">Corrected</span> Turned by 90 degrees.' in text


def test_a_refused_image_shows_its_checks(pipe: BoneAgePipeline) -> None:
    text = page.problem_html("This is no hand.", Refused((CheckLine("One hand", "refuse", "It is a cat."),)))
    assert "<strong>Not read.</strong> This is no hand." in text
    assert '<span class="mark bad">Refused</span> One hand: It is a cat.' in text


def test_a_reason_is_not_said_twice() -> None:
    checks = (CheckLine("hand", "refuse", "This is a cat."), CheckLine("cut_off", "warn", "Its tail is missing."))
    assert page.problem_html("This is a cat.", Refused(checks)).count("This is a cat.") == 1
    row = BatchRow("cat.png", problem="This is a cat.", quality_reasons="This is a cat. Its tail is missing.")
    source = provenance(model="m", revision="r", day=date(2026, 1, 2))
    table = page.batch_html([row], source=source, finished=False)
    assert table.count("This is a cat.") == table.count("Its tail is missing.") == 1


def test_a_batch_shows_the_range_of_a_score_and_where_it_comes_from() -> None:
    row = BatchRow("a.png", bone_age_months=100.0, sex="female", sds=-1.5, sds_low=-3.25, sds_high=0.25)
    source = provenance(model="m", revision="r", day=date(2026, 1, 2))
    table = page.batch_html([row], source=source, finished=True)
    assert "-1.50 (-3.25 to +0.25)" in table
    for text in ("Model m, revision r.", REFERENCE, "2026-01-02", DISCLAIMER):
        assert text in table


def test_the_footer_names_model_reference_table_date_and_purpose() -> None:
    text = page.footer_html(source=provenance(model="m", revision="r", day=date(2026, 1, 2)))
    for part in ("Model m, revision r.", REFERENCE, "Date: 2026-01-02.", DISCLAIMER):
        assert part in text


def test_the_folder_of_a_checkpoint_is_named_without_its_path(pipe: BoneAgePipeline) -> None:
    assert model_name(pipe) == f"tiny (tiny, {pipe.model.config.image_size} px)"


def test_an_interval_is_shown_in_years_and_months(pipe: BoneAgePipeline) -> None:
    answer, report = hostile_report(pipe, interval_months=[100.0, 123.4])
    picture = Image.new("RGB", (8, 8))
    text = page.answer_html(report, picture, picture, answer["attention"])
    assert "8 years 4 months to 10 years 3 months (100.0 to 123.4 months)" in text
    assert DISCLAIMER in text


def test_an_inversion_is_told_and_shown_without_the_quality_check_too(pipe: BoneAgePipeline) -> None:
    hand = draw(110, "female", seed=3, size=300)
    light = read(png_bytes(ImageOps.invert(hand)))
    reading = Reader(pipe).answer(light, "female", check_quality=False)
    assert reading.corrections == ("Bones were dark on a light ground: the grey levels were inverted.",)
    assert np.array_equal(np.asarray(reading.seen), np.asarray(hand))


def test_the_benchmark_tab_holds_the_corrected_table(space: Space) -> None:
    text = next(
        str(b.value) for b in space.demo.blocks.values() if isinstance(b, gr.HTML) and "benchmark" in str(b.value)
    )
    assert "The same table, corrected" in text
    assert "reference-test-1024" in text
    assert "<html" not in text


def test_pictures_of_the_benchmark_are_shown_once(tmp_path: Path) -> None:
    for name in ("age", "ranking"):
        (tmp_path / f"{name}.svg").write_text(f"<svg><title>{name}</title></svg>")
    shown = base64.b64encode((tmp_path / "age.svg").read_bytes()).decode()
    report = f'<main><h1>Report</h1><img src="data:image/svg+xml;base64,{shown}"></main>'
    text = page.benchmark_html(report, sorted(tmp_path.glob("*.svg")))
    assert text.count("<img") == 2
    assert 'alt="ranking"' in text
    assert "<h2>Report</h2>" in text


def test_a_card_is_shown_without_its_metadata() -> None:
    assert page.card_markdown("---\nlicense: other\n---\n\n# Title\n") == "# Title"
    assert page.card_markdown("# Title\n") == "# Title"
    assert "no card" in page.card_markdown(None)


def test_the_default_checkpoint_brings_its_card() -> None:
    pipe = SimpleNamespace(model=SimpleNamespace(name_or_path=str(DEFAULT_CHECKPOINT)))
    card = space_app._card_of(pipe)  # type: ignore[arg-type]
    assert "# boneage-hf default" in page.card_markdown(card)


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
        self.page.evaluate("window.scrollTo(0, 0)")
        self.page.screenshot(path=SCREENSHOTS / f"space-{name}.png", full_page=True)

    def save(self, button: str) -> bytes:
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name=button).click()
        return Path(download.value.path()).read_bytes()


@pytest.fixture
def visit(space: Space, chromium: Any) -> Iterator[Callable[..., Visit]]:
    visits = []

    def open_page(*, of: Space = space, size: dict[str, int] = DESKTOP, scheme: str = "light") -> Visit:
        context = chromium.new_context(viewport=size, color_scheme=scheme)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.set_default_timeout(120_000)  # a busy machine is no failure
        page = context.new_page()
        seen = Visit(page, set(), [])
        page.on("request", lambda request: seen.hosts.add(urlsplit(request.url).hostname or "inside the page"))
        page.on("console", lambda entry: seen.complaints.append(entry.text) if entry.type == "error" else None)
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.goto(of.url)
        page.get_by_role("button", name="Estimate bone age").wait_for()
        visits.append((context, seen))
        return seen

    yield open_page
    for context, seen in visits:
        context.close()
        assert seen.hosts <= {urlsplit(space.url).hostname, "inside the page"}
        assert seen.complaints == []


def held_radiographs() -> int:
    return sum(len(one) for one in gc.get_objects() if isinstance(one, uploads.HeldCases))


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
    widths = seen.page.locator("#answer img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert widths == [300, 300]
    assert "chronological age was not given" in text
    assert "Secretname" not in seen.page.content()
    assert space.files_left() == []
    seen.screenshot("desktop-light")


@pytest.mark.slow
def test_a_dicom_file_is_answered_in_the_page(space: Space, visit: Callable[..., Visit], hand_dicom: Path) -> None:
    seen = visit(scheme="dark")
    seen.upload(hand_dicom)
    assert "Radiograph: DICOM, 12 bit, 300 x 300 px" in seen.page.locator("#preview").inner_text()
    told = "sex female, chronological age 9 years 3 months, left hand"
    assert told in seen.page.locator("#prefill").inner_text()
    assert seen.page.get_by_label("Female", exact=True).is_checked()
    assert seen.page.get_by_label("Left", exact=True).is_checked()
    assert seen.page.get_by_label("Years", exact=True).input_value() == "9"
    assert seen.page.get_by_label("Months", exact=True).input_value() == "3.17"
    seen.ask()
    text = seen.answer()
    assert format_months(space.pipe(str(hand_dicom), sex="female")["bone_age_months"]) in text
    assert "Standard deviation score" in text
    assert "9 years 3 months (111.2 months)" in text
    assert seen.page.locator("#answer svg").get_attribute("aria-label").startswith("Growth plot: bone age")
    assert PATIENT_NAME not in seen.page.content()
    assert "IM000001" not in seen.page.content()
    assert space.files_left() == []
    seen.screenshot("desktop-dark")


@pytest.mark.slow
def test_a_contradiction_to_the_header_is_shown(visit: Callable[..., Visit], hand_dicom: Path) -> None:
    seen = visit()
    seen.upload(hand_dicom)
    seen.page.get_by_label("Male", exact=True).check()
    sentence = "The DICOM header says female, but male was chosen: check which is right."
    seen.page.locator("#remarks").get_by_text(sentence).wait_for()
    seen.ask()
    assert sentence in seen.answer()
    seen.page.get_by_label("Female", exact=True).check()
    seen.page.locator("#answer .waiting").wait_for()
    assert sentence not in seen.page.locator("#question").inner_text()


@pytest.mark.slow
def test_what_was_chosen_before_the_upload_stays_and_its_contradiction_is_shown(
    visit: Callable[..., Visit], hand_dicom: Path, hand_png: Path
) -> None:
    seen = visit()
    seen.page.get_by_label("Male", exact=True).check()
    seen.page.get_by_label("Years", exact=True).fill("7")
    seen.upload(hand_dicom)
    seen.page.locator("#remarks").get_by_text("The DICOM header says female, but male was chosen").wait_for()
    assert seen.page.get_by_label("Male", exact=True).is_checked()
    assert seen.page.get_by_label("Years", exact=True).input_value() == "7"
    seen.page.locator("#upload input[type=file]").set_input_files(hand_png)  # another child
    seen.page.locator("#preview").get_by_text("Drawn phantom").wait_for()
    assert seen.page.locator("#sex input[type=radio]:checked").count() == 0
    assert seen.page.get_by_label("Years", exact=True).input_value() == ""
    assert seen.page.locator("#remarks p").count() == 0


@pytest.mark.slow
def test_age_and_hand_entered_before_the_upload_stay_and_their_contradictions_are_shown(
    visit: Callable[..., Visit], hand_dicom: Path
) -> None:
    seen = visit()
    seen.page.get_by_label("Years", exact=True).fill("7")
    seen.page.get_by_label("Right", exact=True).check()
    seen.upload(hand_dicom)
    remarks = seen.page.locator("#remarks")
    remarks.get_by_text("another chronological age than the one typed").wait_for()
    remarks.get_by_text(
        "The DICOM header says left hand, but the right hand was chosen: check which it is."
    ).wait_for()
    assert seen.page.get_by_label("Female", exact=True).is_checked()  # filled in, as nothing was chosen
    assert seen.page.get_by_label("Years", exact=True).input_value() == "7"
    assert seen.page.get_by_label("Right", exact=True).is_checked()
    seen.ask()
    text = seen.answer()
    assert "7 years 0 months (84.0 months)" in text
    assert "The DICOM header says left hand" in text
    seen.page.get_by_label("Left", exact=True).check()
    remarks.get_by_text("The DICOM header says left hand").wait_for(state="detached")
    assert remarks.locator("p").count() == 1


@pytest.mark.slow
def test_one_childs_data_are_not_used_for_a_radiograph_that_is_not_shown_yet(
    visit: Callable[..., Visit], hand_png: Path, hand_dicom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = visit()
    seen.upload(hand_png)
    seen.page.get_by_label("Male", exact=True).check()
    seen.page.get_by_label("Years", exact=True).fill("7")
    seen.ask()
    assert "7 years 0 months (84.0 months)" in seen.answer()  # the browser says which radiograph it shows
    seen.page.get_by_label("Name or number on the report").fill("Case 7")
    reading, go_on = threading.Event(), threading.Event()

    def late(content: bytes) -> Any:
        reading.set()
        go_on.wait(120)
        return read(content)

    monkeypatch.setattr(space_app, "read", late)
    seen.page.locator("#upload input[type=file]").set_input_files(hand_dicom)
    wait_until(reading.is_set)
    seen.ask()
    seen.page.wait_for_timeout(1000)
    go_on.set()
    seen.page.locator("#problem").get_by_text("The radiograph changed meanwhile").wait_for()
    assert seen.page.locator("#answer .age").count() == 0
    assert seen.page.get_by_label("Female", exact=True).is_checked()
    assert seen.page.get_by_label("Years", exact=True).input_value() == "9"
    seen.ask()
    assert "9 years 3 months (111.2 months)" in seen.answer()
    assert seen.page.get_by_label("Name or number on the report").input_value() == ""


@pytest.mark.slow
def test_dates_entered_before_the_upload_stay(visit: Callable[..., Visit], hand_dicom: Path) -> None:
    seen = visit()
    seen.page.get_by_label("Two dates").check()
    seen.page.get_by_label("Date of birth").press_sequentially("06202012")
    seen.upload(hand_dicom)
    assert seen.page.get_by_label("Left", exact=True).is_checked()
    assert seen.page.get_by_label("Two dates").is_checked()
    assert seen.page.get_by_label("Date of birth").input_value() == "2012-06-20"
    seen.page.get_by_label("Date of study").press_sequentially("06202019")
    seen.page.locator("#remarks").get_by_text("another chronological age than the one typed").wait_for()
    seen.ask()
    assert "7 years 0 months (84.0 months)" in seen.answer()


@pytest.mark.slow
def test_an_age_typed_before_the_upload_of_a_png_stays(visit: Callable[..., Visit], hand_png: Path) -> None:
    seen = visit()
    seen.page.get_by_label("Female", exact=True).check()
    seen.page.get_by_label("Years", exact=True).fill("7")
    seen.upload(hand_png)
    seen.ask()
    assert "7 years 0 months (84.0 months)" in seen.answer()


@pytest.mark.slow
def test_an_age_from_two_dates_is_refused_before_birth_and_used_after(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.page.get_by_role("button", name="Girl, 4 years (drawn)").click()
    seen.page.locator("#preview img").wait_for()
    seen.page.get_by_label("Two dates").check()
    seen.page.get_by_label("Date of birth").fill("2019-05-02")
    seen.page.get_by_label("Date of study").fill("2019-05-01")
    seen.ask()
    seen.page.locator("#problem").get_by_text("The study date lies before the birth date").wait_for()
    assert seen.page.locator("#answer .age").count() == 0
    seen.page.get_by_label("Date of birth").fill("2015-03-01")
    seen.ask()
    assert "4 years 2 months (50.0 months)" in seen.answer()


@pytest.mark.slow
def test_the_slider_changes_the_opacity_without_the_server(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.page.get_by_role("button", name="Girl, 4 years (drawn)").click()
    seen.page.locator("#preview img").wait_for()
    seen.ask()
    seen.answer()
    asked: list[str] = []
    seen.page.on("request", lambda request: asked.append(request.url))
    slider = seen.page.get_by_role("slider", name="Opacity of the attention map in percent")
    slider.focus()
    slider.press("Home")
    assert seen.page.locator("#answer .colours").evaluate("image => image.style.opacity") == "0"
    slider.press("ArrowRight")
    assert seen.page.locator("#answer .colours").evaluate("image => image.style.opacity") == "0.05"
    assert seen.page.locator("#answer output").inner_text() == "5 %"
    assert [url for url in asked if "heartbeat" not in url] == []


@pytest.mark.slow
def test_reports_are_saved_and_leave_nothing_on_the_disk(
    space: Space, visit: Callable[..., Visit], hand_dicom: Path
) -> None:
    pypdf = pytest.importorskip("pypdf", reason="pypdf is not installed")
    seen = visit()
    seen.upload(hand_dicom)
    seen.ask()
    seen.answer()
    months = format_months(space.pipe(str(hand_dicom), sex="female")["bone_age_months"])
    seen.page.get_by_label("Name or number on the report").fill("Case $7$ <b>")
    content = seen.save("Save PDF")
    SCREENSHOTS.mkdir(exist_ok=True)
    (SCREENSHOTS / "report.pdf").write_bytes(content)
    pages = pypdf.PdfReader(io.BytesIO(content)).pages
    assert len(pages) == 1
    for text in (pages[0].extract_text(), seen.save("Save TXT").decode()):
        for part in (months, "Case $7$ <b>", "9 years 3 months (111.2 months)", space.revision, DISCLAIMER):
            assert part in text
    told = json.loads(seen.save("Save JSON"))
    assert (told["label"], told["sex"], told["hand"]) == ("Case $7$ <b>", "female", "left")
    html = seen.save("Save HTML").decode()
    assert "Case $7$ &lt;b&gt;" in html
    assert "http" not in html.replace("http://www.w3.org/", "")
    for text in (json.dumps(told), html):
        assert PATIENT_NAME not in text
    seen.page.get_by_role("button", name="Copy text").click()
    seen.page.get_by_role("button", name="Copied").wait_for()
    assert seen.page.evaluate("navigator.clipboard.readText()") == seen.save("Save TXT").decode()
    assert space.files_left() == []


@pytest.mark.slow
def test_a_name_that_the_pdf_cannot_write_is_refused_there_and_stands_on_the_page(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.page.get_by_role("button", name="Girl, 4 years (drawn)").click()
    seen.page.locator("#preview img").wait_for()
    seen.ask()
    seen.answer()
    seen.page.get_by_label("Name or number on the report").fill("\N{CJK UNIFIED IDEOGRAPH-674E}")
    seen.page.get_by_role("button", name="Save PDF").click()
    seen.page.locator("#report-problem").get_by_text("The PDF has no letters for some of this name").wait_for()
    assert "\N{CJK UNIFIED IDEOGRAPH-674E}" in seen.save("Save HTML").decode()
    assert seen.page.locator("#report-problem p").count() == 0


@pytest.mark.slow
def test_the_footer_shows_the_date_of_the_day(visit: Callable[..., Visit], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_app, "date", SimpleNamespace(today=lambda: date(2031, 5, 6)))
    visit().page.locator("#footer").get_by_text("Date: 2031-05-06.").wait_for()


@pytest.mark.slow
def test_an_age_typed_while_the_page_still_loads_stays(
    visit: Callable[..., Visit], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*, source: dict[str, str]) -> str:
        time.sleep(3)
        return "<p>late</p>"

    monkeypatch.setattr(page, "footer_html", late)
    seen = visit()
    seen.page.get_by_label("Years", exact=True).fill("7")
    seen.page.locator("#footer").get_by_text("late").wait_for()
    assert seen.page.get_by_label("Years", exact=True).input_value() == "7"


@pytest.mark.slow
def test_a_batch_with_one_bad_file_answers_the_others(
    space: Space, visit: Callable[..., Visit], hand_png: Path, hand_dicom: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_text("no radiograph")
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        archive.write(hand_png, "inside.png")
        archive.writestr("../outside.png", b"x")
    (tmp_path / "table.csv").write_text("file,sex,chronological_age_months\ninside.png,male,100\nbad.png,male,\n")
    seen = visit()
    seen.page.get_by_role("tab", name="Batch").click()
    seen.page.locator("#batch-upload input[type=file]").set_input_files(
        [hand_dicom, tmp_path / "bad.png", tmp_path / "many.zip"]
    )
    seen.page.get_by_text("3 files ready").wait_for()
    seen.page.locator("#table-upload input[type=file]").set_input_files(tmp_path / "table.csv")
    seen.page.get_by_text("a table of 2 rows").wait_for()
    seen.page.get_by_role("button", name="Read all").click()
    seen.page.get_by_text("4 of 4 read, 2 answered, 2 without an answer. Finished.").wait_for()
    rows = [row.inner_text() for row in seen.page.locator("#batch-table tbody tr").all()]
    assert [row.split("\t")[0] for row in rows] == ["IM000001", "bad.png", "inside.png", "outside.png"]
    assert "This is a text file" in rows[1]
    assert "points outside" in rows[3]
    with seen.page.expect_download() as download:
        seen.page.get_by_role("link", name="Save as CSV").click()
    months = space.pipe(str(hand_png), sex="male")["bone_age_months"]
    assert f"inside.png,{months:.2f}" in Path(download.value.path()).read_text(encoding="utf-8")
    assert PATIENT_NAME not in seen.page.content()
    assert space.files_left() == []
    seen.screenshot("batch")


@pytest.mark.slow
def test_a_batch_says_that_it_waits_for_others(
    visit: Callable[..., Visit], hand_png: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, go_on = BoneAgePipeline.__call__, threading.Event()

    def late(self: BoneAgePipeline, *arguments: Any, **options: Any) -> Any:
        go_on.wait(120)
        return answer(self, *arguments, **options)

    monkeypatch.setattr(BoneAgePipeline, "__call__", late)
    for number in range(3):
        seen = visit()
        seen.page.get_by_role("tab", name="Batch").click()
        seen.page.locator("#batch-upload input[type=file]").set_input_files(hand_png)
        seen.page.get_by_text("1 file ready").wait_for()
        seen.page.locator("#batch-sex").get_by_label("Female", exact=True).check()
        seen.page.get_by_role("button", name="Read all").click()
        told = "0 of 1 read" if number < 2 else "Waiting for other batches ..."
        seen.page.locator("#progress").get_by_text(told).wait_for()
    go_on.set()
    seen.page.get_by_text("1 of 1 read, 1 answered").wait_for()
    assert "Waiting" not in seen.page.locator("#progress").inner_text()


@pytest.mark.slow
def test_a_batch_without_files_says_so(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.page.get_by_role("tab", name="Batch").click()
    seen.page.get_by_role("button", name="Read all").click()
    seen.page.get_by_text("No files are loaded").wait_for()


@pytest.mark.slow
def test_files_of_a_batch_go_when_the_page_is_closed(
    space: Space, visit: Callable[..., Visit], hand_png: Path
) -> None:
    seen = visit()
    seen.page.get_by_role("tab", name="Batch").click()
    seen.page.locator("#batch-upload input[type=file]").set_input_files(hand_png)
    seen.page.get_by_text("1 file ready").wait_for()
    assert len(space.files_left()) == 1
    seen.page.close()
    wait_until(lambda: space.files_left() == [])


@pytest.mark.slow
def test_an_image_that_the_gate_refuses_is_not_answered(
    space: Space, visit: Callable[..., Visit], hand_png: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = BoneAgePipeline.__call__

    def refuse(self: BoneAgePipeline, *arguments: Any, check_quality: bool, **options: Any) -> Any:
        if check_quality:
            raise RefusedError("It is a photograph.", Quality((Check("hand", "refuse", "It is a photograph."),)))
        return answer(self, *arguments, check_quality=False, **options)

    seen = visit()
    seen.upload(hand_png)
    seen.page.get_by_label("Female", exact=True).check()
    monkeypatch.setattr(BoneAgePipeline, "__call__", refuse)
    seen.ask()
    seen.page.locator("#problem").get_by_text("Not read.").wait_for()
    assert "Hand: It is a photograph." in seen.page.locator("#problem").get_by_role("alert").inner_text()
    assert seen.page.locator("#answer .age").count() == 0
    seen.screenshot("refused")
    insist = seen.page.get_by_role("button", name="It is one hand radiograph: read it all the same")
    insist.click()
    text = seen.answer()
    assert UNCHECKED in text
    assert NOT_CHECKED in text
    insist.wait_for(state="hidden")
    assert seen.page.locator("#problem p").count() == 0


@pytest.fixture(scope="module")
def packaged_pipe() -> BoneAgePipeline:
    return load_pipeline()


@pytest.fixture
def packaged(packaged_pipe: BoneAgePipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Space]:
    """With the packaged checkpoint and its quality gate; for one test, as a process has one folder for uploads."""
    with opened(packaged_pipe, tmp_path_factory.mktemp("packaged")) as space:
        yield space


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sentence"), [("camera", "does not look like"), ("astronaut", "colour picture")])
def test_the_packaged_checkpoint_refuses_a_photograph(
    packaged: Space, visit: Callable[..., Visit], tmp_path: Path, name: str, sentence: str
) -> None:
    pictures = pytest.importorskip("skimage.data", reason="the extra benchmark is not installed")
    Image.fromarray(getattr(pictures, name)()).save(tmp_path / "photograph.png")
    seen = visit(of=packaged)
    seen.upload(tmp_path / "photograph.png")
    seen.page.get_by_label("Female", exact=True).check()
    seen.ask()
    problem = seen.page.locator("#problem").get_by_role("alert")
    problem.get_by_text("Not read.").wait_for()
    assert problem.inner_text().count(sentence) == 1
    assert seen.page.locator("#answer .age").count() == 0
    # A person may know a hand better than the gate, but a colour picture is no radiograph.
    assert seen.page.locator("#insist").is_visible() == (name == "camera")
    assert packaged.files_left() == []
    seen.screenshot(f"refused-{name}")


@pytest.mark.slow
def test_the_packaged_checkpoint_puts_a_turned_hand_right(
    packaged: Space, visit: Callable[..., Visit], tmp_path: Path
) -> None:
    upright = draw(108, "male", seed=7)
    wide = upright.crop((0, 0, upright.width, upright.height * 3 // 4)).transpose(Image.Transpose.ROTATE_90)
    (tmp_path / "turned.png").write_bytes(png_bytes(wide))
    seen = visit(of=packaged)
    seen.upload(tmp_path / "turned.png")
    seen.page.get_by_label("Male", exact=True).check()
    seen.ask()
    text = seen.answer()
    quality = packaged.pipe(str(tmp_path / "turned.png"), sex="male")["quality"]
    assert quality.rotation_degrees == 90
    assert seen.page.locator("#answer .remarks").inner_text().count("turned") == 1
    assert "Corrected The picture was turned by 90 degrees clockwise." in text
    # Shown as the network saw it: upright again.
    sizes = "images => images.map(image => [image.naturalWidth, image.naturalHeight])"
    assert seen.page.locator("#preview img").evaluate_all(sizes) == [[wide.width, wide.height]]
    assert seen.page.locator("#answer img").evaluate_all(sizes) == [[wide.height, wide.width]] * 2
    seen.screenshot("turned")


@pytest.mark.slow
def test_every_tab_is_reached_by_keyboard_and_fits_a_phone(visit: Callable[..., Visit]) -> None:
    seen = visit(size=PHONE)
    seen.page.get_by_role("tab", name="Read").focus()
    for name in ("Batch", "Benchmark", "About"):
        seen.page.keyboard.press("Tab")
        seen.page.keyboard.press("Enter")
        assert seen.page.get_by_role("tab", name=name).get_attribute("aria-selected") == "true"
        seen.page.wait_for_timeout(500)
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name


@pytest.mark.slow
def test_without_sex_the_page_says_so_in_one_sentence(visit: Callable[..., Visit], hand_png: Path) -> None:
    seen = visit()
    seen.upload(hand_png)
    seen.ask()
    seen.page.locator("#problem p").wait_for()
    assert seen.page.locator("#problem").get_by_role("alert").inner_text().strip() == NO_SEX
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
    assert seen.page.locator("#sex input[type=radio]:checked").count() == 0


@pytest.mark.slow
def test_nothing_shows_through_the_header_of_a_page_that_is_scrolled(visit: Callable[..., Visit]) -> None:
    seen = visit(size=PHONE)
    covered = seen.page.evaluate(
        """() => [...document.querySelectorAll("#question [data-testid=block-info], #question label")].map((label) => {
          label.scrollIntoView({ block: "start" });
          const place = label.getBoundingClientRect();
          const head = document.querySelector("#head");
          if (place.y + 5 > head.getBoundingClientRect().bottom - 2) return null;  // too far down to get there
          return head.contains(document.elementFromPoint(place.x + 5, place.y + 5));
        }).filter((found) => found !== null)"""
    )
    assert len(covered) > 3
    assert all(covered)


@pytest.mark.slow
def test_a_phone_shows_one_column_and_always_the_notice(visit: Callable[..., Visit]) -> None:
    seen = visit(size=PHONE)
    seen.page.get_by_role("button", name="Girl, 4 years (drawn)").click()
    seen.page.locator("#preview img").wait_for()
    seen.page.get_by_label("Years", exact=True).fill("4")
    seen.page.get_by_label("Months", exact=True).fill("2")
    seen.ask()
    seen.answer()
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for part in ("#question", "#reply", "#answer .stack", "#answer .plot", "#answer .plot svg", "#save", "#examples"):
        box = seen.page.locator(part).bounding_box()
        assert box["x"] >= 0, part
        assert box["x"] + box["width"] <= PHONE["width"], part  # the page clips what is wider
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
