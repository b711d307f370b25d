import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from own_protocol import protocol_file, protocol_of
from test_benchmarks_measured import metrics_json

from benchmarks.cli import main
from benchmarks.registry import load_published
from benchmarks.results_folder import result_folders
from benchmarks.systems import constant
from boneage_hf.data import load_split

ROOT = Path(__file__).parent.parent


def test_report_writes_its_files_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--out", str(tmp_path), "--measured", str(tmp_path / "none.csv")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.html", "report.csv", "manifest.json"}
    assert capsys.readouterr().out.splitlines()[0] == f"wrote {tmp_path / 'report.md'}"


def test_check_counts_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--measured", str(tmp_path / "none.csv")]) == 0
    assert capsys.readouterr().out == (
        f"{len(load_published())} published, 3 printed and 0 measured rows, the boxes of 328 radiographs and "
        f"{len(result_folders())} result folders are in order.\n"
    )


def test_the_tables_of_the_repository_are_in_order() -> None:
    assert main(["check"]) == 0


def test_an_added_row_appears_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, table = tmp_path / "metrics.json", tmp_path / "measured.csv"
    source.write_text(json.dumps(metrics_json()), encoding="utf-8")
    assert main(["add", str(source), "--system", "Example", "--measured", str(table)]) == 0
    assert main(["add", str(source), "--system", "Example", "--measured", str(table)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "added Example under rsna-test-200-decimal, n = 200",
        "replaced Example under rsna-test-200-decimal, n = 200",
    ]
    main(["report", "--out", str(tmp_path / "out"), "--measured", str(table)])
    assert "| Example | rsna-test-200-decimal | 200 |" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_a_row_that_is_measured_again_keeps_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, table = tmp_path / "metrics.json", tmp_path / "measured.csv"
    source.write_text(json.dumps(metrics_json()), encoding="utf-8")
    again = ["add", str(source), "--measured", str(table)]
    assert main(again) == 2
    assert "the table has no row of" in capsys.readouterr().err
    assert main([*again, "--system", "Example"]) == 0
    capsys.readouterr()
    assert main(again) == 0
    assert capsys.readouterr().out.startswith("replaced Example under ")
    assert main([*again, "--system", "Another"]) == 0
    capsys.readouterr()
    assert main(again) == 2
    assert "the table has several rows of" in capsys.readouterr().err


def test_a_system_without_a_checkpoint_keeps_its_row(tmp_path: Path) -> None:
    source, table = tmp_path / "metrics.json", tmp_path / "measured.csv"
    source.write_text(json.dumps(metrics_json() | {"checkpoint": "A constant"}), encoding="utf-8")
    first = ["add", str(source), "--measured", str(table)]
    assert main([*first, "--system", "A constant", "--checkpoint", "none"]) == 0
    before = table.read_text(encoding="utf-8")
    assert main(first) == 0
    assert table.read_text(encoding="utf-8") == before


def test_a_mistake_is_told_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["add", str(tmp_path / "no.json"), "--system", "A", "--measured", str(tmp_path / "m.csv")]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        "error: the metrics file cannot be read as JSON; give the metrics.json that `boneage evaluate` wrote.\n"
    )


def test_a_folder_that_cannot_be_written_is_a_mistake_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["report", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "give another folder with --out" in capsys.readouterr().err


def test_protocols_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["protocols"]) == 0
    assert "reference-test-1024 " in capsys.readouterr().out


def test_the_module_runs_and_its_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['benchmarks', '--help']\n"
        "try:\n    runpy.run_module('benchmarks', run_name='__main__')\n"
        "except SystemExit as end:\n    print('exit', end.code)\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'transformers'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-2:] == ["exit 0", "[]"]
    assert "report" in run.stdout


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t.assign(id=[*t["id"][1:], "x"]), [], "1 of 8 images have no prediction"),
        (lambda t: pd.concat([t, t.iloc[:1].assign(id="x")]), [], "1 predictions are of no image"),
        (lambda t: pd.concat([t, t.iloc[:1]]), [], "repeats the id"),
        (lambda t: t.iloc[1:], [], "1 of 8 images have no prediction"),
        (
            lambda t: t.assign(predicted_months=["nan", *t["predicted_months"][1:]]),
            [],
            "missing, no number, or negative",
        ),
        (lambda t: t.assign(predicted_months=t["predicted_months"] / 12), [], "declare --unit years"),
        (lambda t: t, ["--unit", "years"], "declare --unit months"),
        (lambda t: t.assign(truth=t["truth"] + 3), ["--truth-column", "truth"], "another version of the ground truth"),
        (lambda t: t.iloc[:0], [], "no row"),
    ],
)
def test_bad_predictions_end_a_run_in_one_sentence_and_leave_nothing(
    prepared_phantoms: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[pd.DataFrame], pd.DataFrame],
    options: list[str],
    message: str,
) -> None:
    rows = load_split(prepared_phantoms, "validation").select_columns(["id", "bone_age_months"])
    months = np.asarray(rows["bone_age_months"], dtype=float)
    table = pd.DataFrame({"id": rows["id"], "predicted_months": months + 5, "truth": months})
    change(table).to_csv(tmp_path / "theirs.csv", index=False)
    arguments = ["--protocol", str(protocol_file(protocol_of(prepared_phantoms), tmp_path)), *options]
    arguments += ["--data", str(prepared_phantoms), "--out", str(tmp_path / "out")]
    assert main(["run", "--system", f"predictions-csv:{tmp_path / 'theirs.csv'}", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_group_without_an_image_ends_a_run_in_one_sentence(
    prepared_phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = load_split(prepared_phantoms, "train")
    girls = train.select([place for place, code in enumerate(train["sex"]) if code == 0])
    monkeypatch.setattr(constant, "load_split", lambda *_: girls)
    arguments = ["--protocol", str(protocol_file(protocol_of(prepared_phantoms), tmp_path))]
    arguments += ["--data", str(prepared_phantoms), "--out", str(tmp_path / "out")]
    assert main(["run", "--system", "constant", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: no male child is in the training split")
    assert not (tmp_path / "out").exists()
