"""Checkpoint folders: writing them (with the code that travels to the Hub, or without) and loading them."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor
from transformers.utils import logging

from .configuration_boneage import BoneAgeConfig
from .errors import InputError
from .hub_access import download, is_hub_id, split_id
from .image_processing_boneage import BoneAgeImageProcessor, BoneAgeImageProcessorKwargs
from .modeling_boneage import BoneAgeModel
from .pipeline_boneage import BoneAgePipeline
from .registration import TASK

#: The checkpoint that ships with the package; `"default"` names it wherever a checkpoint is asked for.
DEFAULT_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "default"

SETTINGS_FILES = ("config.json", "preprocessor_config.json")
WEIGHTS_FILE = "model.safetensors"

#: Terms of weights that were trained on RSNA images.
WEIGHTS_LICENCE = DEFAULT_CHECKPOINT / "LICENSE"

#: Label fingerprint of the training part of this project's reference split of the RSNA training set (9,458 rows).
RSNA_REFERENCE_TRAIN = "bfe85996c66c9d7137ae82cdc600de31ae85ad65db799c8df6542af45b3c384b"


def trained_on_rsna(config: BoneAgeConfig) -> bool:
    """Whether a checkpoint's provenance says that it was trained on RSNA images, or on or by weights that were."""
    provenance = config.provenance or {}
    data = provenance.get("data")
    own = (isinstance(data, dict) and data.get("kind") == "rsna") or (
        provenance.get("train_fingerprint") == RSNA_REFERENCE_TRAIN
    )
    others = [provenance.get("initial_weights"), provenance.get("teacher")]
    earlier = [other["provenance"] for other in others if isinstance(other, dict) and other.get("provenance")]
    return own or any(trained_on_rsna(BoneAgeConfig(provenance=other)) for other in earlier)


