"""Checkpoint folders: written whole, loaded only if whole, and at home where this package is not installed."""

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
import transformers
from make_tiny_checkpoint import CHECKPOINT, GOLDEN, tiny_config, tiny_model, tiny_processor
from pydicom.dataset import FileDataset, FileMetaDataset
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import boneage_hf
from boneage_hf import (
    BoneAgeConfig,
    BoneAgeImageProcessor,
    BoneAgeModel,
    BoneAgePipeline,
    InputError,
    hub,
    load_pipeline,
    radiograph,
)
from boneage_hf.hub import (
    WEIGHTS_LICENCE,
    checkpoint_revision,
    fits_float16,
    resolve_checkpoint,
    save_checkpoint,
    storage_tensors,
    trained_on_rsna,
)
from boneage_hf.registration import TASK

PACKAGE = Path(boneage_hf.__file__).parent
WEIGHTS = "model.safetensors"
PLAIN_FILES = {"config.json", WEIGHTS, "preprocessor_config.json"}
#: The modules of the four classes that transformers looks for in a checkpoint.
ENTRANCES = ("configuration_boneage", "image_processing_boneage", "modeling_boneage", "pipeline_boneage")
HAND = GOLDEN / "hand.png"
CPU = torch.device("cpu")
transformers_pipeline: Any = transformers.pipeline  # typed for the tasks of transformers only


