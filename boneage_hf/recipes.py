"""Training recipes as frozen values, free of torch, so that the command line can name them at once."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from .errors import InputError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides a training run besides data, initial weights and hardware; saved beside the weights.

    Args:
        backbone: see [`BoneAgeConfig`]; with `"auto"` the initial weights are a model of transformers (Hub id or
            folder), whose config the backbone takes.
        sex_input: `"none"` or `"embedding"`.
        pooling: `"attention"` or `"average"`, see [`BoneAgeConfig`].
        freeze_backbone: train attention and head only.
        cached_views: with a frozen backbone, how many augmented views of each training image go through it, once,
            before training; every step then draws one of them. 0: the backbone runs in every step.
        image_size: px, side of the network's input.
        source_size: px, the geometry that images are first reduced to (299 for the squashed copies), or None.
        augmentation: a name of `boneage_hf.augmentation.AUGMENTATIONS`.
        sampling: `"natural"` (every image once per epoch) or `"balanced"` (`per_category` images with replacement for
            each 24-month category and sex, as the reference balances its training part).
        per_category: images per category and sex and epoch for `"balanced"`; the reference has 500.
        epochs, batch_size: the batch is the global one, over all processes and accumulation steps.
        eval_batch_size: images per step of validation. (The reference's test batch of 1,024 changes no number.)
        optimizer: `"adam"` or `"adamw"`; `weight_decay` belongs to the latter.
        learning_rate: the peak one.
        schedule: `"constant"` or `"one_cycle"` (cosine up over 30 % of the steps, cosine down to 1/1000).
        loss: `"mse"` or `"smooth_l1"` with beta 0.1, see [`BoneAgeConfig`].
        feature_dropout, head_dropout: see [`BoneAgeConfig`]; a checkpoint that the run starts from takes them too.
        scale_targets: fit mean and SD of age on the training split; if false the targets are raw months.
        teacher: a checkpoint (packaged name, folder or Hub id) whose pooled features of each unchanged training image
            are a further target of the backbone, see `boneage_hf.distillation`; None for labels alone.
        teacher_weight: of that further loss.
        ema: decay of the moving average of the weights that is validated and saved, 0 for none.
        seed: of order, augmentation, dropout and random weights.
    """

    backbone: str = "efficientnet_lite0"
    sex_input: str = "embedding"
    pooling: str = "attention"
    freeze_backbone: bool = False
    cached_views: int = 0
    image_size: int = 224
    source_size: int | None = 299
    augmentation: str = "strong"
    sampling: str = "natural"
    per_category: int = 500
    epochs: int = 8
    batch_size: int = 32
    eval_batch_size: int = 64
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    learning_rate: float = 1e-3
    schedule: str = "one_cycle"
    loss: str = "smooth_l1"
    feature_dropout: float = 0.5
    head_dropout: float = 0.25
    scale_targets: bool = True
    teacher: str | None = None
    teacher_weight: float = 1.0
    ema: float = 0.998
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "backbone": ("vgg19", "vgg19_bn", "efficientnet_lite0", "tiny", "auto"),
            "sex_input": ("none", "embedding"),
            "pooling": ("attention", "average"),
            "loss": ("mse", "smooth_l1"),
            "augmentation": ("none", "reference", "strong", "wide"),
            "sampling": ("natural", "balanced"),
            "optimizer": ("adam", "adamw"),
            "schedule": ("constant", "one_cycle"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"Recipe: {name} must be one of {', '.join(known)}, not {getattr(self, name)!r}.")
        for name in ("epochs", "batch_size", "eval_batch_size", "per_category", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"Recipe: {name} must be above 0, not {getattr(self, name)}.")
        for name in ("weight_decay", "seed", "cached_views", "teacher_weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"Recipe: {name} must be 0 or more, not {getattr(self, name)}.")
        for name in ("ema", "feature_dropout", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"Recipe: {name} must lie in [0, 1), not {getattr(self, name)}.")
        if self.cached_views and not self.freeze_backbone:
            raise InputError(
                "Recipe: cached_views needs freeze_backbone=true: features of a training backbone change."
            )
        if self.cached_views > 1 and self.augmentation == "none":
            raise InputError("Recipe: without augmentation all views are the same: set cached_views to 1, or to 0.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


RECIPES: dict[str, Recipe] = {
    # The reference project: frozen VGG19, its augmentation table, batches of 32 (validation 256), balanced sampling;
    # Adam 1e-3, squared error on raw months and 15 epochs from its parent kernel. The reference read the original
    # images: with those, --set source_size=null.
    "reference": Recipe(
        backbone="vgg19",
        sex_input="none",
        freeze_backbone=True,
        image_size=384,
        augmentation="reference",
        sampling="balanced",
        epochs=15,
        batch_size=32,
        eval_batch_size=256,
        optimizer="adam",
        weight_decay=0.0,
        schedule="constant",
        loss="mse",
        scale_targets=False,
        ema=0.0,
    ),
    "finetune": Recipe(),
    # A run of minutes that shows every part working; its error says nothing about the method.
    "quick": Recipe(image_size=96, epochs=1),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training of a plan.

    Args:
        recipe: of this training.
        start: what the best checkpoint of the stage before gives it: `"all"` weights, or the `"backbone"` alone.
        fold: the stage before trained `vgg19_bn`; it is folded into `vgg19` first.
    """

    recipe: Recipe
    start: str = "all"
    fold: bool = False

    def __post_init__(self) -> None:
        if self.start not in ("all", "backbone"):
            raise InputError(f"A stage starts from all weights or from the backbone, not from {self.start!r}.")


#: VGG19 from random weights, without sex: trained with BatchNorm, which random weights need, and folded at export.
#: Less dropout than for fine-tuning, because few epochs at these sizes underfit.
_VGG19_BN = Recipe(
    backbone="vgg19_bn",
    sex_input="none",
    image_size=96,
    epochs=6,
    feature_dropout=0.2,
    head_dropout=0.1,
    ema=0.995,
)
#: Attention and head on a frozen backbone whose features are computed once, at the size that the backbone was trained
#: at: at the reference's 384 px, where bones are twice the size that it has seen, its features say less (ridge
#: regression on features of 1,000 training images had an MAE of 16.6 months at 384 px and 13.9 at 192 on 400 of the
#: selection half).
_VGG19_HEAD = Recipe(
    backbone="vgg19",
    sex_input="none",
    freeze_backbone=True,
    cached_views=1,
    image_size=192,
    epochs=15,
    seed=3,
)

#: The backbone that both VGG19 checkpoints share: with BatchNorm at growing sizes, then folded and, with attention and
#: head of the first one, taught by the packaged checkpoint.
_VGG19_BACKBONE = (
    Stage(_VGG19_BN),
    Stage(dataclasses.replace(_VGG19_BN, image_size=192, epochs=2, learning_rate=5e-4, ema=0.99, seed=1)),
    Stage(_VGG19_HEAD, fold=True),
    Stage(
        Recipe(
            backbone="vgg19",
            sex_input="none",
            image_size=160,
            epochs=3,
            learning_rate=2e-4,
            feature_dropout=0.2,
            head_dropout=0.1,
            teacher="default",
            ema=0.995,
            seed=4,
        ),
    ),
)

#: Several trainings in a row, each from the best checkpoint of the one before: `boneage train --recipe NAME`.
PLANS: dict[str, tuple[Stage, ...]] = {
    # The packaged checkpoint: from ImageNet at 224 px, then at the 299 px that the copies have, then at 384 px: the
    # enlarged copies hold no more detail, but the network's steps over it are finer.
    "default": (
        Stage(Recipe()),
        Stage(
            Recipe(image_size=299, feature_dropout=0.2, head_dropout=0.1, epochs=7, learning_rate=7e-4, seed=1),
        ),
        Stage(
            Recipe(
                image_size=384,
                augmentation="wide",
                feature_dropout=0.2,
                head_dropout=0.1,
                epochs=5,
                learning_rate=5e-4,
                seed=2,
            ),
        ),
    ),
    # The reference network where no ImageNet weights of VGG19 are to be had: a backbone of its own.
    "vgg19-attention": _VGG19_BACKBONE,
    # The same backbone, trained without sex; attention and a head that is given the sex.
    "vgg19-attention-sex": (
        *_VGG19_BACKBONE,
        Stage(dataclasses.replace(_VGG19_HEAD, image_size=160, sex_input="embedding"), start="backbone"),
    ),
}


def plan_of(name: str, changes: list[str]) -> tuple[Stage, ...]:
    """A named plan, with the same changes to the recipe of each of its stages.

    Raises:
        InputError: see [`load_recipe`].
    """
    return tuple(dataclasses.replace(stage, recipe=changed(stage.recipe, changes)) for stage in PLANS[name])


def plan_that_repeats(provenance: dict[str, Any]) -> str | None:
    """Name of the plan or recipe that a checkpoint's provenance tells of, stage by stage; None where there is none.

    Fields that a provenance does not name, because they are younger, have the value that they had before: the default.
    """
    chain: list[dict[str, Any]] = []
    step: dict[str, Any] | None = provenance
    while step and isinstance(step.get("recipe"), dict):
        chain.insert(0, {**Recipe().to_dict(), **step["recipe"]})
        step = (step.get("initial_weights") or {}).get("provenance")
    known = {name: [recipe] for name, recipe in RECIPES.items()}
    known |= {name: [stage.recipe for stage in stages] for name, stages in PLANS.items()}
    return next((name for name, recipes in known.items() if [r.to_dict() for r in recipes] == chain), None)


DEFAULT_RECIPE = "finetune"


def load_recipe(name_or_file: str, changes: list[str]) -> Recipe:
    """A named recipe or a JSON file of its fields, with changes of the form `field=value` (value in JSON or a word).

    Raises:
        InputError: unknown name, field or value, or a file that is not such JSON.
    """
    if name_or_file in RECIPES:
        recipe = RECIPES[name_or_file]
    elif name_or_file.endswith(".json") and Path(name_or_file).is_file():
        try:
            recipe = recipe_from_dict(json.loads(Path(name_or_file).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"The recipe file is not JSON ({error}).") from None
    else:
        known = ", ".join([*RECIPES, *PLANS])
        raise InputError(f"There is no recipe {name_or_file!r}; known are {known}, or give a .json file.")
    return changed(recipe, changes)


def changed(recipe: Recipe, changes: list[str]) -> Recipe:
    """A recipe with changes of the form `field=value` (value in JSON or a word).

    Raises:
        InputError: a change that is none, or an unknown field or value.
    """
    values: dict[str, Any] = {}
    for change in changes:
        field, equals, text = change.partition("=")
        if not equals:
            raise InputError(f"--set takes field=value, not {change!r}.")
        try:
            values[field] = json.loads(text)
        except json.JSONDecodeError:
            values[field] = text
    return recipe_from_dict({**recipe.to_dict(), **values})


_KINDS: dict[tuple[type, ...], str] = {
    (int, float): "a number",
    (int,): "a whole number",
    (str,): "a word",
    (bool,): "true or false",
    (int, type(None)): "a whole number or null",
    (str, type(None)): "a word or null",
}


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """Raises InputError for fields that a recipe does not have and for values of another type."""
    if not isinstance(values, dict):
        raise InputError(f"A recipe is a JSON object of fields, not {values!r}.")
    kinds = {field.name: field.type for field in dataclasses.fields(Recipe)}
    for name, value in values.items():
        if name not in kinds:
            raise InputError(f"A recipe has no field {name!r}; its fields are {', '.join(kinds)}.")
        allowed: dict[Any, tuple[type, ...]] = {
            float: (int, float),
            int: (int,),
            str: (str,),
            bool: (bool,),
            int | None: (int, type(None)),
            str | None: (str, type(None)),
        }
        expected = allowed[kinds[name]]
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            raise InputError(f"Recipe: {name} takes {_KINDS[expected]}, not {value!r}.")
    return Recipe(**values)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `boneage train` and `python -m boneage_hf.training` share."""
    parser.add_argument("dataset", help="folder written by `boneage prepare`, or the Hub id of one that was pushed")
    parser.add_argument("out", help="run folder: a name below BONEAGE_RUNS, or a path with a separator")
    parser.add_argument(
        "--recipe", help=f"{', '.join([*RECIPES, *PLANS])}, or a .json file (default: {DEFAULT_RECIPE})"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the recipe (of every stage, where it has several)",
    )
    parser.add_argument(
        "--initial-weights",
        help="Hub id (timm/vgg19.tv_in1k), .safetensors file, checkpoint (folder, Hub id or the packaged default), or "
        "the word random; required",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT, with its own recipe")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), help="default: no")
    parser.add_argument("--accumulation", type=int, metavar="STEPS", help="gradient accumulation steps (default: 1)")
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="publish the best checkpoint at the end, with its error on the selection half; private if it is new",
    )
    parser.add_argument("--save-minutes", type=float, default=5.0, help="how often the state is saved within an epoch")
