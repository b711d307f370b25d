"""Checkpoint, prepared data set or Space -> one commit on the Hub; nothing is public before it is whole.

What is published is laid out in a folder first, checked there, and then sent as one commit. A new repository is
private until that commit is there. `boneage push model | dataset | space`.
"""

import fnmatch
import importlib.metadata
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCardData
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from .card import render_card
from .configuration_boneage import BoneAgeConfig
from .data import FEATURES, check_whole, local_folder, read_manifest
from .data_card import PUBLICATION_TERMS, render
from .errors import InputError
from .files import write_text
from .hub import (
    DEFAULT_CHECKPOINT,
    SETTINGS_FILES,
    WEIGHTS_FILE,
    WEIGHTS_LICENCE,
    checkpoint_folder,
    load_pipeline,
    save_checkpoint,
    storage_dtype,
    trained_on_rsna,
)
from .hub_access import Kind, check_id, hub_sentences, no_bars, split_id, status_of, with_timeout

#: Formats of weights that run code when they are loaded, or that another library would read instead of ours.
_NOT_SAFETENSORS = frozenset(
    {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".h5", ".msgpack", ".npy", ".npz", ".onnx", ".pb"}
)
#: Absolute paths of POSIX and Windows systems; of a URL the slash follows a colon or a letter.
_ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/>*-])/(?:home|root|Users|opt|mnt|media|srv|data|scratch|work|workspace|tmp|var|private)/[\w.]"
    r"|(?<!\w)[A-Za-z]:\\+[\w.]|file:///"
)
_TEXT_SUFFIXES = frozenset({".json", ".md", ".txt", ".csv", ".py", ""})

#: Times that a request is repeated which the Hub refused for their number (429), and the most seconds between two.
_RETRIES, _LONGEST_WAIT = 5, 300

#: What a Space is made of, beside README.md and requirements.txt.
_SPACE_FOLDERS = ("boneage_hf", "benchmarks")
_SPACE_SUFFIXES = frozenset({".py", ".md", ".csv", ".json", ".typed", ".safetensors", ""})
SPACE_MODEL_FILE = "space_model.txt"

Visibility = Literal["private", "public", "new public", "new private"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Publication:
    """What was published, or with `revision` None would be. `files`: name in the repository and size in bytes;
    `still_private`: nobody asked for a private one, but it was there and private."""

    kind: Kind
    repo_id: str
    files: tuple[tuple[str, int], ...]
    revision: str | None = None
    private: bool | None = None
    still_private: bool = False

    def __str__(self) -> str:
        lines = [f"{size:>12,}  {name}" for name, size in self.files]
        lines.append(f"{sum(size for _, size in self.files):>12,}  bytes in {len(self.files)} files")
        if self.revision is None:
            return "\n".join([*lines, f"dry run: nothing was sent to the {self.kind} {self.repo_id}"])
        seen = "private" if self.private else "public"
        told = [f"{self.kind} {self.repo_id} ({seen}): {len(self.files)} files", f"revision {self.revision}"]
        if self.still_private:
            told.append("The repository was private before and still is: its settings on the Hub make it public.")
        return "\n".join(told)


def push_model(
    checkpoint: str | Path,
    repo_id: str,
    *,
    metrics_file: Path | None = None,
    private: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    message: str | None = None,
    visible: Visibility | None = None,
) -> Publication:
    """Publish a checkpoint: weights, settings, the code that travels, its licence, its `metrics.json`, and the card.

    Args:
        checkpoint: folder, `"default"` or Hub id.
        repo_id: `OWNER/NAME`; made if it is not there.
        metrics_file: of `boneage evaluate` for these weights; by default the `metrics.json` beside them.
        private: whether a new repository stays private. An existing one keeps its visibility, but a public one is
            refused if `private` is asked for.
        dry_run: send nothing, only say what would be sent.
        revision: branch to commit to, made if it is not there; by default main.
        message: of the commit.
        visible: as of [`publish`]; instead of `private`.

    Raises:
        InputError: the checkpoint has no measured results or no provenance, holds weights in another format than
            safetensors or an absolute path, or the Hub refuses.
    """
    check_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="boneage-push-") as folder:
        staged = Path(folder) / "model"
        stage_model(checkpoint, staged, name=repo_id, metrics_file=metrics_file)
        return publish(
            staged,
            repo_id,
            kind="model",
            visible=visible or ("private" if private else "new public"),
            dry_run=dry_run,
            revision=revision,
            message=message or "Upload a boneage-hf checkpoint",
            replaced=("*.py", "*.safetensors"),
        )


