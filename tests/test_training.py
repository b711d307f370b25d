"""Training: what an epoch sees, that a run can be stopped anywhere, and that N processes compute what one computes."""

import argparse
import contextlib
import dataclasses
import errno
import faulthandler
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hub_server import HubServer
from huggingface_hub import HfApi
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from boneage_hf import augmentation, cli, training
from boneage_hf.backbones_boneage import TinyBackbone
from boneage_hf.data import load_split, prepare_phantoms, read_manifest
from boneage_hf.errors import InputError
from boneage_hf.evaluation import StorageDifference, predict_prepared
from boneage_hf.hub import DEFAULT_CHECKPOINT, load_pipeline, save_checkpoint
from boneage_hf.initial_weights import IMAGENET_IMAGE_MEAN, LITE_IMAGE_MEAN
from boneage_hf.memory import keep_freed_memory
from boneage_hf.modeling_boneage import BoneAgeModel
from boneage_hf.prepared import PreparedImages, prepare_images
from boneage_hf.recipes import PLANS, Recipe, Stage
from boneage_hf.training import (
    Batch,
    MovingAverage,
    TrainingResult,
    TrainingRun,
    build_model,
    build_optimizer,
    epoch_order,
    learning_rate,
    make_batch,
    make_processor,
    run_folder,
    shares,
    train,
    train_plan,
)

#: Everything that draws random numbers is on: dropout (in the network), augmentation, sampling; and the average.
TINY = Recipe(
    backbone="tiny",
    image_size=64,  # a grid of 2 x 2: with one position alone the attention has no gradient
    source_size=None,
    epochs=4,
    batch_size=16,
    eval_batch_size=8,
    learning_rate=3e-3,
    ema=0.9,
)
STEPS = 5  # 90 training images in batches of 16
RUN_FILES = {
    "run.json",
    "run.lock",
    "metrics.jsonl",
    "learning_curve.png",
    "state.safetensors",
    "tensorboard",
    "checkpoint",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`BONEAGE_RUNS`: run folders by name, and the cache of prepared images."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BONEAGE_RUNS", str(folder))
        yield folder


