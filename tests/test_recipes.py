"""Recipes: what they may hold, how they are read and changed, and what the reference project prescribes."""

import dataclasses
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from boneage_hf.augmentation import AUGMENTATIONS, Augmentation
from boneage_hf.configuration_boneage import BACKBONE_NAMES, LOSSES, SEX_INPUTS
from boneage_hf.errors import InputError
from boneage_hf.recipes import PLANS, RECIPES, Recipe, Stage, load_recipe, plan_of, plan_that_repeats, recipe_from_dict


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backbone", "vgg19"),
        ("freeze_backbone", True),
        ("sex_input", "none"),
        ("image_size", 384),
        ("sampling", "balanced"),
        ("per_category", 500),
        ("augmentation", "reference"),
        ("batch_size", 32),
        ("eval_batch_size", 256),
        ("optimizer", "adam"),
        ("learning_rate", 1e-3),
        ("schedule", "constant"),
        ("loss", "mse"),
        ("scale_targets", False),
        ("epochs", 15),
        ("ema", 0.0),
    ],
)
def test_the_reference_recipe_has_the_value_of_the_reference_project(field: str, value: object) -> None:
    assert getattr(RECIPES["reference"], field) == value


def test_the_reference_augmentation_is_the_table_of_the_reference_project_and_no_more() -> None:
    assert AUGMENTATIONS["reference"] == Augmentation(
        flip=0.5, shift=0.15, rotation_degrees=5.0, shear=0.01, zoom=0.25
    )


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["finetune"].epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_survives_json(name: str) -> None:
    assert recipe_from_dict(json.loads(json.dumps(RECIPES[name].to_dict()))) == RECIPES[name]