def stage_model(checkpoint: str | Path, folder: Path, *, name: str, metrics_file: Path | None) -> None:
    """Lay out in `folder`, which is made, what a model repository holds; arguments and errors of [`push_model`]."""
    source = checkpoint_folder(checkpoint)
    foreign = sorted(path.suffix for path in source.rglob("*") if path.suffix.lower() in _NOT_SAFETENSORS)
    if foreign:
        raise InputError(
            f"The checkpoint folder holds a {foreign[0]} file; only safetensors is published: take it out."
        )
    pipe = load_pipeline(source, device="cpu")
    _check_provenance(pipe.model.config)
    measured = metrics_file or source / "metrics.json"
    if not measured.is_file():
        raise InputError(
            "This checkpoint has no measured results: run `boneage evaluate CHECKPOINT DATASET --split test --out DIR`"
            " and give --metrics DIR/metrics.json."
        )
    save_checkpoint(pipe.model, pipe.image_processor, folder, dtype=storage_dtype(pipe.model), with_code=True)
    if (source / "LICENSE").is_file() and not trained_on_rsna(pipe.model.config):
        shutil.copyfile(source / "LICENSE", folder / "LICENSE")
    write_text(folder / "README.md", render_card(str(folder), name=name, metrics_file=measured))
    shutil.copyfile(measured, folder / "metrics.json")
    check_files(folder)


def _check_provenance(config: BoneAgeConfig) -> None:
    provenance = config.provenance or {}
    if "initial_weights" not in provenance or not ({"data", "train_fingerprint"} & set(provenance)):
        raise InputError(
            "This checkpoint does not say where it comes from (provenance in its config: initial weights and training "
            "data): publish one that `boneage train` wrote."
        )


def push_dataset(
    prepared: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    accept_terms: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> Publication:
    """Publish a prepared data set: its parquet files, its manifest, and its card with the name it gets.

    Args:
        prepared: folder written by `boneage prepare`, or Hub id.
        repo_id: `OWNER/NAME`; made, private, if it is not there.
        public: let everyone see it. Of drawn hands anyone may; radiographs have terms, which must be accepted.
        accept_terms: the terms that [`boneage_hf.data_card.PUBLICATION_TERMS`] states are met.

    Others as of [`push_model`].

    Raises:
        InputError: the folder holds no whole prepared data set, its terms were not accepted, the repository is public
            and `public` was not asked for, or the Hub refuses.
    """
    check_id(repo_id)
    manifest = read_manifest(prepared)
    source = local_folder(prepared)
    check_whole(source, manifest)
    terms = publication_terms(prepared)
    if public and terms is not None and not accept_terms:
        raise InputError(f"{terms} If that is met, add --accept-terms; else leave out --public.")
    with tempfile.TemporaryDirectory(prefix="boneage-push-") as folder:
        staged = Path(folder)
        (staged / "data").mkdir()
        for name in manifest["files"]:
            (staged / name).symlink_to((source / name).resolve())
        shutil.copyfile(source / "prepared.json", staged / "prepared.json")
        write_text(staged / "README.md", render(manifest, features=FEATURES, name=repo_id))
        check_files(staged)
        return publish(
            staged,
            repo_id,
            kind="dataset",
            visible="public" if public else "private",
            dry_run=dry_run,
            revision=revision,
            message=message or "Upload a prepared bone-age data set",
            replaced=("data/*",),
        )


def publication_terms(prepared: str | Path) -> str | None:
    """What must be met before everyone may see a prepared data set, in a sentence; None of drawn hands."""
    return PUBLICATION_TERMS.get(read_manifest(prepared)["kind"])


def push_space(
    repo_id: str,
    *,
    model: str,
    private: bool = False,
    dry_run: bool = False,
    message: str | None = None,
) -> Publication:
    """Publish the Space: page, package, benchmarks, requirements and README with the metadata of a Gradio Space.

    Args:
        repo_id: `OWNER/NAME`; made if it is not there.
        model: Hub id (its revision, or the commit that its main branch has now, is pinned), or `"inside"`: the
            checkpoint of the package lies in the Space.

    Others as of [`push_model`].

    Raises:
        InputError: the model is none of ours, a part of the installation is missing, or the Hub refuses.
    """
    check_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="boneage-push-") as folder:
        staged = Path(folder)
        stage_space(staged, name=repo_id, model=model)
        return publish(
            staged,
            repo_id,
            kind="space",
            visible="private" if private else "new public",
            dry_run=dry_run,
            revision=None,
            message=message or "Upload the bone-age Space",
            replaced=(*(f"{name}/*" for name in _SPACE_FOLDERS), SPACE_MODEL_FILE),
        )