@pytest.fixture(scope="module")
def phantoms(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 drawn hands to train on, 10 to select, 10 to calibrate and 10 to test."""
    folder = tmp_path_factory.mktemp("phantoms") / "prepared"
    prepare_phantoms(120, folder, size=64, progress=False)
    return folder


@pytest.fixture(autouse=True)
def forget_precision() -> Iterator[None]:
    """accelerate keeps the first accelerator's settings for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@dataclasses.dataclass(frozen=True)
class Finished:
    folder: Path
    result: TrainingResult
    printed: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return metrics_of(self.folder)


@pytest.fixture(scope="module")
def finished(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of `TINY` from beginning to end, by the command's own way."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = start(phantoms, folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    return Finished(folder, result, printed.getvalue())


@pytest.fixture(scope="module")
def images(phantoms: Path) -> PreparedImages:
    return prepared_split(phantoms, "train")


def prepared_split(phantoms: Path, name: str, recipe: Recipe = TINY) -> PreparedImages:
    return prepare_images(load_split(phantoms, name), make_processor(recipe), cache=None, name=name, progress=False)


def start(phantoms: Path, folder: Path, recipe: Recipe = TINY, **options: Any) -> TrainingResult:
    return train(phantoms, folder, recipe, initial_weights="random", progress_bar=False, **options)


def resume(phantoms: Path, folder: Path, **options: Any) -> TrainingResult:
    return train(phantoms, folder, None, resume=True, progress_bar=False, **options)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def progress_of(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "state.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["progress"])


def temporary_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if ".tmp" in path.name or ".old" in path.name)


def make_run(phantoms: Path, folder: Path, recipe: Recipe = TINY, **options: Any) -> TrainingRun:
    """A run before its first step, without the folder's files."""
    train_images, selection = (prepared_split(phantoms, name, recipe) for name in ("train", "selection"))
    model, _ = build_model(recipe, initial_weights="random", train=train_images)
    model.config.provenance = {}
    return TrainingRun(
        Accelerator(cpu=True),
        folder,
        recipe,
        model,
        make_processor(recipe),
        train_images,
        selection,
        **{"accumulation": 1, **options},
    )


def timeless(content: Any) -> Any:
    """The same without what depends on the clock or on the state of the checkout that the tests run in, also where it
    is told of earlier trainings."""
    if isinstance(content, list):
        return [timeless(one) for one in content]
    if isinstance(content, dict):
        passing = {"date", "commit", "core_hours", "minutes"}
        return {name: timeless(value) for name, value in content.items() if name not in passing}
    return content


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit the same checkpoint, state and metrics, but for times."""
    weights = [(folder / "checkpoint" / "model.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] == weights[1]
    configs = [json.loads((folder / "checkpoint" / "config.json").read_text()) for folder in (one, other)]
    assert timeless(configs[0]) == timeless(configs[1])
    states = [load_file(folder / "state.safetensors") for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    told = [
        [{name: row[name] for name in ("epoch", "loss", "validation_mae_months")} for row in metrics_of(folder)]
        for folder in (one, other)
    ]
    assert told[0] == told[1]


# --- from a data set to a checkpoint --------------------------------------------------------------------------------


def test_a_run_ends_in_a_checkpoint_that_the_pipeline_loads(finished: Finished, phantoms: Path) -> None:
    pipe = load_pipeline(finished.result.checkpoint, device="cpu")
    answer = pipe(load_split(phantoms, "test")[0]["image"], sex="female")
    assert math.isfinite(answer["bone_age_months"])
    assert answer["attention"].shape == (2, 2)
    assert pipe.image_processor.to_dict() == make_processor(TINY).to_dict()


def test_a_run_folder_holds_recipe_state_metrics_curve_and_checkpoint_and_no_rubbish(finished: Finished) -> None:
    assert {path.name for path in finished.folder.iterdir()} == RUN_FILES
    assert (finished.folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((finished.folder / "run.json").read_text())["recipe"] == TINY.to_dict()
    assert temporary_files(finished.folder) == []


def test_tensorboard_files_hold_every_epoch(finished: Finished) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (finished.folder / "tensorboard").rglob("events.out.tfevents.*")
    values = [(event.step, value) for event in EventFileLoader(str(file)).Load() for value in event.summary.value]
    maes = {step: value.tensor.float_val[0] for step, value in values if value.tag == "validation_mae_months"}
    assert maes == pytest.approx({row["epoch"]: row["validation_mae_months"] for row in finished.rows}, rel=1e-6)


@pytest.mark.slow
def test_the_loss_falls_over_the_epochs(phantoms: Path, images: PreparedImages, tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY, epochs=16, batch_size=8, augmentation="none")
    start(phantoms, tmp_path / "run", recipe)
    losses = [row["loss"] for row in metrics_of(tmp_path / "run")]
    months = torch.from_numpy(images.bone_age_months)
    constant = nn.functional.smooth_l1_loss(
        (months - months.mean()) / months.std(), torch.zeros(len(images)), beta=0.1
    )
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert np.mean(losses[-3:]) < 0.8 * float(constant)


def test_each_epoch_is_one_printed_line(finished: Finished) -> None:
    lines = finished.printed.splitlines()
    assert len(lines) == TINY.epochs
    for number, line in enumerate(lines, start=1):
        assert re.fullmatch(
            rf"epoch {number}/4  loss \d\.\d{{4}}  validation MAE \d+\.\d\d months  \d+\.\d images/s  \d+ min left",
            line,
        )


def test_the_result_is_the_epoch_with_the_smallest_validation_error(finished: Finished) -> None:
    maes = [row["validation_mae_months"] for row in finished.rows]
    assert finished.result.validation_mae_months == min(maes)
    assert finished.result.epoch == 1 + int(np.argmin(maes))


def test_the_checkpoint_has_the_validation_error_that_was_reported(finished: Finished, phantoms: Path) -> None:
    selection = prepared_split(phantoms, "selection")
    model = BoneAgeModel.from_pretrained(finished.result.checkpoint)
    predicted = predict_prepared(model, make_processor(TINY), selection.pixels, selection.sex)
    mae = np.abs(predicted - selection.bone_age_months).mean()
    assert mae == pytest.approx(finished.result.validation_mae_months, abs=0.2)  # stored as float16


def test_the_checkpoint_says_where_its_weights_come_from(finished: Finished, phantoms: Path) -> None:
    provenance = BoneAgeModel.from_pretrained(finished.result.checkpoint).config.provenance
    splits = read_manifest(phantoms)["splits"]
    assert provenance["recipe"] == TINY.to_dict()
    assert provenance["initial_weights"]["source"] == "random"
    assert provenance["data"] == {
        "kind": "phantom",
        "licence": "apache-2.0",
        **read_manifest(phantoms)["settings"],
    }
    assert provenance["train_n"] == splits["train"]["rows"] == 90
    assert provenance["train_fingerprint"] == splits["train"]["fingerprint"]
    assert provenance["selection_n"] == 10
    assert provenance["epoch"] == finished.result.epoch
    assert provenance["validation_mae_months"] == finished.result.validation_mae_months
    assert str(finished.folder.parent) not in json.dumps(provenance)


def test_the_checkpoint_says_what_float16_storage_moved(finished: Finished) -> None:
    moved = BoneAgeModel.from_pretrained(finished.result.checkpoint).config.provenance["float16_storage"]
    assert moved["n"] == 10
    assert 0 <= moved["mean_months"] <= moved["largest_months"]


def test_weights_whose_predictions_float16_would_move_are_stored_as_float32(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "float16_difference", lambda *_: StorageDifference(10, 0.1, 0.2))
    result = start(phantoms, tmp_path / "run", dataclasses.replace(TINY, epochs=1))
    stored = load_file(result.checkpoint / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float32}


def test_weights_that_do_not_fit_into_float16_are_stored_as_float32(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "fits_float16", lambda _: False)
    result = start(phantoms, tmp_path / "run", dataclasses.replace(TINY, epochs=1))
    stored = load_file(result.checkpoint / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float32}
    assert BoneAgeModel.from_pretrained(result.checkpoint).config.provenance["float16_storage"] is None


def test_test_and_calibration_images_are_never_loaded(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    used: list[str] = []

    def spy_on_loading(dataset: Any, name: str) -> Any:
        loaded.append(name)
        return load_split(dataset, name)

    def spy_on_images(dataset: Any, *arguments: Any, **options: Any) -> PreparedImages:
        images = prepare_images(dataset, *arguments, **options)
        used.extend(images.ids)
        return images

    monkeypatch.setattr(training, "load_split", spy_on_loading)
    monkeypatch.setattr(training, "prepare_images", spy_on_images)
    start(phantoms, tmp_path / "run", dataclasses.replace(TINY, epochs=1))
    assert loaded == ["train", "selection"]
    held_back = {row_id for name in ("test", "calibration") for row_id in load_split(phantoms, name)["id"]}
    assert len(used) == 100
    assert not held_back.intersection(used)


def test_bf16_trains_in_autocast_and_keeps_float32_weights(phantoms: Path, tmp_path: Path, finished: Finished) -> None:
    types: set[torch.dtype] = set()
    forward = TinyBackbone.forward

    def spy(self: TinyBackbone, pixel_values: torch.Tensor) -> torch.Tensor:
        features = forward(self, pixel_values)
        if self.training:
            types.add(features.dtype)
        return features

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinyBackbone, "forward", spy)
        start(phantoms, tmp_path / "run", dataclasses.replace(TINY, epochs=1), mixed_precision="bf16")
    assert types == {torch.bfloat16}
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert state["model.head.dense.weight"].dtype == state["optimizer.0.exp_avg"].dtype == torch.float32
    (row,) = metrics_of(tmp_path / "run")
    assert row["loss"] == pytest.approx(finished.rows[0]["loss"], rel=0.2)
    assert row["loss"] != finished.rows[0]["loss"]


def test_every_epoch_trains_in_training_mode_with_a_frozen_backbone_in_evaluation_mode(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: set[tuple[bool, bool]] = set()
    optimize = TrainingRun.step

    def spy(self: TrainingRun, batches: Iterable[Batch], *, epoch: int, step: int) -> float:
        modes.add((self.model.head.dropout.training, self.model.backbone.training))
        return optimize(self, batches, epoch=epoch, step=step)

    monkeypatch.setattr(TrainingRun, "step", spy)
    start(phantoms, tmp_path / "run", dataclasses.replace(TINY, epochs=2, freeze_backbone=True))
    assert modes == {(True, False)}


# --- refusals -------------------------------------------------------------------------------------------------------


def test_training_does_not_start_without_initial_weights(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs --initial-weights: .*random"):
        train(phantoms, tmp_path / "run", TINY)
    assert list(tmp_path.iterdir()) == []


def test_training_does_not_start_with_weights_that_do_not_exist(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        train(phantoms, tmp_path / "run", TINY, initial_weights="absent.safetensors", progress_bar=False)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_not_overwritten(phantoms: Path, finished: Finished) -> None:
    before = (finished.folder / "run.json").read_bytes()
    with pytest.raises(InputError, match="holds a run already; continue it with --resume"):
        start(phantoms, finished.folder)
    assert (finished.folder / "run.json").read_bytes() == before


def test_there_is_nothing_to_resume_in_an_empty_folder(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        resume(phantoms, tmp_path)


def test_a_run_that_lost_its_state_does_not_go_on_from_random_weights(
    phantoms: Path, finished: Finished, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_bytes((finished.folder / "run.json").read_bytes())
    with pytest.raises(InputError, match=r"no state\.safetensors to resume from"):
        resume(phantoms, tmp_path)


@pytest.mark.parametrize("seed", [2018, 2019])
def test_a_run_is_not_resumed_on_other_data(seed: int, finished: Finished, tmp_path: Path) -> None:
    prepare_phantoms(40, tmp_path / "other", seed=seed, size=64, progress=False)
    with pytest.raises(InputError, match="split train are not those this run was started on"):
        resume(tmp_path / "other", finished.folder)


def test_a_run_is_not_resumed_with_another_half_to_select_by(
    phantoms: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_half(dataset: Any, name: str) -> Any:
        return load_split(dataset, "calibration" if name == "selection" else name)

    monkeypatch.setattr(training, "load_split", other_half)
    with pytest.raises(InputError, match="split selection are not those"):
        resume(phantoms, finished.folder)


def test_a_run_is_not_resumed_with_another_recipe(phantoms: Path, finished: Finished) -> None:
    with pytest.raises(InputError, match="not with epochs 9 instead of 4; leave these out"):
        train(phantoms, finished.folder, dataclasses.replace(TINY, epochs=9), resume=True, progress_bar=False)


def test_a_run_is_not_resumed_from_other_weights(phantoms: Path, finished: Finished) -> None:
    with pytest.raises(InputError, match="leave out --initial-weights"):
        resume(phantoms, finished.folder, initial_weights="random")


def test_training_without_tensorboard_says_what_to_install(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install \"boneage-hf\[train\]\""):
        start(phantoms, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_resumed_in_another_precision(phantoms: Path, finished: Finished) -> None:
    with pytest.raises(InputError, match="mixed precision 'bf16' instead of 'no'"):
        resume(phantoms, finished.folder, mixed_precision="bf16")


def test_a_run_of_two_processes_is_not_resumed_by_one(phantoms: Path, finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((finished.folder / "run.json").read_bytes())
    state = load_file(finished.folder / "state.safetensors")
    state["generator.1.cpu"] = state["generator.0.cpu"].clone()
    save_file(state, tmp_path / "state.safetensors", metadata={"progress": json.dumps(progress_of(finished.folder))})
    with pytest.raises(InputError, match="started with 2 processes; resume it with as many, not 1"):
        resume(phantoms, tmp_path)


def test_a_finished_run_that_is_resumed_stays_as_it_is(phantoms: Path, finished: Finished) -> None:
    before = (finished.folder / "state.safetensors").read_bytes()
    assert train(phantoms, finished.folder, TINY, resume=True, progress_bar=False) == finished.result
    assert (finished.folder / "state.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "accumulation", "message"),
    [
        ({"batch_size": 128}, 1, "fewer training images than one batch"),
        ({"batch_size": 15}, 2, "cannot be shared evenly"),
        ({}, 0, "--accumulation must be 1"),
    ],
)
def test_an_impossible_batch_is_refused_and_leaves_no_run_behind(
    changes: dict[str, Any], accumulation: int, message: str, phantoms: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        start(phantoms, tmp_path / "run", dataclasses.replace(TINY, **changes), accumulation=accumulation)
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_made_is_one_sentence(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="run folder cannot be written"):
        start(phantoms, tmp_path / "file" / "run")


# --- stopped and resumed --------------------------------------------------------------------------------------------


def _die_after_saving(epoch: int, step: int) -> None:
    """Have this process killed, without a chance to tidy up, right after the state of that step is on disk."""
    save = TrainingRun.save_state

    def save_and_die(self: TrainingRun) -> None:
        save(self)
        if (self.progress.epoch, self.progress.step) == (epoch, step):
            os.kill(os.getpid(), signal.SIGKILL)

    TrainingRun.save_state = save_and_die  # type: ignore[method-assign]


def _run_and_die(arguments: list[str]) -> None:
    _die_after_saving(epoch=1, step=2)
    raise SystemExit(training.main(arguments))


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_an_epoch_ends_bit_for_bit_as_if_it_had_not_been(
    phantoms: Path, finished: Finished, tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.json"
    recipe.write_text(json.dumps(TINY.to_dict()))
    run = tmp_path / "run"
    options = ["--recipe", str(recipe), "--initial-weights", "random", "--save-minutes", "0"]
    process = multiprocessing.get_context("spawn").Process(
        target=_run_and_die, args=([str(phantoms), str(run), *options],), daemon=True
    )
    process.start()
    process.join(timeout=600)
    assert process.exitcode == -signal.SIGKILL
    assert (progress_of(run)["epoch"], progress_of(run)["step"]) == (1, 2)
    assert training.main([str(phantoms), str(run), "--resume"]) == 0
    assert_same_run(run, finished.folder)


def stop_at_the_first_step(patch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any, **options: Any) -> float:
        raise KeyboardInterrupt

    patch.setattr(TrainingRun, "step", stop)


def stop_in_the_middle_of_writing_a_state(patch: pytest.MonkeyPatch) -> None:
    def stop(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if json.loads(metadata["progress"])["epoch"] == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save_file(tensors, path, metadata=metadata)

    patch.setattr(training, "save_file", stop)


def stop_between_the_best_weights_and_the_state(patch: pytest.MonkeyPatch) -> None:
    report = training._report_epoch

    def stop(folder: Path, row: dict[str, float], *, epochs: int) -> None:
        report(folder, row, epochs=epochs)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    patch.setattr(training, "_report_epoch", stop)


@pytest.mark.parametrize(
    "interruption",
    [stop_at_the_first_step, stop_in_the_middle_of_writing_a_state, stop_between_the_best_weights_and_the_state],
)
def test_a_run_can_be_stopped_anywhere_and_resumed_bit_for_bit(
    interruption: Callable[[pytest.MonkeyPatch], None], phantoms: Path, finished: Finished, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interruption(patch)
        with pytest.raises(KeyboardInterrupt):
            start(phantoms, tmp_path / "run")
    resume(phantoms, tmp_path / "run")
    assert_same_run(tmp_path / "run", finished.folder)


# --- what goes wrong on the way -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_state_before_it(
    phantoms: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = 0

    def poisoned(*arguments: Any, **options: Any) -> Batch:
        nonlocal batches
        batches += 1
        batch = make_batch(*arguments, **options)
        return dataclasses.replace(batch, labels=batch.labels * math.nan) if batches == STEPS + 4 else batch

    monkeypatch.setattr(training, "make_batch", poisoned)
    with pytest.raises(InputError, match=r"the loss became nan in epoch 2, after 3 .*--set learning_rate"):
        start(phantoms, tmp_path / "run", save_minutes=0)
    assert (progress_of(tmp_path / "run")["epoch"], progress_of(tmp_path / "run")["step"]) == (1, 3)
    monkeypatch.undo()
    resume(phantoms, tmp_path / "run")
    assert_same_run(tmp_path / "run", finished.folder)


@pytest.mark.parametrize(
    ("last_step", "message"),
    [
        (1, "a weight became NaN or infinite in epoch 2, after 2 "),
        (STEPS - 1, "the validation MAE became nan in epoch 2, after 5 "),
    ],
)
def test_weights_that_are_not_numbers_reach_neither_state_nor_checkpoint(
    last_step: int, message: str, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize = TrainingRun.step

    def overflowing(self: TrainingRun, batches: Iterable[Batch], *, epoch: int, step: int) -> float:
        loss = optimize(self, batches, epoch=epoch, step=step)
        if (epoch, step) == (1, last_step):
            self.model.head.output.bias.data.fill_(math.nan)
            assert self.average is not None
            self.average.update(self.model, epoch * STEPS + step)
        return loss

    monkeypatch.setattr(TrainingRun, "step", overflowing)
    with pytest.raises(InputError, match=message):
        start(phantoms, tmp_path / "run", save_minutes=0)
    for file in ("state.safetensors", "checkpoint/model.safetensors"):
        values = load_file(tmp_path / "run" / file).values()
        assert all(bool(torch.isfinite(value).all()) for value in values)
    assert progress_of(tmp_path / "run")["epoch"] == 1
    assert [row["epoch"] for row in metrics_of(tmp_path / "run")] == [1]


def test_a_state_with_a_map_to_the_teachers_features_that_is_no_number_is_not_written(
    phantoms: Path, tmp_path: Path
) -> None:
    run = make_run(phantoms, tmp_path, teacher_targets=TARGETS)
    run.save_state()
    kept = (tmp_path / "state.safetensors").read_bytes()
    assert run.student is not None
    run.student.projection.bias.data[3] = math.inf
    with pytest.raises(InputError, match="a weight became NaN or infinite"):
        run.save_state()
    assert (tmp_path / "state.safetensors").read_bytes() == kept


DISK_FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", DISK_FULL, ids=["OSError", "SafetensorError"])
def test_a_full_disk_stops_the_run_and_keeps_the_last_state(
    error: Exception, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    kept: list[bytes] = []

    def filling_up(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        progress = json.loads(metadata["progress"])
        if (progress["epoch"], progress["step"]) == (0, 3):
            kept.append((run / "state.safetensors").read_bytes())
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(training, "save_file", filling_up)
    with pytest.raises(InputError, match=r"the disk is full\. The last good state .* is intact; .* --resume"):
        start(phantoms, run, save_minutes=0)
    assert [(run / "state.safetensors").read_bytes()] == kept
    assert progress_of(run)["step"] == 2
    assert temporary_files(run) == []


@pytest.mark.parametrize("place", ["save_checkpoint", "write_text", "draw_learning_curve"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_nothing_that_cannot_be_written_at_the_end_of_an_epoch_costs_the_state(
    place: str, code: int, phantoms: Path, tmp_path: Path
) -> None:
    run = make_run(phantoms, tmp_path)
    run.save_state()
    kept = (tmp_path / "state.safetensors").read_bytes()
    run.progress = training.Progress(step=STEPS, loss_sum=1.0, seconds=1.0)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, place, fail)
        message = "the disk is full" if code == errno.ENOSPC else r"writing failed \(.*Input/output error\)"
        with pytest.raises(InputError, match=message):
            run.finish_epoch()
    assert (tmp_path / "state.safetensors").read_bytes() == kept
    assert temporary_files(tmp_path) == []


def test_a_learning_curve_that_cannot_be_drawn_leaves_no_half_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    row = {"epoch": 1, "loss": 0.5, "validation_mae_months": 20.0}
    with pytest.raises(OSError, match="No space left"):
        training.draw_learning_curve([row], tmp_path / "learning_curve.png")
    assert list(tmp_path.iterdir()) == []


# --- any number of processes ----------------------------------------------------------------------------------------

STRONG = dataclasses.replace(TINY, ema=0.0)
TWO = dataclasses.replace(TINY, epochs=2)
#: A made-up teacher's features of the 90 training images.
TARGETS = np.random.default_rng(5).standard_normal((90, 12)).astype(np.float32)


def gradients_of_first_steps(run: TrainingRun, *, steps: int) -> dict[str, torch.Tensor]:
    """`<step>.<parameter>` -> gradient that the optimizer sees; BatchNorm in evaluation mode and no dropout."""
    run.wrapped.eval()
    gradients: dict[str, torch.Tensor] = {}
    order = epoch_order(run.recipe, run.train_images, 0)

    def keep(*_: Any) -> None:
        for name, value in (run.student or run.model).named_parameters():
            if value.requires_grad:
                assert value.grad is not None
                gradients[f"{step}.{name}"] = value.grad.detach().clone(memory_format=torch.contiguous_format)

    run.optimizer.optimizer.register_step_pre_hook(keep)
    for step in range(steps):
        loss = run.step(run.batches(order, epoch=0, step=step), epoch=0, step=step)
        gradients[f"{step}.loss"] = torch.tensor(loss)
    return gradients


def _one_of_two(rank: int, port: int, phantoms: Path, out: Path) -> None:
    """What each of two processes does, as `torchrun --nproc-per-node 2` would start it."""
    # Where a process hangs, its lines are printed before the other one gives up waiting for it.
    faulthandler.dump_traceback_later(300, exit=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    for accumulation in (1, 2):
        run = make_run(phantoms, out, STRONG, accumulation=accumulation)
        assert run.accelerator.num_processes == 2
        save_file(gradients_of_first_steps(run, steps=2), out / f"gradients-{accumulation}-{rank}.safetensors")
    run = make_run(phantoms, out, STRONG, teacher_targets=TARGETS)
    save_file(gradients_of_first_steps(run, steps=2), out / f"gradients-taught-{rank}.safetensors")
    start(phantoms, out / "whole", TWO)
    # Both stop at the same step of the second epoch, as when the machine goes down, and are started again.
    optimize = TrainingRun.step

    def stopping(self: TrainingRun, batches: Iterable[Batch], *, epoch: int, step: int) -> float:
        if (epoch, step) == (1, 3):
            raise KeyboardInterrupt
        return optimize(self, batches, epoch=epoch, step=step)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(TrainingRun, "step", stopping)
        start(phantoms, out / "stopped", TWO, save_minutes=0)
    resume(phantoms, out / "stopped")
    train_plan(phantoms, out / "plan", PLAN, initial_weights="random", progress_bar=False)
    training.end_processes()
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def two_processes(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes on this machine computed."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_one_of_two, args=(rank, port, phantoms, out), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
    assert [process.exitcode for process in processes] == [0, 0]
    return out


@pytest.fixture(scope="module")
def gradients_of_one(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    gradients = gradients_of_first_steps(make_run(phantoms, tmp_path_factory.mktemp("one"), STRONG), steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    return gradients


def assert_gradients_equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert len(some) > 40
    for name, value in some.items():
        assert float(value.abs().max()) > 0, f"{name} has no gradient to compare"
        torch.testing.assert_close(others[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_compute_the_gradients_of_one(
    accumulation: int, rank: int, two_processes: Path, gradients_of_one: dict[str, torch.Tensor]
) -> None:
    gradients = load_file(two_processes / f"gradients-{accumulation}-{rank}.safetensors")
    assert_gradients_equal(gradients_of_one, gradients)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_learn_from_a_teacher_as_one_does(
    rank: int, two_processes: Path, phantoms: Path, tmp_path: Path
) -> None:
    one = gradients_of_first_steps(make_run(phantoms, tmp_path, STRONG, teacher_targets=TARGETS), steps=2)
    assert "0.projection.weight" in one
    assert_gradients_equal(one, load_file(two_processes / f"gradients-taught-{rank}.safetensors"))


@pytest.mark.parametrize("accumulation", [2, 4, 16])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    accumulation: int, phantoms: Path, tmp_path: Path, gradients_of_one: dict[str, torch.Tensor]
) -> None:
    run = make_run(phantoms, tmp_path, STRONG, accumulation=accumulation)
    assert_gradients_equal(gradients_of_one, gradients_of_first_steps(run, steps=2))


@pytest.mark.slow
def test_two_processes_write_one_run(two_processes: Path) -> None:
    folder = two_processes / "whole"
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    assert [row["epoch"] for row in metrics_of(folder)] == [1, 2]
    generators = [name for name in load_file(folder / "state.safetensors") if name.startswith("generator.")]
    assert generators == ["generator.0.cpu", "generator.1.cpu"]
    assert temporary_files(folder) == []


@pytest.mark.slow
def test_the_validation_error_of_two_processes_is_that_of_the_averages_that_are_saved(
    two_processes: Path, phantoms: Path
) -> None:
    # The state holds what the last epoch was validated with, in full precision.
    state = load_file(two_processes / "whole" / "state.safetensors")
    model = BoneAgeModel.from_pretrained(two_processes / "whole" / "checkpoint")
    averages = {name.removeprefix("average."): value for name, value in state.items() if name.startswith("average.")}
    model.load_state_dict(averages, strict=False)
    selection = prepared_split(phantoms, "selection")
    predicted = predict_prepared(model, make_processor(TWO), selection.pixels, selection.sex)
    mae = np.abs(predicted - selection.bone_age_months).mean()
    assert mae == pytest.approx(metrics_of(two_processes / "whole")[-1]["validation_mae_months"], abs=1e-3)


@pytest.mark.slow
def test_two_processes_that_were_stopped_end_bit_for_bit_as_two_that_were_not(two_processes: Path) -> None:
    assert_same_run(two_processes / "whole", two_processes / "stopped")


@pytest.mark.slow
def test_two_processes_train_the_stages_of_a_plan_in_a_row(two_processes: Path) -> None:
    folder = two_processes / "plan"
    assert [len(metrics_of(folder / f"stage-{number}")) for number in (1, 2)] == [1, 1]
    weights = [(part / "checkpoint" / "model.safetensors").read_bytes() for part in (folder, folder / "stage-2")]
    assert weights[0] == weights[1]
    provenance = BoneAgeModel.from_pretrained(folder / "checkpoint").config.provenance
    assert provenance["processes"] == 2
    assert temporary_files(folder) == []


@pytest.mark.parametrize("processes", [2, 4])
def test_the_augmentation_of_a_global_batch_does_not_depend_on_who_computes_which_share(
    processes: int, images: PreparedImages
) -> None:
    order = epoch_order(TINY, images, 0)[:16]
    generator = training.augmentation_generator(TINY, 0, 0)
    parameters = augmentation.sample(augmentation.AUGMENTATIONS["strong"], 16, generator)

    def batch(part: slice) -> torch.Tensor | None:
        return make_batch(
            images,
            order[part],
            parameters[part],
            processor=make_processor(TINY),
            uses_sex=True,
            device=torch.device("cpu"),
        ).pixel_values

    share = shares(16, processes, 1)
    parts = [batch(slice(first, first + share)) for first in range(0, 16, share)]
    joined = torch.cat([part for part in parts if part is not None])
    torch.testing.assert_close(joined, batch(slice(0, 16)), rtol=0, atol=1e-6)


def test_a_batch_holds_the_right_labels_and_sexes_for_its_images(images: PreparedImages) -> None:
    indices = np.array([5, 2, 2, 70])
    parameters = augmentation.sample(augmentation.AUGMENTATIONS["none"], 4, torch.Generator())
    processor, device = make_processor(TINY), torch.device("cpu")
    batch = make_batch(images, indices, parameters, processor=processor, uses_sex=True, device=device)
    wanted = processor.to_pixel_values(torch.from_numpy(images.pixels[indices]))
    torch.testing.assert_close(batch.pixel_values, wanted, rtol=0, atol=1e-4)
    assert batch.labels.tolist() == images.bone_age_months[indices].tolist()
    assert batch.sex is not None
    assert batch.sex.tolist() == images.sex[indices].tolist()
    blind = make_batch(images, indices, parameters, processor=processor, uses_sex=False, device=device)
    assert blind.sex is None


def test_the_augmentation_differs_between_steps_epochs_and_seeds() -> None:
    def drawn(recipe: Recipe, epoch: int, step: int) -> float:
        return float(torch.rand(1, generator=training.augmentation_generator(recipe, epoch, step)))

    other = dataclasses.replace(TINY, seed=1)
    assert len({drawn(TINY, 0, 0), drawn(TINY, 0, 1), drawn(TINY, 1, 0), drawn(other, 0, 0)}) == 4
    assert drawn(TINY, 3, 4) == drawn(TINY, 3, 4)


@pytest.mark.parametrize(
    ("batch_size", "processes", "accumulation", "share"), [(32, 1, 1, 32), (32, 2, 4, 4), (12, 3, 2, 2)]
)
def test_a_global_batch_is_shared_evenly(batch_size: int, processes: int, accumulation: int, share: int) -> None:
    assert shares(batch_size, processes, accumulation) == share


# --- what an epoch sees ---------------------------------------------------------------------------------------------


def labelled(months: list[float], sexes: list[int]) -> PreparedImages:
    ids = tuple(str(number) for number in range(len(months)))
    return PreparedImages(np.zeros((len(ids), 1, 1), np.uint8), np.array(sexes), np.array(months, np.float32), ids)


def slow_category(months: float, sex: int) -> tuple[int, int]:
    """The 24-month category by search; the last one, 216 to 240 months, includes its upper end."""
    for number in range(10):
        if 24 * number <= months < 24 * (number + 1):
            return number, sex
    assert months == 240
    return 9, sex


def test_a_natural_epoch_holds_every_image_once(images: PreparedImages) -> None:
    order = epoch_order(TINY, images, 0)
    assert order.tolist() != list(range(len(images)))
    assert sorted(order.tolist()) == list(range(len(images)))


def test_a_balanced_epoch_holds_as_many_of_each_category_and_sex_as_a_slow_count_finds() -> None:
    months = [0.0, 23.99, 24.0, 24.0, 50.0, 100.0, 119.0, 120.0, 215.99, 216.0, 228.0, 240.0, 240.0]
    data = labelled(months, [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0])
    recipe = dataclasses.replace(TINY, sampling="balanced", per_category=40)
    counts: dict[tuple[int, int], int] = {}
    seen = set()
    for index in epoch_order(recipe, data, 0).tolist():
        category = slow_category(float(data.bone_age_months[index]), int(data.sex[index]))
        counts[category] = counts.get(category, 0) + 1
        seen.add(index)
    occurring = {slow_category(age, int(sex)) for age, sex in zip(months, data.sex, strict=True)}
    assert counts == dict.fromkeys(occurring, 40)
    assert seen == set(range(len(months)))


def test_a_balanced_epoch_is_shuffled() -> None:
    data = labelled([10.0] * 50 + [100.0] * 50, [0] * 100)
    order = epoch_order(dataclasses.replace(TINY, sampling="balanced", per_category=50), data, 0)
    assert 15 < int((order[:50] < 50).sum()) < 35


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(sampling: str, images: PreparedImages) -> None:
    recipe = dataclasses.replace(TINY, sampling=sampling, per_category=3)
    first = epoch_order(recipe, images, 0).tolist()
    np.random.seed(1)
    torch.manual_seed(1)
    assert epoch_order(recipe, images, 0).tolist() == first
    assert epoch_order(recipe, images, 1).tolist() != first
    assert epoch_order(dataclasses.replace(recipe, seed=1), images, 0).tolist() != first


# --- learning rate, optimizer, average ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (0, 0.04),  # 4 % of the peak
        (15, 0.52),  # half way up: (0.04 + 1) / 2
        (30, 1.0),  # the peak, after 30 % of the steps
        (65, 0.5005),  # half way down: (1 + 0.001) / 2
        (100, 0.001),
    ],
)
def test_the_one_cycle_rate_has_the_values_that_were_worked_out_by_hand(step: int, share: float) -> None:
    recipe = dataclasses.replace(TINY, schedule="one_cycle", learning_rate=2e-3)
    assert learning_rate(recipe, step, 101) == pytest.approx(2e-3 * share, rel=1e-9)


def test_the_one_cycle_rate_rises_then_falls() -> None:
    rates = [learning_rate(TINY, step, 101) for step in range(101)]
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)


def test_a_constant_rate_is_constant() -> None:
    recipe = dataclasses.replace(TINY, schedule="constant")
    assert {learning_rate(recipe, step, 10) for step in range(10)} == {recipe.learning_rate}


def test_a_run_of_one_step_has_a_rate() -> None:
    assert 0 < learning_rate(TINY, 0, 1) <= TINY.learning_rate


def test_every_step_is_made_at_the_rate_of_its_place_in_the_whole_run(phantoms: Path, tmp_path: Path) -> None:
    run = make_run(phantoms, tmp_path)
    order = epoch_order(TINY, run.train_images, 2)
    run.step(run.batches(order, epoch=2, step=3), epoch=2, step=3)
    rates = {group["lr"] for group in run.optimizer.param_groups}
    assert rates == {learning_rate(TINY, 2 * STEPS + 3, TINY.epochs * STEPS)}


def decays_of_adamw(images: PreparedImages) -> tuple[BoneAgeModel, dict[str, float]]:
    """A model, and the weight decay that AdamW has for each of its parameters."""
    recipe = dataclasses.replace(TINY, weight_decay=0.05)
    model, _ = build_model(recipe, initial_weights="random", train=images)
    optimizer = build_optimizer(recipe, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {id(value): name for name, value in model.named_parameters()}
    groups = optimizer.param_groups
    return model, {names[id(value)]: group["weight_decay"] for group in groups for value in group["params"]}


def test_adamw_decays_matrices_and_neither_biases_nor_batchnorm_nor_the_sex_vectors(images: PreparedImages) -> None:
    model, decays = decays_of_adamw(images)
    modules = dict(model.named_modules())
    for name, decay in decays.items():
        module = modules[name.rpartition(".")[0]]
        matrix = name.endswith(".weight") and not isinstance(module, nn.BatchNorm2d | nn.Embedding)
        assert decay == (0.05 if matrix else 0.0), name


def test_adamw_does_not_decay_the_biases_of_the_locally_connected_layer(images: PreparedImages) -> None:
    assert decays_of_adamw(images)[1]["attention.local.bias"] == 0.0


@pytest.mark.parametrize(("optimizer", "decay"), [("adamw", 0.05), ("adamw", 0.0), ("adam", 0.05)])
def test_the_map_to_the_teachers_features_decays_as_the_network_does(
    optimizer: str, decay: float, phantoms: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(TINY, optimizer=optimizer, weight_decay=decay)
    run = make_run(phantoms, tmp_path, recipe, teacher_targets=TARGETS)
    assert run.student is not None
    decays = {id(value): group["weight_decay"] for group in run.optimizer.param_groups for value in group["params"]}
    wanted = decay if optimizer == "adamw" else 0.0
    projection, head = run.student.projection, run.model.head.dense
    assert decays[id(projection.weight)] == decays[id(head.weight)] == wanted
    assert decays[id(projection.bias)] == decays[id(head.bias)] == 0.0


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("freeze_backbone", [False, True])
def test_the_optimizer_has_each_parameter_that_trains_once_and_no_other(
    optimizer: str, freeze_backbone: bool, images: PreparedImages
) -> None:
    recipe = dataclasses.replace(TINY, optimizer=optimizer, freeze_backbone=freeze_backbone)
    model, _ = build_model(recipe, initial_weights="random", train=images)
    trained = [id(value) for group in build_optimizer(recipe, model).param_groups for value in group["params"]]
    assert sorted(trained) == sorted(id(value) for value in model.parameters() if value.requires_grad)
    assert any(name.startswith("backbone") and value.requires_grad for name, value in model.named_parameters()) == (
        not freeze_backbone
    )


def test_a_frozen_backbone_does_not_change_in_training(phantoms: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY, freeze_backbone=True)
    run = make_run(phantoms, tmp_path, recipe)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.wrapped.train()
    run.step(run.batches(epoch_order(recipe, run.train_images, 0), epoch=0, step=0), epoch=0, step=0)
    changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("backbone.", "attention.expand.")) for name in changed)
    assert {"head.dense.weight", "attention.local.weight", "feature_norm.running_mean"} <= changed


def perturbed(model: BoneAgeModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator))
            else:
                value.add_(1)


def test_the_moving_average_is_that_of_a_plain_loop(images: PreparedImages) -> None:
    model, _ = build_model(TINY, initial_weights="random", train=images)
    average = MovingAverage(model, 0.5)
    wanted = {name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}
    assert "feature_norm.running_var" in wanted
    for step in range(12):
        perturbed(model, step)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if name in wanted:
                wanted[name] = decay * wanted[name] + (1 - decay) * value.double()
    assert average.values.keys() == wanted.keys()
    for name, value in average.values.items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-5)


def test_the_averages_are_in_the_model_within_the_block_and_its_own_weights_after_it(images: PreparedImages) -> None:
    model, _ = build_model(TINY, initial_weights="random", train=images)
    average = MovingAverage(model, 0.9)
    perturbed(model, 0)
    average.update(model, 50)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with contextlib.suppress(InputError), average.applied_to(model):
        within = {name: value.clone() for name, value in model.state_dict().items() if name in average.values}
        raise InputError("the block may end early")
    assert all(torch.equal(value, average.values[name]) for name, value in within.items())
    assert not torch.equal(within["head.dense.weight"], own["head.dense.weight"])
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


# --- the model that is trained --------------------------------------------------------------------------------------


def test_the_targets_are_scaled_by_mean_and_sd_of_the_training_images(images: PreparedImages) -> None:
    model, _ = build_model(TINY, initial_weights="random", train=images)
    months = images.bone_age_months.astype(np.float64)
    assert model.config.age_mean_months == pytest.approx(sum(months) / len(months), abs=1e-9)
    assert model.config.age_sd_months == pytest.approx(math.sqrt(sum((months - months.mean()) ** 2) / len(months)))


def test_unscaled_targets_are_raw_months(images: PreparedImages) -> None:
    recipe = dataclasses.replace(TINY, scale_targets=False)
    model, _ = build_model(recipe, initial_weights="random", train=images)
    assert (model.config.age_mean_months, model.config.age_sd_months) == (0.0, 1.0)


def test_random_weights_depend_on_the_seed_alone(images: PreparedImages) -> None:
    def weight(recipe: Recipe) -> torch.Tensor:
        torch.rand(3)
        return build_model(recipe, initial_weights="random", train=images)[0].head.dense.weight

    assert torch.equal(weight(TINY), weight(TINY))
    assert not torch.equal(weight(TINY), weight(dataclasses.replace(TINY, seed=1)))


def test_a_training_can_start_from_a_checkpoint_with_all_its_weights(
    finished: Finished, images: PreparedImages
) -> None:
    recipe = dataclasses.replace(TINY, freeze_backbone=True, loss="mse")
    model, initial = build_model(recipe, initial_weights=str(finished.result.checkpoint), train=images)
    stored = BoneAgeModel.from_pretrained(finished.result.checkpoint)
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.config.age_mean_months == stored.config.age_mean_months
    assert (model.config.freeze_backbone, model.config.loss) == (True, "mse")
    assert not any(value.requires_grad for value in model.backbone.parameters())
    assert initial["source"] == "checkpoint"
    assert initial["provenance"]["train_n"] == 90


def test_a_training_can_start_from_a_checkpoint_on_the_hub_with_all_its_weights(
    finished: Finished, images: PreparedImages, hub: HubServer
) -> None:
    api = HfApi(endpoint=hub.url)
    api.create_repo("clinic/bone-age")
    api.upload_folder(repo_id="clinic/bone-age", folder_path=finished.result.checkpoint)
    model, initial = build_model(TINY, initial_weights="clinic/bone-age", train=images)
    stored = BoneAgeModel.from_pretrained(finished.result.checkpoint)
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in model.state_dict().items())
    commit = hub.repository("clinic/bone-age").branches["main"]
    assert initial == {"source": "clinic/bone-age", "revision": commit, "provenance": stored.config.provenance}


@pytest.mark.parametrize(
    ("source", "message"),
    [("absent/tiny.safetensors", "were not found"), ("absent/tiny.pth", "is not a safetensors file")],
)
def test_a_file_of_weights_that_is_not_there_is_not_looked_for_on_the_hub(
    images: PreparedImages, hub: HubServer, source: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_model(TINY, initial_weights=source, train=images)
    assert hub.requests == []


def test_a_training_can_start_from_the_packaged_checkpoint(images: PreparedImages) -> None:
    packaged = BoneAgeModel.from_pretrained(DEFAULT_CHECKPOINT)
    recipe = dataclasses.replace(TINY, backbone="efficientnet_lite0", image_size=packaged.config.image_size)
    model, initial = build_model(recipe, initial_weights="default", train=images)
    assert torch.equal(model.head.dense.weight, packaged.head.dense.weight)
    assert (initial["source"], initial["provenance"]) == ("default", packaged.config.provenance)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"half of i", "model.safetensors is damaged or truncated"),
        ("model.safetensors", None, "The checkpoint cannot be loaded: "),
        ("config.json", b'{"model_type": "boneage", "image_size": "large"}', "The checkpoint cannot be loaded: "),
    ],
)
def test_a_damaged_checkpoint_to_start_from_gets_one_sentence(
    finished: Finished, images: PreparedImages, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    copy = Path(shutil.copytree(finished.result.checkpoint, tmp_path / "copy"))
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        build_model(TINY, initial_weights=str(copy), train=images)


@pytest.mark.parametrize(
    ("name", "message"),
    [("state.safetensors", "state.safetensors is damaged or truncated"), ("run.json", "run.json is damaged")],
)
def test_a_damaged_run_gets_one_sentence(
    finished: Finished, phantoms: Path, tmp_path: Path, name: str, message: str
) -> None:
    copy = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    (copy / name).write_bytes((copy / name).read_bytes()[:100])
    with pytest.raises(InputError, match=message):
        resume(phantoms, copy)


def test_a_folder_in_which_another_training_is_at_work_is_refused_and_left_as_it_is(
    finished: Finished, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    before = (copy / "state.safetensors").read_bytes()
    monkeypatch.setattr(training, "PATIENCE_SECONDS", 0.05)
    with WeakFileLock(copy / "run.lock"), pytest.raises(InputError, match="Another training is at work"):
        resume(phantoms, copy)
    with WeakFileLock(tmp_path / "new.lock"):  # another lock is in nobody's way
        resume(phantoms, copy)
    assert (copy / "state.safetensors").read_bytes() == before


def test_a_resumed_run_accumulates_as_it_was_started(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    short = dataclasses.replace(TINY, epochs=1)
    result = start(phantoms, folder, short, accumulation=4)
    assert BoneAgeModel.from_pretrained(result.checkpoint).config.provenance["accumulation"] == 4
    seen: list[int] = []
    own = TrainingRun.load_state

    def look(self: TrainingRun) -> None:
        seen.append(self.accumulation)
        own(self)

    monkeypatch.setattr(TrainingRun, "load_state", look)
    resume(phantoms, folder)
    resume(phantoms, folder, accumulation=4)
    assert seen == [4, 4]
    with pytest.raises(InputError, match="with accumulation 2 instead of 4; leave these out"):
        resume(phantoms, folder, accumulation=2)


def test_a_checkpoint_of_another_image_size_has_its_attention_interpolated(
    finished: Finished, images: PreparedImages
) -> None:
    recipe = dataclasses.replace(TINY, image_size=96)
    model, _ = build_model(recipe, initial_weights=str(finished.result.checkpoint), train=images)
    assert model.config.image_size == 96
    assert model(torch.zeros(1, 3, 96, 96), sex=torch.tensor([0])).attention.shape == (1, 3, 3)


def test_a_start_checkpoint_takes_the_dropout_of_the_recipe(finished: Finished, images: PreparedImages) -> None:
    recipe = dataclasses.replace(TINY, feature_dropout=0.2, head_dropout=0.1)
    model, _ = build_model(recipe, initial_weights=str(finished.result.checkpoint), train=images)
    assert (model.head.feature_dropout.p, model.head.dropout.p) == (0.2, 0.1)


def test_a_checkpoint_of_another_kind_is_refused(finished: Finished, images: PreparedImages) -> None:
    recipe = dataclasses.replace(TINY, sex_input="none")
    with pytest.raises(InputError, match="has sex_input 'embedding' and the recipe 'none'"):
        build_model(recipe, initial_weights=str(finished.result.checkpoint), train=images)


def test_backbone_weights_come_from_a_file_that_is_named_in_the_provenance(
    finished: Finished, images: PreparedImages, tmp_path: Path
) -> None:
    backbone = BoneAgeModel.from_pretrained(finished.result.checkpoint).backbone
    save_file(backbone.state_dict(), tmp_path / "tiny.safetensors")
    model, initial = build_model(TINY, initial_weights=str(tmp_path / "tiny.safetensors"), train=images)
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in model.backbone.state_dict().items())
    assert initial["source"] == "tiny.safetensors"
    assert len(initial["sha256"]) == 64


def test_weights_of_a_backbone_out_of_a_checkpoint_bring_what_they_were_trained_on(
    finished: Finished, images: PreparedImages
) -> None:
    recipe = dataclasses.replace(TINY, sex_input="none")
    source = finished.result.checkpoint / "model.safetensors"
    _, initial = build_model(recipe, initial_weights=str(source), train=images)
    assert initial["provenance"] == json.loads((finished.result.checkpoint / "config.json").read_text())["provenance"]


def test_the_best_checkpoint_tells_the_learning_curve_of_the_whole_run_and_what_it_cost(finished: Finished) -> None:
    cost = json.loads((finished.result.checkpoint / "config.json").read_text())["provenance"]["cost"]
    assert [row["epoch"] for row in cost["learning_curve"]] == [1, 2, 3, 4]
    for told, row in zip(cost["learning_curve"], finished.rows, strict=True):
        assert told["validation_mae_months"] == pytest.approx(row["validation_mae_months"], abs=1e-3)
    hours = sum(row["seconds"] for row in finished.rows) / 3600 * torch.get_num_threads()
    assert cost["core_hours"] == pytest.approx(hours, abs=0.005)
    assert cost["hardware"]["cores"] == os.cpu_count()


@pytest.mark.parametrize(
    ("backbone", "mean"), [("vgg19", IMAGENET_IMAGE_MEAN), ("efficientnet_lite0", LITE_IMAGE_MEAN)]
)
def test_images_are_standardised_as_the_public_weights_of_the_backbone_expect(
    backbone: str, mean: tuple[float, float, float]
) -> None:
    processor = make_processor(Recipe(backbone=backbone, image_size=96, source_size=299))
    assert processor.image_mean == list(mean)
    assert (processor.size, processor.source_size) == ({"height": 96, "width": 96}, 299)


# --- command line ---------------------------------------------------------------------------------------------------


def test_the_module_and_the_command_take_the_same_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def keep(options: argparse.Namespace) -> int:
        seen.append(dict(vars(options)))
        return 0

    monkeypatch.setattr(training, "run_from_arguments", keep)
    arguments = ["data", "out", "--recipe", "quick", "--set", "epochs=2", "--set", "seed=3", "--accumulation", "2"]
    arguments += ["--initial-weights", "random", "--mixed-precision", "bf16", "--save-minutes", "1.5", "--resume"]
    for given in (["data", "out"], arguments):
        seen.clear()
        assert training.main(given) == 0
        assert cli.main(["train", *given]) == 0
        module, command = seen
        assert module == {name: value for name, value in command.items() if name not in ("command", "run")}
    assert module["set"] == ["epochs=2", "seed=3"]


def test_the_command_trains_a_changed_recipe_and_names_the_checkpoint(
    phantoms: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "tiny.json"
    recipe.write_text(json.dumps(TINY.to_dict()))
    options = ["--recipe", str(recipe), "--set", "epochs=1", "--accumulation", "2"]
    assert cli.main(["train", str(phantoms), "short", *options, "--initial-weights", "random"]) == 0
    printed = capsys.readouterr()
    assert "epoch 1/1:" in printed.err  # the progress bar
    lines = printed.out.splitlines()
    assert lines[0].startswith("epoch 1/1  loss ")
    assert lines[1:] == [
        f"best epoch 1: validation MAE {metrics_of(runs / 'short')[0]['validation_mae_months']:.2f} months",
        f"checkpoint: {runs / 'short' / 'checkpoint'}",
    ]
    # Resuming takes the run's own recipe, and the same one given again.
    assert cli.main(["train", str(phantoms), "short", "--resume"]) == 0
    assert cli.main(["train", str(phantoms), "short", "--resume", *options]) == 0
    capsys.readouterr()
    assert cli.main(["train", str(phantoms), "short", "--resume", *options, "--set", "epochs=3"]) == 2
    assert "epochs 3 instead of 1" in capsys.readouterr().err


VGG = dataclasses.replace(TINY, backbone="vgg19_bn", image_size=32, sex_input="none", epochs=1, batch_size=32)
PLAN = (
    Stage(VGG),
    Stage(
        dataclasses.replace(VGG, backbone="vgg19", sex_input="embedding", freeze_backbone=True, cached_views=2),
        start="backbone",
        fold=True,
    ),
)


@pytest.mark.slow
def test_a_plan_trains_folds_and_ends_in_the_checkpoint_of_its_last_stage(
    phantoms: Path, runs: Path, tmp_path: Path
) -> None:
    result = train_plan(phantoms, tmp_path / "plan", PLAN, initial_weights="random", progress_bar=False)
    model = BoneAgeModel.from_pretrained(result.checkpoint)
    before = BoneAgeModel.from_pretrained(tmp_path / "plan" / "stage-1-folded")
    assert (model.config.backbone, model.config.sex_input) == ("vgg19", "embedding")
    trained = model.backbone.state_dict()
    for name, value in before.backbone.state_dict().items():
        # Frozen, so rounded to float16 at most.
        torch.testing.assert_close(trained[name], value, rtol=2**-11, atol=1e-6, msg=name)


def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (Stage(dataclasses.replace(TINY, epochs=1)), Stage(dataclasses.replace(TINY, epochs=2, seed=1)))
    monkeypatch.setitem(PLANS, "tiny-plan", stages)


def test_a_plan_that_was_interrupted_ends_bit_for_bit_as_one_that_was_not(
    phantoms: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_plan(monkeypatch)
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--recipe", "tiny-plan", "--initial-weights", "random"]
    assert cli.main(["train", str(phantoms), str(one), *options]) == 0
    assert f"checkpoint: {one / 'checkpoint'}" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        own, epochs = TrainingRun.finish_epoch, []

        def stop_in_the_second_stage(self: TrainingRun) -> None:
            epochs.append(self.progress.epoch)
            if len(epochs) == 3:
                raise KeyboardInterrupt
            own(self)

        patch.setattr(TrainingRun, "finish_epoch", stop_in_the_second_stage)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            training.run_from_arguments(cli.build_parser().parse_args(["train", str(phantoms), str(two), *options]))
    assert not (two / "checkpoint").exists()
    assert cli.main(["train", str(phantoms), str(two), "--recipe", "tiny-plan", "--resume"]) == 0
    assert_same_run(one / "stage-2", two / "stage-2")
    weights = [(folder / "checkpoint" / "model.safetensors").read_bytes() for folder in (one, one / "stage-2")]
    assert weights[0] == weights[1]


def test_a_plan_is_not_begun_twice_and_not_resumed_without_its_name(
    phantoms: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_plan(monkeypatch)
    (tmp_path / "stage-1").mkdir()
    (tmp_path / "stage-1" / "run.json").write_text("{}")
    begin = ["train", str(phantoms), str(tmp_path)]
    assert cli.main([*begin, "--recipe", "tiny-plan", "--initial-weights", "random"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main([*begin, "--resume"]) == 2
    assert "name its recipe again" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(
    phantoms: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at_the_first_step(monkeypatch)
    options = [
        argument for name, value in TINY.to_dict().items() for argument in ("--set", f"{name}={json.dumps(value)}")
    ]
    assert training.main([str(phantoms), "interrupted", "--initial-weights", "random", *options]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; go on with --resume."
    assert (runs / "interrupted" / "state.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments", [["absent", "out", "--initial-weights", "random"], ["absent", "out", "--resume"]]
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", captured.err)


@pytest.mark.slow
def test_accelerate_launch_runs_the_module(phantoms: Path, runs: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    changes = [f"{name}={json.dumps(value)}" for name, value in dataclasses.replace(TINY, epochs=1).to_dict().items()]
    options = [argument for change in changes for argument in ("--set", change)]
    module = ["-m", "boneage_hf.training", str(phantoms), "launched", "--initial-weights", "random"]
    finished = subprocess.run([*launch, *module, *options], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert f"checkpoint: {runs / 'launched' / 'checkpoint'}" in finished.stdout


def test_a_bare_name_is_a_run_below_the_runs_folder_and_a_path_is_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path))
    assert run_folder("first") == tmp_path / "first"
    assert run_folder("./first") == Path("./first")
    assert run_folder("/data/first") == Path("/data/first")
    monkeypatch.delenv("BONEAGE_RUNS")
    assert run_folder("first") == Path.home() / ".cache" / "boneage-hf" / "runs" / "first"


def test_a_checkpoint_folder_is_replaced_as_a_whole(finished: Finished, tmp_path: Path) -> None:
    model = BoneAgeModel.from_pretrained(finished.result.checkpoint)
    for _ in range(2):
        save_checkpoint(model, make_processor(TINY), tmp_path / "checkpoint")
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_freed_memory_is_kept_where_the_allocator_can_be_told() -> None:
    known = platform.libc_ver()[0] == "glibc"
    assert keep_freed_memory() is known
