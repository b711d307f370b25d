"""The load on the Space: what is counted, and that a real Space answers it."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.cli import main
from benchmarks.load import Answered, Load
from boneage_hf.errors import InputError

TINY = Path(__file__).parent / "checkpoints" / "tiny"
STAGES = {"read": 0.1, "gate": 0.02, "network": 0.2, "drawing": 0.08}


def test_latencies_and_stages_are_medians_over_the_answers() -> None:
    answered = [Answered(seconds, STAGES) for seconds in (0.5, 0.6, 0.7)] + [Answered(9.0, error="OSError: gone")]
    text = str(Load(2, 10.0, tuple(answered), (500.0, 510.0, 520.0)))
    assert "2 clients, 10 s, PNG of 1500 x 2000 px: 3 answers, 1 errors, 0.30 answers/s" in text
    assert "median 0.600 s, p95 0.690 s" in text
    assert "median 0.400 s, p95 0.400 s: read 0.100, gate 0.020, network 0.200, drawing 0.080" in text
    assert "500 MB warm, 510 MB at the end, 520 MB at most" in text
    assert "1 x OSError: gone" in text


def test_a_run_without_answers_is_told_all_the_same() -> None:
    assert "0 answers, 1 errors" in str(Load(1, 1.0, (Answered(1.0, error="OSError: gone"),), None))


@pytest.mark.parametrize("stream", ["", "event: error\ndata: null\n", "event: heartbeat\ndata: null\n"])
def test_a_stream_without_an_answer_is_an_error(stream: str) -> None:
    with pytest.raises(InputError):
        load._answer_of(stream)


class Broken(BaseHTTPRequestHandler):
    """Takes uploads, and fails each call."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps(["path"] if self.path.endswith("upload") else {"event_id": "1"}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"event: error\ndata: null\n")

    def log_message(self, *arguments: object) -> None:
        pass


class Cut(Broken):
    """Takes uploads and calls, and breaks off within the answer."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"event: complete\n")


@pytest.fixture(params=[Broken])
def broken(request: pytest.FixtureRequest) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_errors_of_a_space_are_counted(broken: str) -> None:
    run = load.measure_load(url=broken, checkpoint="default", clients=2, minutes=1, requests=3)
    assert [one.error for one in run.answered] == ["InputError: null"] * 6


@pytest.mark.parametrize("broken", [Cut], indirect=True)
def test_an_answer_that_breaks_off_is_an_error_and_ends_nothing(broken: str) -> None:
    run = load.measure_load(url=broken, checkpoint="default", clients=1, minutes=1, requests=2)
    assert [str(one.error).split(":")[0] for one in run.answered] == ["IncompleteRead"] * 2


@pytest.mark.parametrize("option", ["--clients", "--minutes", "--requests"])
def test_numbers_that_make_no_sense_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "--url", "http://127.0.0.1:1", option, "0"]) == 2
    assert "numbers above 0" in capsys.readouterr().err


def test_a_space_that_does_not_open_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "no-such-folder", "--clients", "1", "--requests", "1"]) == 2
    assert "did not open" in capsys.readouterr().err


@pytest.mark.slow
def test_a_space_is_opened_asked_and_ended() -> None:
    run = load.measure_load(url=None, checkpoint=str(TINY), clients=3, minutes=1, requests=2)
    assert [one.error for one in run.answered] == [None] * 6
    assert all(set(one.stages or {}) == set(load.STAGES) for one in run.answered)
