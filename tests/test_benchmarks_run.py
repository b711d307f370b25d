"""One run: what it writes, what it refuses, and that it goes on where it was stopped."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from own_protocol import protocol_file, protocol_of

from benchmarks import run
from benchmarks.cli import main
from benchmarks.findings import check_findings
from benchmarks.measured import RESULTS
from benchmarks.protocol import PROTOCOLS, Protocol
from benchmarks.results_folder import Result, load_result, recompute, result_folders
from benchmarks.run import load_test_set, run_system
from benchmarks.systems import System
from benchmarks.systems.checkpoint import trained_on
from boneage_hf.data import load_split
from boneage_hf.errors import InputError
from boneage_hf.evaluation import predict_dataset
from boneage_hf.hub import DEFAULT_CHECKPOINT, load_pipeline
from boneage_hf.interval_boneage import interval_months

ROOT = Path(__file__).parent.parent
TINY = str(Path(__file__).parent / "checkpoints" / "tiny")


class Counting(System):
    """Says 100 months and counts the images; fails after `limit` of them."""

    name, revision, trained_on, preprocessing = "Counting", "1", (), "none"

    def __init__(self, limit: int = 1000, months: float = 100.0) -> None:
        self.limit, self.months, self.seen = limit, months, 0

    def predict(self, dataset: Any) -> pd.DataFrame:
        if self.seen + len(dataset) > self.limit:
            raise ConnectionError("stopped")
        self.seen += len(dataset)
        months = self.months + np.arange(self.seen - len(dataset), self.seen)
        return pd.DataFrame({"id": dataset["id"], "predicted_months": months})


@pytest.fixture
def protocol(prepared_phantoms: Path) -> Protocol:
    return protocol_of(prepared_phantoms)


def test_a_run_of_a_checkpoint_predicts_what_evaluate_predicts(
    prepared_phantoms: Path, protocol: Protocol, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--protocol", str(protocol_file(protocol, tmp_path)), "--data", str(prepared_phantoms)]
    assert main(["run", "--system", f"checkpoint:{TINY}", *arguments, "--device", "cpu", "--out", str(out)]) == 0
    assert "mae_months" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        *("predictions.csv", "metrics.json", "manifest.json", "agreement.svg")
    }
    expected = predict_dataset(
        load_pipeline(TINY, device="cpu"), load_split(prepared_phantoms, "validation"), progress=False
    )
    found = pd.read_csv(out / "predictions.csv", dtype={"id": str})
    assert list(found.columns) == ["id", "predicted_months"]
    assert found["id"].tolist() == expected["id"].tolist()
    assert found["predicted_months"].to_numpy() == pytest.approx(expected["predicted_months"].to_numpy(), abs=1e-3)
    recompute(load_result(out), prepared_phantoms)


def test_the_manifest_says_what_ran_on_what(prepared_phantoms: Path, protocol: Protocol, tmp_path: Path) -> None:
    summary = run_system(Counting(), protocol=protocol, data=prepared_phantoms, out=tmp_path / "out", progress=False)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["system"]["revision"] == "1"
    assert Protocol.from_dict(manifest["protocol"]) == protocol
    assert manifest["ground_truth_fingerprint"] == protocol.ground_truth_fingerprint
    assert manifest["predictions_sha256"] == summary["predictions_sha256"]
    assert {"commit", "versions", "hardware", "time", "seconds", "data"} <= set(manifest)
    assert manifest["hardware"]["cores"] == os.cpu_count()
    assert str(prepared_phantoms) not in json.dumps(manifest)


def test_a_stopped_run_goes_on_where_it_was(
    prepared_phantoms: Path, protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "PART", 3)
    options: dict[str, Any] = {"protocol": protocol, "data": prepared_phantoms, "progress": False}
    with pytest.raises(ConnectionError):
        run_system(Counting(limit=6), **options, out=tmp_path / "out")
    assert not (tmp_path / "out" / "predictions.csv").exists()
    second = Counting()
    second.seen = 6  # the months that it says go on
    run_system(second, **options, out=tmp_path / "out")
    assert second.seen == 8
    run_system(Counting(), **options, out=tmp_path / "whole")
    stopped, whole = ((tmp_path / name / "predictions.csv").read_bytes() for name in ("out", "whole"))
    assert stopped == whole
    assert not (tmp_path / "out" / ".parts").exists()


def test_a_finished_run_is_read_and_not_repeated(prepared_phantoms: Path, protocol: Protocol, tmp_path: Path) -> None:
    options: dict[str, Any] = {"protocol": protocol, "data": prepared_phantoms, "out": tmp_path, "progress": False}
    first, again = run_system(Counting(), **options), Counting()
    picture = (tmp_path / "agreement.svg").read_bytes()
    (tmp_path / "agreement.svg").unlink()
    assert run_system(again, **options) == first
    assert again.seen == 0
    assert (tmp_path / "agreement.svg").read_bytes() == picture


def test_the_results_of_another_run_are_not_overwritten(
    prepared_phantoms: Path, protocol: Protocol, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"protocol": protocol, "data": prepared_phantoms, "progress": False}
    run_system(Counting(), **options, out=tmp_path / "out")
    other = Counting()
    other.revision = "2"
    with pytest.raises(InputError, match="another run"):
        run_system(other, **options, out=tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="no results of a run"):
        run_system(Counting(), **options, out=tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.iloc[1:], "exactly one per image"),
        (lambda table: pd.concat([table, table.iloc[:1]]), "exactly one per image"),
        (lambda table: table.assign(id="x"), "exactly one per image"),
        (lambda table: table.assign(predicted_months=float("nan")), "NaN"),
        (lambda table: table.drop(columns="predicted_months"), "column predicted_months"),
        (lambda table: table.assign(predicted_months=table["predicted_months"] / 12), "multiply them by 12"),
    ],
)
def test_bad_predictions_are_refused_and_nothing_is_left(
    prepared_phantoms: Path, protocol: Protocol, tmp_path: Path, change: Any, message: str
) -> None:
    class Bad(Counting):
        def predict(self, dataset: Any) -> pd.DataFrame:
            table: pd.DataFrame = change(super().predict(dataset))
            return table

    with pytest.raises(InputError, match=message):
        run_system(Bad(), protocol=protocol, data=prepared_phantoms, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_labels_of_another_version_are_refused(
    prepared_phantoms: Path, protocol: Protocol, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = protocol_of(prepared_phantoms, ground_truth_fingerprint="0" * 64)
    with pytest.raises(InputError, match="not those of drawn-hands-8"):
        load_test_set(wrong, prepared_phantoms)
    arguments = ["--data", str(prepared_phantoms), "--out", str(tmp_path / "out")]
    assert main(["run", "--system", "constant", "--protocol", "reference-test-1024", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_protocol_whose_labels_are_not_known_cannot_be_run(prepared_phantoms: Path) -> None:
    with pytest.raises(InputError, match="rsna-test-200-decimal or rsna-test-200-integer"):
        load_test_set(PROTOCOLS["rsna-test-200"], prepared_phantoms)
    with pytest.raises(InputError, match="stay cited"):
        load_test_set(PROTOCOLS["dha-1383"], prepared_phantoms)


def test_the_system_that_the_readme_adds_runs_and_is_short(
    prepared_phantoms: Path, protocol: Protocol, tmp_path: Path
) -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(code.splitlines()) < 30
    script = tmp_path / "brightness.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script, protocol_file(protocol, tmp_path), prepared_phantoms, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = load_result(tmp_path / "out")
    assert float(done.stdout) == result.metrics["metrics"]["mae_months"]
    assert result.system == "Mean grey level"


@pytest.mark.slow
def test_two_processes_write_what_one_writes(prepared_phantoms: Path, protocol: Protocol, tmp_path: Path) -> None:
    file = protocol_file(protocol, tmp_path)
    command = ["-m", "benchmarks", "run", "--system", f"checkpoint:{TINY}", "--protocol", str(file)]
    command += ["--data", str(prepared_phantoms), "--device", "cpu", "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29519"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for start, out in ((launch, "two"), ([sys.executable], "one")):
        subprocess.run([*start, *command, str(tmp_path / out)], cwd=ROOT, env=environment, check=True, timeout=300)
    one, two = ((tmp_path / name / "predictions.csv").read_bytes() for name in ("one", "two"))
    assert one == two
    assert json.loads((tmp_path / "two" / "manifest.json").read_text(encoding="utf-8"))["processes"] == 2


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda metrics: metrics["metrics"].update(mae_months=1.0), "mae_months"),
        (lambda metrics: metrics["metrics"].update(mae_months_ci95=[1.0, 2.0]), r"mae_months_ci95\[0\]"),
        (lambda metrics: metrics["groups"][-1].update(bias_months=0.5), "bias_months"),
        (lambda metrics: metrics["groups"].pop(), "groups"),
        (lambda metrics: metrics["bland_altman"].update(bias_months=0.5), "bias_months"),
        (lambda metrics: metrics["error_over_age"].update(slope_over_reference=0.5), "slope_over_reference"),
        (lambda metrics: metrics["equal_over_age"].update(verdict="as it should be"), "verdict"),
    ],
)
def test_a_figure_that_does_not_follow_from_the_predictions_is_found(
    prepared_phantoms: Path, counted: Result, change: Callable[[dict[str, Any]], None], name: str
) -> None:
    recompute(counted, prepared_phantoms)
    metrics = copy.deepcopy(dict(counted.metrics))
    change(metrics)
    with pytest.raises(InputError, match=rf"{name} is .* in metrics\.json"):
        recompute(dataclasses.replace(counted, metrics=metrics), prepared_phantoms)


class Doubting(Counting):
    """Counting, with intervals that follow from the predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = {
            "alpha": 0.1,
            "edges_months": [102.0, 105.0],
            "quantiles": [1.0, 2.0, 3.0],
            "knots_months": [100.0, 110.0],
            "spread_months": [8.0, 12.0],
        }
        self.interval = self.ends

    def predict(self, dataset: Any) -> pd.DataFrame:
        table = super().predict(dataset)
        low, high = interval_months(table["predicted_months"], self.ends)
        return table.assign(interval_low_months=low, interval_high_months=high)


