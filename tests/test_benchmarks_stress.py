"""The stress test on drawn hands and simulated predictions: no radiograph."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from benchmarks import stress
from benchmarks.cli import main
from benchmarks.findings import recompute_stress
from benchmarks.stress import KINDS, SETTINGS, UNCHANGED, Setting, mcnemar, measure, stress_checkpoint
from boneage_hf.data import load_split, prepare_phantoms
from boneage_hf.errors import InputError
from boneage_hf.hub import load_pipeline
from boneage_hf.phantom import draw
from boneage_hf.sex import SEXES

TINY = str(Path(__file__).parent / "checkpoints" / "tiny")
BY_NAME = {setting.name: setting for setting in SETTINGS}
FEW = (BY_NAME["rotation 90 deg"], BY_NAME["inversion negative"], BY_NAME["resolution 12.5 %"])


@pytest.fixture(scope="module")
def hand() -> Image.Image:
    return draw(100, "female", seed=3, size=128).convert("L").crop((0, 0, 100, 128))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "prepared"
    prepare_phantoms(80, folder, seed=1, size=96)
    return folder


def test_there_are_33_settings_of_seven_kinds_with_names_of_their_own() -> None:
    assert len(SETTINGS) == len({setting.name for setting in SETTINGS}) == 33
    assert list(dict.fromkeys(setting.kind for setting in SETTINGS)) == list(KINDS)
    assert len(KINDS) == 7


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_setting_changes_a_grey_picture_into_another_and_leaves_its_input_alone(
    setting: Setting, hand: Image.Image
) -> None:
    before = hand.tobytes()
    altered = setting(hand)
    assert hand.tobytes() == before
    assert altered.mode == "L"
    assert altered.tobytes() != before
    assert altered.size == (hand.size[::-1] if setting.name in ("rotation 90 deg", "rotation 270 deg") else hand.size)
    assert setting(hand).tobytes() == altered.tobytes()


def test_quarter_turns_flips_and_the_negative_undo_themselves(hand: Image.Image) -> None:
    for first, second in (
        ("rotation 90 deg", "rotation 270 deg"),
        ("rotation 180 deg", "rotation 180 deg"),
        ("flip left-right", "flip left-right"),
        ("flip top-bottom", "flip top-bottom"),
        ("inversion negative", "inversion negative"),
    ):
        assert BY_NAME[second](BY_NAME[first](hand)).tobytes() == hand.tobytes()


def test_a_positive_angle_turns_counter_clockwise_and_leaves_black_corners() -> None:
    picture = np.full((101, 101), 100, np.uint8)
    picture[48:53, 80:] = 255  # a bar to the right of the centre
    turned = np.asarray(BY_NAME["rotation 30 deg"](Image.fromarray(picture)))
    assert turned[50 - 20, 50 + 35] == 255  # up and to the right
    assert turned[0, 0] == turned[-1, -1] == 0


def test_brightness_adds_a_share_of_the_range_and_clips() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name, added in (("brightness +20 %", 51), ("brightness -40 %", -102)):
        expected = [min(255, max(0, level + added)) for level in range(256)]
        assert np.asarray(BY_NAME[name](Image.fromarray(ramp))).ravel().tolist() == expected


def test_contrast_scales_the_distance_from_the_mean() -> None:
    picture = np.array([[50, 150]], np.uint8)
    halved = np.asarray(BY_NAME["contrast x 0.5"](Image.fromarray(picture)))
    assert halved.tolist() == [[75, 125]]


def test_a_marker_is_white_and_stays_in_its_corner(hand: Image.Image) -> None:
    black = Image.new("L", (200, 300))
    for name, corner in (
        ("marker L upper left", (slice(0, 60), slice(0, 50))),
        ("marker R lower right", (slice(240, 300), slice(150, 200))),
    ):
        marked = np.asarray(BY_NAME[name](black))
        assert set(np.unique(marked)) == {0, 255}
        assert (marked[corner] == 255).sum() == (marked == 255).sum() > 100


def test_a_lower_resolution_keeps_less_detail(hand: Image.Image) -> None:
    pixels = np.asarray(hand, dtype=float)
    names = [setting.name for setting in SETTINGS if setting.kind == "resolution"]
    lost = [np.abs(np.asarray(BY_NAME[name](hand), dtype=float) - pixels).mean() for name in names]
    assert lost == sorted(lost)


def simulated(n: int = 60) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Unchanged predictions with an SD of 8 months, turned ones 20 months higher, negatives the same."""
    generator = np.random.default_rng(0)
    ids, reference = [str(number) for number in range(n)], generator.uniform(30, 200, n)
    before = reference + generator.normal(0, 8, n)
    parts = {UNCHANGED: before, FEW[0].name: before + 20, FEW[1].name: before, FEW[2].name: before + 7}
    tables = [pd.DataFrame({"id": ids, "setting": name, "predicted_months": value}) for name, value in parts.items()]
    return pd.concat(tables), pd.DataFrame({"id": ids, "reference_months": reference})


def test_changes_are_measured_against_the_unchanged_predictions() -> None:
    predictions, references = simulated()
    table = measure(predictions, references, settings=FEW).set_index("setting")
    turned, negative, coarse = (table.loc[setting.name] for setting in FEW)
    errors = {
        name: np.abs(part["predicted_months"].to_numpy() - references["reference_months"].to_numpy())
        for name, part in predictions.groupby("setting")
    }
    assert turned["mae_change_months"] == pytest.approx(errors[FEW[0].name].mean() - errors[UNCHANGED].mean())
    assert turned["mae_change_low_months"] < turned["mae_change_months"] < turned["mae_change_high_months"]
    assert turned["mean_move_months"] == pytest.approx(20)
    assert (turned["moved_over_6_months"], turned["moved_over_12_months"]) == (1, 1)
    assert (coarse["moved_over_6_months"], coarse["moved_over_12_months"]) == (1, 0)
    assert turned["mae_change_holm_p"] < 0.001 < turned["unchanged_mae_months"]
    assert turned["significant_errors"] == (errors[FEW[0].name] > 24).mean()
    assert (negative["mae_change_months"], negative["mae_change_p"], negative["significant_p"]) == (0, 1, 1)
    assert (table["mae_change_holm_p"] >= table["mae_change_p"]).all()