def test_recipes_are_named_without_importing_torch() -> None:
    code = "import sys, boneage_hf.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- choices and ranges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("backbone", BACKBONE_NAMES),
        ("sex_input", SEX_INPUTS),
        ("loss", LOSSES),
        ("augmentation", tuple(AUGMENTATIONS)),
        ("sampling", ("natural", "balanced")),
        ("optimizer", ("adam", "adamw")),
        ("schedule", ("constant", "one_cycle")),
    ],
)
def test_a_choice_takes_what_exists_and_names_it_for_what_does_not(field: str, known: tuple[str, ...]) -> None:
    for name in known:
        assert getattr(recipe_from_dict({field: name}), field) == name
    with pytest.raises(InputError, match=f"{field} must be one of {', '.join(known)}, not 'other'"):
        recipe_from_dict({field: "other"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("eval_batch_size", 0),
        ("per_category", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("weight_decay", float("nan")),
        ("seed", -1),
        ("ema", 1.0),
        ("ema", -0.1),
        ("ema", float("nan")),
        ("feature_dropout", 1.0),
        ("head_dropout", -0.1),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^Recipe: {field} must .*, not {value}"):
        recipe_from_dict({field: value})


# --- fields and types -----------------------------------------------------------------------------------------------


def test_an_unknown_field_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(InputError, match=r"no field 'learning_rat'; its fields are backbone, .*learning_rate.*seed"):
        recipe_from_dict({"learning_rat": 0.1})


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("epochs", "many", "a whole number"),
        ("epochs", 1.5, "a whole number"),
        ("epochs", None, "a whole number"),
        ("epochs", True, "a whole number"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", False, "a number"),
        ("learning_rate", [1e-3], "a number"),
        ("freeze_backbone", 1, "true or false"),
        ("freeze_backbone", "yes", "true or false"),
        ("source_size", 299.0, "a whole number or null"),
        ("source_size", True, "a whole number or null"),
        ("optimizer", 3, "a word"),
        ("optimizer", None, "a word"),
    ],
)
def test_a_value_of_another_type_is_refused_and_the_right_type_named(field: str, value: object, wanted: str) -> None:
    with pytest.raises(InputError) as refusal:
        recipe_from_dict({field: value})
    assert str(refusal.value) == f"Recipe: {field} takes {wanted}, not {value!r}."


def test_a_whole_number_serves_as_a_number() -> None:
    assert recipe_from_dict({"learning_rate": 1}).learning_rate == 1


@pytest.mark.parametrize("values", [[], "finetune", 3, None])
def test_json_that_is_no_object_is_refused(values: Any) -> None:
    with pytest.raises(InputError, match="JSON object"):
        recipe_from_dict(values)


# --- names, files and changes ---------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(InputError, match=r"no recipe 'fintune'; known are reference, finetune, quick"):
        load_recipe("fintune", [])


def test_a_recipe_comes_from_a_json_file_and_takes_defaults_for_what_it_does_not_say(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"epochs": 3, "source_size": null}')
    assert load_recipe(str(file), []) == Recipe(epochs=3, source_size=None)


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text("epochs: 3")
    with pytest.raises(InputError, match="not JSON"):
        load_recipe(str(file), [])


def test_a_json_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe"):
        load_recipe(str(tmp_path / "absent.json"), [])


def test_changes_are_json_values_or_words_and_the_last_one_counts() -> None:
    changes = ["epochs=3", "learning_rate=2e-4", "source_size=null", "freeze_backbone=true", "loss=mse", "epochs=4"]
    changed = load_recipe("finetune", changes)
    wanted = {"epochs": 4, "learning_rate": 2e-4, "source_size": None, "freeze_backbone": True, "loss": "mse"}
    assert changed == dataclasses.replace(RECIPES["finetune"], **wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["epochs", "", "epochs 3"])
def test_a_change_without_an_equals_sign_is_refused(change: str) -> None:
    with pytest.raises(InputError, match="field=value"):
        load_recipe("finetune", [change])


@pytest.mark.parametrize("change", ["=3", "lr=3", "epochs=", "epochs=3x", "sampling=balance"])
def test_a_change_to_something_impossible_is_refused(change: str) -> None:
    with pytest.raises(InputError):
        load_recipe("finetune", [change])


def test_features_of_a_backbone_that_trains_are_not_cached() -> None:
    with pytest.raises(InputError, match="cached_views needs freeze_backbone=true"):
        Recipe(cached_views=2)


def test_several_views_need_an_augmentation() -> None:
    with pytest.raises(InputError, match="all views are the same"):
        Recipe(cached_views=2, freeze_backbone=True, augmentation="none")


@pytest.mark.parametrize("name", list(PLANS))
def test_every_stage_of_a_plan_can_start_from_the_one_before(name: str) -> None:
    for before, stage in pairwise(PLANS[name]):
        assert stage.fold == (before.recipe.backbone == "vgg19_bn" and stage.recipe.backbone == "vgg19")
        assert stage.fold or stage.recipe.backbone == before.recipe.backbone
        assert stage.start == "backbone" or stage.recipe.sex_input == before.recipe.sex_input


def test_a_change_concerns_every_stage_of_a_plan() -> None:
    assert {stage.recipe.epochs for stage in plan_of("default", ["epochs=1"])} == {1}


def test_a_stage_starts_from_all_or_from_the_backbone() -> None:
    with pytest.raises(InputError, match="not from 'head'"):
        Stage(Recipe(), start="head")


def test_no_plan_has_the_name_of_a_recipe() -> None:
    assert not set(PLANS) & set(RECIPES)


def provenance_of(stages: list[Recipe]) -> dict[str, Any]:
    """As the last of some trainings leaves it."""
    told: dict[str, Any] = {"source": "random"}
    for recipe in stages:
        told = {"source": "folder", "provenance": {"recipe": recipe.to_dict(), "initial_weights": told}}
    return dict(told["provenance"])


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_known_by_what_its_last_checkpoint_tells(name: str) -> None:
    assert plan_that_repeats(provenance_of([stage.recipe for stage in PLANS[name]])) == name


def test_a_recipe_of_one_training_is_known_too() -> None:
    assert plan_that_repeats(provenance_of([RECIPES["quick"]])) == "quick"


@pytest.mark.parametrize("stages", [[Recipe(seed=77)], [Recipe(), Recipe(seed=77)], []])
def test_trainings_of_no_plan_are_said_to_be_none(stages: list[Recipe]) -> None:
    assert plan_that_repeats(provenance_of(stages) if stages else {}) is None


def test_a_field_that_a_provenance_is_too_old_to_name_has_its_default() -> None:
    told = provenance_of([RECIPES["finetune"]])
    del told["recipe"]["cached_views"]
    assert plan_that_repeats(told) == "finetune"
