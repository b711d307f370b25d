"""A teacher's features as further targets: what they are, what is learnt from them, and that a run can be stopped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from boneage_hf import distillation, training
from boneage_hf.configuration_boneage import BoneAgeConfig
from boneage_hf.data import load_split, prepare_phantoms
from boneage_hf.distillation import Student, teacher_features
from boneage_hf.errors import InputError
from boneage_hf.hub import load_pipeline
from boneage_hf.modeling_boneage import BoneAgeModel
from boneage_hf.pipeline_boneage import BoneAgePipeline
from boneage_hf.prepared import PreparedImages, prepare_images
from boneage_hf.recipes import Recipe, recipe_from_dict
from boneage_hf.training import TrainingResult, train

TEACHER = Recipe(backbone="tiny", image_size=96, source_size=None, epochs=1, batch_size=16, ema=0.9)
#: Smaller images than the teacher's, and no sex, which the teacher is given.
STUDENT = Recipe(
    backbone="tiny",
    sex_input="none",
    image_size=64,
    source_size=None,
    epochs=2,
    batch_size=16,
    learning_rate=3e-3,
    ema=0.9,
)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """45 drawn hands to train on, with `BONEAGE_RUNS` set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BONEAGE_RUNS", str(tmp_path_factory.mktemp("runs")))
        folder = tmp_path_factory.mktemp("phantoms") / "prepared"
        prepare_phantoms(60, folder, size=96, progress=False)
        yield folder


