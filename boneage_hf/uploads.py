"""What the Space holds of its visitors, and for how long: uploads on the disk, radiographs of open pages in memory.

An upload lies under a random name in a private folder, never under its own, which may name a patient; its content is
read once and the file deleted. What no request fetches is deleted after half an hour, files that wait for a batch
after an hour, all of it when the Space ends, or, where it was killed, when the next one starts.
"""

import base64
import binascii
import os
import re
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.processing_utils import client_utils
from gradio.route_utils import GradioMultiPartParser, GradioUploadFile
from gradio.routes import file_upload_statuses
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .batch import MAX_MEMBERS, ZIP_STARTS, BatchItem, TableRow, collect
from .errors import InputError
from .radiograph import MAX_FILE_BYTES, Prefill, Radiograph, content_of
from .report import Report

with suppress(ImportError):  # Windows has no such locks, and no folders of other users in that place
    import fcntl

#: Pixels of radiographs of open pages that are held in memory, 1 byte each; the oldest give way.
MAX_HELD_PIXELS = 400_000_000

#: Closed pages that are remembered, so that an event of theirs that still runs holds nothing anew.
MAX_CLOSED = 10_000

#: Most bytes of one upload (1 GiB): an archive for a batch; a single radiograph may have `MAX_FILE_BYTES`.
MAX_UPLOAD_BYTES = 1024**3

#: Most bytes of any other request: a radiograph as a data URI (4 letters for 3 bytes) and what is said of it.
MAX_BODY_BYTES = MAX_FILE_BYTES * 4 // 3 + 1024**2

#: Most bytes of all uploads that arrive or wait to be read (8 GiB); further ones are refused.
MAX_STORED_BYTES = 8 * 1024**3

#: Most parts of an upload's form that are no files, and most bytes of each: pages and clients of Gradio's send none.
MAX_FIELDS, MAX_FIELD_BYTES = 16, 4096

#: An upload that no request has fetched by then (a broken connection) is deleted. A request fetches its files only
#: when all of them have arrived and its turn has come; MAX_STORED_BYTES bounds what lies there meanwhile.
ORPHAN_SECONDS = 1800.0

#: Files that a batch has taken and not read by then are deleted; while it runs, they are kept.
WAITING_SECONDS = 3600.0

#: A folder for uploads that is younger may not be locked by its Space yet.
_YOUNG_SECONDS = 60.0

#: Where Gradio's pages and clients send uploads.
UPLOAD_ROUTE = "/gradio_api/upload"

_FOLDER, _INCOMING, _WAITING = "boneage-uploads-", "incoming-", "waiting"
_UPLOAD_GONE = "The upload is no longer there: give the file again."
_NO_DATA_URI = "image must be a data URI with base64, such as data:image/png;base64,...; URLs and paths are not read."
_NOT_AN_UPLOAD = "Only an uploaded file is read: give the file itself, not a URL or a path."
_NOT_A_VALUE = "A field was given what it does not take: fill in the page again, or read what the endpoint takes."
_NO_ROOM = "Too many uploads are waiting: try again in some minutes."
_NOT_A_FILE = (
    f"A part of the form that is no file has more than {MAX_FIELD_BYTES:,} bytes: send the radiographs as files."
)


