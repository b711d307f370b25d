"""The count of what the quality gate refuses: exact bounds, honest kinds, results that say where they come from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_tiny_checkpoint import CHECKPOINT
from PIL import Image
from test_benchmarks_report import rows_of, sections_with

from benchmarks import gate
from benchmarks.findings import load_findings
from benchmarks.gate import exact_interval, gate_of_checkpoint
from benchmarks.non_hands import Kind, kinds, load_original
from boneage_hf.data import load_split, prepare_phantoms
from boneage_hf.errors import InputError
from boneage_hf.fitted_gate import fit_gate_of_checkpoint


def test_the_interval_is_that_of_clopper_and_pearson() -> None:
    low, high = exact_interval(0, 300)
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 300))
    assert exact_interval(300, 300) == pytest.approx((0.025 ** (1 / 300), 1))
    # 2 of 10, as in tables of the method
    assert exact_interval(2, 10) == pytest.approx((0.0252, 0.5561), abs=1e-4)
    assert exact_interval(0, 0) == (0, 1)


def test_at_least_three_hundred_non_hands_of_several_kinds_are_counted() -> None:
    assert sum(kind.n for kind in kinds()) >= 300
    assert len({kind.name for kind in kinds()}) == len(kinds()) >= 8


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_non_hands_are_pictures_that_come_out_the_same_each_time(kind: Kind) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    pytest.importorskip("data_store")
    index = kind.n - 1
    first, again = kind.make(index, "counted"), kind.make(index, "counted")
    assert first.tobytes() == again.tobytes()
    assert first.mode in ("L", "RGB")
    assert min(first.size) >= 64
    assert len(set(first.convert("L").tobytes())) > 1
    assert kind.make(0, "counted").tobytes() != kind.make(1, "counted").tobytes()
    if kind.originals["tuning"]:
        assert kind.make(0, "counted").tobytes() != kind.make(0, "tuning").tobytes()


def test_what_is_for_tuning_is_never_counted() -> None:
    from benchmarks import non_hands

    tables = [value for name, value in vars(non_hands).items() if name.startswith("_") and isinstance(value, dict)]
    files = [table for table in tables if set(table) == {"tuning", "counted"}]
    assert len(files) == 6
    for table in files:
        assert not set(table["tuning"]) & set(table["counted"])


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(InputError, match=r"no_such_package is missing: .*\[benchmark\]"):
        load_original("no_such_package.data", "camera.png")


def test_a_checkpoint_without_a_gate_is_refused(prepared_phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fit-gate"):
        gate_of_checkpoint(str(CHECKPOINT), prepared_phantoms, out=tmp_path)


def black_and_noise(index: int, purpose: str) -> Image.Image:
    if index == 0:
        return Image.new("L", (80, 80))
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (80, 80), dtype=np.uint8))


def test_the_results_count_each_kind_and_say_where_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, gated = tmp_path / "prepared", tmp_path / "gated"
    prepare_phantoms(260, prepared, size=64, progress=False)
    fit_gate_of_checkpoint(str(CHECKPOINT), prepared, gated, images=60, progress=False)
    fake: Any = Kind("made up", 3, "black, then noise", {"tuning": 0, "counted": 2}, black_and_noise)
    monkeypatch.setattr(gate, "kinds", lambda: (fake,))
    result = gate_of_checkpoint(str(gated), prepared, out=tmp_path / "out", changed_images=4)

    table: Any = result.table.set_index("kind")
    n = len(load_split(prepared, "test"))
    assert table.loc["hands", "n"] == n
    assert table.loc["hands", "refused"] == 0  # phantoms carry their mark
    assert table.loc["hands", "warned"] == n
    assert list(table.loc["made up", ["n", "originals"]]) == [3, 2]
    assert table.loc["made up", "refused"] >= 1
    assert list(table.loc["made up"][1:]) == pytest.approx(list(table.loc["all non-hands"][1:]), nan_ok=True)
    low, high = exact_interval(int(table.loc["made up", "refused"]), 3)
    assert (table.loc["made up", "refused_low"], table.loc["made up", "refused_high"]) == pytest.approx((low, high))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["checks"]["made up"]["refuse"]["pixels"] == 1
    assert {"revision", "data_fingerprint", "gate", "commit", "versions"} <= set(manifest)
    assert len(json.loads((tmp_path / "out" / "gate.json").read_text())) == len(table)
    assert "aim at most 1.00 %: met" in str(result)
    assert str(tmp_path / "out" / "gate.csv") in str(result)

    sections = sections_with(findings=load_findings([tmp_path / "out"]))
    (shown_gate,) = (found for found in sections if found.heading.startswith("Quality gate of "))
    shown = rows_of(shown_gate)
    (made_up,) = (row for row in shown if row["Pictures"] == "made up")
    assert (made_up["n"], made_up["Originals"]) == ("3", "2")
    refused = int(table.loc["made up", "refused"])
    assert made_up["Refused"] == f"{refused} ({100 * refused / 3:.1f} %)"
