"""Hostile files: each is a picture or one sentence, soon, in little memory and without a word of what is in it.

They are read in processes of their own, so that an abort, a hang or an endless allocation is seen as what it is.
"""

import io
import logging
import multiprocessing
import queue
import re
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout

import pytest
from drawn import PATIENT_NAME
from hostile import hostile_files

from boneage_hf.batch import collect
from boneage_hf.errors import InputError
from boneage_hf.radiograph import MAX_AGE_MONTHS, Prefill, Radiograph, read, read_prefill

resource = pytest.importorskip("resource", reason="limits of memory and time are those of POSIX")

#: Longest for one file, generous since other processes share the machine.
SECONDS_PER_FILE = 20.0

#: Most memory that reading may add: a bomb here that is unpacked and copied once takes more.
MEMORY_BYTES = 768 * 1024**2


def _sentence(error: InputError) -> None:
    told = str(error)
    assert re.fullmatch(r"[A-Z][^\n]*\.", told), told
    assert "Secretname" not in told
    assert "Zaphod" not in told


def _check(content: bytes) -> bool:
    """Whether the file could be read; AssertionError, or whatever it threw, where it behaved in no allowed way."""
    is_read = False
    try:
        assert isinstance(read(content), Radiograph)
        is_read = True
    except InputError as error:
        _sentence(error)
    header = read_prefill(content)
    assert isinstance(header, Prefill)
    assert header.chronological_age_months is None or 0 <= header.chronological_age_months <= MAX_AGE_MONTHS
    for item in collect([("upload", content)]):
        try:
            inside = item.content()
            assert isinstance(inside, bytes)
        except InputError as error:
            _sentence(error)
    return is_read


def _work(each: int, answers: multiprocessing.Queue) -> None:
    """In the child: (name, outcome, seconds) of every file, the name alone before it is read."""
    warnings.simplefilter("error")
    logged = io.StringIO()
    logging.basicConfig(stream=logged, level=logging.DEBUG, force=True)
    in_use = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for name, content in hostile_files(each):
        answers.put((name, None, 0.0))
        printed = io.StringIO()
        logged.truncate(0)  # what PIL said while the file was drawn
        start = time.monotonic()
        try:
            with redirect_stdout(printed), redirect_stderr(printed):
                outcome = "read" if _check(content) else "refused"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        if printed.getvalue() or logged.getvalue():
            outcome = f"said something: {printed.getvalue()}{logged.getvalue()}"
        answers.put((name, outcome, time.monotonic() - start))
        del content
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - in_use
    answers.put(("", str(grown), 0.0))


def _outcomes(each: int) -> tuple[dict[str, str], float, int]:
    """(name -> outcome, longest seconds, bytes grown); a file that ends or blocks the child is named."""
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue = context.Queue()
    child = context.Process(target=_work, args=(each, answers))
    child.start()
    outcomes: dict[str, str] = {}
    slowest, current = 0.0, "the start"
    try:
        while True:
            waited = time.monotonic()
            while True:
                try:
                    name, outcome, seconds = answers.get(timeout=1)
                    break
                except queue.Empty:
                    assert child.is_alive(), f"{current} ended the process with {child.exitcode}"
                    assert time.monotonic() - waited < 4 * SECONDS_PER_FILE, f"{current} does not end"
            if name == "":
                return outcomes, slowest, int(outcome)
            current = name
            if outcome is not None:
                outcomes[name] = outcome
                slowest = max(slowest, seconds)
    finally:
        child.kill()
        child.join()


def _expect_good_manners(each: int) -> dict[str, str]:
    outcomes, slowest, grown = _outcomes(each)
    bad = {name: outcome for name, outcome in outcomes.items() if outcome not in ("read", "refused")}
    assert bad == {}
    assert slowest < SECONDS_PER_FILE
    assert grown < MEMORY_BYTES
    return outcomes


def test_a_few_of_each_kind_are_read_or_refused(capfd: pytest.CaptureFixture[str]) -> None:
    outcomes = _expect_good_manners(each=1)
    assert len(outcomes) > 90
    assert list(outcomes.values()).count("refused") > 50
    assert "read" in outcomes.values()
    told = capfd.readouterr()  # libtiff writes its own remarks there, without values
    assert "Secretname" not in told.out + told.err


@pytest.mark.slow
def test_hundreds_are_read_or_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert len(_expect_good_manners(each=10)) > 600
    told = capfd.readouterr()
    assert "Secretname" not in told.out + told.err


def test_the_files_do_carry_a_name_to_give_away() -> None:
    names = [name for name, content in hostile_files(1) if PATIENT_NAME.encode() in content]
    assert len(set(names)) == len(names) > 10
