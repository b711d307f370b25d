"""Recipe and prepared data -> run folder -> checkpoint, with accelerate on any number of processes.

`boneage train DATASET OUT --recipe NAME --initial-weights SOURCE`, or the same through
`accelerate launch -m boneage_hf.training DATASET OUT ...`. Several processes on CPUs are started by
`torchrun --nproc-per-node N -m boneage_hf.training DATASET OUT ...`: accelerate's own launcher needs MPI for that and
starts one process without it, whatever its --num_processes says.

The order of the images and the parameters of every augmentation are functions of (seed, epoch, step) of the *global*
batch; each process takes its share. So one process and N with the same global batch compute the same gradient
(with BatchNorm in evaluation mode and without dropout, to rounding). In training mode each process normalises by the
statistics of its own share, as usual with data parallelism, and draws its own dropout.
"""

import argparse
import contextlib
import dataclasses
import datetime
import errno
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast, gather_object
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from . import __version__, augmentation
from .backbones_boneage import TransformersBackbone
from .configuration_boneage import BoneAgeConfig
from .data import fingerprint, hub_source, licence_of, load_split, read_manifest
from .distillation import Student, teacher_features
from .errors import InputError
from .evaluation import (
    evaluate_checkpoint,
    float16_difference,
    git_commit,
    hardware,
    package_versions,
    predict_prepared,
)
from .features import CachedFeatures, cached_features
from .files import write_text
from .folding import fold_checkpoint
from .hub import (
    WEIGHTS_FILE,
    checkpoint_revision,
    fits_float16,
    load_pipeline,
    loading_sentences,
    own_checkpoint,
    replace_folder,
    save_checkpoint,
)
from .image_processing_boneage import BoneAgeImageProcessor
from .initial_weights import (
    IMAGE_NORMALISATION,
    IMAGENET_IMAGE_MEAN,
    IMAGENET_IMAGE_STD,
    is_weights_file,
    load_initial_weights,
    load_transformers_backbone,
    read_backbone_config,
)
from .memory import keep_freed_memory
from .modeling_boneage import BoneAgeModel
from .prepared import PreparedImages, prepare_images
from .publishing import check_access, push_model
from .recipes import (
    DEFAULT_RECIPE,
    PLANS,
    Recipe,
    Stage,
    add_training_arguments,
    load_recipe,
    plan_of,
    recipe_from_dict,
)
from .sex import SEXES
from .splits import age_band

#: JPEG quality of the 299 px copies of the RSNA images: with it originals give the very pixels of their copies.
COPY_JPEG_QUALITY = 92

#: Validation images on which the effect of storing the best weights as float16 is measured.
STORAGE_CHECK_IMAGES = 32

RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
#: A training that was stopped just now may take as long to end.
PATIENCE_SECONDS = 10.0
STATE_FILE = "state.safetensors"
METRICS_FILE = "metrics.jsonl"


def runs_folder() -> Path:
    """Where run folders and the cache of prepared images live: `BONEAGE_RUNS`, else the user's cache."""
    configured = os.environ.get("BONEAGE_RUNS")
    return Path(configured) if configured else Path.home() / ".cache" / "boneage-hf" / "runs"


def run_folder(out: str) -> Path:
    """A bare name lies in [`runs_folder`]; a path with a separator is taken as it is."""
    return Path(out) if os.sep in out or "/" in out else runs_folder() / out


# --- what an epoch sees ---------------------------------------------------------------------------------------------


def epoch_order(recipe: Recipe, images: PreparedImages, epoch: int) -> np.ndarray:
    """Indices of the training images of one epoch, in order; (n,) int64, the same on every machine.

    `natural`: a permutation. `balanced`: for each 24-month category of age and each sex that occurs, `per_category`
    images drawn with replacement, shuffled.
    """
    generator = np.random.default_rng([recipe.seed, epoch])
    if recipe.sampling == "natural":
        return generator.permutation(len(images))
    categories = np.array([age_band(months) for months in images.bone_age_months]) * len(SEXES) + images.sex
    drawn = [
        generator.choice(np.flatnonzero(categories == category), recipe.per_category, replace=True)
        for category in np.unique(categories)
    ]
    return generator.permutation(np.concatenate(drawn))


