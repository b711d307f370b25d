"""A checkpoint with `vgg19_bn` -> the same network as plain `vgg19`: what a training from scratch ships as."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from .backbones_boneage import Vgg19Bn, fold_batchnorm
from .errors import InputError
from .hub import check_output, checkpoint_revision, load_pipeline, resolve_checkpoint, save_checkpoint
from .modeling_boneage import BoneAgeModel


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What [`fold_checkpoint`] wrote.

    Attributes:
        values: parameters of the new network.
        revision: of the new checkpoint.
    """

    values: int
    revision: str

    def __str__(self) -> str:
        return f"vgg19 with {self.values:,} values, revision {self.revision}"


def fold_model(model: BoneAgeModel) -> BoneAgeModel:
    """A new model with a plain VGG19 that answers as `model` does in evaluation mode, up to rounding.

    Raises:
        InputError: the backbone is not `vgg19_bn`.
    """
    if not isinstance(model.backbone, Vgg19Bn):
        raise InputError(f"Only a vgg19_bn can be folded into a vgg19; this backbone is {model.config.backbone}.")
    config = copy.deepcopy(model.config)
    config.backbone = "vgg19"
    folded = BoneAgeModel(config)
    torch.nn.Module.to(folded, model.device, model.dtype)  # transformers' own `to` has no types
    others = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
    backbone = {f"backbone.{name}": value for name, value in fold_batchnorm(model.backbone).state_dict().items()}
    folded.load_state_dict(others | backbone)
    return folded.train(model.training)


def fold_checkpoint(checkpoint: str, out: Path) -> Folded:
    """Write the checkpoint `out` with a plain VGG19 in place of the `vgg19_bn` of `checkpoint`.

    It is stored as float32.

    Raises:
        InputError: the checkpoint cannot be loaded or has another backbone; `out` is the checkpoint itself or holds
            something else.
    """
    source = Path(resolve_checkpoint(checkpoint))
    if out.exists() and source.exists() and out.resolve() == source.resolve():
        raise InputError("The output is the checkpoint itself; name another folder.")
    check_output(out)
    pipe = load_pipeline(checkpoint)
    folded = fold_model(pipe.model)
    provenance = {**(pipe.model.config.provenance or {}), "folded_from": checkpoint_revision(pipe)}
    provenance.pop("float16_storage", None)  # measured on other weights than these
    folded.config.provenance = provenance
    try:
        # Products of what was stored, so hardly one fits into float16, and here are no images to measure what
        # rounding them would do to predictions.
        save_checkpoint(folded, pipe.image_processor, out, dtype=torch.float32)
    except OSError as error:
        raise InputError(f"The checkpoint cannot be written ({error.strerror}); name another folder.") from None
    return Folded(
        values=sum(value.numel() for value in folded.parameters()), revision=checkpoint_revision(load_pipeline(out))
    )
