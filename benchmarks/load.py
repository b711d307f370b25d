"""How the Space serves under load: latencies, errors and memory with many clients, and where the time of one goes.

Requests are those of any client: the file is uploaded, `/predict` called, its answer awaited. Pictures are drawn
phantoms, so that nothing of a patient is needed.
"""

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from boneage_hf.errors import InputError
from boneage_hf.phantom import draw, png_bytes

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
    with _space(url, checkpoint) as (address, process):
        return asyncio.run(_run(address, process, picture, clients, minutes, requests))


async def _run(
    url: str, process: psutil.Process | None, picture: bytes, clients: int, minutes: float, requests: int | None
) -> Load:
    began = time.perf_counter()
    end = None if requests is not None else began + 60 * minutes
    answered: list[Answered] = []
    memory: list[float] = []

    async def ask(http: httpx.AsyncClient) -> None:
        count = 0
        while count < requests if requests is not None else time.perf_counter() < (end or 0):
            answered.append(await _ask(http, url, picture))
            count += 1

    async def watch() -> None:
        while process is not None:
            memory.append(process.memory_info().rss / 1024**2)
            await asyncio.sleep(1)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=_REQUEST_SECONDS, limits=limits, trust_env=False) as http:
        await _ask(http, url, picture)  # connection and code paths of the first request
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(ask(http) for _ in range(clients)))
        watching.cancel()
    warm = memory[int(len(memory) * _WARM_UP) :]
    rss = None if not warm else (warm[0], warm[-1], max(memory))
    return Load(clients, time.perf_counter() - began, tuple(answered), rss)


async def _ask(http: httpx.AsyncClient, url: str, picture: bytes) -> Answered:
    began = time.perf_counter()
    try:
        upload = await http.post(f"{url}/gradio_api/upload", files={"files": ("hand.png", picture)})
        upload.raise_for_status()
        file = {"path": upload.json()[0], "meta": {"_type": "gradio.FileData"}}
        call = f"{url}/gradio_api/call/predict"
        asked = await http.post(call, json={"data": [file, "female", 100]})
        asked.raise_for_status()
        answer = await http.get(f"{call}/{asked.json()['event_id']}")
        told = _answer_of(answer.text)
    except (httpx.HTTPError, InputError) as error:
        return Answered(time.perf_counter() - began, error=f"{type(error).__name__}: {error}")
    return Answered(time.perf_counter() - began, stages=told["seconds"])


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
    return png_bytes(Image.fromarray(np.clip(image + noise, 0, 255).astype(np.uint8)))


@contextmanager
def _space(url: str | None, checkpoint: str) -> Iterator[tuple[str, psutil.Process | None]]:
    if url is not None:
        yield url.rstrip("/"), None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "boneage_hf.cli", "demo", "--model", checkpoint, "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(server, address)
        yield address, psutil.Process(server.pid)
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait(server: "subprocess.Popen[str]", url: str) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            said = (server.stderr.read() if server.stderr else "").strip().splitlines()
            raise InputError(f"The Space did not open: {said[-1] if said else 'it ended without a word'}")
        try:
            if httpx.get(f"{url}/healthz", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise InputError("The Space did not open within five minutes.")