# --- in memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What one open page shows.

    Args:
        radiograph: as read.
        prefill: what its DICOM header says; nothing for other files.
        report: the answer on the page, if there is one.
        overlay: the attention map over the radiograph, of that answer.
        token: tells the case from every other; the browser sends back that of the case that it shows.
    """

    radiograph: Radiograph
    prefill: Prefill = field(default_factory=Prefill)
    report: Report | None = None
    overlay: Image.Image | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(16))


class HeldCases:
    """The case of each open page by session, in memory only. Safe to use from several threads."""

    def __init__(self, max_pixels: int = MAX_HELD_PIXELS) -> None:
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Case] = OrderedDict()
        self._sessions: set[str] = set()
        self._closed: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, session: str) -> bool:
        """Whether the session was given a case and has not forgotten it, even if that gave way to newer ones."""
        return session in self._sessions

    def hold(self, session: str, case: Case) -> None:
        """Replace the session's case, unless its page is closed; with too many pixels, the oldest of other sessions
        are forgotten."""
        with self._lock:
            if session in self._closed:
                return
            self._held.pop(session, None)
            self._held[session] = case
            self._sessions.add(session)
            while len(self._held) > 1 and sum(_pixels(one) for one in self._held.values()) > self._max_pixels:
                self._held.popitem(last=False)

    def get(self, session: str) -> Case | None:
        return self._held.get(session)

    def update(self, session: str, before: Case, after: Case) -> None:
        """Replace the session's case where it still is `before`: it may have been forgotten since it was got."""
        with self._lock:
            if self._held.get(session) is before:
                self._held[session] = after
                self._held.move_to_end(session)

    def forget(self, session: str) -> None:
        with self._lock:
            self._held.pop(session, None)
            self._sessions.discard(session)

    def close(self, session: str) -> None:
        """Forget the session's case, and hold none for it from now on."""
        with self._lock:
            self._held.pop(session, None)
            self._sessions.discard(session)
            self._closed[session] = None
            if len(self._closed) > MAX_CLOSED:
                self._closed.popitem(last=False)

    def is_closed(self, session: str) -> bool:
        return session in self._closed


def _pixels(case: Case) -> int:
    return case.radiograph.image.width * case.radiograph.image.height


# --- on the disk ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Upload:
    """A file that waits to be read once.

    Args:
        name: as the visitor's machine calls it.
        path: where it lies.
    """

    name: str
    path: Path

    def content(self) -> bytes:
        """Its bytes; the file is deleted, whatever comes of it.

        Raises:
            InputError: it is empty, larger than one radiograph may be, or no longer there.
        """
        try:
            if not self.path.is_file():
                raise InputError(_UPLOAD_GONE)
            return content_of(self.path)
        finally:
            self.delete()

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
        _remove_if_empty(self.path.parent)

    def waiting(self) -> "Upload":
        """The same file where it may wait for an hour.

        Raises:
            InputError: it is no longer there.
        """
        kept = self.path.parents[1] / _WAITING / self.path.parent.name / "upload"
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.utime(self.path)
            os.replace(self.path, kept)
        except FileNotFoundError:
            raise InputError(_UPLOAD_GONE) from None
        _remove_if_empty(self.path.parent)
        return replace(self, path=kept)


def upload_field(**options: Any) -> gr.File:
    """A `gr.File` that takes uploads only: no URL, no path of the server.

    With `file_count="multiple"` it hands on a list of [`Upload`]s, each to be read or deleted; else the content of the
    one file, already deleted, or None.

    Not a subclass: Gradio writes a .pyi file beside the source of every subclass of a component.
    """
    file = gr.File(**options)
    folder = Path(file.GRADIO_CACHE).resolve()

    async def stay_in_cache(url_or_file_path: str | Path | None) -> str | None:
        # Gradio's own would download a URL. Uploads lie in its cache already; other paths were refused before.
        if url_or_file_path is not None and "://" in str(url_or_file_path):
            raise gr.Error(_NOT_AN_UPLOAD, print_exception=False)
        return None if url_or_file_path is None else str(url_or_file_path)

    def take(payload: Any) -> list[Upload]:
        uploads = []
        for one in [] if payload is None else getattr(payload, "root", None) or [payload]:
            path = Path(one.path).resolve()
            if folder not in path.parents or not path.is_file():
                raise gr.Error(_UPLOAD_GONE, print_exception=False)
            uploads.append(Upload(one.orig_name or "upload", path))
        return uploads

    def take_content(payload: Any) -> bytes | None:
        try:
            return next((upload.content() for upload in take(payload)), None)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from None

    file.async_move_resource_to_block_cache = stay_in_cache  # type: ignore[method-assign]
    several = options.get("file_count") == "multiple"
    file.preprocess = take if several else take_content  # type: ignore[method-assign, assignment]
    return file


