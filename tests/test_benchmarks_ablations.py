"""Ablations on drawn hands with the tiny backbone: what is trained, what is trained again, what is said of it."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from test_benchmarks_findings import broken, changed_manifest
from test_benchmarks_report import rows_of, section, sections_with

from benchmarks import ablations
from benchmarks.ablations import ARMS, EPOCHS, Ablations, Arm, ablate, changes, difference, table_of, verdict
from benchmarks.cli import main
from benchmarks.findings import check_findings, load_findings
from boneage_hf import training
from boneage_hf.backbones_boneage import TinyBackbone
from boneage_hf.data import load_split, prepare_phantoms
from boneage_hf.errors import InputError
from boneage_hf.recipes import Recipe
from boneage_hf.training import TrainingRun

TINY = Recipe(
    backbone="tiny", image_size=64, source_size=None, epochs=2, batch_size=16, eval_batch_size=8, learning_rate=3e-3
)
STEPS = 4  # of a run: 36 training images in batches of 16, two epochs

BASE = Arm(name="base", question="base arm", change="nothing", recipe=TINY)
AVERAGE = Arm(
    name="average", question="pooling", change="averaging", recipe=dataclasses.replace(TINY, pooling="average")
)
RANDOM = Arm(name="random", question="start", change="a random start", recipe=TINY, random_start=True)
FEW = (BASE, AVERAGE, RANDOM)


@pytest.fixture(autouse=True)
def forget_precision() -> Iterator[None]:
    """accelerate keeps the first accelerator's settings for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(TinyBackbone().state_dict(), path)
    return path


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Every step of an optimizer from here on: whether the network averages, and the seed."""
    taken: list[tuple[bool, int]] = []
    step = TrainingRun.step

    def counted(self: TrainingRun, *arguments: Any, **options: Any) -> float:
        taken.append((self.recipe.pooling == "average", self.recipe.seed))
        return step(self, *arguments, **options)

    monkeypatch.setattr(TrainingRun, "step", counted)
    return taken


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`BONEAGE_RUNS` of this module."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BONEAGE_RUNS", str(folder))
        yield folder


def start(prepared: Path, weights: Path, out: Path, **options: Any) -> Ablations:
    given: dict[str, Any] = {"mixed_precision": "no", "arms": FEW, "progress": False, **options}
    return ablate(prepared, initial_weights=str(weights), out=out, **given)


@pytest.fixture(scope="module")
def finished(prepared_phantoms: Path, weights: Path, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result folder of three arms with two seeds each."""
    out = tmp_path_factory.mktemp("ablations") / "tiny-ablations"
    start(prepared_phantoms, weights, out, seeds=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


@pytest.fixture
def elsewhere(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The result folder of `finished`, on a machine without its run folders."""
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path / "no-runs"))
    return Path(shutil.copytree(finished, tmp_path / "out"))


# --- the arms -------------------------------------------------------------------------------------------------------


def test_each_arm_differs_from_the_base_arm_in_what_its_question_asks() -> None:
    assert [(arm.name, changes(arm, ARMS[0])) for arm in ARMS] == [
        ("base", "nothing"),
        ("average-pooling", "pooling=average"),
        ("no-sex", "sex_input=none"),
        ("224px", "image_size=224 epochs=3"),
        ("299px", "image_size=299 epochs=2"),
        ("reference-augmentation", "augmentation=reference"),
        ("balanced-sampling", "sampling=balanced per_category=473"),
        ("random-start", "initial_weights=random"),
    ]
    assert len({arm.question for arm in ARMS[1:]}) == 6


def test_the_base_arm_is_lite0_with_sex_attention_strong_augmentation_and_natural_sampling_at_128_px() -> None:
    recipe = ARMS[0].recipe
    assert (recipe.backbone, recipe.image_size, recipe.sex_input) == ("efficientnet_lite0", 128, "embedding")
    assert (recipe.pooling, recipe.augmentation, recipe.sampling) == ("attention", "strong", "natural")
    assert not ARMS[0].random_start


@pytest.mark.parametrize(("image_size", "images_per_second"), [(128, 70), (224, 26), (299, 14)])
def test_the_epochs_of_a_size_are_those_nearest_to_twenty_minutes(image_size: int, images_per_second: float) -> None:
    minutes = {epochs: epochs * 9458 / images_per_second / 60 for epochs in range(1, 40)}
    assert EPOCHS[image_size] == min(minutes, key=lambda epochs: abs(minutes[epochs] - 20))


def test_balanced_sampling_sees_as_many_images_as_natural_sampling_does() -> None:
    (balanced,) = (arm.recipe for arm in ARMS if arm.recipe.sampling == "balanced")
    assert 20 * balanced.per_category // balanced.batch_size == 9458 // balanced.batch_size


# --- the verdict ----------------------------------------------------------------------------------------------------


def pairs_of(**moved: list[float]) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """Arm -> by how much its errors are larger than those of the base arm with each seed, on 400 images."""
    reference = np.full(400, 100.0)
    noise = np.tile([0.5, -0.5], 200)
    pairs = {("base", seed): (reference + 8, reference) for seed in (0, 1)}
    for name, values in moved.items():
        pairs |= {(name, seed): (reference + 8 + value + noise, reference) for seed, value in enumerate(values)}
    return pairs


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        ([1.0], "Averaging raises the MAE by 1.00 months"),
        ([-1.0], "Averaging lowers the MAE by 1.00 months"),
        ([0.01], "Averaging: not told apart, +0.01 months"),
        ([0.2, 0.3], "Averaging raises the MAE by 0.25 months"),
        ([0.5, -0.1], "Averaging: not told apart, +0.20 months"),
    ],
)
def test_a_verdict_rests_on_the_interval_and_on_all_seeds(moved: list[float], said: str) -> None:
    pairs = pairs_of(average=moved)
    found = verdict(AVERAGE, BASE, pairs, range(len(moved)))
    assert found.startswith(said)
    assert ("the seeds disagree" in found) == (len({np.sign(value) for value in moved}) > 1)
    assert f"{'one seed' if len(moved) == 1 else '2 seeds'}, n = 400" in found


def test_a_difference_is_that_of_the_mean_absolute_errors_over_the_seeds() -> None:
    generator = np.random.default_rng(1)
    reference = generator.uniform(20, 200, 50)
    pairs = {
        (arm, seed): (reference + generator.normal(0, 9, 50), reference)
        for arm in ("base", "average")
        for seed in (0, 1)
    }
    slow = 0.0
    for seed in (0, 1):
        for image in range(50):
            for arm, sign in (("average", 1), ("base", -1)):
                predicted, truth = pairs[arm, seed]
                slow += sign * abs(predicted[image] - truth[image]) / 100
    found = difference(pairs, "average", "base", 0, 1)
    assert found.difference_months == pytest.approx(slow)
    assert found.low_months < found.difference_months < found.high_months


# --- what is trained ------------------------------------------------------------------------------------------------


def test_the_folder_holds_a_row_and_predictions_per_run_and_says_where_they_come_from(
    finished: Path, prepared_phantoms: Path, weights: Path
) -> None:
    table = pd.read_csv(finished / "ablations.csv")
    runs = [(arm.name, seed) for arm in FEW for seed in (0, 1)]
    assert list(zip(table["arm"], table["seed"], strict=True)) == runs
    assert list(table["changes"]) == [*["nothing"] * 2, *["pooling=average"] * 2, *["initial_weights=random"] * 2]
    assert (table[["minutes", "core_hours", "images_per_second"]] > 0).all(axis=None)
    assert set(table["epochs"]) == {2}
    selection = load_split(prepared_phantoms, "selection")
    assert set(table["n"]) == {len(selection)}
    months = np.asarray(selection["bone_age_months"], dtype=float)
    errors = {}
    for name, seed in runs:
        predictions = pd.read_csv(finished / f"predictions-{name}-seed{seed}.csv", dtype={"id": str})
        assert list(predictions.columns) == ["id", "predicted_months"]
        assert list(predictions["id"]) == list(selection["id"])
        errors[name, seed] = float(np.abs(predictions["predicted_months"] - months).mean())
    # The table has six digits: an error of 100 months and more is rounded to 0.001.
    assert list(table["mae_months"]) == pytest.approx([errors[run] for run in runs], rel=1e-5, abs=1e-4)
    moved = [errors[name, seed] - errors["base", seed] for name, seed in runs]
    assert list(table["difference_months"]) == pytest.approx(moved, rel=1e-5, abs=1e-4)
    manifest = json.loads((finished / "manifest.json").read_text(encoding="utf-8"))
    assert {"commit", "versions", "hardware", "data_fingerprint", "train_fingerprint"} <= set(manifest)
    assert manifest["split"] == "selection"
    assert manifest["initial_weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    starts = {name: run["initial_weights"]["source"] for name, run in manifest["runs"].items()}
    assert starts["base-seed0"] == "tiny.safetensors"
    assert starts["random-seed1"] == "random"


def test_the_measured_mae_is_the_one_that_training_chose_its_best_epoch_by(finished: Path, runs: Path) -> None:
    table = pd.read_csv(finished / "ablations.csv")
    for row in table.to_dict(orient="records"):
        (folder,) = (runs / "ablations").glob(f"{row['arm']}-seed{row['seed']}-*")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        best = min(lines, key=lambda line: line["validation_mae_months"])
        assert row["best_epoch"] == best["epoch"]
        assert row["mae_months"] == pytest.approx(best["validation_mae_months"], abs=0.05)  # stored as float16
        assert row["minutes"] == pytest.approx(sum(line["seconds"] for line in lines) / 60, rel=1e-4)


def test_neither_the_test_split_nor_the_calibration_half_is_read(
    prepared_phantoms: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path / "runs"))
    read: set[str] = set()

    def noted(dataset: Any, split: str) -> Any:
        read.add(split)
        return load_split(dataset, split)

    for module in (ablations, training):
        monkeypatch.setattr(module, "load_split", noted)
    start(prepared_phantoms, weights, tmp_path / "out", names=["base"])
    assert read == {"train", "selection"}


def test_a_finished_run_is_not_trained_again_and_goes_into_any_result_folder(
    finished: Path, prepared_phantoms: Path, weights: Path, tmp_path: Path, steps: list[tuple[bool, int]]
) -> None:
    start(prepared_phantoms, weights, tmp_path / "again", names=["average"], seeds=2)
    assert steps == []
    assert (tmp_path / "again" / "ablations.csv").read_bytes() == (finished / "ablations.csv").read_bytes()


def test_the_result_folder_is_enough_to_go_on_from_on_another_machine(
    elsewhere: Path, finished: Path, prepared_phantoms: Path, weights: Path, steps: list[tuple[bool, int]]
) -> None:
    start(prepared_phantoms, weights, elsewhere, seeds=2)
    assert steps == []
    assert (elsewhere / "ablations.csv").read_bytes() == (finished / "ablations.csv").read_bytes()


def test_runs_of_another_recipe_are_not_taken_over_from_the_result_folder(
    elsewhere: Path, prepared_phantoms: Path, weights: Path, steps: list[tuple[bool, int]]
) -> None:
    longer = dataclasses.replace(AVERAGE, recipe=dataclasses.replace(AVERAGE.recipe, learning_rate=2e-3))
    start(prepared_phantoms, weights, elsewhere, seeds=1, arms=(BASE, longer))
    assert steps == [(True, 0)] * STEPS


def test_predictions_that_a_run_did_not_write_are_refused(
    elsewhere: Path, prepared_phantoms: Path, weights: Path
) -> None:
    (elsewhere / "predictions-average-seed1.csv").write_text("id,predicted_months\n1,1\n")
    with pytest.raises(InputError, match="is not what average-seed1 wrote"):
        start(prepared_phantoms, weights, elsewhere, seeds=2)


def test_an_interrupted_command_goes_on_within_the_epoch_and_ends_as_if_it_had_not_been_interrupted(
    finished: Path,
    prepared_phantoms: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[tuple[bool, int]],
) -> None:
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path / "runs"))
    step, train = TrainingRun.step, training.train

    def stopping(self: TrainingRun, *arguments: Any, **options: Any) -> float:
        if len(steps) == STEPS + 3:  # in the second epoch of the second arm
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(training, "train", lambda *arguments, **options: train(*arguments, save_minutes=0, **options))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            start(prepared_phantoms, weights, out, names=["average"], seeds=1)
    with pytest.raises(InputError, match="not complete; run the same command again"):
        load_findings([out])
    assert json.loads((out / "manifest.json").read_text())["verdicts"]["pooling"] == "average not measured yet."
    start(prepared_phantoms, weights, out, names=["average"], seeds=1)
    assert steps == [*[(False, 0)] * STEPS, *[(True, 0)] * STEPS]
    for name in ("base", "average"):
        file = f"predictions-{name}-seed0.csv"
        assert (out / file).read_bytes() == (finished / file).read_bytes()
    assert "start: random not measured yet." in "; ".join(
        f"{question}: {said}" for question, said in load_findings([out]).ablations[0].manifest["verdicts"].items()
    )


@pytest.mark.parametrize("close", [True, False])
def test_only_arms_close_to_the_base_arm_get_a_second_seed_and_the_base_arm_with_them(
    finished: Path,
    prepared_phantoms: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    close: bool,
) -> None:
    rows: Any = pd.read_csv(finished / "ablations.csv").query("seed == 0 and arm != 'base'").itertuples()
    gaps = {row.arm: abs(row.difference_months) for row in rows}
    nearer, further = sorted(gaps, key=lambda name: gaps[name])
    assert gaps[nearer] < gaps[further]
    monkeypatch.setattr(ablations, "CLOSE_MONTHS", (gaps[nearer] + gaps[further] if close else gaps[nearer]) / 2)
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(ablations._Trainings, "run", lambda self, arm, seed: asked.append((arm.name, seed)))
    start(prepared_phantoms, weights, tmp_path / "out")
    first = [(arm.name, 0) for arm in FEW]
    assert asked == [*first, *([("base", 1), (nearer, 1)] if close else [])]


def test_runs_on_other_data_are_not_taken_for_these(
    finished: Path, weights: Path, tmp_path: Path, steps: list[tuple[bool, int]]
) -> None:
    other = tmp_path / "other"
    prepare_phantoms(48, other, seed=5, size=64, progress=False)
    start(other, weights, tmp_path / "out", names=["base"])
    assert len(steps) == STEPS
    with pytest.raises(InputError, match="other data, initial weights, precision or version"):
        start(other, weights, finished, names=["base"])


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_are_told_in_one_sentence_before_anything_is_trained(
    prepared_phantoms: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("", encoding="utf-8")
    for words, message in (
        (["--arms", "music"], "There is no arm 'music'; the arms are base, average-pooling,"),
        (["--initial-weights", "random"], "make one with boneage convert-lite0"),
        (["--out", str(tmp_path / "full")], "holds files that are no ablations"),
    ):
        given = ["--initial-weights", str(weights), "--out", str(tmp_path / "out"), *words]
        assert main(["ablations", str(prepared_phantoms), *given]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_weights_of_another_network_are_refused_with_the_name_of_the_arm(
    prepared_phantoms: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path / "runs"))
    lite0 = dataclasses.replace(BASE, recipe=dataclasses.replace(TINY, backbone="efficientnet_lite0"))
    with pytest.raises(InputError, match=r"^Arm base-seed0: .*weights of tiny, not of efficientnet_lite0"):
        start(prepared_phantoms, weights, tmp_path / "out", arms=(lite0,))


# --- check and report -----------------------------------------------------------------------------------------------


def test_the_folder_is_in_order_and_measured_again_from_its_predictions(
    finished: Path, prepared_phantoms: Path, tmp_path: Path
) -> None:
    assert main(["check", str(finished), "--data", str(prepared_phantoms)]) == 0
    table = pd.read_csv(finished / "ablations.csv")
    table["mae_months"] = table["mae_low_months"]
    text = table.to_csv(index=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    forged = broken(finished, tmp_path, ablations=text, manifest=changed_manifest(finished, table_sha256=digest))
    check_findings([forged])
    with pytest.raises(InputError, match=r"mae_months is .* in ablations\.csv and .* from its predictions"):
        check_findings([forged], data=prepared_phantoms)


def test_a_damaged_folder_is_refused(finished: Path, prepared_phantoms: Path, tmp_path: Path) -> None:
    def with_file(name: str, text: str) -> Path:
        (tmp_path / name).mkdir()
        return broken(finished, tmp_path / name, **{name: text})

    predictions = (finished / "predictions-base-seed0.csv").read_text(encoding="utf-8")
    for folder, message in (
        (with_file("ablations", "question,arm\n"), "lacks "),
        (with_file("predictions-base-seed0", predictions.replace(".", "1.", 1)), "is not the one that manifest"),
        (with_file("predictions-base-seed1", "id,sex\n1,male\n"), "columns id,predicted_months and nothing else"),
        (with_file("manifest", changed_manifest(finished, runs={})), "of different runs"),
    ):
        with pytest.raises(InputError, match=message):
            load_findings([folder])
    (tmp_path / "labels").mkdir()
    other = broken(finished, tmp_path / "labels", manifest=changed_manifest(finished, data_fingerprint="0" * 64))
    with pytest.raises(InputError, match="other images or labels"):
        check_findings([other], data=prepared_phantoms)


def test_the_report_prints_one_table_and_a_verdict_per_question(finished: Path) -> None:
    found = section(sections_with(findings=load_findings([finished])), "Ablations")
    rows, table = rows_of(found), pd.read_csv(finished / "ablations.csv")
    assert [(row["Arm"], row["Seed"]) for row in rows] == [(arm.name, str(seed)) for arm in FEW for seed in (0, 1)]
    first = table.iloc[2]
    assert rows[2]["MAE"] == f"{first.mae_months:.2f} [{first.mae_low_months:.2f}, {first.mae_high_months:.2f}]"
    assert rows[2]["Difference to the base arm"].startswith(f"{first.difference_months:+.2f} [")
    assert found.notes == (f"Pooling: {first.verdict}", f"Start: {table.iloc[4].verdict}")
    moved = abs(table.mae_months[1] - table.mae_months[0])
    assert f"another seed alone moves the MAE of the base arm by {moved:.2f} months" in found.paragraphs[1]


def test_the_report_has_no_section_on_ablations_where_none_were_made() -> None:
    assert "Ablations" not in [found.heading for found in sections_with()]


def test_a_run_whose_base_arm_lacks_the_seed_has_no_row() -> None:
    references = pd.DataFrame({"id": ["1", "2"], "reference_months": [50.0, 90.0]})
    run = {"seconds": 60.0, "images": 100, "best_epoch": 1, "hardware": {"torch_threads": 2}}
    keys = [("base", 0), ("average", 0), ("average", 1)]
    predictions = dict.fromkeys(keys, pd.DataFrame({"id": ["1", "2"], "predicted_months": [60.0, 80.0]}))
    table = table_of(FEW, dict.fromkeys(keys, run), predictions, references)
    assert list(zip(table["arm"], table["seed"], strict=True)) == keys[:2]
    assert list(table["core_hours"]) == pytest.approx([1 / 30] * 2)