def augmentation_generator(recipe: Recipe, epoch: int, step: int) -> torch.Generator:
    """The generator of one global batch's augmentation."""
    digest = hashlib.sha256(f"{recipe.seed}:{epoch}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """The rate of a step, counted from 0: constant, or cosine up over 30 % and down to a thousandth of the peak."""
    if recipe.schedule == "constant":
        return recipe.learning_rate
    position = step / max(1, total_steps - 1)
    if position < 0.3:
        return recipe.learning_rate * (0.04 + 0.96 * (1 - math.cos(math.pi * position / 0.3)) / 2)
    return recipe.learning_rate * (0.001 + 0.999 * (1 + math.cos(math.pi * (position - 0.3) / 0.7)) / 2)


@dataclasses.dataclass
class Batch:
    """One process's share of a global batch, for one accumulation step."""

    pixel_values: torch.Tensor | None
    sex: torch.Tensor | None
    labels: torch.Tensor
    backbone_features: torch.Tensor | None = None
    teacher_features: torch.Tensor | None = None


def make_batch(
    images: PreparedImages,
    indices: np.ndarray,
    parameters: augmentation.Parameters,
    *,
    processor: BoneAgeImageProcessor,
    uses_sex: bool,
    device: torch.device,
) -> Batch:
    """Load, augment and normalise the images of `indices`; augmentation runs on `device`."""
    pixels = torch.from_numpy(np.stack([images.pixels[index] for index in indices])).to(device)
    pixel_values = processor.to_pixel_values(augmentation.apply(pixels, parameters))
    return Batch(
        pixel_values=pixel_values.contiguous(memory_format=torch.channels_last),
        sex=torch.from_numpy(images.sex[indices]).to(device) if uses_sex else None,
        labels=torch.from_numpy(images.bone_age_months[indices]).to(device),
    )


def make_feature_batch(
    images: PreparedImages,
    features: CachedFeatures,
    indices: np.ndarray,
    views: np.ndarray,
    *,
    uses_sex: bool,
    device: torch.device,
) -> Batch:
    """As [`make_batch`], from features that were computed before; `views` (n,) names one for each image."""
    return Batch(
        pixel_values=None,
        backbone_features=torch.from_numpy(features.of(indices, views)).to(device).float(),
        sex=torch.from_numpy(images.sex[indices]).to(device) if uses_sex else None,
        labels=torch.from_numpy(images.bone_age_months[indices]).to(device),
    )


def shares(batch_size: int, processes: int, accumulation: int) -> int:
    """Images per process and accumulation step of a global batch.

    Raises:
        InputError: if they do not divide it evenly, or there is no step.
    """
    if accumulation < 1:
        raise InputError(f"--accumulation must be 1 (none) or more, not {accumulation}.")
    if batch_size % (processes * accumulation):
        raise InputError(
            f"The global batch of {batch_size} images cannot be shared evenly among {processes} processes and "
            f"{accumulation} accumulation steps; choose a multiple with --set batch_size=..."
        )
    return batch_size // (processes * accumulation)


# --- state ----------------------------------------------------------------------------------------------------------


def _float_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


class MovingAverage:
    """Exponential moving average of a model's floating point state (parameters and BatchNorm statistics).

    The decay starts low, min(decay, (1 + step) / (10 + step)), so that the random start is soon forgotten.
    """

    def __init__(self, model: BoneAgeModel, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in _float_state(model).items()}

    @torch.no_grad()
    def update(self, model: BoneAgeModel, step: int) -> None:
        current = _float_state(model)
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [current[name] for name in self.values], weight)

    @contextlib.contextmanager
    def applied_to(self, model: BoneAgeModel) -> Iterator[None]:
        """Within the block the model holds the averages."""
        own = {name: value.detach().clone() for name, value in _float_state(model).items()}
        model.load_state_dict(self.values, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)