def guard_fields(demo: gr.Blocks) -> None:
    """Refuse every request that names a file by URL, and print nothing of what a field does not take, whichever field
    of the page or of an endpoint it stands in.

    Gradio downloads a URL even for a field that takes no files, and prints a traceback with the value that a field
    does not take, which may be a name. A field that an event changes is made anew for the page, so that nothing can be
    set on the fields themselves.
    """
    preprocess = demo.preprocess_data

    def refuse_url(file: dict[str, Any]) -> dict[str, Any]:
        if "://" in file["path"]:
            raise gr.Error(_NOT_AN_UPLOAD, print_exception=False)
        return file

    async def preprocess_own(block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> Any:
        client_utils.traverse(inputs, refuse_url, client_utils.is_file_obj_with_meta)
        try:
            return await preprocess(block_fn, inputs, *rest, **options)
        except gr.Error as error:
            error.print_exception = False
            raise
        except (ValueError, TypeError, AttributeError):  # of Gradio's and pydantic's own parsing
            raise gr.Error(_NOT_A_VALUE, print_exception=False) from None

    demo.preprocess_data = preprocess_own  # type: ignore[method-assign]


def forget_closed_pages(demo: gr.Blocks, is_closed: Callable[[str], bool]) -> None:
    """Keep nothing of what a closed page showed: Gradio would for as long as it runs.

    After every event, since one that ends after its page was closed makes Gradio keep it anew.
    """
    process = demo.process_api

    async def process_own(*arguments: Any, **options: Any) -> Any:
        try:
            return await process(*arguments, **options)
        finally:
            session = options.get("session_hash")
            if session is not None and is_closed(session):
                demo.state_holder.session_data.pop(session, None)

    demo.process_api = process_own  # type: ignore[method-assign]


class BodyLimit:
    """ASGI middleware: what is longer than `limit` bytes is refused unparsed; uploads have limits of their own.

    A length that is told beforehand is answered with 413; without one, the connection ends once it is exceeded.
    """

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY_BYTES) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) == UPLOAD_ROUTE:
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if int(told) > self._limit:
            await PlainTextResponse("The request is too long: upload files.", status_code=413)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return {"type": "http.disconnect"} if seen > self._limit else message

        await self._app(scope, counted, send)


class _NoRoomError(MultiPartException):
    """The uploads together are more than may wait."""


class _Room:
    """Counts what uploads take of MAX_STORED_BYTES: those that wait to be read, and those that still arrive.

    What arrives is counted as it comes, since a request need not tell its length beforehand, or tell the truth.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._arriving = 0
        # At least what waits: what has been read and deleted is noticed only when the room seems used up.
        self._waiting = 0

    def check(self, folder: Path, size: int) -> None:
        """
        Raises:
            _NoRoomError: there is no room for `size` more bytes.
        """
        with self._lock:
            if self._waiting + self._arriving + size > MAX_STORED_BYTES:
                self._waiting = _stored_bytes(folder)
                if self._waiting + self._arriving + size > MAX_STORED_BYTES:
                    raise _NoRoomError(_NO_ROOM)

    def take(self, folder: Path, size: int) -> None:
        """As `check`; the bytes then belong to an upload that arrives, until it is settled."""
        with self._lock:
            self.check(folder, size)
            self._arriving += size

    def settle(self, taken: int, *, stored: int) -> None:
        """An upload has arrived or failed: of the bytes taken for it so many wait to be read."""
        with self._lock:
            self._arriving -= taken
            self._waiting += stored


_room = _Room()


class _FormParser(GradioMultiPartParser):
    """Gradio's own holds a part that is no file in memory, however long, and fails on it if progress is asked for."""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is not None:
            super().on_part_data(data, start, end)
        elif len(self._current_part.data) + end - start > MAX_FIELD_BYTES:
            raise MultiPartException(_NOT_A_FILE)
        else:
            self._current_part.data += data[start:end]


