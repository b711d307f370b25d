"""Energy of attention maps inside boxes: synthetic maps, drawn hands, no radiograph."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import attention
from benchmarks.attention import (
    BUILTIN_BOXES,
    UNKNOWN,
    BoxedMap,
    box_cells,
    box_mask,
    data_parts,
    energy_shares,
    load_boxes,
    measure,
    verdict,
)
from benchmarks.cli import main
from benchmarks.findings import load_findings
from benchmarks.protocol import PROTOCOLS, TRAINING_PARTS
from boneage_hf.data import load_prepared, prepare_phantoms
from boneage_hf.errors import InputError
from boneage_hf.explain import WHOLE, upsample_attention

TINY = Path(__file__).parent / "checkpoints" / "tiny"
HEADER = ",".join(attention.COLUMNS)
BOXES = np.array([[0.1, 0.2, 0.35, 0.4], [0.3, 0.3, 0.5, 0.6]])


def item(grid: np.ndarray, months: float = 100.0, data_part: str = "unseen") -> BoxedMap:
    boxes = {"DIP": BOXES[:1], "Wrist": BOXES[1:]}
    return BoxedMap(
        attention=grid, boxes=boxes, size=(60, 50), part=WHOLE, bone_age_months=months, data_part=data_part
    )


def test_boxes_are_measured_in_cells_of_the_part_of_the_map_that_shows_the_radiograph() -> None:
    boxes = {"DIP": np.array([[0.1, 0.1, 0.2, 0.3], [0.5, 0.5, 0.9, 0.6]]), "Wrist": np.zeros((0, 4))}
    grid = np.ones((10, 20))
    one = BoxedMap(attention=grid, boxes=boxes, size=(60, 50), part=WHOLE, bone_age_months=100.0, data_part="unseen")
    assert box_cells([one]) == {"DIP": pytest.approx((2.0 + 8.0) / 2)}
    half = dataclasses.replace(one, part=(0.25, 0.0, 0.75, 1.0))
    assert box_cells([half]) == {"DIP": pytest.approx((2.0 + 4.0) / 2)}


def slow_energy(grid: np.ndarray, boxes: np.ndarray, size: tuple[int, int], margin: tuple[float, float]) -> float:
    """Bilinear interpolation between cell centres and the sum inside the boxes, pixel by pixel."""
    (height, width), (rows, columns) = size, grid.shape
    inside = total = 0.0
    for pixel_y in range(height):
        for pixel_x in range(width):
            x, y = (pixel_x + 0.5) / width, (pixel_y + 0.5) / height
            across, down = x * columns - 0.5, y * rows - 0.5
            left, top = math.floor(across), math.floor(down)
            value = 0.0
            for row, row_weight in ((top, 1 - (down - top)), (top + 1, down - top)):
                for column, weight in ((left, 1 - (across - left)), (left + 1, across - left)):
                    cell = grid[min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)]
                    value += row_weight * weight * float(cell)
            total += value
            if any(
                box[0] - margin[0] <= x < box[2] + margin[0] and box[1] - margin[1] <= y < box[3] + margin[1]
                for box in boxes
            ):
                inside += value
    return inside / total


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_energy_equals_a_plain_loop_over_pixels(tolerance: float) -> None:
    grid = np.random.default_rng(0).uniform(0.1, 1, (7, 7)).astype(np.float32)
    margin = (tolerance / 7, tolerance / 7)
    mask = box_mask(BOXES, (60, 50), margin=margin)
    fast = energy_shares(upsample_attention(grid, 60, 50)[None], mask[None])[0, 0]
    assert fast == pytest.approx(slow_energy(grid, BOXES, (60, 50), margin), abs=1e-5)


def test_a_map_that_is_one_inside_the_boxes_has_all_its_energy_there() -> None:
    mask = box_mask(BOXES, (60, 50))
    assert energy_shares(mask[None].astype(np.float32), mask[None])[0, 0] == pytest.approx(1.0)


def test_a_uniform_map_has_the_share_of_the_area() -> None:
    table = measure([item(np.full((7, 7), 0.25, np.float32), months) for months in (10, 100, 200)])
    assert table["energy"].to_numpy() == pytest.approx(table["area_share"].to_numpy(), abs=1e-6)
    assert table["shuffled_cells_share"].to_numpy() == pytest.approx(table["area_share"].to_numpy(), abs=1e-6)


def test_overlapping_boxes_count_once() -> None:
    twice = np.concatenate([BOXES, BOXES])
    assert np.array_equal(box_mask(twice, (60, 50)), box_mask(BOXES, (60, 50)))
    assert box_mask(np.array([[0.0, 0.0, 0.5, 1.0], [0.25, 0.0, 1.0, 1.0]]), (4, 8)).all()


def test_half_a_cell_of_tolerance_widens_each_side() -> None:
    mask = box_mask(np.array([[0.4, 0.4, 0.6, 0.6]]), (100, 100), margin=(0.05, 0.1))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert (columns[0], columns[-1], rows[0], rows[-1]) == (35, 64, 30, 69)


def test_a_map_on_the_boxes_beats_every_rival_and_one_beside_them_none() -> None:
    on = upsample_attention(box_mask(BOXES, (14, 14)).astype(np.float32), 7, 7) + 0.001
    # The maps must differ, or that of another radiograph is as good.
    spread = [np.roll(on, shift, axis=1) for shift in (0, 3)]
    table = measure([item(on if n % 2 else spread[1], 20.0 * n, "training") for n in range(12)])
    row = table.query("part == 'training' and third == 'all' and region == 'all' and tolerance_cells == 0").iloc[0]
    assert row["over_shuffled_cells"] > 0
    beside = measure([item(1.001 - np.minimum(on, 1), 20.0 * n) for n in range(12)])
    row = beside.query("part == 'unseen' and third == 'all' and region == 'all' and tolerance_cells == 0").iloc[0]
    assert row["over_area_high"] < 0


def test_rows_are_grouped_by_part_third_region_and_tolerance() -> None:
    generator = np.random.default_rng(1)
    items = [
        item(generator.uniform(0.1, 1, (7, 7)).astype(np.float32), 10.0 * n, "training" if n < 6 else "unseen")
        for n in range(12)
    ]
    table = measure(items).set_index(["part", "third", "region", "tolerance_cells"])["n"]
    assert table["all", "all", "all", 0.5] == 12
    assert table["all", "oldest", "DIP", 0.0] == 4
    assert table["training", "all", "Wrist", 0.0] == 6
    assert ("training", "oldest", "all", 0.0) not in table.index
    assert measure(items).equals(measure(items))


def test_the_sides_of_a_box_are_told_in_cells() -> None:
    table = measure([item(np.ones((7, 7), np.float32), months) for months in (10, 100, 200)])
    row = table.query("region == 'DIP'").iloc[0]
    assert (row["box_width_cells"], row["box_height_cells"]) == pytest.approx((0.25 * 7, 0.2 * 7))


def test_the_verdict_follows_the_intervals() -> None:
    on = box_mask(BOXES, (14, 14)).reshape(7, 2, 7, 2).mean(axis=(1, 3)).astype(np.float32) + 0.001
    generator = np.random.default_rng(2)
    maps = [np.roll(generator.uniform(0, 1, (7, 7)).astype(np.float32), n, axis=0) for n in range(6)]
    good = [item(maps[n] if n < 6 else on, 10.0 * n) for n in range(12)]
    assert "not borne out" in verdict(measure([item(1.001 - on.clip(0, 1), 10.0 * n) for n in range(12)]))
    assert "in the 4 unseen radiographs of the oldest third" in verdict(measure(good))
    trained = measure([item(on, 10.0 * n, "training") for n in range(12)])
    assert "cannot be tested here" in verdict(trained)


def test_the_expert_counts_where_two_annotators_boxed_a_radiograph(tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    lines = [
        "7,eval/nonexpert,DIP,100,200,0,0,10,10",
        "7,eval/expert,DIP,100,200,10,20,30,60",
        "8,train,Ulna,100,100,0,0,50,100",
        "9,eval/nonexpert,DIP,100,200,0,0,10,10",
    ]
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    boxes = load_boxes(path)
    assert set(boxes) == {"7", "8"}
    assert boxes["7"]["DIP"].tolist() == [[0.1, 0.1, 0.3, 0.3]]


def test_the_table_that_ships_holds_328_radiographs_and_its_licence() -> None:
    boxes = load_boxes()
    assert len(boxes) == 328
    # 17 a radiograph, three of them missing on one.
    assert sum(len(found) for regions in boxes.values() for found in regions.values()) == 17 * 328 - 3
    assert all(set(regions) == set(attention.REGIONS) for regions in boxes.values())
    assert "MIT License" in (BUILTIN_BOXES.parent / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,region\n1,DIP\n", "lacks the column annotator"),
        (f"{HEADER}\n1,train,Toe,10,10,0,0,5,5\n", "unknown region Toe"),
        (f"{HEADER}\n1,train,DIP,10,10,0,0,5,5\n1,train,DIP,10,10,5,0,5,5\n", "Line 3 .* no box within its picture"),
        (f"{HEADER}\n1,train,DIP,10,10,0,0,5,x\n", "Line 2"),
        (f"{HEADER}\n1,somebody,DIP,10,10,0,0,5,5\n", "no row whose annotator"),
    ],
)
def test_a_wrong_table_of_boxes_is_refused_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_boxes(path)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "prepared"
    prepare_phantoms(30, folder, seed=1, size=96)
    return folder


def test_the_command_measures_drawn_hands(phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = load_prepared(phantoms)
    ids = [row_id for split in splits.values() for row_id in list(split["id"])[:4]]
    path = tmp_path / "boxes.csv"
    path.write_text("\n".join([HEADER, *(f"{row_id},train,Wrist,96,96,30,60,60,90" for row_id in ids)]) + "\n")
    out = tmp_path / "out"
    assert main(["attention", str(TINY), str(phantoms), "--boxes", str(path), "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {"attention.csv", "attention.png", "manifest.json"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["n"] == len(ids)
    assert manifest["trained_on_this_training_part"] is None
    # This checkpoint does not say what it was trained on.
    table = load_findings([out]).attention[0].table
    assert set(table["part"]) == {"all", "training", "seen or not: unknown"}
    assert manifest["verdict"] in capsys.readouterr().out
    first = (out / "attention.csv").read_bytes()
    assert main(["attention", str(TINY), str(phantoms), "--boxes", str(path), "--out", str(out)]) == 0
    assert (out / "attention.csv").read_bytes() == first
    assert load_findings([out]).attention[0].manifest["revision"] == manifest["revision"]


def test_a_data_set_without_boxes_is_refused(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text(f"{HEADER}\nnobody,train,DIP,10,10,0,0,5,5\n")
    assert main(["attention", str(TINY), str(phantoms), "--boxes", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "ids do not match" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


REFERENCE: dict[str, dict[str, Any]] = {
    "train": {"fingerprint": TRAINING_PARTS["rsna-reference-train-9458"]},
    "validation": {"fingerprint": "5" * 64},
    "test": {"fingerprint": PROTOCOLS["reference-test-1024"].ground_truth_fingerprint},
}


@pytest.mark.parametrize(
    ("seen", "validation", "test"),
    [
        (("rsna-reference-train-9458",), "unseen", "unseen"),
        (("rsna-training-12611", "rsna-validation-1425"), UNKNOWN, "training"),
        (("rsna-reference-train-9458", "rsna-training-12611"), UNKNOWN, "training"),
        (("rsna-reference-train-9458", "labels 555555555555"), "training", "unseen"),
        (("labels 111111111111",), UNKNOWN, UNKNOWN),
        (None, UNKNOWN, UNKNOWN),
    ],
)
def test_radiographs_are_unseen_where_what_was_seen_is_known_to_hold_none_of_them(
    seen: tuple[str, ...] | None, validation: str, test: str
) -> None:
    expected = {"train": "training", "validation": validation, "test": test}
    assert data_parts(seen, REFERENCE) == expected


def test_no_claim_is_tested_on_radiographs_that_may_have_been_seen() -> None:
    table = measure([item(np.ones((7, 7), np.float32), 10.0 * n, UNKNOWN) for n in range(12)])
    assert "No radiograph of the oldest third is known to be unseen" in verdict(table)


def test_an_attention_test_of_other_weights_or_another_command_is_not_overwritten(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [row_id for split in load_prepared(phantoms).values() for row_id in split["id"]]
    monkeypatch.setattr(attention, "load_boxes", lambda boxes: {row_id: {} for row_id in ids})
    monkeypatch.setattr(attention, "_boxed_map", lambda *arguments, **options: pytest.fail("work was done"))
    for manifest in ('{"task": "stress"}', '{"task": "attention", "revision": "another"}', "damaged"):
        (tmp_path / "manifest.json").write_text(manifest, encoding="utf-8")
        assert main(["attention", str(TINY), str(phantoms), "--out", str(tmp_path)]) == 2
        assert "--out holds results of something else" in capsys.readouterr().err
        assert (tmp_path / "manifest.json").read_text(encoding="utf-8") == manifest
