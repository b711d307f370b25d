"""Comparison: paired, corrected, and without a rank where none is supported."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from own_protocol import protocol_of

from benchmarks.cli import main
from benchmarks.compare import compare_errors, compare_folders, compare_results
from benchmarks.findings import load_findings
from benchmarks.results_folder import Result, load_result
from benchmarks.run import run_system
from benchmarks.statistics import holm, n_needed, wilcoxon
from benchmarks.systems import System
from boneage_hf.errors import InputError


def drawn(scale: float, seed: int, n: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, n)


def compared(errors: dict[str, np.ndarray], **leakages: str) -> Any:
    return compare_errors(errors, protocol="example", leakages=dict.fromkeys(errors, "none") | leakages, draws=300)


def test_systems_far_apart_get_their_ranks() -> None:
    found = compared({"c": drawn(30, 1), "a": drawn(4, 2), "b": drawn(12, 3)})
    assert [(standing.system, standing.rank) for standing in found.standings] == [("a", 1), ("b", 2), ("c", 3)]
    assert "not distinguishable" not in str(found)


def test_systems_that_are_alike_get_no_rank_but_the_images_needed() -> None:
    errors = {"a": drawn(10, 1), "b": drawn(10, 2)}
    found = compared(errors)
    assert [standing.rank for standing in found.standings] == [None, None]
    assert f"not distinguishable at n = 200 (n needed for this mean: {n_needed(errors['a'], errors['b'])})" in str(
        found
    )


def test_p_values_are_corrected_for_the_number_of_pairs() -> None:
    errors = {"a": drawn(9, 1), "b": drawn(10, 2), "c": drawn(11, 3)}
    found = compared(errors)
    raw = [wilcoxon(errors[pair.better], errors[pair.other]) for pair in found.pairs]
    assert [pair.p_value for pair in found.pairs] == raw
    assert [pair.p_holm for pair in found.pairs] == holm(raw)


def test_a_mean_and_ranks_that_disagree_give_no_rank() -> None:
    """b is a little better on nearly every image, a has the lower MAE for b's few gross errors."""
    a = np.full(200, 10.0)
    b = np.where(np.arange(200) < 10, 300.0, 9.0)
    found = compared({"a": a, "b": b})
    assert found.pairs[0].p_holm < 0.001
    assert found.pairs[0].difference.high_months < 0
    assert [standing.rank for standing in found.standings] == [None, None]


def test_a_system_that_has_seen_the_test_gets_no_rank_and_is_flagged() -> None:
    errors = {"seen": drawn(2, 1), "a": drawn(8, 2), "b": drawn(20, 3)}
    found = compared(errors, seen="trained on rsna-training-12611")
    assert [(standing.system, standing.rank) for standing in found.standings] == [("seen", None), ("a", 1), ("b", 2)]
    assert "leakage: trained on rsna-training-12611" in str(found)


def test_one_system_is_no_comparison() -> None:
    with pytest.raises(InputError, match="two systems"):
        compared({"a": drawn(1, 1)})


class Fixed(System):
    """The same months for everybody."""

    revision, trained_on, preprocessing = "1", (), "none"

    def __init__(self, name: str, months: float) -> None:
        self.name, self.months = name, months

    def predict(self, dataset: Any) -> pd.DataFrame:
        return pd.DataFrame({"id": dataset["id"], "predicted_months": self.months})