@dataclasses.dataclass
class Progress:
    """Where a run stands. `step` counts the optimizer steps of `epoch`; both start at 0. `loss_sum` and `seconds` are
    those of the epoch so far."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    best_mae_months: float | None = None
    best_epoch: int | None = None


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _write_failure(error: Exception, folder: Path) -> InputError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "the disk is full" if full else f"writing failed ({error})"
    return InputError(
        f"Training stopped: {reason}. The last good state in {folder} is intact; make room and continue with --resume."
    )


class TrainingRun:
    """The parts of a run that its steps share: model, optimizer, average, images, and where it stands.

    Args:
        teacher_targets: of the training images, see [`teacher_features`]; None where the labels alone teach.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        recipe: Recipe,
        model: BoneAgeModel,
        processor: BoneAgeImageProcessor,
        train_images: PreparedImages,
        validation_images: PreparedImages,
        *,
        accumulation: int,
        teacher_targets: np.ndarray | None = None,
    ) -> None:
        self.train_features: CachedFeatures | None = None
        self.validation_features: CachedFeatures | None = None
        self.accelerator, self.folder, self.recipe, self.processor = accelerator, folder, recipe, processor
        self.train_images, self.validation_images = train_images, validation_images
        self.accumulation = accumulation
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        self.share = shares(recipe.batch_size, accelerator.num_processes, accumulation)
        self.steps_per_epoch = len(epoch_order(recipe, train_images, 0)) // recipe.batch_size
        if self.steps_per_epoch == 0:
            raise InputError("There are fewer training images than one batch; lower it with --set batch_size=...")
        self.model = model.to(accelerator.device, memory_format=torch.channels_last)
        self.average = MovingAverage(model, recipe.ema) if recipe.ema else None
        self.teacher_targets = teacher_targets
        self.student: Student | None = None
        optimizer = build_optimizer(recipe, self.model)
        if teacher_targets is not None:
            torch.manual_seed(recipe.seed)  # the same map in every process
            self.student = Student(self.model, teacher_targets.shape[1], weight=recipe.teacher_weight)
            self.student.to(accelerator.device)
            for group in parameter_groups(recipe, self.student.projection):
                optimizer.add_param_group(group)
        self.wrapped, self.optimizer = accelerator.prepare(self.student or self.model, optimizer)
        self.progress = Progress()
        torch.manual_seed(recipe.seed + accelerator.process_index)  # dropout differs between processes

    def begin(self) -> None:
        """Write the state, which holds the initial weights, and then the run file: what can be seen can be resumed.

        Raises:
            InputError: the folder cannot be written.
        """
        content = {"recipe": self.recipe.to_dict(), "config": self.model.config.to_dict()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.save_state()
            if self.accelerator.is_main_process:
                write_text(self.folder / RUN_FILE, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"The run folder cannot be written ({error.strerror}); choose another one.") from None

    def cache_features(self, cache: Path, *, progress: bool) -> None:
        """From here on, train and validate on features that the frozen backbone computes once: [`cached_features`].

        Raises:
            InputError: see there.
        """

        def features(images: PreparedImages, name: str, changes: str, views: int, seed: int) -> CachedFeatures:
            return cached_features(
                self.model,
                self.processor,
                images,
                cache=cache,
                name=name,
                changes=augmentation.AUGMENTATIONS[changes],
                views=views,
                seed=seed,
                bfloat16=self.accelerator.mixed_precision == "bf16",
                progress=progress,
            )

        recipe = self.recipe
        with self.accelerator.main_process_first():  # the others find the cache filled
            self.train_features = features(
                self.train_images, "train", recipe.augmentation, recipe.cached_views, recipe.seed
            )
            self.validation_features = features(self.validation_images, "selection", "none", 1, 0)

    def batches(self, order: np.ndarray, *, epoch: int, step: int) -> Iterator[Batch]:
        """This process's share of a global batch, one part for each accumulation step."""
        size = self.recipe.batch_size
        indices = order[step * size : (step + 1) * size]
        generator = augmentation_generator(self.recipe, epoch, step)
        if self.train_features is not None:
            views = torch.randint(self.train_features.views, (size,), generator=generator).numpy()
        else:
            parameters = augmentation.sample(augmentation.AUGMENTATIONS[self.recipe.augmentation], size, generator)
        for turn in range(self.accumulation):
            first = (self.accelerator.process_index * self.accumulation + turn) * self.share
            part = slice(first, first + self.share)
            if self.train_features is not None:
                batch = make_feature_batch(
                    self.train_images,
                    self.train_features,
                    indices[part],
                    views[part],
                    uses_sex=self.model.config.uses_sex,
                    device=self.accelerator.device,
                )
            else:
                batch = make_batch(
                    self.train_images,
                    indices[part],
                    parameters[part],
                    processor=self.processor,
                    uses_sex=self.model.config.uses_sex,
                    device=self.accelerator.device,
                )
            if self.teacher_targets is not None:
                targets = torch.from_numpy(self.teacher_targets[indices[part]])
                batch = dataclasses.replace(batch, teacher_features=targets.to(self.accelerator.device))
            yield batch

    def step(self, batches: Iterable[Batch], *, epoch: int, step: int) -> float:
        """One step of the optimizer on a global batch; returns its mean loss over all processes.

        Raises:
            InputError: the loss is not finite; the weights are those before the step.
        """
        total = torch.zeros((), device=self.accelerator.device)
        for turn, batch in enumerate(batches, start=1):
            last = turn == self.accumulation
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    loss = self.loss(batch)
                self.accelerator.backward(loss / self.accumulation)
            total += loss.detach() / self.accumulation
        mean = float(self.accelerator.reduce(total, reduction="mean"))
        if not math.isfinite(mean):
            raise self.diverged(f"the loss became {mean}")
        done = epoch * self.steps_per_epoch + step
        rate = learning_rate(self.recipe, done, self.recipe.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.model, done)
        return mean

    def loss(self, batch: Batch) -> torch.Tensor:
        """Scalar, of this process's part of a batch."""
        inputs = {
            "pixel_values": batch.pixel_values,
            "sex": batch.sex,
            "labels": batch.labels,
            "backbone_features": batch.backbone_features,
        }
        if self.student is None:
            return self.wrapped(**inputs).loss
        return self.wrapped(**inputs, teacher_features=batch.teacher_features)

    def train_epoch(self, *, save_seconds: float, quiet: bool) -> None:
        """From where the run stands to the end of the epoch, saving the state every `save_seconds`."""
        progress = self.progress
        order = epoch_order(self.recipe, self.train_images, progress.epoch)
        self.wrapped.train()
        last_save = tick = time.monotonic()
        with tqdm(
            total=self.steps_per_epoch,
            initial=progress.step,
            desc=f"epoch {progress.epoch + 1}/{self.recipe.epochs}",
            unit="batch",
            disable=quiet,
        ) as bar:
            while progress.step < self.steps_per_epoch:
                batches = self.batches(order, epoch=progress.epoch, step=progress.step)
                progress.loss_sum += self.step(batches, epoch=progress.epoch, step=progress.step)
                progress.step += 1
                bar.set_postfix(loss=f"{progress.loss_sum / progress.step:.4f}", refresh=False)
                bar.update()
                now = time.monotonic()
                progress.seconds += now - tick
                tick = now
                # Whether it is time to save must be one decision for all processes.
                if self.agree(now - last_save > save_seconds) and progress.step < self.steps_per_epoch:
                    self.save_state()
                    last_save = tick = time.monotonic()

    def agree(self, decision: bool) -> bool:
        """The main process's decision."""
        if self.accelerator.num_processes == 1:
            return decision
        flag = torch.tensor(float(decision and self.accelerator.is_main_process), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def share_statistics(self) -> None:
        """Give every process the main process's BatchNorm statistics, which are those that will be saved; each process
        has gathered them over its own share of the batches."""
        state = self.model.state_dict() if self.average is None else self.average.values
        for name, _ in self.model.named_buffers():
            if name in state:
                broadcast(state[name])

    def diverged(self, what: str) -> InputError:
        return InputError(
            f"Training stopped: {what} in epoch {self.progress.epoch + 1}, after {self.progress.step} of its steps. "
            "The last good state is intact; start again with a lower rate (--set learning_rate=...)."
        )

    def validate(self) -> float:
        """MAE in months on the selection half of validation, each process a share of it; keeps the best weights.

        Raises:
            InputError: the weights do not predict finite ages any more; the best ones before stay as they are.
        """
        self.share_statistics()
        with self.average.applied_to(self.model) if self.average is not None else contextlib.nullcontext():
            mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
            predicted = self.predict_validation(mine)
            errors = np.abs(predicted.astype(np.float64) - self.validation_images.bone_age_months[mine])
            mae = float(np.mean(np.concatenate(gather_object([errors]))))
            if not math.isfinite(mae):
                raise self.diverged(f"the validation MAE became {mae}")
            progress = self.progress
            if progress.best_mae_months is None or mae < progress.best_mae_months:
                progress.best_mae_months, progress.best_epoch = mae, progress.epoch + 1
                if self.accelerator.is_main_process:
                    self.save_best()
        return mae

    def predict_validation(self, part: slice) -> np.ndarray:
        """Months of a part of the selection half, from its features where they are cached."""
        size = self.recipe.eval_batch_size
        if self.validation_features is None:
            images = self.validation_images
            return predict_prepared(self.model, self.processor, images.pixels[part], images.sex[part], batch_size=size)
        self.model.eval()
        indices = np.arange(len(self.validation_images))[part]
        months = []
        for start in range(0, len(indices), size):
            some = indices[start : start + size]
            batch = make_feature_batch(
                self.validation_images,
                self.validation_features,
                some,
                np.zeros(len(some), np.int64),
                uses_sex=self.model.config.uses_sex,
                device=self.accelerator.device,
            )
            with torch.inference_mode():
                output = self.model(backbone_features=batch.backbone_features, sex=batch.sex)
            months.append(output.bone_age_months.float().cpu().numpy())
        return np.concatenate(months) if months else np.empty(0, np.float32)

    def save_best(self) -> None:
        provenance = self.model.config.provenance
        provenance["epoch"] = self.progress.best_epoch
        provenance["validation_mae_months"] = self.progress.best_mae_months
        provenance["date"] = datetime.date.today().isoformat()
        images, some = self.validation_images, slice(0, STORAGE_CHECK_IMAGES)
        dtype = torch.float32
        provenance["float16_storage"] = None
        if fits_float16(self.model):
            moved = float16_difference(self.model, self.processor, images.pixels[some], images.sex[some])
            provenance["float16_storage"] = dataclasses.asdict(moved)
            dtype = torch.float16 if moved.allowed else torch.float32
        try:
            save_checkpoint(self.model, self.processor, self.folder / "checkpoint", dtype=dtype)
        except (OSError, SafetensorError) as error:
            raise _write_failure(error, self.folder) from None

    def save_state(self) -> None:
        """All that resuming needs, as one safetensors file, whole or not at all; every process must call it.

        Raises:
            InputError: the disk is full, or a weight is not finite; the state written before stays as it is.
        """
        # A gradient may overflow while the loss is still finite; the next loss would tell, after the state is lost.
        if not all(bool(torch.isfinite(value).all()) for value in (self.student or self.model).parameters()):
            raise self.diverged("a weight became NaN or infinite")
        generators = gather_object([_random_state(self.accelerator.device)])
        if not self.accelerator.is_main_process:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.values.items()}
        if self.student is not None:
            tensors |= {f"projection.{name}": value for name, value in self.student.projection.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        for rank, states in enumerate(generators):
            tensors |= {f"generator.{rank}.{name}": value for name, value in states.items()}
        # A clone each: safetensors refuses tensors that share memory or are not contiguous.
        tensors = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
        }
        temporary = self.folder / (STATE_FILE + ".tmp")
        try:
            save_file(tensors, temporary, metadata={"progress": json.dumps(dataclasses.asdict(self.progress))})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.folder / STATE_FILE)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise _write_failure(error, self.folder) from None

    def load_state(self) -> None:
        """The opposite of [`save_state`].

        Raises:
            InputError: nothing was saved, or by another number of processes; the state is damaged.
        """
        path = self.folder / STATE_FILE
        if not path.is_file():
            raise InputError(f"This run has no {STATE_FILE} to resume from; start it again in another folder.")
        groups: dict[str, dict[str, torch.Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                self.progress = Progress(**json.loads(file.metadata()["progress"]))
                for key in file.keys():  # noqa: SIM118 - safe_open is no dict
                    group, _, name = key.partition(".")
                    groups.setdefault(group, {})[name] = file.get_tensor(key)
        except SafetensorError:
            raise InputError(
                f"The run's {STATE_FILE} is damaged or truncated: copy it again, or start the run in another folder."
            ) from None
        processes = len({name.partition(".")[0] for name in groups["generator"]})
        if processes != self.accelerator.num_processes:
            raise InputError(
                f"This run was started with {processes} processes; resume it with as many, not "
                f"{self.accelerator.num_processes}."
            )
        self.model.load_state_dict(groups["model"])
        if self.student is not None:
            self.student.projection.load_state_dict(groups["projection"])
        if self.average is not None:
            device = self.accelerator.device
            self.average.values = {name: groups["average"][name].to(device) for name in self.average.values}
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in groups.get("optimizer", {}).items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        mine = f"{self.accelerator.process_index}."
        torch.set_rng_state(groups["generator"][mine + "cpu"])
        if self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(groups["generator"][mine + "cuda"], self.accelerator.device)

    def finish_epoch(self) -> None:
        """Validate, report one line, draw the curve, save the state."""
        mae = self.validate()
        progress = self.progress
        images = self.steps_per_epoch * self.recipe.batch_size
        row = {
            "epoch": progress.epoch + 1,
            "loss": progress.loss_sum / self.steps_per_epoch,
            "validation_mae_months": mae,
            "images_per_second": images / progress.seconds,
            "seconds": progress.seconds,
        }
        self.accelerator.log({name: value for name, value in row.items() if name != "epoch"}, step=progress.epoch + 1)
        if self.accelerator.is_main_process:
            try:
                _report_epoch(self.folder, row, epochs=self.recipe.epochs)
            except OSError as error:
                raise _write_failure(error, self.folder) from None
        self.progress = Progress(
            epoch=progress.epoch + 1, best_mae_months=progress.best_mae_months, best_epoch=progress.best_epoch
        )
        self.save_state()


def _report_epoch(folder: Path, row: dict[str, float], *, epochs: int) -> None:
    path = folder / METRICS_FILE
    earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rows = [*(other for other in earlier if other["epoch"] < row["epoch"]), row]
    write_text(path, "".join(json.dumps(other) + "\n" for other in rows))
    draw_learning_curve(rows, folder / "learning_curve.png")
    left = (epochs - row["epoch"]) * row["seconds"] / 60
    tqdm.write(
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  "
        f"validation MAE {row['validation_mae_months']:.2f} months  "
        f"{row['images_per_second']:.1f} images/s  {left:.0f} min left",
        file=sys.stdout,
    )
    sys.stdout.flush()


def draw_learning_curve(rows: Sequence[dict[str, float]], target: Path) -> None:
    """Training loss and validation MAE over epochs, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    epochs = [row["epoch"] for row in rows]
    left.plot(epochs, [row["validation_mae_months"] for row in rows], "o-", color="#0072B2")
    left.set(xlabel="epoch", ylim=(0, None))
    left.set_ylabel("validation MAE (months)", color="#0072B2")
    right = left.twinx()
    right.plot(epochs, [row["loss"] for row in rows], "s--", color="#D55E00")
    right.set(ylim=(0, None))
    right.set_ylabel("training loss", color="#D55E00")
    temporary = target.with_suffix(".tmp.png")
    try:
        figure.savefig(temporary, dpi=120)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


# --- the whole of it ------------------------------------------------------------------------------------------------


def make_processor(recipe: Recipe) -> BoneAgeImageProcessor:
    """The image processor of a recipe, with the statistics that belong to its backbone's public weights."""
    mean, std = IMAGE_NORMALISATION.get(recipe.backbone, (IMAGENET_IMAGE_MEAN, IMAGENET_IMAGE_STD))
    return BoneAgeImageProcessor(
        size={"height": recipe.image_size, "width": recipe.image_size},
        source_size=recipe.source_size,
        source_jpeg_quality=None if recipe.source_size is None else COPY_JPEG_QUALITY,
        image_mean=mean,
        image_std=std,
    )


def build_model(recipe: Recipe, *, initial_weights: str, train: PreparedImages) -> tuple[BoneAgeModel, dict[str, Any]]:
    """The network of a recipe with its initial weights, and where those come from.

    Age mean and SD are fitted on the training split. `initial_weights` is "random", a Hub id or a safetensors file of
    a backbone (for the backbone "auto" a Hub id or folder of a transformers model), or a checkpoint of this package
    (folder, Hub id or "default"), from which every weight is taken (the attention interpolated if the image size
    differs).

    Raises:
        InputError: the weights are not to be had, are damaged or belong to another network.
    """
    months = np.asarray(train.bone_age_months, dtype=np.float64)
    torch.manual_seed(recipe.seed)
    # A file that is not there must not be looked for on the Hub as owner/name.
    own = None if is_weights_file(initial_weights) else own_checkpoint(initial_weights)
    backbone_config = None
    if recipe.backbone == "auto" and own is None:
        backbone_config = read_backbone_config(initial_weights)
    elif recipe.backbone == "auto" and own is not None:
        with loading_sentences():
            backbone_config = BoneAgeConfig.from_pretrained(own.folder).backbone_config
    wanted = BoneAgeConfig(
        backbone=recipe.backbone,
        backbone_config=backbone_config,
        freeze_backbone=recipe.freeze_backbone,
        image_size=recipe.image_size,
        sex_input=recipe.sex_input,
        pooling=recipe.pooling,
        age_mean_months=float(months.mean()) if recipe.scale_targets else 0.0,
        age_sd_months=float(months.std()) if recipe.scale_targets else 1.0,
        loss=recipe.loss,
        feature_dropout=recipe.feature_dropout,
        head_dropout=recipe.head_dropout,
    )
    if own is None:
        model = BoneAgeModel(wanted)
        if isinstance(model.backbone, TransformersBackbone):
            return model, load_transformers_backbone(model.backbone, initial_weights)
        found = load_initial_weights(model.backbone, initial_weights, backbone_name=recipe.backbone)
        path = Path(initial_weights)
        if path.name == WEIGHTS_FILE and own_checkpoint(path.parent) is not None:
            with loading_sentences():  # what its backbone was trained on goes along
                return model, {**found, "provenance": BoneAgeConfig.from_pretrained(path.parent).provenance}
        return model, found
    with loading_sentences():
        model = BoneAgeModel.from_pretrained(
            own.folder, feature_dropout=recipe.feature_dropout, head_dropout=recipe.head_dropout
        )
    for field in ("backbone", "sex_input", "pooling"):
        if getattr(model.config, field) != getattr(wanted, field):
            raise InputError(
                f"The checkpoint has {field} {getattr(model.config, field)!r} and the recipe "
                f"{getattr(wanted, field)!r}; start from a checkpoint of the same kind."
            )
    initial = {"source": own.name, "revision": own.commit, "provenance": model.config.provenance}
    # Fitted to the answers of the weights as they were, or chosen for them.
    model.config.age_correction = model.config.local_calibration = model.config.interval = None
    model.config.flip_average = False
    model.drop_gate()
    if model.config.image_size != recipe.image_size:
        model.resize_attention(recipe.image_size)
    model.config.freeze_backbone, model.config.loss = recipe.freeze_backbone, recipe.loss
    model.freeze()
    return model, initial


def build_optimizer(recipe: Recipe, model: BoneAgeModel) -> torch.optim.Optimizer:
    """Adam, or AdamW with decay as of [`parameter_groups`]."""
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameter_groups(recipe, model), lr=recipe.learning_rate)


def parameter_groups(recipe: Recipe, module: torch.nn.Module) -> list[dict[str, Any]]:
    """What of a module trains, as an optimizer takes it: with AdamW the recipe's decay is on matrices only (not on
    biases, BatchNorm or the sex vectors), with Adam on nothing."""
    trained = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
    if recipe.optimizer == "adam":
        return [{"params": [value for _, value in trained], "weight_decay": 0.0}]
    # By name too: the bias of the locally connected layer has two dimensions.
    decays = {
        name: value.ndim > 1 and "embedding" not in name and not name.endswith("bias") for name, value in trained
    }
    return [
        {"params": [value for name, value in trained if decays[name]], "weight_decay": recipe.weight_decay},
        {"params": [value for name, value in trained if not decays[name]], "weight_decay": 0.0},
    ]


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """The best checkpoint of a run and its MAE on the selection half of validation."""

    checkpoint: Path
    validation_mae_months: float
    epoch: int


def train(
    dataset: str | Path,
    folder: Path,
    recipe: Recipe | None,
    *,
    initial_weights: str | None = None,
    resume: bool = False,
    mixed_precision: str | None = None,
    accumulation: int | None = None,
    save_minutes: float = 5.0,
    progress_bar: bool = True,
) -> TrainingResult:
    """Train a recipe; the best weights by validation MAE end in `folder/checkpoint`.

    Args:
        dataset: folder written by `boneage prepare`, or Hub id. "train" trains, the selection half of "validation"
            selects.
        folder: the run folder: recipe and provenance, state, `metrics.jsonl`, TensorBoard files, `learning_curve.png`,
            `checkpoint`.
        recipe: required unless resuming; a resumed run keeps its own, and refuses another.
        initial_weights: see [`build_model`]; required unless resuming.
        mixed_precision: "no" or "bf16" (autocast); the weights themselves stay float32. None is "no", or what the
            resumed run was started with.
        accumulation: steps whose gradients make up one global batch. None is 1, or that of the resumed run.
        save_minutes: how often the state is saved within an epoch.

    Raises:
        InputError: no initial weights, a run that exists already or (resuming) one with other settings or data, a loss
            that is not finite, a full disk; another training is at work in the folder.
    """
    saved = _read_run(folder, resume=resume)
    if find_spec("tensorboard") is None:
        raise InputError('Training writes TensorBoard files: pip install "boneage-hf[train]".')
    if saved is not None and initial_weights is not None:
        raise InputError("A resumed run has its weights already; leave out --initial-weights.")
    if saved is not None:
        recipe, mixed_precision, accumulation = _saved_settings(saved, recipe, mixed_precision, accumulation)
    elif recipe is None or initial_weights is None:
        raise InputError(
            "Training needs --initial-weights: a Hub id such as timm/vgg19.tv_in1k, a .safetensors file (for "
            "efficientnet_lite0 made by `boneage convert-lite0`), a checkpoint folder, or the word random."
        )
    accelerator = Accelerator(
        mixed_precision=mixed_precision or "no",
        log_with="tensorboard",
        project_dir=str(folder),
        cpu=not torch.accelerator.is_available(),
        # What the main process does first (preparing images, a teacher's or a frozen backbone's features) may take
        # hours, in which the others wait; they would give up after 10 or 30 minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=24))],
    )
    steps = 1 if accumulation is None else accumulation
    quiet = not (progress_bar and accelerator.is_main_process)
    manifest = read_manifest(dataset)
    processor = make_processor(recipe)
    with accelerator.main_process_first():  # the others find the cache filled
        cache = runs_folder() / "prepared-images"
        train_images, validation_images = (
            prepare_images(load_split(dataset, name), processor, cache=cache, name=name, progress=not quiet)
            for name in ("train", "selection")
        )
    targets, teacher = _ask_teacher(accelerator, dataset, recipe, train_images, progress=not quiet)
    if saved is not None:
        _check_data(saved, train_images, validation_images)
        _check_teacher(saved, teacher)
        model = BoneAgeModel(BoneAgeConfig.from_dict(saved["config"]))
    else:
        model, initial = build_model(recipe, initial_weights=str(initial_weights), train=train_images)
        model.config.provenance = {
            "recipe": {**recipe.to_dict(), "teacher": teacher["source"] if teacher else None},
            "initial_weights": initial,
            **({"teacher": teacher} if teacher else {}),
            "data": {
                "kind": manifest["kind"],
                "licence": licence_of(manifest),
                **manifest["settings"],
                **hub_source(dataset),
            },
            "train_n": len(train_images),
            "train_fingerprint": fingerprint(train_images.ids, train_images.bone_age_months.tolist()),
            "selection_n": len(validation_images),
            "selection_fingerprint": fingerprint(validation_images.ids, validation_images.bone_age_months.tolist()),
            "mixed_precision": mixed_precision or "no",
            "accumulation": steps,
            "processes": accelerator.num_processes,
            "package_version": __version__,
            "commit": git_commit(),
            "versions": package_versions(("torch", "transformers", "accelerate")),
        }
    run = TrainingRun(
        accelerator,
        folder,
        recipe,
        model,
        processor,
        train_images,
        validation_images,
        accumulation=steps,
        teacher_targets=targets,
    )
    with _alone_in(folder) if accelerator.is_main_process else contextlib.nullcontext():
        if saved is not None:
            run.load_state()
        else:
            _read_run(folder, resume=False)  # again: another training may have begun one here meanwhile
            run.begin()
        if recipe.cached_views:  # only now: a resumed run has its backbone from the state
            run.cache_features(runs_folder() / "features", progress=not quiet)
        accelerator.init_trackers("tensorboard")
        while run.progress.epoch < recipe.epochs:
            run.train_epoch(save_seconds=save_minutes * 60, quiet=quiet)
            run.finish_epoch()
        # Not `accelerator.end_training()`: it ends the process group as well, which the next stage of a plan needs.
        for tracker in accelerator.trackers:
            tracker.finish()
        if accelerator.is_main_process:
            record_cost(folder, processes=accelerator.num_processes)
    if run.progress.best_mae_months is None or run.progress.best_epoch is None:
        raise InputError("No epoch had a validation error; the selection half of validation may be empty.")
    return TrainingResult(folder / "checkpoint", run.progress.best_mae_months, run.progress.best_epoch)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within the block no other training on this disk writes into the run folder. The lock file stays: to delete it
    would let one process lock the deleted file and another one a new one.

    Raises:
        InputError: another training is at work in the folder, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(folder / LOCK_FILE, timeout=PATIENCE_SECONDS))
        except TimeoutError:
            raise InputError(
                "Another training is at work in this run folder: wait for it or stop it, then go on with --resume."
            ) from None
        except OSError as error:
            raise InputError(f"The run folder cannot be written ({error.strerror}); choose another one.") from None
        yield