@pytest.fixture(autouse=True)
def forget_precision() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def teacher(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the name "teacher"."""
    folder = tmp_path_factory.mktemp("taught")
    found = train(phantoms, folder / "run", TEACHER, initial_weights="random", progress_bar=False).checkpoint
    AcceleratorState._reset_state(reset_partial_state=True)
    return found.rename(folder / "teacher")


@pytest.fixture(scope="module")
def pipe(teacher: Path) -> BoneAgePipeline:
    return load_pipeline(teacher, device="cpu")


@pytest.fixture(scope="module")
def images(phantoms: Path, pipe: BoneAgePipeline) -> PreparedImages:
    return prepare_images(
        load_split(phantoms, "train"), pipe.image_processor, cache=None, name="train", progress=False
    )


def learn(phantoms: Path, folder: Path, teacher: Path | None, **options: Any) -> TrainingResult:
    recipe = Recipe(**{**STUDENT.to_dict(), "teacher": None if teacher is None else str(teacher)})
    return train(phantoms, folder, recipe, initial_weights="random", progress_bar=False, **options)


def ask(pipe: BoneAgePipeline, images: PreparedImages, cache: Path, **options: Any) -> np.ndarray:
    return teacher_features(pipe.model, pipe.image_processor, images, cache=cache, progress=False, **options)


def test_a_teachers_features_are_those_that_its_head_is_given_standardised_over_the_images(
    pipe: BoneAgePipeline, images: PreparedImages, tmp_path: Path
) -> None:
    given: list[torch.Tensor] = []
    hook = pipe.model.head.feature_dropout.register_forward_hook(
        lambda _module, inputs, _output: given.append(inputs[0])
    )
    for pixels, sex in zip(images.pixels, images.sex, strict=True):  # one at a time
        values = pipe.image_processor.to_pixel_values(torch.from_numpy(np.array(pixels))[None])
        with torch.inference_mode():
            pipe.model(pixel_values=values, sex=torch.tensor([int(sex)]))
    hook.remove()
    pooled = torch.cat(given).double()
    spread = pooled.std(dim=0, correction=0)
    expected = (pooled - pooled.mean(dim=0)) / torch.where(spread > 1e-3, spread, 1)
    torch.testing.assert_close(torch.from_numpy(ask(pipe, images, tmp_path)).double(), expected, rtol=0, atol=1e-3)


def test_a_teacher_is_asked_once_for_the_same_images(
    pipe: BoneAgePipeline, images: PreparedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask(pipe, images, tmp_path)
    monkeypatch.setattr(distillation, "_pooled", None)  # whoever calls it fails
    np.testing.assert_array_equal(ask(pipe, images, tmp_path), first)


def test_features_of_an_unfinished_file_are_computed_anew(
    pipe: BoneAgePipeline, images: PreparedImages, tmp_path: Path
) -> None:
    first = ask(pipe, images, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    np.testing.assert_array_equal(ask(pipe, images, tmp_path), first)


def test_two_trainings_that_ask_the_same_teacher_at_once_both_get_its_features(
    pipe: BoneAgePipeline, images: PreparedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = distillation.save_file
    begun: list[Path] = []
    others: list[np.ndarray] = []

    def another_one_meanwhile(tensors: dict[str, np.ndarray], path: Path) -> None:
        own(tensors, path)
        if not begun:
            begun.append(path)
            with monkeypatch.context() as patch:
                patch.setattr(distillation.os, "getpid", lambda: -1)
                others.append(ask(pipe, images, tmp_path))

    monkeypatch.setattr(distillation, "save_file", another_one_meanwhile)
    found = ask(pipe, images, tmp_path)
    np.testing.assert_array_equal(found, others[0])
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_another_precision_has_features_of_its_own(
    pipe: BoneAgePipeline, images: PreparedImages, tmp_path: Path
) -> None:
    assert not np.array_equal(ask(pipe, images, tmp_path), ask(pipe, images, tmp_path, bfloat16=True))


def test_the_loss_of_a_student_is_that_over_ages_and_the_squared_error_of_the_features(tmp_path: Path) -> None:
    model = BoneAgeModel(BoneAgeConfig(backbone="tiny", image_size=64, sex_input="none", age_mean_months=120.0)).eval()
    student = Student(model, 5, weight=0.25)
    values, labels, features = torch.randn(3, 3, 64, 64), torch.tensor([30.0, 90.0, 150.0]), torch.randn(3, 5)
    given: list[torch.Tensor] = []
    model.head.feature_dropout.register_forward_hook(lambda _module, inputs, _output: given.append(inputs[0]))
    ages = model(pixel_values=values, labels=labels).loss
    found = given[0] @ student.projection.weight.T + student.projection.bias
    expected = ages + 0.25 * sum((found[i, j] - features[i, j]) ** 2 for i in range(3) for j in range(5)) / 15
    torch.testing.assert_close(student(pixel_values=values, labels=labels, teacher_features=features), expected)


def test_a_student_comes_nearer_to_its_teachers_features(phantoms: Path, teacher: Path, tmp_path: Path) -> None:
    losses = {}
    for weight in (0.0, 5.0):
        changes = {"teacher": str(teacher), "teacher_weight": weight, "epochs": 20, "augmentation": "none"}
        recipe = Recipe(**{**STUDENT.to_dict(), **changes, "feature_dropout": 0.0, "head_dropout": 0.0})
        train(phantoms, tmp_path / str(weight), recipe, initial_weights="random", progress_bar=False)
        rows = [json.loads(line) for line in (tmp_path / str(weight) / "metrics.jsonl").read_text().splitlines()]
        losses[weight] = [row["loss"] for row in rows]
    # What the features add to the loss: five times about one for a map that knows nothing.
    added = [much - little for much, little in zip(losses[5.0], losses[0.0], strict=True)]
    assert added[-1] < 0.9 * added[0]


def test_a_run_with_a_teacher_that_was_interrupted_and_resumed_equals_an_uninterrupted_one(
    phantoms: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(phantoms, tmp_path / "whole", teacher)
    steps = 0
    own = training.TrainingRun.step

    def interrupted(self: training.TrainingRun, *arguments: Any, **options: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return own(self, *arguments, **options)

    monkeypatch.setattr(training.TrainingRun, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(phantoms, tmp_path / "parts", teacher, save_minutes=0)
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path / "elsewhere"))  # the teacher is asked again
    train(phantoms, tmp_path / "parts", None, resume=True, progress_bar=False)
    states = [load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts")]
    assert any(name.startswith("projection.") for name in states[0])
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert (
        whole.checkpoint.joinpath("model.safetensors").read_bytes()
        == (tmp_path / "parts" / "checkpoint" / "model.safetensors").read_bytes()
    )


def test_a_run_is_not_resumed_with_another_teacher(phantoms: Path, teacher: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in teacher.iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    learn(phantoms, tmp_path / "run", mine)
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps({**config, "age_mean_months": 1.0}))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(InputError, match=r"revision .* now and had .* resume with the checkpoint of then"):
        train(phantoms, tmp_path / "run", None, resume=True, progress_bar=False)


def test_the_provenance_names_the_teacher_and_no_path_of_this_machine(
    phantoms: Path, teacher: Path, pipe: BoneAgePipeline, tmp_path: Path
) -> None:
    found = learn(phantoms, tmp_path / "run", teacher)
    provenance = json.loads((found.checkpoint / "config.json").read_text())["provenance"]
    assert provenance["teacher"]["source"] == provenance["recipe"]["teacher"] == "teacher"
    assert provenance["teacher"]["revision"] == training.checkpoint_revision(pipe)
    assert str(teacher.parent) not in json.dumps(provenance)


def test_the_checkpoint_of_a_student_holds_nothing_of_its_teacher(
    phantoms: Path, teacher: Path, tmp_path: Path
) -> None:
    alone = load_file(learn(phantoms, tmp_path / "alone", None).checkpoint / "model.safetensors")
    AcceleratorState._reset_state(reset_partial_state=True)
    taught = load_file(learn(phantoms, tmp_path / "taught", teacher).checkpoint / "model.safetensors")
    assert {name: value.shape for name, value in taught.items()} == {
        name: value.shape for name, value in alone.items()
    }


def test_a_teacher_is_a_word_or_nothing() -> None:
    with pytest.raises(InputError, match="teacher takes a word or null, not 3"):
        recipe_from_dict({"teacher": 3})


def test_a_teacher_that_there_is_not_is_named_before_anything_is_trained(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no checkpoint at that path"):
        learn(phantoms, tmp_path / "run", tmp_path / "nobody")
    assert not (tmp_path / "run").exists()