def test_measuring_does_not_depend_on_the_order_of_rows() -> None:
    predictions, references = simulated()
    shuffled = predictions.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(
        measure(shuffled, references, settings=FEW), measure(predictions, references, settings=FEW)
    )


def test_missing_predictions_are_refused() -> None:
    predictions, references = simulated()
    with pytest.raises(InputError, match="no predictions for"):
        measure(predictions[predictions["setting"] != FEW[1].name], references, settings=FEW)
    with pytest.raises(InputError, match="have no prediction"):
        measure(predictions[predictions["id"] != "3"], references, settings=FEW)


def test_mcnemar_is_the_binomial_test_of_the_pairs_that_differ() -> None:
    before = np.array([True] * 3 + [False] * 17)
    after = np.array([True] * 2 + [False] * 11 + [True] * 7)
    # one lost, seven gained: 2 * P(X <= 1 | 8, 1/2)
    assert mcnemar(before, after) == pytest.approx(2 * (1 + 8) / 2**8)
    assert mcnemar(before, before) == 1


def test_images_of_a_limit_are_spread_over_the_whole_split() -> None:
    assert stress.evenly_spaced(1024, 256) == list(range(0, 1024, 4))
    assert stress.evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert stress.evenly_spaced(3, None) == stress.evenly_spaced(3, 5) == [0, 1, 2]


def test_a_part_of_a_split_is_measured_again_from_its_labels(phantoms: Path, tmp_path: Path) -> None:
    stress_checkpoint(TINY, phantoms, out=tmp_path, limit=3, settings=FEW, progress=False)
    recompute_stress(tmp_path, phantoms)


def test_predictions_are_those_of_the_pipeline_for_the_changed_pictures(phantoms: Path, tmp_path: Path) -> None:
    done = stress_checkpoint(TINY, phantoms, out=tmp_path, limit=3, settings=FEW, progress=False)
    predictions = pd.read_csv(tmp_path / "predictions.csv", dtype={"id": str}).set_index(["setting", "id"])
    pipe, rows = load_pipeline(TINY), load_split(phantoms, "test")
    assert len(rows) > 3
    for row in rows.select([0, len(rows) // 3, 2 * len(rows) // 3]):
        for name, alter in ((UNCHANGED, lambda grey: grey), (FEW[0].name, FEW[0])):
            expected = pipe(alter(row["image"].convert("L")), sex=SEXES[row["sex"]])["bone_age_months"]
            assert predictions.loc[(name, row["id"]), "predicted_months"] == pytest.approx(expected, abs=1e-3)
    assert list(predictions.columns) == ["predicted_months"]
    assert len(predictions) == 3 * (len(FEW) + 1)
    assert done.manifest["complete"] is True
    assert done.manifest["images"] == f"3 of {len(rows)}, evenly spaced in the order of the split"
    assert {path.name for path in done.files} == {path.name for path in tmp_path.iterdir()}


def test_an_interrupted_test_goes_on_and_ends_as_if_it_had_not_been(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stress_checkpoint(TINY, phantoms, out=whole, limit=4, settings=FEW, progress=False)
    predict, calls = stress.predict_dataset, []

    def failing(*args: object, **kwargs: object) -> pd.DataFrame:
        calls.append(kwargs["alter"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(stress, "predict_dataset", failing)
    with pytest.raises(KeyboardInterrupt):
        stress_checkpoint(TINY, phantoms, out=broken, limit=4, settings=FEW, progress=False)
    assert json.loads((broken / "manifest.json").read_text())["complete"] is False
    calls.extend([None] * 10)
    before = len(calls)
    stress_checkpoint(TINY, phantoms, out=broken, limit=4, settings=FEW, progress=False)
    assert calls[before:] == list(FEW[1:])
    for name in ("predictions.csv", "stress.csv"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_settings_side_by_side_predict_what_they_predict_one_by_one(phantoms: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    tables = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = tmp_path / str(threads)
            stress_checkpoint(TINY, phantoms, out=out, limit=4, settings=FEW, progress=False)
            assert torch.get_num_threads() == threads
            tables.append((out / "predictions.csv").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert tables[0] == tables[1]


def test_a_folder_of_another_test_is_left_alone(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stress_checkpoint(TINY, phantoms, out=tmp_path, limit=3, settings=FEW, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["stress", TINY, str(phantoms), "--limit", "4", "--out", str(tmp_path)]) == 2
    assert "name another one with --out" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--limit", "1"], "--limit must be 2 or more"), (["--split", "tset"], 'did you mean "test"')],
)
def test_a_mistake_is_told_in_one_sentence(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["stress", TINY, str(phantoms), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


_LISTEN = """
import sys
import benchmarks.cli
benchmarks.cli.keep_freed_memory = lambda: print("numpy" in sys.modules)
benchmarks.cli.main(["stress", "nowhere", "nowhere", "--out", "nowhere"])
"""


def test_the_allocator_is_told_before_numpy_starts_threads_with_arenas_of_their_own() -> None:
    listened = subprocess.run([sys.executable, "-c", _LISTEN], capture_output=True, text=True, check=True)
    assert listened.stdout.split() == ["False"]