async def receive_upload(request: Request) -> Response:
    """Store the files of a form under random names, in place of Gradio's own route, which keeps their names.

    Two visitors who send the same file also get two files here, not one. What is refused gets one sentence, with 413
    where there is too much of it and else 400, and is not kept.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return PlainTextResponse("Send the files as multipart/form-data.", status_code=400)
    upload_id = request.query_params.get("upload_id")
    if upload_id:
        file_upload_statuses.track(upload_id)
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    incoming = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=folder))
    taken, stored_bytes = 0, 0
    stored = []

    async def counted() -> AsyncGenerator[bytes, None]:
        nonlocal taken
        async for chunk in request.stream():
            _room.take(folder, len(chunk))
            taken += len(chunk)
            yield chunk

    try:
        _room.check(folder, int(request.headers.get("content-length", "0")))
        form = await _FormParser(
            request.headers,
            counted(),
            max_files=MAX_MEMBERS,
            max_fields=MAX_FIELDS,
            upload_dir=incoming,
            max_file_size=MAX_UPLOAD_BYTES,
            upload_id=upload_id,
            upload_progress=file_upload_statuses if upload_id else None,
        ).parse()
        for file in form.getlist("files"):
            if isinstance(file, GradioUploadFile):
                path = incoming.parent / secrets.token_hex(16) / "upload"
                path.parent.mkdir()
                file.file.close()
                os.utime(str(file.file.name))  # it may have arrived long before the last one of its form
                os.replace(str(file.file.name), path)
                stored_bytes += path.stat().st_size
                stored.append(str(path))
    except MultiPartException as error:
        if upload_id:
            file_upload_statuses.set_done(upload_id)  # or the page would ask for its progress for ever
        too_much = isinstance(error, _NoRoomError) or "maximum allowed size" in error.message
        return PlainTextResponse(error.message, status_code=413 if too_much else 400)
    except ClientDisconnect:
        return Response(status_code=400)  # nobody is left to read it
    finally:
        shutil.rmtree(incoming, ignore_errors=True)  # of a refused or broken upload too
        _room.settle(taken, stored=stored_bytes)
    return JSONResponse(stored)


def _stored_bytes(folder: Path) -> int:
    total = 0
    for path in _below(folder):
        if path.name == "upload":
            with suppress(FileNotFoundError):  # read and deleted meanwhile
                total += path.stat().st_size
    return total


def _below(folder: Path) -> Iterator[Path]:
    """Files and folders below a folder, the deepest first, while others delete them: unlike `Path.rglob` before Python
    3.13, `os.walk` passes over a folder that is gone when its turn comes."""
    for parent, folders, files in os.walk(folder, topdown=False):
        yield from (Path(parent, name) for name in (*files, *folders))


@contextmanager
def upload_folder() -> Iterator[Path]:
    """A private folder for uploads, named by GRADIO_TEMP_DIR meanwhile; what nobody fetches goes after a while."""
    _delete_folders_left_behind()
    stop = threading.Event()
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix=_FOLDER, ignore_cleanup_errors=True) as name, _locked(Path(name)):
        folder = Path(name)
        os.environ["GRADIO_TEMP_DIR"] = name

        def sweep() -> None:
            while not stop.wait(ORPHAN_SECONDS / 4):
                delete_older(folder, seconds=ORPHAN_SECONDS, waiting_seconds=WAITING_SECONDS)

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
def _locked(folder: Path) -> Iterator[bool]:
    """Whether the folder could be locked; the lock goes with the process, however that ends."""
    if sys.platform == "win32":
        yield False
        return
    lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        is_locked = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # by another process, or the file system has no locks
            is_locked = False
        yield is_locked
    finally:
        os.close(lock)


def _delete_folders_left_behind() -> None:
    """Delete this user's folders for uploads whose Space was killed before it could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        try:
            about = folder.lstat()
            if sys.platform != "win32" and about.st_uid != os.getuid():
                continue
            if time.time() - about.st_ctime < _YOUNG_SECONDS:
                continue
            with _locked(folder) as is_free:
                if is_free:
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # no folder, gone meanwhile, or not ours to open


