"""The table of the shipped checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
from make_tiny_checkpoint import CHECKPOINT

from benchmarks import checkpoints_table
from benchmarks.checkpoints_table import END, NOT_MEASURED, START, checkpoints_text, latency_of, write_into
from benchmarks.cli import main
from boneage_hf.errors import InputError
from boneage_hf.evaluation import evaluate_checkpoint


@pytest.fixture(scope="module")
def measured(prepared_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path_factory.mktemp("table") / "tiny"))
    evaluate_checkpoint(str(folder), prepared_phantoms, split="train", out=folder.parent / "out", progress=False)
    shutil.copy(folder.parent / "out" / "metrics.json", folder)
    return folder


def speed(results: Path, revision: str) -> None:
    (results / "speed").mkdir(parents=True)
    others = {"checkpoint": "other", "revision": "2" * 12}
    timed = {"checkpoints": [others, {"checkpoint": "tiny", "revision": revision}]}
    (results / "speed" / "manifest.json").write_text(json.dumps(timed))
    rows = "system,what,precision,threads,median_ms\ntiny,network,fp32,2,3.2\n"
    rows += 'other,"file to months, PNG 1500 x 2000",fp32,2,99.9\n'
    rows += 'tiny,"file to months, PNG 1500 x 2000",fp32,2,53.4\n'
    (results / "speed" / "speed.csv").write_text(rows)


def test_the_row_of_a_checkpoint_says_what_was_measured(measured: Path, tmp_path: Path) -> None:
    metrics = json.loads((measured / "metrics.json").read_text())
    speed(tmp_path, metrics["revision"])
    row = checkpoints_text([measured], results=tmp_path).splitlines()[2]
    low, high = metrics["metrics"]["mae_months_ci95"]
    assert f"| `phantom-train-36` | 36 | {metrics['metrics']['mae_months']:.2f} | {low:.2f} to {high:.2f} |" in row
    assert "| 53 ms (PNG 1500 x 2000, 2 threads) |" in row
    assert f"| `{metrics['revision']}` |" in row
    assert "| 0.0 MB |" in row


def test_a_latency_that_was_not_measured_of_these_weights_is_said_to_be_missing(
    measured: Path, tmp_path: Path
) -> None:
    speed(tmp_path, "0" * 12)
    assert f"| {NOT_MEASURED} |" in checkpoints_text([measured], results=tmp_path)
    assert latency_of("1" * 12, tmp_path) is None


def test_checkpoints_of_the_repository_follow_those_of_the_package(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints_table, "CLONE", tmp_path)
    monkeypatch.setattr(checkpoints_table, "DEFAULT_CHECKPOINT", tmp_path / "package" / "tiny")
    shutil.copytree(measured, tmp_path / "package" / "tiny")
    shutil.copytree(measured, tmp_path / "checkpoints" / "a-larger-one")
    assert [line.split("`")[1] for line in checkpoints_text().splitlines()[2:3]] == ["tiny"]
    assert "a-larger-one" not in checkpoints_text()  # no clone: whose folder this is, nobody knows
    (tmp_path / "pyproject.toml").touch()
    lines = checkpoints_text().splitlines()
    assert [line.split("`")[1] for line in lines[2:4]] == ["tiny", "a-larger-one"]
    assert sum(line.startswith("`a-larger-one` by sex: girls") for line in lines) == 1


def test_results_of_other_weights_are_refused(measured: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(measured, tmp_path / "other"))
    content = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(content | {"revision": "0" * 12}))
    with pytest.raises(InputError, match="evaluate it again"):
        checkpoints_text([folder])


def test_the_command_writes_between_the_marks_and_nowhere_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    assert main(["checkpoints", "--write", str(document)]) == 0
    assert document.read_text() == f"before\n{START}\n{checkpoints_text()}\n{END}\nafter\n"
    capsys.readouterr()
    assert main(["checkpoints"]) == 0
    assert capsys.readouterr().out == checkpoints_text() + "\n"


def test_a_document_without_marks_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing\n")
    with pytest.raises(InputError, match="no place for the table"):
        write_into(tmp_path / "README.md")
