"""Result folders that a command may write into."""

from pathlib import Path

import pytest

from benchmarks.cli import main
from benchmarks.latency import measure_speed
from benchmarks.provenance import check_out
from boneage_hf.errors import InputError

TINY = Path(__file__).parent / "checkpoints" / "tiny"
FILES = ("table.csv", "manifest.json")


def test_a_new_folder_and_one_about_the_same_are_taken_and_left_as_they_are(tmp_path: Path) -> None:
    check_out(tmp_path / "new" / "folder", FILES, task="gate")
    assert not (tmp_path / "new").exists()
    (tmp_path / "manifest.json").write_text('{"task": "gate", "revision": "1"}', encoding="utf-8")
    check_out(tmp_path, FILES, task="gate", revision="1")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_folder_of_other_files_or_results_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"task": "gate", "revision": "1"}', encoding="utf-8")
    for subject in ({"task": "speed"}, {"task": "gate", "revision": "2"}):
        with pytest.raises(InputError, match="results of something else; delete that folder"):
            check_out(tmp_path, FILES, **subject)
    (tmp_path / "thesis.txt").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="no gate results; name another folder"):
        check_out(tmp_path, FILES, task="gate")
    with pytest.raises(InputError, match="is a file"):
        check_out(tmp_path / "thesis.txt", FILES, task="gate")


@pytest.mark.parametrize(
    "command",
    [
        ["attention", str(TINY), "PREPARED"],
        ["gate", str(TINY), "PREPARED"],
        ["speed", str(TINY)],
        ["speed", "--training", "--set", "backbone=tiny"],
        ["compare", "RUN", "RUN", "--data", "PREPARED"],
    ],
    ids=lambda command: " ".join(command[::2]),
)
def test_what_cannot_be_written_or_would_be_overwritten_is_told_before_any_work(
    prepared_phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    command = [str(prepared_phantoms) if word == "PREPARED" else word for word in command]
    assert main([*command, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"run_key": "1"}', encoding="utf-8")
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "results of something else" in capsys.readouterr().err


def test_the_speed_of_other_weights_is_not_overwritten(tmp_path: Path) -> None:
    text = '{"task": "speed", "checkpoints": [{"checkpoint": "tiny", "revision": "another"}]}'
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="results of something else"):
        measure_speed([str(TINY)], out=tmp_path, peers=False, progress=False)