def _ask_teacher(
    accelerator: Accelerator, dataset: str | Path, recipe: Recipe, train_images: PreparedImages, *, progress: bool
) -> tuple[np.ndarray | None, dict[str, Any] | None]:
    """The teacher's features of the training images, and who it is: `source`, `revision` and its own `provenance`.

    Raises:
        InputError: the teacher is not to be had, or it looks at other images than the training does.
    """
    if recipe.teacher is None:
        return None, None
    pipe = load_pipeline(recipe.teacher, device=accelerator.device)
    local = Path(recipe.teacher).exists()
    teacher = {
        "source": Path(recipe.teacher).resolve().name if local else recipe.teacher,
        "revision": checkpoint_revision(pipe),
        "provenance": pipe.model.config.provenance,
    }
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with accelerator.main_process_first():  # the others find the cache filled
        images = prepare_images(
            load_split(dataset, "train"),
            pipe.image_processor,
            cache=runs_folder() / "prepared-images",
            name="train",
            progress=progress,
        )
        if images.ids != train_images.ids:
            raise InputError("The teacher was given other images than the training; delete the cache and start again.")
        targets = teacher_features(
            pipe.model,
            pipe.image_processor,
            images,
            cache=runs_folder() / "teacher-features",
            bfloat16=accelerator.mixed_precision == "bf16",
            progress=progress,
        )
    return targets, teacher


