"""Checkpoint folders: writing them (with the code that travels to the Hub, or without) and loading them."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from .configuration_boneage import BoneAgeConfig
from .errors import InputError
from .image_processing_boneage import BoneAgeImageProcessor
from .modeling_boneage import BoneAgeModel
from .pipeline_boneage import BoneAgePipeline
from .registration import TASK

#: The checkpoint that ships with the package; `"default"` names it wherever a checkpoint is asked for.
DEFAULT_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "default"


def storage_tensors(model: torch.nn.Module, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The state of a model as it is stored: `dtype`, but BatchNorm statistics in float32 (a variance may leave float16's
    range) and counters as they are."""
    stored = {}
    for name, value in model.state_dict().items():
        keep = not value.is_floating_point() or name.endswith(("running_mean", "running_var"))
        stored[name] = value.detach().cpu().contiguous() if keep else value.detach().cpu().to(dtype).contiguous()
    return stored


def save_checkpoint(
    model: BoneAgeModel,
    processor: BoneAgeImageProcessor,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float16,
    with_code: bool = False,
) -> None:
    """Write a checkpoint folder, whole or not at all; an older one in its place is replaced.

    Args:
        dtype: storage type of the weights. The config says float32 whatever it is, so that loading gives float32.
        with_code: also write the Python files that travel, so that the folder works with `trust_remote_code=True` where
            this package is not installed.

    Raises:
        OSError: writing failed; the older checkpoint is still there.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # Neither code nor auto_map without the class attribute that register_for_auto_class sets.
    for cls, auto_class in ((BoneAgeConfig, "AutoConfig"), (BoneAgeModel, "AutoModel")):
        cls._auto_class = auto_class if with_code else None
    BoneAgeImageProcessor._auto_class = "AutoImageProcessor" if with_code else None
    try:
        if with_code:
            pipe = BoneAgePipeline(model=model, image_processor=processor, task=TASK)
            pipe.save_pretrained(temporary, state_dict=storage_tensors(model, dtype))
        else:
            model.save_pretrained(temporary, state_dict=storage_tensors(model, dtype))
            processor.save_pretrained(temporary)
    finally:
        for cls in (BoneAgeConfig, BoneAgeModel, BoneAgeImageProcessor):
            cls._auto_class = None
    older = folder.with_name(folder.name + ".old")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        folder.rename(older)
    temporary.rename(folder)
    shutil.rmtree(older, ignore_errors=True)


def load_pipeline(checkpoint: str | Path = "default", *, revision: str | None = None, **options: Any) -> BoneAgePipeline:
    """The bone-age pipeline of a checkpoint.

    Args:
        checkpoint: `"default"` (ships with the package, needs no network), a checkpoint folder, or a Hub id.
        revision: branch, tag or commit of a Hub id.
        options: handed to `transformers.pipeline`, for example `device` or `dtype`.

    Raises:
        InputError: there is no such checkpoint, or it is not one of this package's models.
    """
    from transformers import pipeline

    source = resolve_checkpoint(checkpoint)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(f"The checkpoint cannot be loaded: {_first_line(error)}") from None
    if not isinstance(config, BoneAgeConfig):
        raise InputError(f"This checkpoint is a {config.model_type} model, not a bone-age model of this package.")
    return pipeline(TASK, model=str(source), revision=revision, **options)


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
            raise InputError('There is no checkpoint at that path: name a folder with a config.json, a Hub id, or "default".')
        return str(path)
    return str(checkpoint)


def checkpoint_revision(pipe: BoneAgePipeline) -> str:
    """The first 12 hex digits of the sha256 over the model's stored weights: names the weights wherever they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(pipe.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:12]


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
