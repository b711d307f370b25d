"""How the Space serves under load: latencies, errors and memory with many clients, and where the time of one goes.

Requests are those of any client: the file is uploaded, `/predict` called, its answer awaited. Pictures are drawn
phantoms, so that nothing of a patient is needed.
"""

import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from boneage_hf.errors import InputError
from boneage_hf.phantom import draw

#: Width and height of the picture, px: an original of the RSNA data has about this size.
PICTURE_SIZE = (1500, 2000)

STAGES = ("read", "gate", "network", "drawing")

#: Longest that the Space may take to open, and one request to be answered, seconds.
_START_SECONDS, _REQUEST_SECONDS = 300.0, 300.0

#: The first share of a run warms up; memory is measured from its end on.
_WARM_UP = 0.2


@dataclass(frozen=True)
class Answered:
    """One request: seconds until its answer was there, seconds by stage as the server says, or what went wrong."""

    seconds: float
    stages: dict[str, float] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Load:
    """What came of a run.

    Args:
        clients: that asked at the same time, each its next request as soon as the last was answered.
        rss_mb: resident memory of the server after warming up, at the end, and at most; None for a server that this
            machine does not run.
    """

    clients: int
    seconds: float
    answered: tuple[Answered, ...]
    rss_mb: tuple[float, float, float] | None

    def __str__(self) -> str:
        good = [one for one in self.answered if one.error is None]
        errors = [one.error for one in self.answered if one.error is not None]
        lines = [
            f"{self.clients} {'client' if self.clients == 1 else 'clients'}, {self.seconds:.0f} s, PNG of "
            f"{PICTURE_SIZE[0]} x {PICTURE_SIZE[1]} px: {len(good)} answers, {len(errors)} errors, "
            f"{len(good) / self.seconds:.2f} answers/s"
        ]
        if good:
            seconds = [one.seconds for one in good]
            lines.append(
                f"  latency      median {statistics.median(seconds):.3f} s, p95 {_percentile_95(seconds):.3f} s"
            )
            staged = [one.stages for one in good if one.stages is not None]
            totals = [sum(stages.values()) for stages in staged]
            lines.append(
                f"  server time  median {statistics.median(totals):.3f} s, p95 {_percentile_95(totals):.3f} s: "
                + ", ".join(f"{name} {statistics.median(one[name] for one in staged):.3f}" for name in STAGES)
            )
        if self.rss_mb is not None:
            warm, end, most = self.rss_mb
            lines.append(f"  memory       {warm:.0f} MB warm, {end:.0f} MB at the end, {most:.0f} MB at most")
        lines += [f"  error        {errors.count(error)} x {error}" for error in sorted(set(errors))]
        return "\n".join(lines)


def measure_load(*, url: str | None, checkpoint: str, clients: int, minutes: float, requests: int | None) -> Load:
    """Ask a Space again and again.

    Args:
        url: of an open Space; None opens one on a free port with `checkpoint` and ends it afterwards.
        clients: that ask at the same time.
        minutes: until no client asks any more; left aside if `requests` is given.
        requests: of each client.

    Raises:
        InputError: a number makes no sense, or the Space does not open.
    """
    if clients < 1 or minutes <= 0 or (requests is not None and requests < 1):
        raise InputError("--clients, --minutes and --requests take numbers above 0.")
    picture = _picture()
    with _space(url, checkpoint) as (address, pid):
        _ask(address, picture)  # code paths of the first request
        began = time.perf_counter()
        end = began + 60 * minutes
        memory: list[float] = []
        stop = threading.Event()

        def ask() -> list[Answered]:
            answered: list[Answered] = []
            while len(answered) < requests if requests is not None else time.perf_counter() < end:
                answered.append(_ask(address, picture))
            return answered

        def watch() -> None:
            while not stop.wait(1.0):
                memory.append(_resident_mb(pid))

        watching = threading.Thread(target=watch, daemon=True)
        if pid is not None and Path("/proc/self/statm").exists():
            watching.start()
        with ThreadPoolExecutor(clients) as pool:
            parts = [part.result() for part in [pool.submit(ask) for _ in range(clients)]]
        seconds = time.perf_counter() - began
        stop.set()
    warm = memory[int(len(memory) * _WARM_UP) :]
    rss = None if not warm else (warm[0], warm[-1], max(memory))
    return Load(clients, seconds, tuple(one for part in parts for one in part), rss)


def _ask(url: str, picture: bytes) -> Answered:
    began = time.perf_counter()
    try:
        boundary = "a-boundary-that-no-picture-holds"
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="hand.png"\r\n\r\n'
        body = head.encode() + picture + f"\r\n--{boundary}--\r\n".encode()
        uploaded = json.loads(_request(f"{url}/gradio_api/upload", body, f"multipart/form-data; boundary={boundary}"))
        file = {"path": uploaded[0], "meta": {"_type": "gradio.FileData"}}
        call = f"{url}/gradio_api/call/predict"
        asked = _request(call, json.dumps({"data": [file, "female", 100]}).encode(), "application/json")
        told = _answer_of(_request(f"{call}/{json.loads(asked)['event_id']}"))
    # urllib's errors and time-outs are OSErrors; a connection that breaks within a reply is none.
    except (OSError, HTTPException, InputError) as error:
        return Answered(time.perf_counter() - began, error=f"{type(error).__name__}: {error}")
    return Answered(time.perf_counter() - began, stages=told["seconds"])


def _request(url: str, body: bytes | None = None, content_type: str = "") -> str:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": content_type} if body else {})
    with _DIRECT.open(request, timeout=_REQUEST_SECONDS) as reply:
        return str(reply.read().decode("utf-8"))


#: Without a proxy: the Space is on this machine or named by its address.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _resident_mb(pid: int | None) -> float:
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1024**2


def _answer_of(stream: str) -> dict[str, Any]:
    """The JSON answer in the event stream of one call."""
    event = ""
    for line in stream.splitlines():
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: ") and event == "complete":
            answer: dict[str, Any] = json.loads(line.removeprefix("data: "))[0]
            return answer
        elif line.startswith("data: ") and event == "error":
            raise InputError(line.removeprefix("data: "))
    raise InputError("the stream ended without an answer")


def _percentile_95(values: list[float]) -> float:
    return float(np.percentile(values, 95))


def _picture() -> bytes:
    """A drawn phantom with the noise of a detector, so that it decodes no quicker than a radiograph does."""
    image = np.asarray(draw(120, "female", seed=0).resize(PICTURE_SIZE, Image.Resampling.BICUBIC), dtype=np.int16)
    noise = np.random.default_rng(0).integers(-3, 4, image.shape)
    stream = io.BytesIO()
    Image.fromarray(np.clip(image + noise, 0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@contextmanager
def _space(url: str | None, checkpoint: str) -> Iterator[tuple[str, int | None]]:
    if url is not None:
        yield url.rstrip("/"), None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "boneage_hf.cli", "demo", "--model", checkpoint, "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:  # a pipe that nobody reads would block the server
        server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(server, address, said)
            yield address, server.pid
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait(server: "subprocess.Popen[bytes]", url: str, said: IO[str]) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            said.seek(0)
            last = said.read().strip().splitlines()[-1:] or ["it ended without a word"]
            raise InputError(f"The Space did not open: {last[0]}")
        try:
            _request(f"{url}/healthz")
            return
        except OSError:
            time.sleep(0.5)
    raise InputError("The Space did not open within five minutes.")