def record_cost(folder: Path, *, processes: int = 1) -> None:
    """Write into the provenance of a run's best checkpoint what the whole run looked like and took.

    `cost` holds `learning_curve` (of each epoch `epoch`, `loss`, `validation_mae_months` and `minutes`, the wall time
    of its steps without validation), `core_hours` (those minutes times torch's threads and the processes; as it is
    wall time, other work on the machine counts as well) and `hardware`. Weights and revision stay as they are.

    Raises:
        InputError: the checkpoint cannot be written.
    """
    path, curve = folder / "checkpoint" / "config.json", folder / METRICS_FILE
    if not (path.is_file() and curve.is_file()):
        return  # no epoch had a validation error, which `train` says
    rows = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    machine = hardware()
    minutes = sum(row["seconds"] for row in rows) / 60
    config = json.loads(path.read_text(encoding="utf-8"))
    config["provenance"]["cost"] = {
        "learning_curve": [
            {
                "epoch": row["epoch"],
                "loss": round(row["loss"], 5),
                "validation_mae_months": round(row["validation_mae_months"], 3),
                "minutes": round(row["seconds"] / 60, 2),
            }
            for row in rows
        ],
        "core_hours": round(minutes / 60 * machine["torch_threads"] * processes, 2),
        "hardware": machine,
    }
    try:
        write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise _write_failure(error, folder) from None