def storage_tensors(model: torch.nn.Module, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The state of a model as it is stored.

    Floating point is stored as `dtype`, but BatchNorm statistics as float32 (a variance may leave float16's range);
    counters stay as they are.

    Raises:
        InputError: a value is not finite, or not in `dtype`.
    """
    stored = {}
    for name, value in model.state_dict().items():
        wanted = value.dtype if _keeps_type(name, value) else dtype
        stored[name] = value.detach().to(device="cpu", dtype=wanted).contiguous()
        if not bool(torch.isfinite(stored[name]).all()):
            if bool(torch.isfinite(value).all()):
                raise InputError(f"{name} holds values beyond the range of {dtype}: save with dtype=torch.float32.")
            raise InputError(f"{name} holds NaN or infinity: the training has diverged, take an earlier state of it.")
    return stored


def fits_float16(model: torch.nn.Module) -> bool:
    """Whether no finite value of a model leaves float16's range where it is stored so."""
    return all(
        _keeps_type(name, value) or bool((value.half().isfinite() | ~value.isfinite()).all())
        for name, value in model.state_dict().items()
    )


def storage_dtype(model: torch.nn.Module) -> torch.dtype:
    """float16 if all that is stored so can be without a change, as of a model that was loaded from float16; else
    float32."""
    for name, value in model.state_dict().items():
        if not _keeps_type(name, value) and not torch.equal(value.half().to(value.dtype), value):
            return torch.float32
    return torch.float16


def _keeps_type(name: str, value: torch.Tensor) -> bool:
    return not value.is_floating_point() or name.endswith(("running_mean", "running_var"))


def check_output(folder: Path) -> None:
    """Refuse a folder that [`save_checkpoint`] would not write to.

    Raises:
        InputError: it holds something else than a checkpoint.
    """
    others = {path.name for path in folder.iterdir()} - {"LICENSE"} if folder.is_dir() else set()
    if folder.is_file() or (others and "config.json" not in others):
        raise InputError(
            "The output holds something else than a checkpoint, which would be lost: name another folder."
        )


def save_checkpoint(
    model: BoneAgeModel,
    processor: BoneAgeImageProcessor,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float16,
    with_code: bool = False,
) -> None:
    """Write a checkpoint folder, whole or not at all; an older one in its place is replaced.

    Weights trained on RSNA images get their LICENSE beside them.

    Args:
        dtype: storage type of the weights. The config says float32 whatever it is, so that loading gives float32.
        with_code: also write the Python files that travel, so that the folder works with `trust_remote_code=True` if
            this package is not installed.

    Raises:
        InputError: the folder holds something else than a checkpoint, or the weights cannot be stored as `dtype`.
        OSError: writing failed; the older checkpoint is still there.
    """
    check_output(folder)
    tensors = storage_tensors(model, dtype)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with _no_progress_bar():
            if with_code:
                pipe = BoneAgePipeline(model=model, image_processor=processor, task=TASK)
                pipe.save_pretrained(temporary, state_dict=tensors)
            else:
                with _without_code(model, processor):
                    model.save_pretrained(temporary, state_dict=tensors)
                    processor.save_pretrained(temporary)
        if trained_on_rsna(model.config):
            shutil.copyfile(WEIGHTS_LICENCE, temporary / "LICENSE")
        # safetensors lets nobody but the writer read its file; a checkpoint is read as its config is.
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path) -> None:
    older = folder.with_name(folder.name + ".old")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        folder.rename(older)
    temporary.rename(folder)
    shutil.rmtree(older, ignore_errors=True)


def replace_folder(folder: Path, *, copy_of: Path) -> None:
    """Make `folder` a copy of a checkpoint folder, whole or not at all.

    Raises:
        OSError: writing failed; what `folder` was before is still there.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(copy_of, temporary)
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _without_code(model: BoneAgeModel, processor: BoneAgeImageProcessor) -> Iterator[None]:
    """Within the block transformers writes neither code nor `auto_map`, whatever an earlier save has left behind."""
    classes: list[Any] = [BoneAgeConfig, BoneAgeModel, BoneAgeImageProcessor]
    marks = [cls._auto_class for cls in classes]
    left = [
        (attributes, name, attributes.pop(name))
        for attributes in (vars(model.config), vars(processor))
        for name in ("auto_map", "custom_pipelines")
        if name in attributes
    ]
    for cls in classes:
        cls._auto_class = None
    try:
        yield
    finally:
        for cls, mark in zip(classes, marks, strict=True):
            cls._auto_class = mark
        for attributes, name, value in left:
            attributes[name] = value


def load_pipeline(
    checkpoint: str | Path = "default",
    *,
    revision: str | None = None,
    device: str | int | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> BoneAgePipeline:
    """The bone-age pipeline of a checkpoint. Its own code is used, never code that lies beside the weights.

    Args:
        checkpoint: `"default"` (ships with the package, needs no network), a checkpoint folder, or a Hub id, with its
            revision if need be: `"owner/name@main"`. Of a Hub repository only JSON and safetensors are downloaded.
        revision: branch, tag or commit of a Hub id.
        device: as `transformers.pipeline` takes it; by default the first accelerator, or else the CPU.
        dtype: of the weights in memory, by default float32.

    Raises:
        InputError: there is no such checkpoint, it is not one of this package's models, or its files are incomplete,
            damaged or do not belong together.
    """
    source = resolve_checkpoint(checkpoint)
    folder = checkpoint_folder(source, revision=revision, files=SETTINGS_FILES)
    with loading_sentences():
        config = AutoConfig.from_pretrained(folder)
        if not isinstance(config, BoneAgeConfig):
            raise InputError(f"This checkpoint is a {config.model_type} model, not a bone-age model of this package.")
        if is_hub_id(source):  # only now that it is known to be one of ours; of the very commit of the settings
            folder = checkpoint_folder(split_id(source)[0], revision=folder.name, files=(WEIGHTS_FILE,))
        processor = AutoImageProcessor.from_pretrained(folder)
        with _no_progress_bar():  # a model of 10 to 40 MB loads in a blink
            model = BoneAgeModel.from_pretrained(folder, config=config, dtype=dtype or torch.float32)
    if not isinstance(processor, BoneAgeImageProcessor):
        raise InputError(f"The checkpoint's preprocessor_config.json is that of a {type(processor).__name__}.")
    if processor.size != {"height": config.image_size, "width": config.image_size}:
        raise InputError(
            f"The checkpoint's image processor makes images of {processor.size['height']} x {processor.size['width']} "
            f"px, but its model needs {config.image_size} x {config.image_size}: give both the same size."
        )
    if is_hub_id(source):
        model.name_or_path = config.name_or_path = split_id(source)[0]  # not the folder of the cache
        model.config._commit_hash = folder.name
    chosen = torch.device(device) if isinstance(device, str) else device
    return BoneAgePipeline(model=model, image_processor=processor, task=TASK, device=chosen)


@contextmanager
def loading_sentences() -> Iterator[None]:
    """Within the block, what is wrong with the files of a checkpoint becomes an InputError of one sentence."""
    try:
        yield
    except InputError:
        raise
    except SafetensorError:
        raise InputError(
            "The checkpoint's model.safetensors is damaged or truncated: download or save it again."
        ) from None
    # AttributeError and TypeError: JSON that is whole but means something else, for example an unknown dtype.
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"The checkpoint cannot be loaded: {_first_sentence(error)}.") from None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def resolve_checkpoint(checkpoint: str | Path) -> str:
    """`"default"` -> the packaged folder; a folder or Hub id as it is.

    Raises:
        InputError: a path that is no checkpoint folder.
    """
    if str(checkpoint) == "default":
        if not (DEFAULT_CHECKPOINT / "config.json").is_file():
            raise InputError("This installation has no packaged checkpoint; name a checkpoint folder or a Hub id.")
        return str(DEFAULT_CHECKPOINT)
    path = Path(checkpoint)
    if path.exists() or path.is_absolute() or str(checkpoint).startswith(".") or str(checkpoint).count("/") > 1:
        if not (path / "config.json").is_file():
            raise InputError(
                'There is no checkpoint at that path: name a folder with a config.json, a Hub id, or "default".'
            )
        for name in (WEIGHTS_FILE, "preprocessor_config.json"):
            if not (path / name).is_file():
                raise InputError(f"The checkpoint folder has no {name}: copy or save the whole checkpoint.")
        return str(path)
    return str(checkpoint)


def checkpoint_folder(
    checkpoint: str | Path, *, revision: str | None = None, files: Sequence[str] | None = None
) -> Path:
    """The folder of a checkpoint on this disk; that of a Hub id is downloaded into the Hub's cache first.

    Args:
        checkpoint: as of [`load_pipeline`].
        revision: of a Hub id; instead of the one that may follow its `@`.
        files: to download; by default those of a checkpoint and its `metrics.json`.

    Raises:
        InputError: there is no such checkpoint, or one of the files is not in it.
    """
    source = resolve_checkpoint(checkpoint)
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_id(source):
        raise InputError(
            f"{source} is neither a checkpoint folder nor a Hub id: name a folder with a config.json, OWNER/NAME, or "
            '"default".'
        )
    repo_id, own = split_id(source)
    wanted = files or (*SETTINGS_FILES, WEIGHTS_FILE, "metrics.json", "LICENSE")
    folder = download(repo_id, wanted, revision=revision or own)
    for name in {*SETTINGS_FILES, WEIGHTS_FILE}.intersection(wanted):
        if not (folder / name).is_file():
            raise InputError(f"The Hub's model {repo_id} has no {name}, so it is no checkpoint of this package.")
    return folder


@dataclass(frozen=True)
class OwnCheckpoint:
    """A checkpoint of this package on this disk: its folder, its name without a path, and its commit on the Hub."""

    folder: Path
    name: str
    commit: str | None = None


def own_checkpoint(source: str | Path) -> OwnCheckpoint | None:
    """One of this package's checkpoints, downloaded if need be; None if `source` is something else.

    Args:
        source: folder, Hub id or `"default"`; or whatever else initial weights may be.

    Raises:
        InputError: a Hub id that cannot be reached, or a checkpoint on the Hub that lacks a file.
    """
    if str(source) == "default":
        return OwnCheckpoint(Path(resolve_checkpoint(source)), "default")
    if Path(source).exists() or not is_hub_id(str(source)):
        return OwnCheckpoint(Path(source), Path(source).resolve().name) if _is_own(Path(source)) else None
    repo_id, revision = split_id(str(source))
    settings = download(repo_id, ("config.json",), revision=revision)
    if not _is_own(settings):
        return None
    commit = settings.name  # so does the cache of the Hub name the folder
    return OwnCheckpoint(checkpoint_folder(repo_id, revision=commit), repo_id, commit)


def _is_own(folder: Path) -> bool:
    """Whether a folder is a checkpoint of this package, and not one of another model of transformers."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("model_type") == BoneAgeConfig.model_type


#: Fields of the config that decide how a model trains or where it comes from, not what it predicts.
_OF_TRAINING = frozenset(
    {
        "freeze_backbone",
        "feature_dropout",
        "head_dropout",
        "batch_norm_momentum",
        "loss",
        "smooth_l1_beta",
        "provenance",
    }
)


#: Values that checkpoints from before these fields had.
_IMPLIED: dict[str, Any] = {"pooling": "attention", "flip_average": False}


def checkpoint_revision(pipe: BoneAgePipeline) -> str:
    """Names all that decides a prediction: 12 hex digits of the sha256 over weights, settings and image processor.

    The same wherever the checkpoint lies and however it was loaded (in float32); provenance plays no part.
    """
    config = pipe.model.config
    settings = {name: getattr(config, name) for name in BoneAgeConfig.__annotations__ if name not in _OF_TRAINING}
    # Without what is not there or goes without saying, so that a new field leaves the names of older checkpoints as
    # they are.
    settings = {name: value for name, value in settings.items() if value is not None and value != _IMPLIED.get(name)}
    processor = {name: getattr(pipe.image_processor, name) for name in BoneAgeImageProcessorKwargs.__annotations__}
    digest = hashlib.sha256(json.dumps([settings, processor], sort_keys=True).encode())
    for name, value in sorted(pipe.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:12]


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