@pytest.fixture(scope="module")
def folders(prepared_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("results")
    for name, months in (("middle", 120.0), ("old", 230.0)):
        run_system(
            Fixed(name, months),
            protocol=protocol_of(prepared_phantoms),
            data=prepared_phantoms,
            out=base / name,
            progress=False,
        )
    return base / "middle", base / "old"


def test_two_result_folders_are_compared(
    folders: tuple[Path, Path], prepared_phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *map(str, folders), "--data", str(prepared_phantoms)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("protocol drawn-hands-8, n = 8\n")
    assert "middle - old: -" in out


def with_images(result: Result, key: str, *, reads_images: bool = True) -> Result:
    """A result as of another prepared data set."""
    system = {**result.manifest["system"], "reads_images": reads_images}
    data = {**result.manifest["data"], "key": key}
    return replace(result, manifest={**result.manifest, "system": system, "data": data})


def test_systems_that_read_differently_prepared_images_are_not_compared(
    folders: tuple[Path, Path], prepared_phantoms: Path
) -> None:
    one, other = map(load_result, folders)
    with pytest.raises(InputError, match="middle and old read images that were prepared from other files"):
        compare_results([one, with_images(other, "another")], prepared_phantoms)


def test_a_system_that_reads_no_image_is_compared_whatever_the_images_are(
    folders: tuple[Path, Path], prepared_phantoms: Path
) -> None:
    one, other = map(load_result, folders)
    found = compare_results([one, with_images(other, "another", reads_images=False)], prepared_phantoms)
    assert found == compare_results([one, other], prepared_phantoms)


def test_a_comparison_is_kept_without_labels_and_read_back(
    folders: tuple[Path, Path], prepared_phantoms: Path, tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    arguments = ["compare", *map(str, folders), "--data", str(prepared_phantoms), "--out", str(out)]
    assert main(arguments) == 0
    assert {path.name for path in out.iterdir()} == {"comparison.csv", "manifest.json"}
    findings = load_findings([*folders, out])
    assert findings.comparisons == (compare_folders(folders, prepared_phantoms),)
    assert findings.comparison(protocol_of(prepared_phantoms)) is findings.comparisons[0]
    assert load_findings(folders).comparison(protocol_of(prepared_phantoms)) is None
    assert load_findings(folders, data=prepared_phantoms).comparisons == findings.comparisons
    assert main(["check", *map(str, folders), str(out)]) == 0


def test_a_changed_or_foreign_comparison_is_refused(
    folders: tuple[Path, Path], prepared_phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    arguments = ["compare", *map(str, folders), "--data", str(prepared_phantoms), "--out"]
    assert main([*arguments, str(out)]) == 0
    assert main(["check", str(folders[0]), str(out)]) == 2
    assert "of other predictions" in capsys.readouterr().err
    text = (out / "comparison.csv").read_text(encoding="utf-8")
    (out / "comparison.csv").write_text(text.replace("true", "false").replace("-", "-1"), encoding="utf-8")
    assert main(["check", *map(str, folders), str(out)]) == 2
    assert "not that of manifest.json" in capsys.readouterr().err
    assert main([*arguments, str(folders[0])]) == 2
    assert "no comparison" in capsys.readouterr().err


def test_a_comparison_is_made_again_from_the_predictions_and_the_labels(
    folders: tuple[Path, Path], prepared_phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    assert main(["compare", *map(str, folders), "--data", str(prepared_phantoms), "--out", str(out)]) == 0
    again = ["check", *map(str, reversed(folders)), str(out), "--data", str(prepared_phantoms)]
    assert main(again) == 0
    assert main(["check", str(out), "--data", str(prepared_phantoms)]) == 2
    assert "without its runs" in capsys.readouterr().err
    table = pd.read_csv(out / "comparison.csv", dtype=str)
    table["wilcoxon_p"] = "0.5"
    (out / "comparison.csv").write_text(table.to_csv(index=False, lineterminator="\n"), encoding="utf-8")
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256((out / "comparison.csv").read_bytes()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest | {"table_sha256": digest}), encoding="utf-8")
    assert main(again) == 2
    assert "p_value is 0.5 in its folder" in capsys.readouterr().err


def test_folders_of_unequal_protocols_are_not_compared(
    folders: tuple[Path, Path], prepared_phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = protocol_of(prepared_phantoms, name="other-hands-8")
    run_system(Fixed("a", 100.0), protocol=other, data=prepared_phantoms, out=tmp_path / "other", progress=False)
    assert main(["compare", str(folders[0]), str(tmp_path / "other"), "--data", str(prepared_phantoms)]) == 2
    assert "unequal protocols are not compared" in capsys.readouterr().err


def broken(folder: Path, tmp_path: Path, predictions: str | None = None, **manifest: Any) -> Path:
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    if predictions is not None:
        (copy / "predictions.csv").write_text(predictions, encoding="utf-8")
    if manifest:
        content = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
        (copy / "manifest.json").write_text(json.dumps(content | manifest), encoding="utf-8")
    return copy


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ("id,predicted_months\n1,100\n", "not the one that metrics.json is about"),
        ("id,predicted_months\n1,100\n1,100\n", "repeats one"),
        ("id,predicted_months\n1,\n", "missing, NaN or infinite"),
        ("id,predicted_months\n1,nan\n", "missing, NaN or infinite"),
        ("id,predicted_months\n", "empty"),
        ("id,predicted_months,sex\n1,100,male\n", "nothing else"),
        ("", "cannot be read"),
    ],
)
def test_a_result_folder_with_other_predictions_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], predictions: str, message: str
) -> None:
    assert main(["check", str(broken(folders[0], tmp_path, predictions))]) == 2
    assert message in capsys.readouterr().err


def test_a_result_folder_on_other_labels_or_without_a_file_is_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = broken(folders[0], tmp_path, ground_truth_fingerprint="0" * 64)
    with pytest.raises(InputError, match="its labels are not those"):
        load_result(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        load_result(copy)


def test_check_measures_again_from_the_labels(
    folders: tuple[Path, Path], tmp_path: Path, prepared_phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(folders[0]), "--data", str(prepared_phantoms)]) == 0
    copy = broken(folders[0], tmp_path)
    content = json.loads((copy / "metrics.json").read_text(encoding="utf-8"))
    content["metrics"]["mae_months"] -= 0.5
    (copy / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    assert main(["check", str(copy), "--data", str(prepared_phantoms)]) == 2
    assert "mae_months is" in capsys.readouterr().err


def test_two_result_folders_of_one_name_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folders[1], tmp_path / "b" / "middle")
    both = [str(folders[0]), str(tmp_path / "b" / "middle"), "--measured", str(tmp_path / "none.csv")]
    assert main(["report", *both, "--out", str(tmp_path / "out")]) == 2
    assert "two result folders are named middle; name each once, and rename one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="named middle"):
        load_findings([folders[0], folders[0].parent / "old" / ".." / "middle"])


def test_two_own_protocols_of_one_name_do_not_share_a_report(
    folders: tuple[Path, Path], prepared_phantoms: Path, tmp_path: Path
) -> None:
    other = protocol_of(prepared_phantoms, ground_truth="read again")
    run_system(Fixed("a", 100.0), protocol=other, data=prepared_phantoms, out=tmp_path / "other", progress=False)
    with pytest.raises(InputError, match="middle and other are under two protocols of the name drawn-hands-8"):
        load_findings([folders[0], tmp_path / "other"])


def test_runs_on_differently_prepared_images_do_not_share_a_report(folders: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads((folders[1] / "manifest.json").read_text(encoding="utf-8"))
    other = broken(folders[1], tmp_path, data={**content["data"], "key": "another"})
    with pytest.raises(InputError, match="middle and old read images that were prepared from other files"):
        load_findings([folders[0], other])
    elsewhere = {**content["system"], "reads_images": False}
    found = load_findings([folders[0], broken(other, tmp_path / "csv", system=elsewhere)])
    assert len(found.runs) == 2


def test_compare_and_add_pass_over_a_comparison(
    folders: tuple[Path, Path], prepared_phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    options = ["--data", str(prepared_phantoms), "--out", str(out)]
    assert main(["compare", *map(str, folders), *options]) == 0
    capsys.readouterr()
    assert main(["compare", str(out), *map(str, folders), *options]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"passed over {out}, which is a comparison and no run"
    table = tmp_path / "measured.csv"
    assert main(["add", str(out / "metrics.json"), "--measured", str(table)]) == 0
    assert capsys.readouterr().out == f"passed over {out}, which is a comparison and no run\n"
    assert not table.exists()


def test_runs_with_the_same_predictions_stand_in_a_report_with_their_comparison(
    folders: tuple[Path, Path], prepared_phantoms: Path, tmp_path: Path
) -> None:
    run_system(
        Fixed("twin", 120.0),
        protocol=protocol_of(prepared_phantoms),
        data=prepared_phantoms,
        out=tmp_path / "twin",
        progress=False,
    )
    three, out = [*map(str, folders), str(tmp_path / "twin")], tmp_path / "comparison"
    assert main(["compare", *three, "--data", str(prepared_phantoms), "--out", str(out)]) == 0
    report = ["report", *three, str(out), "--measured", str(tmp_path / "none.csv"), "--out", str(tmp_path / "report")]
    assert main(report) == 0
    assert main(["check", *three, str(out), "--data", str(prepared_phantoms)]) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "| middle | twin | 0.00 [0.00, 0.00] |" in text
    assert load_findings([*folders, out]).comparison(protocol_of(prepared_phantoms)) is None