def relative_imports(file: Path) -> set[str]:
    """Siblings that a module imports, by its syntax tree."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add(node.module or "")
    return found


def travelling_modules() -> set[str]:
    waiting: set[str] = set(ENTRANCES)
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        found.add(module)
        waiting |= relative_imports(PACKAGE / f"{module}.py") - found
    return found


@pytest.fixture(scope="module")
def with_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "with-code"
    save_checkpoint(tiny_model(), tiny_processor(), folder, with_code=True)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- written --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_code_has_three_files_and_no_word_about_code(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tiny_processor(), tmp_path / "plain")
    assert {file.name for file in (tmp_path / "plain").iterdir()} == PLAIN_FILES
    for name in ("config.json", "preprocessor_config.json"):
        settings = json.loads((tmp_path / "plain" / name).read_text())
        assert not {"auto_map", "custom_pipelines"} & set(settings)


def test_a_checkpoint_with_code_carries_all_travelling_files_and_no_other(with_code: Path) -> None:
    expected = PLAIN_FILES | {f"{module}.py" for module in travelling_modules()}
    assert {file.name for file in with_code.iterdir()} == expected
    assert {"errors.py", "sex.py", "radiograph.py", "backbones_boneage.py"} <= expected


def test_travelling_files_are_copies(with_code: Path) -> None:
    for file in with_code.glob("*.py"):
        assert file.read_bytes() == (PACKAGE / file.name).read_bytes()


def test_no_travelling_file_imports_the_package_by_its_name(with_code: Path) -> None:
    for file in with_code.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            assert not [name for name in names if name.split(".")[0] == "boneage_hf"], file.name


def test_transformers_finds_by_its_pattern_the_imports_that_there_are(with_code: Path) -> None:
    # It searches the text line by line: a docstring line that looks like an import would break loading.
    for file in with_code.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        by_pattern = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE))
        by_pattern |= set(re.findall(r"^\s*import\s+\.(\S+)\s*$", text, flags=re.MULTILINE))
        assert by_pattern == relative_imports(file), file.name


def test_the_config_of_a_checkpoint_with_code_names_every_class(with_code: Path) -> None:
    config = json.loads((with_code / "config.json").read_text())
    processor = json.loads((with_code / "preprocessor_config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_boneage.BoneAgeConfig",
        "AutoModel": "modeling_boneage.BoneAgeModel",
    }
    assert processor["auto_map"] == {"AutoImageProcessor": "image_processing_boneage.BoneAgeImageProcessor"}
    assert config["custom_pipelines"]["bone-age"]["impl"] == "pipeline_boneage.BoneAgePipeline"


def test_saving_with_code_leaves_no_trace_in_the_next_checkpoint(tmp_path: Path) -> None:
    model, processor = tiny_model(), tiny_processor()
    save_checkpoint(model, processor, tmp_path / "first", with_code=True)
    save_checkpoint(model, processor, tmp_path / "second")
    for name in PLAIN_FILES:
        saved, known = ((folder / name).read_bytes() for folder in (tmp_path / "second", CHECKPOINT))
        if name == "config.json":  # which version saved it is no trace of the first
            saved, known = (re.sub(rb'"transformers_version": "[0-9.]+"', b"", text) for text in (saved, known))
        assert saved == known


def test_the_ordinary_save_of_a_pipeline_writes_code_and_names_every_class(with_code: Path, tmp_path: Path) -> None:
    load_pipeline(CHECKPOINT).save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {path.name for path in with_code.iterdir()}
    own, other = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "saved", with_code))
    assert own["auto_map"] == other["auto_map"]
    assert own["custom_pipelines"] == other["custom_pipelines"]


def test_a_save_without_code_does_not_change_the_ordinary_save(tmp_path: Path) -> None:
    model, processor = tiny_model(), tiny_processor()
    save_checkpoint(model, processor, tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert "auto_map" in json.loads((tmp_path / "second" / "config.json").read_text())


def test_weights_trained_on_rsna_images_get_their_licence(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.provenance = {"data": {"kind": "rsna"}}
    for _ in range(2):  # a second save keeps it
        save_checkpoint(model, tiny_processor(), tmp_path / "checkpoint")
        assert (tmp_path / "checkpoint" / "LICENSE").read_bytes() == WEIGHTS_LICENCE.read_bytes()


def test_weights_fine_tuned_from_rsna_weights_count_as_trained_on_them() -> None:
    config = tiny_model().config
    config.provenance = {"data": {"kind": "own"}, "initial_weights": {"provenance": {"data": {"kind": "rsna"}}}}
    assert trained_on_rsna(config)
    config.provenance = {"data": {"kind": "own"}, "initial_weights": {"source": "random"}}
    assert not trained_on_rsna(config)


def test_weights_taught_by_rsna_weights_count_as_trained_on_them() -> None:
    config = tiny_model().config
    config.provenance = {"data": {"kind": "own"}, "teacher": {"provenance": {"data": {"kind": "rsna"}}}}
    assert trained_on_rsna(config)


def test_a_model_that_came_with_code_can_be_saved_without(with_code: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(with_code)
    save_checkpoint(pipe.model, pipe.image_processor, tmp_path / "plain")
    assert {file.name for file in (tmp_path / "plain").iterdir()} == PLAIN_FILES
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "plain" / "preprocessor_config.json").read_text())


def test_an_older_checkpoint_is_replaced_with_all_its_files(checkpoint: Path) -> None:
    (checkpoint / "old.py").write_text("")
    edit_json(checkpoint / "config.json", image_size=128)
    save_checkpoint(tiny_model(), tiny_processor(), checkpoint)
    assert {file.name for file in checkpoint.iterdir()} == PLAIN_FILES
    assert load_pipeline(checkpoint).model.config.image_size == 64
    assert [entry.name for entry in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_save_that_fails_leaves_the_older_checkpoint_and_nothing_else(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    monkeypatch.setattr(BoneAgeImageProcessor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tiny_model(), tiny_processor(), checkpoint)
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    assert [entry.name for entry in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="name another folder"):
        save_checkpoint(tiny_model(), tiny_processor(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_may_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    save_checkpoint(tiny_model(), tiny_processor(), tmp_path / "new")
    assert load_pipeline(tmp_path / "new").model.config.backbone == "tiny"


def test_folders_above_the_checkpoint_are_made(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tiny_processor(), tmp_path / "run" / "best")
    assert (tmp_path / "run" / "best" / WEIGHTS).is_file()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_whoever_may_read_the_config_may_read_the_weights(with_code: Path) -> None:
    modes = {stat.S_IMODE((with_code / name).stat().st_mode) for name in PLAIN_FILES}
    assert len(modes) == 1


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_checkpoint(model, tiny_processor(), tmp_path / "checkpoint")
    after = model.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


def test_a_variance_beyond_float16_is_kept(tmp_path: Path) -> None:
    model = tiny_model()
    model.state_dict()["feature_norm.running_var"].fill_(1e6)
    save_checkpoint(model, tiny_processor(), tmp_path / "checkpoint")
    assert load_file(tmp_path / "checkpoint" / WEIGHTS)["feature_norm.running_var"].unique().tolist() == [1e6]


def test_weights_beyond_float16_are_refused_with_the_cure() -> None:
    model = tiny_model()
    torch.nn.init.constant_(model.head.output.bias, 1e6)
    with pytest.raises(InputError, match=r"head\.output\.bias.*dtype=torch\.float32"):
        storage_tensors(model)
    assert float(storage_tensors(model, torch.float32)["head.output.bias"]) == 1e6
    assert not fits_float16(model)
    assert fits_float16(tiny_model())


@pytest.mark.parametrize("name", ["head.output.bias", "feature_norm.running_mean"])
def test_a_model_with_nan_is_not_saved(name: str, tmp_path: Path) -> None:
    model = tiny_model()
    model.state_dict()[name].fill_(float("nan"))
    with pytest.raises(InputError, match="NaN"):
        save_checkpoint(model, tiny_processor(), tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


# --- loaded ---------------------------------------------------------------------------------------------------------


def refusal_of(checkpoint: str | Path) -> str:
    """The sentence with which a checkpoint is refused; fails if it is more than that."""
    with pytest.raises(InputError) as refusal:
        load_pipeline(checkpoint)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert len(sentence) < 400
    assert sentence.endswith(".")
    return sentence


def test_a_checkpoint_folder_gives_a_pipeline_that_is_ready() -> None:
    pipe = load_pipeline(CHECKPOINT, device=CPU)
    assert isinstance(pipe, BoneAgePipeline)
    assert not pipe.model.training
    assert pipe.model.dtype == torch.float32
    assert pipe.image_processor.size == {"height": 64, "width": 64}
    assert load_pipeline(str(CHECKPOINT), device=CPU)(HAND, sex="female")["bone_age_months"] > 0


def test_transformers_own_function_gives_the_same_pipeline() -> None:
    theirs = transformers_pipeline(TASK, model=str(CHECKPOINT), device=CPU)(HAND, sex="male")
    ours = load_pipeline(CHECKPOINT, device=CPU)(HAND, sex="male")
    assert theirs["bone_age_months"] == ours["bone_age_months"]
    assert np.array_equal(theirs["attention"], ours["attention"])


def test_the_packages_own_code_is_used_and_not_the_code_beside_the_weights(with_code: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(with_code, tmp_path / "hostile"))
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('code of a checkpoint was run')\n")
    pipe = load_pipeline(folder)
    assert type(pipe) is BoneAgePipeline
    assert type(pipe.model) is BoneAgeModel
    assert type(pipe.model.config) is BoneAgeConfig


def test_the_packaged_checkpoint_is_meant_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "DEFAULT_CHECKPOINT", CHECKPOINT)
    assert resolve_checkpoint("default") == str(CHECKPOINT)
    assert load_pipeline().model.config.backbone == "tiny"


def test_a_missing_packaged_checkpoint_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "DEFAULT_CHECKPOINT", tmp_path)
    assert "no packaged checkpoint" in refusal_of("default")


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "../a/b/c", "", "https://example.org/model"])
def test_a_path_without_a_checkpoint_is_one_sentence(path: str) -> None:
    assert "name a folder" in refusal_of(path)


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    assert "config.json" in refusal_of(tmp_path)


@pytest.mark.parametrize("hub_id", ["nobody/no-such-model", "nobody/no-such-model@main"])
def test_a_hub_id_that_cannot_be_reached_is_one_sentence(hub_id: str) -> None:
    sentence = refusal_of(hub_id)
    assert "nobody/no-such-model" in sentence
    assert "connection" in sentence


@pytest.mark.parametrize("name", ["no-such-model", "not a hub id", "a/b@"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_one_sentence(name: str) -> None:
    assert "neither a checkpoint folder nor a Hub id" in refusal_of(name)


def test_a_checkpoint_of_another_architecture_is_named(tmp_path: Path) -> None:
    for name in PLAIN_FILES - {"config.json"}:
        shutil.copy(CHECKPOINT / name, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "vit model" in refusal_of(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model_type": "no-such-type"}', "\x00\x01", '{"model_type": 3}'], ids=repr
)
def test_a_config_that_is_none_is_one_sentence(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    refusal_of(checkpoint)


@pytest.mark.parametrize(
    "change",
    [{"image_size": "64"}, {"image_size": 3}, {"backbone": "resnet50"}, {"imagesize": 64}, {"dtype": "float99"}],
    ids=str,
)
def test_a_config_with_a_wrong_field_is_one_sentence(checkpoint: Path, change: dict[str, Any]) -> None:
    edit_json(checkpoint / "config.json", **change)
    refusal_of(checkpoint)


@pytest.mark.parametrize("name", [WEIGHTS, "preprocessor_config.json"])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    assert name in refusal_of(checkpoint)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff" * len(data),
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["empty", "truncated", "garbage", "lfs pointer"],
)
def test_damaged_weights_are_one_sentence(checkpoint: Path, damage: Callable[[bytes], bytes]) -> None:
    (checkpoint / WEIGHTS).write_bytes(damage((checkpoint / WEIGHTS).read_bytes()))
    assert "damaged or truncated" in refusal_of(checkpoint)


def test_missing_weights_are_not_drawn_at_random(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    del tensors["attention.local.weight"]
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    assert "attention.local.weight" in refusal_of(checkpoint)


def test_weights_of_another_network_are_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", head_size=64)
    assert "of another shape" in refusal_of(checkpoint)
    edit_json(checkpoint / "config.json", head_size=32, sex_input="none")
    assert "head.sex_embedding.weight" in refusal_of(checkpoint)


def test_pickled_weights_are_not_read(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / WEIGHTS), checkpoint / "pytorch_model.bin")
    (checkpoint / WEIGHTS).unlink()
    assert WEIGHTS in refusal_of(checkpoint)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"image_processor_type": "ViTImageProcessor"}',
        '{"image_processor_type": "BoneAgeImageProcessor", "x": 1}',
    ],
)
def test_a_wrong_processor_config_is_one_sentence(checkpoint: Path, text: str) -> None:
    (checkpoint / "preprocessor_config.json").write_text(text)
    refusal_of(checkpoint)


def test_a_processor_and_a_model_of_different_sizes_are_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "preprocessor_config.json", size={"height": 96, "width": 64})
    assert "96 x 64" in refusal_of(checkpoint)


# --- named by its weights -------------------------------------------------------------------------------------------


def test_equal_weights_have_equal_revisions_wherever_they_lie(with_code: Path) -> None:
    revision = checkpoint_revision(load_pipeline(CHECKPOINT))
    assert re.fullmatch("[0-9a-f]{12}", revision)
    assert checkpoint_revision(load_pipeline(with_code)) == revision


@pytest.mark.parametrize("change", ["age mean", "processor"])
def test_a_setting_that_moves_predictions_changes_the_revision(change: str) -> None:
    pipe = load_pipeline(CHECKPOINT, device=CPU)
    before = checkpoint_revision(pipe)
    if change == "age mean":
        pipe.model.config.age_mean_months += 1.0
    else:
        pipe.image_processor.stretch_percentiles = None
    assert checkpoint_revision(pipe) != before


def test_provenance_does_not_change_the_revision() -> None:
    pipe = load_pipeline(CHECKPOINT, device=CPU)
    before = checkpoint_revision(pipe)
    pipe.model.config.provenance = {"note": "another"}
    assert checkpoint_revision(pipe) == before


def test_one_changed_value_changes_the_revision() -> None:
    pipe = load_pipeline(CHECKPOINT)
    before = checkpoint_revision(pipe)
    with torch.no_grad():
        pipe.model.head.output.bias.add_(1e-3)
    assert checkpoint_revision(pipe) != before


# --- where the package is not installed -----------------------------------------------------------------------------

TRAVELLER = '''
"""Runs where boneage_hf cannot be imported: argv is checkpoint, PNG, DICOM, picture of which the answer is asked."""
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    blocked = {"boneage_hf", "pydicom"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ImportError("No module named " + repr(name))

sys.meta_path.insert(0, Blocker())
try:
    import boneage_hf
except ImportError:
    pass
else:
    raise SystemExit("boneage_hf is there")

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

checkpoint, png, dicom = sys.argv[1:]
report = {}

def keep(name, answer):
    report[name] = {"months": answer["bone_age_months"].hex(), "attention": answer["attention"].tobytes().hex()}

pipe = pipeline("bone-age", model=checkpoint, trust_remote_code=True, device="cpu")
keep("path", pipe(png, sex="female"))
keep("bytes", pipe(open(png, "rb").read(), sex="female"))
keep("flipped", pipe(png, sex="female", flip_average=True))
for name, source, options in (
    ("no pydicom", dicom, {"sex": "female"}),
    ("no sex", png, {}),
    ("url", "https://example.org/hand.png", {"sex": "male"}),
):
    try:
        pipe(source, **options)
    except ValueError as error:
        report[name] = [type(error).__name__, str(error)]
Blocker.blocked = {"boneage_hf"}
keep("dicom", pipe(dicom, sex="female"))

config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=True)
model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
image = sys.modules[type(pipe).__module__].read(png).image
with torch.no_grad():
    output = model(**processor(image, return_tensors="pt"), sex=torch.tensor([0]))
keep("auto", {"bone_age_months": float(output.bone_age_months[0]), "attention": output.attention[0].numpy()})
report["provenance"] = config.provenance
report["modules"] = sorted({type(thing).__module__ for thing in (pipe, config, processor, model)})
report["dtypes"] = sorted({str(value.dtype) for value in model.parameters()})
report["leaked"] = sorted(name for name in sys.modules if name.partition(".")[0] == "boneage_hf")
print(json.dumps(report))
'''


def run_fresh(script: str, *arguments: str, folder: Path) -> Any:
    """Run a script in a process of its own that knows nothing of this one; its last line is JSON."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    environment |= {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    (folder / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-I", str(folder / "script.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def write_dicom(path: Path, grey: np.ndarray) -> None:
    """An uncompressed 8-bit MONOCHROME2 file without a person."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=["hand"])
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = grey.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.PixelData = grey.tobytes()
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def travelled(with_code: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(HAND, folder / "hand.png")
    write_dicom(folder / "hand", np.asarray(radiograph.read(HAND).image))
    found: dict[str, Any] = run_fresh(TRAVELLER, str(with_code), "hand.png", "hand", folder=folder)
    return found


@pytest.fixture(scope="module")
def at_home(with_code: Path) -> dict[str, dict[str, str]]:
    pipe = load_pipeline(with_code, device=CPU)
    answers = {
        "plain": pipe(HAND, sex="female"),
        "flipped": pipe(HAND, sex="female", flip_average=True),
    }
    return {
        name: {"months": answer["bone_age_months"].hex(), "attention": answer["attention"].tobytes().hex()}
        for name, answer in answers.items()
    }


@pytest.mark.slow
def test_elsewhere_the_package_was_not_there(travelled: dict[str, Any]) -> None:
    assert travelled["leaked"] == []
    assert all(module.startswith("transformers_modules.") for module in travelled["modules"])
    assert len(travelled["modules"]) == 4


@pytest.mark.slow
def test_what_the_ordinary_save_wrote_answers_the_same_elsewhere(
    tmp_path: Path, at_home: dict[str, dict[str, str]]
) -> None:
    load_pipeline(CHECKPOINT, device=CPU).save_pretrained(tmp_path / "saved")
    shutil.copy(HAND, tmp_path / "hand.png")
    write_dicom(tmp_path / "hand", np.asarray(radiograph.read(HAND).image))
    found = run_fresh(TRAVELLER, str(tmp_path / "saved"), "hand.png", "hand", folder=tmp_path)
    assert found["leaked"] == []
    assert found["path"] == at_home["plain"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["path", "bytes", "dicom", "auto"])
def test_elsewhere_the_answer_is_bit_identical(
    travelled: dict[str, Any], at_home: dict[str, dict[str, str]], source: str
) -> None:
    assert travelled[source] == at_home["plain"]


@pytest.mark.slow
def test_elsewhere_the_average_of_both_views_is_bit_identical(
    travelled: dict[str, Any], at_home: dict[str, dict[str, str]]
) -> None:
    assert travelled["flipped"] == at_home["flipped"]
    assert travelled["flipped"] != travelled["path"]


@pytest.mark.slow
def test_elsewhere_dicom_is_the_only_thing_that_needs_pydicom(travelled: dict[str, Any]) -> None:
    kind, sentence = travelled["no pydicom"]
    assert kind == "InputError"
    assert "pydicom" in sentence


@pytest.mark.slow
def test_elsewhere_mistakes_are_refused_in_the_same_words(travelled: dict[str, Any]) -> None:
    assert travelled["no sex"][0] == travelled["url"][0] == "InputError"
    assert "needs the child's sex" in travelled["no sex"][1]
    assert "URL" in travelled["url"][1]


@pytest.mark.slow
def test_elsewhere_the_weights_are_float32_and_their_provenance_is_told(travelled: dict[str, Any]) -> None:
    assert travelled["dtypes"] == ["torch.float32"]
    assert travelled["provenance"] == tiny_config().provenance


AT_HOME = """
import json, sys
sys.path.insert(0, sys.argv[1])
import boneage_hf
report = {"torch with the package": "torch" in sys.modules}
boneage_hf.BoneAgeModel
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline
things = [cls.from_pretrained(sys.argv[2]) for cls in (AutoConfig, AutoImageProcessor, AutoModel)]
things.append(pipeline("bone-age", model=sys.argv[2], device="cpu"))
report["classes"] = [type(thing).__name__ for thing in things]
report["months"] = things[-1](sys.argv[3], sex="male")["bone_age_months"]
print(json.dumps(report))
"""


@pytest.mark.slow
def test_using_one_class_of_the_package_makes_all_auto_classes_know_it(tmp_path: Path) -> None:
    report = run_fresh(AT_HOME, str(PACKAGE.parent), str(CHECKPOINT), str(HAND), folder=tmp_path)
    assert report["classes"] == ["BoneAgeConfig", "BoneAgeImageProcessor", "BoneAgeModel", "BoneAgePipeline"]
    assert report["months"] == load_pipeline(CHECKPOINT, device=CPU)(HAND, sex="male")["bone_age_months"]
    assert report["torch with the package"] is False


def test_code_may_be_trusted_where_the_package_is_installed_too(with_code: Path) -> None:
    theirs = transformers_pipeline(TASK, model=str(with_code), trust_remote_code=True, device=CPU)(HAND, sex="female")
    ours = load_pipeline(with_code, device=CPU)(HAND, sex="female")
    assert theirs["bone_age_months"] == ours["bone_age_months"]


def test_without_trust_the_auto_class_takes_the_packages_own_model(with_code: Path) -> None:
    assert type(AutoModel.from_pretrained(with_code)) is BoneAgeModel