def stage_space(folder: Path, *, name: str, model: str) -> None:
    """Lay out in `folder` what a Space repository holds; arguments and errors of [`push_space`]."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "space_app.py").is_file() or not (root / "benchmarks").is_dir():
        raise InputError(
            "space_app.py and benchmarks are not installed beside the package; install the project again."
        )
    inside = model == "inside"
    if inside and not (DEFAULT_CHECKPOINT / WEIGHTS_FILE).is_file():
        raise InputError("This installation has no packaged checkpoint: name a Hub id with --model.")
    pinned = None
    if not inside:
        commit = checkpoint_folder(model, files=SETTINGS_FILES)
        if not (commit.parent.name == "snapshots"):
            raise InputError("--model takes a Hub id, so that the Space can load it, or the word inside.")
        pinned = f"{split_id(model)[0]}@{commit.name}"
        write_text(folder / SPACE_MODEL_FILE, pinned + "\n")
    shutil.copyfile(root / "space_app.py", folder / "space_app.py")
    for part in _SPACE_FOLDERS:
        for path in sorted((root / part).rglob("*")):
            if path.is_file() and _in_space(path.relative_to(root), with_weights=inside):
                target = folder / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    write_text(folder / "requirements.txt", _requirements())
    write_text(folder / "README.md", _space_readme(name, pinned=pinned))
    check_files(folder)


def _in_space(path: Path, *, with_weights: bool) -> bool:
    if any(part.startswith((".", "__pycache__")) for part in path.parts) or path.suffix not in _SPACE_SUFFIXES:
        return False
    if path.parts[:2] == ("boneage_hf", "checkpoints"):
        return path.parts[2] == "default" and (with_weights or path.name == WEIGHTS_LICENCE.name)
    return True


def _requirements() -> str:
    """What the package needs, with its extra `dicom`; CPU builds of PyTorch, which are a fifth of the size."""
    try:
        declared = importlib.metadata.requires("boneage-hf") or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError("boneage-hf is not installed, so its requirements are not known: install it first.") from None
    lines = sorted(line.partition(";")[0].strip() for line in declared if "extra ==" not in line or "dicom" in line)
    return "\n".join(["--extra-index-url https://download.pytorch.org/whl/cpu", *lines]) + "\n"


def _space_readme(name: str, *, pinned: str | None) -> str:
    data = SpaceCardData(
        title="Bone age from a hand radiograph",
        sdk="gradio",
        sdk_version=importlib.metadata.version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="space_app.py",
        license="other",
        license_name="apache-2.0-code-and-rsna-research-weights",
        license_link="boneage_hf/checkpoints/default/LICENSE",
        models=None if pinned is None else [pinned.partition("@")[0]],
        tags=["bone-age", "radiograph", "medical", "boneage-hf"],
        pinned=False,
        short_description="Bone age in months. Research use only.",
    )
    source = "the checkpoint in `boneage_hf/checkpoints/default`" if pinned is None else f"`{pinned}`"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# Bone age from a hand radiograph\n\n"
        "Drop a child's hand radiograph (PNG, JPEG, TIFF or DICOM), choose the sex, read the bone age in months. "
        "**Research use only, not a medical device.** Nothing that is uploaded is kept.\n\n"
        f"The model is {source}. The code is Apache-2.0; weights trained on RSNA images are for research, "
        "non-commercial use (`boneage_hf/checkpoints/default/LICENSE`). On your own machine, in a folder with its "
        f"files (`{name}`):\n\n```bash\npip install -r requirements.txt\npython space_app.py\n```\n"
    )


# --- checked, then sent ---------------------------------------------------------------------------------------------


def check_files(folder: Path) -> None:
    """Refuse a folder with an absolute path in one of its texts, or with weights that are not safetensors.

    Raises:
        InputError: with the name of the file in the repository.
    """
    for name, path in _files(folder):
        if path.suffix.lower() in _NOT_SAFETENSORS:
            raise InputError(f"{name} is not safetensors; nothing else is published: leave it out.")
        if path.suffix.lower() not in _TEXT_SUFFIXES:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        held = path.suffix == ".json" and any(map(_is_absolute, _strings(json.loads(text))))
        # Code names fixed places of systems; what a user's machine puts into a file is in data.
        if held or (path.suffix != ".py" and _ABSOLUTE_PATH.search(text)):
            raise InputError(f"{name} holds an absolute path, which says something of a machine: take it out first.")


def _files(folder: Path) -> list[tuple[str, Path]]:
    return [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file()]


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value)


def _is_absolute(text: str) -> bool:
    posix = text.startswith("/") and len(PurePosixPath(text).parts) > 1
    return posix or re.match(r"[A-Za-z]:[\\/]|\\\\|~[\\/]|file:", text) is not None


def check_access(repo_id: str) -> None:
    """Refuse early, before hours of work, what could not be published to.

    Raises:
        InputError: a name that is none, no token, one that the Hub does not know, or one that may only read.
    """
    check_id(repo_id)
    with hub_sentences(repo_id, "model", writing=True), with_timeout():
        account = _patiently(lambda: HfApi().whoami())
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError("Your token may only read from the Hub: use one that may write.")


def publish(
    folder: Path,
    repo_id: str,
    *,
    kind: Kind,
    visible: Visibility,
    dry_run: bool,
    revision: str | None,
    message: str,
    replaced: Sequence[str],
) -> Publication:
    """Send a folder as one commit.

    A new repository is made private and, if it is not to stay so, made public after the commit: a failure leaves an
    empty private repository at most.

    Args:
        visible: "private" (a public repository is refused), "public" (a private one is made public), or what a new
            one is to be, where one that is there keeps its own: "new public" or "new private".
        replaced: patterns of files that go if they are not in the folder, so that no older code or shard is left.

    Raises:
        InputError: the repository is public and `visible` is "private", or the Hub refuses.
    """
    files = _files(folder)
    listed = tuple((name, path.stat().st_size) for name, path in files)
    if dry_run:
        return Publication(kind, repo_id, listed)
    api, branch = HfApi(), revision or "main"
    bars = nullcontext() if sys.stderr.isatty() else no_bars()
    with hub_sentences(repo_id, kind, revision=revision, writing=True), with_timeout(), bars:
        private = _private(api, repo_id, kind)
        if private is False and visible == "private":
            raise InputError(
                f"{repo_id} is public: name another repository, or make it private in its settings on the Hub first."
            )
        new = private is None
        if new:
            sdk = "gradio" if kind == "space" else None
            _patiently(lambda: api.create_repo(repo_id, repo_type=kind, private=True, space_sdk=sdk))
        if revision is not None:
            _patiently(lambda: api.create_branch(repo_id, branch=branch, repo_type=kind, exist_ok=True))
        additions = [CommitOperationAdd(name, path) for name, path in files]
        # Uploaded before the commit: only requests that the library does not repeat itself are repeated here.
        api.preupload_lfs_files(repo_id, additions, repo_type=kind, revision=branch, free_memory=False)
        names = {name for name, _ in files}
        old = [
            name
            for name in api.list_repo_files(repo_id, repo_type=kind, revision=branch)
            if name not in names and any(fnmatch.fnmatch(name, pattern) for pattern in replaced)
        ]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions]
        operations += [CommitOperationDelete(name, is_folder=False) for name in old]
        done = _patiently(
            lambda: api.create_commit(repo_id, operations, commit_message=message, repo_type=kind, revision=branch)
        )
        show = visible == "public" or (new and visible == "new public")
        if show and private is not False:
            _make_public(api, repo_id, kind)
    return Publication(
        kind,
        repo_id,
        listed,
        revision=done.oid,
        private=not show and private is not False,
        still_private=bool(private) and visible == "new public",
    )


def _private(api: HfApi, repo_id: str, kind: Kind) -> bool | None:
    """Whether a repository is private; None if there is none."""
    try:
        return bool(_patiently(lambda: api.repo_info(repo_id, repo_type=kind)).private)
    except RepositoryNotFoundError as error:
        if status_of(error) == 401:
            raise
        return None


def _make_public(api: HfApi, repo_id: str, kind: Kind) -> None:
    try:
        _patiently(lambda: api.update_repo_settings(repo_id, repo_type=kind, private=False))
    except (OSError, HfHubHTTPError):
        raise InputError(
            f"{repo_id} is on the Hub and whole, but still private: make it public in its settings, or push it again."
        ) from None


def _patiently(call: Callable[[], Result]) -> Result:
    """Call again, after the time that the Hub asks for, as long as it answers that there were too many requests."""
    for _ in range(_RETRIES):
        try:
            return call()
        except HfHubHTTPError as error:
            if status_of(error) != 429:
                raise
            asked = error.response.headers.get("Retry-After", "")
            time.sleep(min(int(asked) if asked.isdecimal() else 10, _LONGEST_WAIT))
    return call()