def delete_older(folder: Path, *, seconds: float, waiting_seconds: float) -> None:
    """Delete the files below `folder` that were last written longer ago than that, and folders that are empty.

    Not what still arrives, which its own request deletes, nor a folder so young that its file may be about to come.
    """
    now = time.time()
    for path in _below(folder):
        parts = path.relative_to(folder).parts
        if parts[0].startswith(_INCOMING):
            continue
        allowed = waiting_seconds if _WAITING in parts else seconds
        try:
            if path.stat().st_mtime >= now - allowed:
                continue
            if path.is_dir():
                _remove_if_empty(path)
            else:
                path.unlink()
                _remove_if_empty(path.parent)
        except FileNotFoundError:
            pass  # read and deleted meanwhile


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or somebody was quicker
        folder.rmdir()


def content_of_data_uri(uri: str) -> bytes:
    """The file in a data URI.

    Raises:
        InputError: it is no data URI with base64, or holds more than one radiograph may have.
    """
    match = re.match(r"data:[\w.+/-]*;base64,", uri)
    if match is None:
        raise InputError(_NO_DATA_URI)
    if len(uri) > MAX_FILE_BYTES * 4 // 3 + 1000:
        raise InputError(f"The image has more than {MAX_FILE_BYTES // 1024**2} MiB, more than a radiograph needs.")
    try:
        return content_of(base64.b64decode(uri[match.end() :], validate=True))
    except binascii.Error:
        raise InputError(_NO_DATA_URI) from None


# --- files that wait for a batch ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WaitingBatch:
    """What a page has been given for a batch so far."""

    uploads: tuple[Upload, ...] = ()
    table: dict[str, TableRow] | None = None

    def delete(self) -> None:
        for upload in self.uploads:
            upload.delete()


_Row = TypeVar("_Row")


def keep_unread(rows: Iterable[_Row], uploads: Sequence[Upload]) -> Iterator[_Row]:
    """The rows of a batch; however long they take, the uploads that are not read yet stay."""
    touched = time.monotonic()
    for row in rows:
        yield row
        if time.monotonic() - touched >= WAITING_SECONDS / 60:
            for upload in uploads:
                with suppress(FileNotFoundError):  # read and deleted
                    os.utime(upload.path)
            touched = time.monotonic()


def batch_items(uploads: Sequence[Upload]) -> list[BatchItem]:
    """The files of a batch, archives opened. Each upload is deleted once read, an archive at once (it stays open).

    Raises:
        InputError: there are more files than a batch may have.
    """
    items: list[BatchItem] = []
    for upload in uploads:
        named = collect([(upload.name, b"-")])[0]
        inside = collect([upload.path])
        if len(inside) == 1 and inside[0].place == str(upload.path):
            refusal = _refusal_of_archive(upload.path, inside[0])
            items.append(replace(named, content=refusal or upload.content))
            if refusal is not None:
                upload.delete()
        else:
            items += inside
            upload.delete()
    if len(items) > MAX_MEMBERS:
        for upload in uploads:
            upload.delete()
        raise InputError(f"These are more than {MAX_MEMBERS:,} files: give them in parts.")
    return items


def _refusal_of_archive(path: Path, item: BatchItem) -> Any:
    """The `content` of an archive that is refused as a whole, which says why; None for any other file."""
    try:
        with path.open("rb") as file:
            is_archive = file.read(4).startswith(ZIP_STARTS)
    except OSError:
        return None
    return item.content if is_archive else None