@pytest.mark.parametrize(("key", "value"), [("coverage", 0.5), ("mean_width_months", 20.0)])
def test_coverage_and_width_of_intervals_are_found_again_from_the_predictions(
    prepared_phantoms: Path, tmp_path: Path, key: str, value: float
) -> None:
    run_system(
        Doubting(),
        protocol=protocol_of(prepared_phantoms),
        data=prepared_phantoms,
        out=tmp_path / "out",
        progress=False,
    )
    result = load_result(tmp_path / "out")
    recompute(result, prepared_phantoms)
    metrics = copy.deepcopy(dict(result.metrics))
    metrics["interval"]["all"][key] = value
    with pytest.raises(InputError, match=rf"{key} is {value} in metrics\.json"):
        recompute(dataclasses.replace(result, metrics=metrics), prepared_phantoms)


@pytest.fixture(scope="module")
def counted(prepared_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("counted") / "out"
    run_system(Counting(), protocol=protocol_of(prepared_phantoms), data=prepared_phantoms, out=out, progress=False)
    return load_result(out)


@pytest.mark.development
def test_committed_figures_follow_from_committed_predictions(prepared_rsna: Path) -> None:
    """Runs, stress tests and comparisons; attention, gate and speed keep no predictions."""
    check_findings(result_folders(), data=prepared_rsna)


def predictions_of(prepared: Path, folder: Path) -> str:
    """`--system` for predictions of the eight hands that somebody made elsewhere."""
    ids = list(load_split(prepared, "validation")["id"])
    table = pd.DataFrame({"id": ids, "predicted_months": np.linspace(60, 130, len(ids))})
    table.to_csv(folder / "theirs.csv", index=False)
    return f"predictions-csv:{folder / 'theirs.csv'}"


def test_a_finished_run_is_not_taken_for_one_of_a_system_that_has_seen_other_data(
    prepared_phantoms: Path, protocol: Protocol, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "--system", predictions_of(prepared_phantoms, tmp_path), "--data", str(prepared_phantoms)]
    command += ["--protocol", str(protocol_file(protocol, tmp_path)), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert main(command) == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    assert main([*command, "--trained-on", "rsna-training-12611"]) == 2
    assert "trained on unknown data, now it is rsna-training-12611; name another folder" in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("checkpoint", ["default", "vgg19-attention", "vgg19-attention-sex"])
def test_a_committed_run_says_of_its_checkpoint_what_is_known_today(checkpoint: str) -> None:
    manifest = json.loads((RESULTS / f"{checkpoint}-test-1024" / "manifest.json").read_text(encoding="utf-8"))
    folder = DEFAULT_CHECKPOINT if checkpoint == "default" else ROOT / "checkpoints" / checkpoint
    provenance = json.loads((folder / "config.json").read_text(encoding="utf-8"))["provenance"]
    assert manifest["system"]["trained_on"] == list(trained_on(provenance) or ())


@pytest.mark.parametrize("device", ["bogus", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used_is_refused_in_one_sentence(
    prepared_phantoms: Path, protocol: Protocol, tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    arguments = ["--protocol", str(protocol_file(protocol, tmp_path)), "--data", str(prepared_phantoms)]
    arguments += ["--out", str(tmp_path / "out"), "--device", device]
    assert main(["run", "--system", f"checkpoint:{TINY}", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f'error: --device "{device}" cannot be used here; leave it out')
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_protocol_that_tells_another_number_of_images_is_refused(prepared_phantoms: Path) -> None:
    with pytest.raises(InputError, match=r"says n is 9, its split has 8 images; correct n"):
        load_test_set(protocol_of(prepared_phantoms, n=9), prepared_phantoms)