def _read_run(folder: Path, *, resume: bool) -> dict[str, Any] | None:
    path = folder / RUN_FILE
    if resume and not path.is_file():
        raise InputError("There is no run to resume in this folder; start it without --resume.")
    if not resume and path.is_file():
        raise InputError("This folder holds a run already; continue it with --resume or choose another folder.")
    try:
        return json.loads(path.read_text()) if resume else None
    except ValueError:
        raise InputError(f"The run's {RUN_FILE} is damaged: copy it again, or start another run.") from None


def _saved_settings(
    saved: dict[str, Any], recipe: Recipe | None, mixed_precision: str | None, accumulation: int | None
) -> tuple[Recipe, str, int]:
    provenance = saved["config"]["provenance"]
    own, precision = recipe_from_dict(saved["recipe"]), provenance["mixed_precision"]
    steps = provenance.get("accumulation", 1)
    differences = [
        f"{name} {value!r} instead of {getattr(own, name)!r}"
        for name, value in (recipe or own).to_dict().items()
        if value != getattr(own, name)
    ]
    if mixed_precision not in (None, precision):
        differences.append(f"mixed precision {mixed_precision!r} instead of {precision!r}")
    if accumulation not in (None, steps):
        differences.append(f"accumulation {accumulation} instead of {steps}")
    if differences:
        raise InputError(
            f"A run is resumed with its own settings, not with {', '.join(differences)}; leave these out, or start "
            "another run."
        )
    return own, precision, steps


