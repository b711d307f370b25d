"""Result folders of every kind: told apart, refused where they are not in order, and drawn."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_benchmarks_report import findings_of, measured_row, noise, rows_of, section, sections_with

from benchmarks import stress
from benchmarks.attention import RIVALS
from benchmarks.cli import main
from benchmarks.findings import Findings, Study, check_findings, kind_of, load_findings, load_study
from benchmarks.measured import RESULTS
from benchmarks.pictures import Costed, draw_cost_into
from benchmarks.report import write_report
from benchmarks.results_folder import Result, result_folders
from benchmarks.stress import SETTINGS, stress_checkpoint
from boneage_hf.errors import InputError

TINY = str(Path(__file__).parent / "checkpoints" / "tiny")
FEW = (SETTINGS[0], SETTINGS[-1])


@pytest.fixture(scope="module")
def stressed(prepared_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stress") / "tiny-stress"
    stress_checkpoint(TINY, prepared_phantoms, out=out, settings=FEW, progress=False)
    return out


def broken(folder: Path, tmp_path: Path, **files: str) -> Path:
    """A copy in which files, named without their suffix, hold other texts."""
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    for name, text in files.items():
        (path,) = (path for path in copy.iterdir() if path.stem == name and path.suffix != ".png")
        path.write_text(text, encoding="utf-8")
    return copy


def changed_manifest(folder: Path, **changes: Any) -> str:
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return json.dumps(content | changes)


def test_a_stress_folder_is_checked_and_measured_again_from_its_predictions(
    stressed: Path, prepared_phantoms: Path, tmp_path: Path
) -> None:
    assert kind_of(stressed) == "stress"
    assert main(["check", str(stressed), "--data", str(prepared_phantoms)]) == 0
    text = (stressed / "stress.csv").read_text(encoding="utf-8")
    moved = re.sub(r"^(rotation,rotation -30 deg,\d+,)([\d.]+)", r"\g<1>1.5", text, flags=re.MULTILINE)
    assert moved != text
    digest = hashlib.sha256(moved.encode()).hexdigest()
    forged = broken(stressed, tmp_path, stress=moved, manifest=changed_manifest(stressed, table_sha256=digest))
    check_findings([forged])
    with pytest.raises(InputError, match=r"unchanged_mae_months is 1\.5 in stress\.csv"):
        check_findings([forged], data=prepared_phantoms)


def test_a_stress_test_of_other_labels_is_not_measured_again(
    stressed: Path, prepared_phantoms: Path, tmp_path: Path
) -> None:
    other = broken(stressed, tmp_path, manifest=changed_manifest(stressed, data_fingerprint="0" * 64))
    with pytest.raises(InputError, match="other images or labels"):
        check_findings([other], data=prepared_phantoms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stress": ""}, "cannot be read as a table"),
        ({"stress": "kind,setting\nflip,flip left-right\n"}, "lacks n"),
        ({"predictions": "id,setting,predicted_months\n"}, "of different runs"),
        ({"manifest": "[]"}, "cannot be read as JSON"),
        ({"manifest": '{"task": "music"}'}, "knows no results of the kind 'music'"),
        ({"manifest": '{"task": "stress", "complete": false}'}, "not complete"),
    ],
)
def test_a_damaged_study_is_refused_in_one_sentence(
    stressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    assert main(["check", str(broken(stressed, tmp_path, **changes))]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told)
    assert told.count("\n") == 1


@pytest.mark.parametrize("entry", ["images", "unchanged_mae_months"])
def test_a_study_that_does_not_tell_what_its_table_is_of_is_refused(
    stressed: Path, tmp_path: Path, entry: str
) -> None:
    manifest = json.loads((stressed / "manifest.json").read_text(encoding="utf-8"))
    del manifest[entry]
    with pytest.raises(InputError, match=f"does not tell {entry}; run again"):
        load_study(broken(stressed, tmp_path, manifest=json.dumps(manifest)), "stress")


def test_an_edited_table_is_refused(stressed: Path, tmp_path: Path) -> None:
    text = (stressed / "stress.csv").read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"not the one that manifest\.json is about"):
        load_study(broken(stressed, tmp_path, stress=text + "\n"), "stress")
    (tmp_path / "shares").mkdir()
    table = pd.read_csv(stressed / "stress.csv").assign(moved_over_6_months=1.5)
    with pytest.raises(InputError, match="not between 0 and 1"):
        load_study(broken(stressed, tmp_path / "shares", stress=table.to_csv(index=False)), "stress")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- in the report --------------------------------------------------------------------------------------------------


def stress_study(revision: str) -> Study:
    ids = [str(number) for number in range(60)]
    generator = np.random.default_rng(0)
    reference = generator.uniform(20, 200, 60)
    names = [stress.UNCHANGED, *(setting.name for setting in SETTINGS)]
    months = {name: reference + generator.normal(0, 8 + 2 * index, 60) for index, name in enumerate(names)}
    predictions = pd.concat(
        [pd.DataFrame({"id": ids, "setting": name, "predicted_months": values}) for name, values in months.items()]
    )
    table = stress.measure(predictions, pd.DataFrame({"id": ids, "reference_months": reference}))
    manifest = {"checkpoint": "example", "revision": revision, "protocol": "example", "split": "test", "n": 60}
    manifest |= {"images": "60 of 60", "unchanged_mae_months": 6.5}
    return Study(folder="example-stress", manifest=manifest, table=table)


def attention_study(revision: str, folder: str = "example-attention") -> Study:
    rows = [
        {"part": part, "third": third, "region": region, "tolerance_cells": 0.5, "n": 12}
        | {"energy": 0.4, "energy_low": 0.3, "energy_high": 0.5}
        | dict.fromkeys(RIVALS.values(), 0.35)
        for part in ("all", "unseen")
        for third in ("all", "oldest")
        for region in ("all", "DIP", "Wrist")
    ]
    manifest = {"checkpoint": "example", "revision": revision, "n": 24, "grid": [7, 7], "verdict": "It is not so."}
    return Study(folder=folder, manifest=manifest, table=pd.DataFrame(rows))


def speed_study(*revisions: str) -> Study:
    timed = [(f"checkpoint {revision}", 0.8, 20.0) for revision in revisions]
    timed += [("EfficientNet-B0, 512 px (Deeplasia's kind)", 4.1, 90.0)]
    timed += [("three ConvNeXtV2-tiny, 512 px (ianpan's kind)", 140.0, 900.0)]
    rows = [
        {"system": name, "what": "network", "image_size": 299, "batch": batch, "precision": "fp32"}
        | {"threads": threads, "repeats": 3, "median_ms": slower * time, "p95_ms": slower * time + 1}
        | {"images_per_second": 1000 / time, "gflop_per_image": gflop, "share_of_peak": 0.2}
        for name, gflop, time in timed
        for threads, batch, slower in ((1, 1, 2.0), (2, 1, 1.0), (2, 8, 0.9))
    ]
    start = {"cold_start": {"seconds": 5.0, "peak_memory_mb": 700.0}}
    manifest = {
        "checkpoints": [{"checkpoint": f"checkpoint {name}", "revision": name, **start} for name in revisions],
        "peak_gflop_per_second": {"fp32, 2 threads": 200.0},
        "hardware": {"processor": "A processor", "machine": "x86_64", "cores": 2, "torch_threads": 2},
    }
    return Study(folder="speed", manifest=manifest, table=pd.DataFrame(rows))


@pytest.fixture(scope="module")
def everything() -> Findings:
    runs = findings_of(A=noise(30, 1), B=noise(4, 2))
    revisions = [run.manifest["system"]["revision"] for run in runs.runs]
    return Findings(
        runs=runs.runs,
        comparisons=runs.comparisons,
        stress=(stress_study(revisions[1]), stress_study("another")),
        attention=(attention_study(revisions[1]), attention_study("another", folder="other-attention")),
        speed=(speed_study(revisions[1]),),
    )


def test_every_picture_of_the_report_is_drawn(everything: Findings, tmp_path: Path) -> None:
    rows = [measured_row("A", 24.0), measured_row("B", 3.0)]
    files = write_report(tmp_path, measured=rows, findings=everything)
    pictures = [path for path in files if path.suffix == ".svg"]
    attention = {"attention-example-attention", "attention-other-attention"}
    assert {path.stem for path in pictures} == {"ranking", "age", "stress", "cost", *attention}
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for path in pictures:
        assert path.read_text(encoding="utf-8").lstrip().startswith("<?xml")
        assert f"]({path.name})" in markdown
    assert "<text" not in (tmp_path / "stress.svg").read_text(encoding="utf-8")  # outlines: no font is needed


def test_a_study_is_named_after_the_system_of_its_revision(everything: Findings) -> None:
    sections = sections_with(measured_row("A", 24.0), measured_row("B", 3.0), findings=everything)
    headings = [found.heading for found in sections]
    assert "Stress test of B" in headings
    assert "Stress test of example @ another" in headings
    assert "Attention of B" in headings
    assert len(rows_of(section(sections, "Stress test of B"))) == len(SETTINGS)
    assert section(sections, "Attention of B").paragraphs[0] == "It is not so."


def test_a_stress_test_counts_intervals_that_leave_out_0_and_significant_settings_apart() -> None:
    study = stress_study("revision of B")
    table = study.table.assign(mae_change_low_months=-1.0, mae_change_high_months=1.0, mae_change_holm_p=0.2)
    table.loc[:2, "mae_change_low_months"] = 0.5
    table.loc[3, "mae_change_high_months"] = -0.5
    table.loc[:0, "mae_change_holm_p"] = 0.01
    sections = sections_with(findings=Findings(stress=(dataclasses.replace(study, table=table),)))
    said = section(sections, "Stress test of example @ revision of B").paragraphs[0]
    assert f"Of {len(SETTINGS)} settings 4 have an interval of the MAE change that leaves out 0, and 1 change" in said
    assert "may point to smaller errors where the mean grows" in section(sections, "Stress test").paragraphs[0]


def test_the_cost_of_flip_averages_is_said_to_be_twice_the_network(everything: Findings) -> None:
    runs = tuple(replace_flip(run) for run in everything.runs)
    own = rows_of(section(sections_with(findings=dataclasses.replace(everything, runs=runs)), "Cost"))[0]
    assert (own["CPU milliseconds"], own["Status"]) == (
        "40.0",
        "measured, twice the network: image and mirror image",
    )


def replace_flip(run: Result) -> Result:
    return dataclasses.replace(run, metrics={**run.metrics, "flip_average": True})


def test_a_study_without_unseen_radiographs_shows_the_regions_of_all(everything: Findings) -> None:
    study = attention_study("another")
    table = study.table.assign(part=study.table["part"].replace("unseen", "seen or not: unknown"))
    sections = sections_with(findings=Findings(attention=(dataclasses.replace(study, table=table),)))
    rows = rows_of(section(sections, "Attention of example @ another"))
    assert {row["Region"] for row in rows if row["Part"] == "all"} == {"all", "DIP", "Wrist"}
    assert {row["Region"] for row in rows if row["Part"] != "all"} == {"all"}


def test_cost_pairs_measured_errors_with_measured_compute_and_marks_what_is_cited(everything: Findings) -> None:
    sections = sections_with(measured_row("A", 24.0), measured_row("B", 3.0), findings=everything)
    own, deeplasia, ianpan = rows_of(section(sections, "Cost"))
    mae = everything.runs[1].metrics["metrics"]["mae_months"]
    assert (own["System"], own["MAE"], own["CPU milliseconds"], own["Status"]) == (
        "B",
        f"{mae:.2f}",
        "20.0",
        "measured",
    )
    assert (deeplasia["GFLOP"], deeplasia["Status"]) == ("at least 12.30", "cited MAE")
    assert (ianpan["System"], ianpan["Protocol of the MAE"]) == ("ianpan/bone-age", "rsna-test-200")


def test_every_system_has_a_mark_of_its_own_and_its_figures_in_the_plot_of_cost() -> None:
    systems = [Costed(name=f"system {n}", mae=7.0, gflop=110.0, milliseconds=500.0) for n in range(3)]
    peer = Costed(name="peer", mae=4.0, gflop=12.0, milliseconds=250.0, cited=True, at_least=True)
    figure = Figure(layout="constrained")
    draw_cost_into(figure, [*systems, peer])
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries[:3] == [f"system {n}\n7.00 months, 110 GFLOP, 500 ms" for n in range(3)]
    assert (
        entries[3]
        == "peer\ncited: 4.00 months, \N{GREATER-THAN OR EQUAL TO} 12 GFLOP, \N{GREATER-THAN OR EQUAL TO} 250 ms"
    )
    looks = {(line.get_marker(), line.get_color()) for line in figure.axes[0].lines}
    assert len(looks) == 4
    assert not figure.axes[0].texts or all(not text.get_text() for text in figure.axes[0].texts)


@pytest.mark.parametrize("grey", [step / 40 for step in range(41)])
def test_numbers_in_a_heat_map_have_the_ink_with_the_higher_contrast(grey: float) -> None:
    light = stress.luminance((grey, grey, grey))
    assert (light < stress.DARK) == (1.05 / (light + 0.05) > (light + 0.05) / 0.05)


def test_cost_is_left_out_where_no_measured_system_was_timed(everything: Findings) -> None:
    other = Findings(runs=everything.runs, speed=(speed_study("another"),))
    assert "Cost" not in [found.heading for found in sections_with(findings=other)]


# --- what is committed ----------------------------------------------------------------------------------------------


def test_committed_result_folders_are_in_order() -> None:
    found = check_findings(result_folders(RESULTS))
    assert found.runs


def test_committed_studies_are_of_checkpoints_that_were_run() -> None:
    found = load_findings(result_folders(RESULTS))
    known = {run.manifest["system"]["revision"] for run in found.runs}
    studied = {study.manifest["revision"] for study in (*found.stress, *found.attention)}
    studied |= {one["revision"] for study in found.speed for one in study.manifest["checkpoints"]}
    assert studied <= known, "run the checkpoint too, or delete what is about another one"


def test_the_committed_report_is_what_the_committed_results_give(tmp_path: Path) -> None:
    committed = RESULTS / "report"
    if not committed.is_dir():
        pytest.skip("no report is committed")
    files = write_report(tmp_path, findings=load_findings(result_folders(RESULTS)))
    assert {path.name for path in files} == {path.name for path in committed.iterdir()}
    made_with = json.loads((committed / "manifest.json").read_text(encoding="utf-8"))["versions"]["matplotlib"]
    for path in files:
        old, new = (committed / path.name).read_bytes(), path.read_bytes()
        if path.suffix == ".html":
            old, new = (re.sub(rb'src="data:[^"]*"', b"", page) for page in (old, new))
        if path.suffix in (".md", ".html", ".csv") or (path.suffix == ".svg" and made_with == matplotlib.__version__):
            assert old == new, f"{path.name}: write the report again"


def test_no_committed_result_names_a_machine_or_a_directory() -> None:
    home = re.escape(os.path.expanduser("~"))
    for path in RESULTS.rglob("*.json"):
        assert not re.search(rf"{home}/|/home/|/tmp/|/Users/", path.read_text(encoding="utf-8")), path.name