def _check_data(saved: dict[str, Any], train_images: PreparedImages, validation_images: PreparedImages) -> None:
    for name, images in (("train", train_images), ("selection", validation_images)):
        now = fingerprint(images.ids, images.bone_age_months.tolist())
        if saved["config"]["provenance"][f"{name}_fingerprint"] != now:
            raise InputError(
                f"The images of the split {name} are not those this run was started on; resume it on its own data."
            )


def _check_teacher(saved: dict[str, Any], teacher: dict[str, Any] | None) -> None:
    before = (saved["config"]["provenance"].get("teacher") or {}).get("revision")
    if teacher is not None and teacher["revision"] != before:
        raise InputError(
            f"The teacher has the revision {teacher['revision']} now and had {before} when the run began; resume with "
            "the checkpoint of then."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """`accelerate launch -m boneage_hf.training DATASET OUT ...`, and what `boneage train` calls."""
    parser = argparse.ArgumentParser(prog="python -m boneage_hf.training", description="Train a recipe; resumable.")
    add_training_arguments(parser)
    try:
        return run_from_arguments(parser.parse_args(arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; go on with --resume.", file=sys.stderr)
        return 130


def train_plan(
    dataset: str | Path,
    folder: Path,
    plan: Sequence[Stage],
    *,
    initial_weights: str | None = None,
    mixed_precision: str | None = None,
    accumulation: int | None = None,
    save_minutes: float = 5.0,
    progress_bar: bool = True,
) -> TrainingResult:
    """Run the stages of a plan in `folder/stage-1`, `folder/stage-2`, ...; the last one's best weights end in
    `folder/checkpoint`. Called again with the same arguments it goes on where it was interrupted.

    Args:
        initial_weights: of the first stage; required unless that has begun.

    Others and errors as of [`train`].
    """
    start, result = initial_weights, None
    for number, stage in enumerate(plan, start=1):
        run = folder / f"stage-{number}"
        begun = (run / RUN_FILE).is_file()
        if not begun and result is not None:
            start = _start_of(stage, result.checkpoint, folder / f"stage-{number - 1}-folded")
        result = train(
            dataset,
            run,
            stage.recipe,
            initial_weights=None if begun else start,
            resume=begun,
            mixed_precision=mixed_precision,
            accumulation=accumulation,
            save_minutes=save_minutes,
            progress_bar=progress_bar,
        )
    if result is None:
        raise InputError("A plan needs at least one stage.")
    if PartialState().is_main_process:
        replace_folder(folder / "checkpoint", copy_of=result.checkpoint)
    return dataclasses.replace(result, checkpoint=folder / "checkpoint")


def _start_of(stage: Stage, before: Path, folded: Path) -> str:
    """What a stage starts from, made of the best checkpoint of the stage before."""
    with PartialState().main_process_first():
        if stage.fold and not folded.exists():
            fold_checkpoint(str(before), folded)
    source = folded if stage.fold else before
    return str(source if stage.start == "all" else source / WEIGHTS_FILE)


def end_processes() -> None:
    """Leave the group of training processes together; nothing where there is one process.

    All of them wait for one another first: one that leaves while another still waits for its last words would break
    or hang the other. A push to the Hub comes after it, as no one need wait for that.
    """
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def run_from_arguments(options: argparse.Namespace) -> int:
    folder = run_folder(options.out)
    if options.push_to_hub is not None:
        check_access(options.push_to_hub)
    if options.recipe in PLANS:
        if (folder / "stage-1" / RUN_FILE).is_file() and not options.resume:
            raise InputError("This folder holds a run already; continue it with --resume or choose another folder.")
        result = train_plan(
            options.dataset,
            folder,
            plan_of(options.recipe, options.set),
            initial_weights=options.initial_weights,
            mixed_precision=options.mixed_precision,
            accumulation=options.accumulation,
            save_minutes=options.save_minutes,
        )
        return _tell(result, options, folder)
    if options.resume and (folder / "stage-1" / RUN_FILE).is_file():
        raise InputError(f"This run has stages: name its recipe again ({', '.join(PLANS)}) beside --resume.")
    own = options.resume and options.recipe is None and not options.set
    recipe = None if own else load_recipe(options.recipe or DEFAULT_RECIPE, options.set)
    result = train(
        options.dataset,
        folder,
        recipe,
        initial_weights=options.initial_weights,
        resume=options.resume,
        mixed_precision=options.mixed_precision,
        accumulation=options.accumulation,
        save_minutes=options.save_minutes,
    )
    return _tell(result, options, folder)


def _tell(result: TrainingResult, options: argparse.Namespace, folder: Path) -> int:
    end_processes()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"best epoch {result.epoch}: validation MAE {result.validation_mae_months:.2f} months")
        print(f"checkpoint: {result.checkpoint}")
        if options.push_to_hub is not None:
            _push(result.checkpoint, options, folder / "evaluation")
    return 0


def _push(checkpoint: Path, options: argparse.Namespace, out: Path) -> None:
    """Measure the best checkpoint on the selection half, and publish it with that.

    Raises:
        InputError: the Hub is in the way; what to do is printed.
    """
    evaluate_checkpoint(str(checkpoint), options.dataset, split="selection", out=out, progress=False)
    metrics = out / "metrics.json"
    try:
        print(push_model(checkpoint, options.push_to_hub, metrics_file=metrics, visible="new private"))
    except InputError:
        print(f"not published; again: boneage push model {checkpoint} {options.push_to_hub} --metrics {metrics}")
        raise


if __name__ == "__main__":
    raise SystemExit(main())
