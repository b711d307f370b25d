"""Models, data sets and Spaces pushed to a Hub and read back; and what happens when something is in the way."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from drawn import dicom
from hub_server import READ_ONLY, READ_WRITE, HubServer
from make_tiny_checkpoint import CHECKPOINT, GOLDEN

from boneage_hf import hub_access, radiograph
from boneage_hf.cli import main
from boneage_hf.errors import InputError
from boneage_hf.evaluation import evaluate_checkpoint
from boneage_hf.hub import DEFAULT_CHECKPOINT, checkpoint_revision, load_pipeline
from boneage_hf.publishing import check_files, push_model

HAND = GOLDEN / "hand.png"
MODEL = "clinic/tiny"
HOME = "/" + "home"  # not in one piece: no file of the repository names such a path


@pytest.fixture(scope="module")
def measured(prepared_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with measured results beside it."""
    folder = tmp_path_factory.mktemp("measured") / "tiny"
    shutil.copytree(CHECKPOINT, folder)
    results = folder.parent / "results"
    evaluate_checkpoint(str(folder), prepared_phantoms, split="test", out=results, progress=False)
    shutil.copy(results / "metrics.json", folder)
    return folder


@pytest.fixture
def copy(measured: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(measured, tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def metadata_of(hub: HubServer, name: str, kind: str = "model") -> dict[str, Any]:
    readme = hub.repository(name, kind).files()["README.md"].content.decode()
    loaded: dict[str, Any] = yaml.safe_load(readme.split("---")[1])
    return loaded


# --- a model, pushed and read back ----------------------------------------------------------------------------------


def test_a_pushed_model_is_read_back_and_answers_the_same(hub: HubServer, measured: Path) -> None:
    published = push_model(measured, MODEL)
    assert published.revision == hub.repository(MODEL).branches["main"]
    theirs, ours = load_pipeline(MODEL, device="cpu"), load_pipeline(measured, device="cpu")
    assert checkpoint_revision(theirs) == checkpoint_revision(ours)
    assert theirs(HAND, sex="female")["bone_age_months"] == ours(HAND, sex="female")["bone_age_months"]
    assert theirs.model.name_or_path == MODEL


def test_a_model_is_published_as_one_commit_that_is_public_only_then(hub: HubServer, measured: Path) -> None:
    push_model(measured, MODEL)
    repository = hub.repository(MODEL)
    assert repository.messages == ["initial commit", "Upload a boneage-hf checkpoint"]
    assert repository.private is False
    steps = [one for one in hub.requests if re.search(r"create|/commit/|settings", one)]
    assert [step.split("/")[-1] for step in steps] == ["create", "main", "settings"]


def test_a_model_repository_holds_weights_settings_code_results_and_card(hub: HubServer, measured: Path) -> None:
    push_model(measured, MODEL)
    files = set(hub.repository(MODEL).files())
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "metrics.json", "README.md"} <= files
    assert {"modeling_boneage.py", "pipeline_boneage.py", "radiograph.py"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    assert hub.repository(MODEL).files()["model.safetensors"].content == (measured / "model.safetensors").read_bytes()


def test_the_card_of_a_pushed_model_has_its_results_in_the_metadata(hub: HubServer, measured: Path) -> None:
    push_model(measured, MODEL)
    metadata = metadata_of(hub, MODEL)
    results = json.loads((measured / "metrics.json").read_text())
    (result,) = metadata["model-index"][0]["results"]
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values["mae"] == round(results["metrics"]["mae_months"], 2)
    assert result["dataset"]["split"] == "test"
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "image-classification")
    assert "bone-age" in metadata["tags"]
    text = hub.repository(MODEL).files()["README.md"].content.decode()
    assert f'pipeline("bone-age", model="{MODEL}", trust_remote_code=True)' in text


def test_base_model_and_data_set_are_linked_where_they_are_on_the_hub(hub: HubServer, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["provenance"]["initial_weights"] = {"source": "stage-1", "provenance": config["provenance"]}
    config["provenance"]["initial_weights"]["provenance"] = {"initial_weights": {"source": "timm/vgg19.tv_in1k"}}
    config["provenance"]["data"] = {"kind": "phantom", "hub_id": "clinic/hands"}
    (copy / "config.json").write_text(json.dumps(config))
    push_model(copy, MODEL)
    assert metadata_of(hub, MODEL)["base_model"] == "timm/vgg19.tv_in1k"
    assert metadata_of(hub, MODEL)["datasets"] == ["clinic/hands"]


def test_the_packaged_checkpoint_goes_with_its_licence(hub: HubServer) -> None:
    push_model("default", "clinic/default")
    files, metadata = hub.repository("clinic/default").files(), metadata_of(hub, "clinic/default")
    assert (metadata["license"], metadata["license_link"]) == ("other", "LICENSE")
    assert files["LICENSE"].content == (DEFAULT_CHECKPOINT / "LICENSE").read_bytes()


def test_a_second_push_takes_older_code_and_weights_away_and_leaves_other_files(
    hub: HubServer, measured: Path
) -> None:
    push_model(measured, MODEL)
    repository = hub.repository(MODEL)
    gone = {"old_boneage.py": repository.files()["README.md"], "notes.txt": repository.files()["README.md"]}
    repository.commit("main", {**repository.files(), **gone}, "by hand")
    push_model(measured, MODEL, message="Again")
    assert "old_boneage.py" not in repository.files()
    assert "notes.txt" in repository.files()
    assert repository.messages[-1] == "Again"


def test_a_model_is_read_by_branch_and_by_commit(hub: HubServer, measured: Path, copy: Path) -> None:
    first = push_model(measured, MODEL).revision
    edit_json(copy / "config.json", age_mean_months=50.0)
    evaluated = json.loads((copy / "metrics.json").read_text())
    evaluated["revision"] = checkpoint_revision(load_pipeline(copy))
    (copy / "metrics.json").write_text(json.dumps(evaluated))
    second = push_model(copy, MODEL, revision="younger").revision
    assert hub.repository(MODEL).branches == {"main": first, "younger": second}
    for name, mean in (
        (MODEL, None),
        (f"{MODEL}@younger", 50.0),
        (f"{MODEL}@{second}", 50.0),
        (f"{MODEL}@main", None),
    ):
        expected = mean or load_pipeline(measured).model.config.age_mean_months
        assert load_pipeline(name).model.config.age_mean_months == expected
    assert load_pipeline(MODEL, revision="younger").model.config.age_mean_months == 50.0


def test_a_model_that_was_read_once_is_read_without_a_connection(
    hub: HubServer, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    push_model(measured, MODEL)
    load_pipeline(MODEL)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert load_pipeline(MODEL).model.config.backbone == "tiny"
    assert len(hub.requests) == before


def test_a_hub_that_is_down_does_not_matter_for_a_model_that_was_read_once(hub: HubServer, measured: Path) -> None:
    push_model(measured, MODEL)
    load_pipeline(MODEL)
    with hub.fault("*", ".", status=500):
        assert load_pipeline(MODEL).model.config.backbone == "tiny"


def test_only_json_and_safetensors_are_downloaded(hub: HubServer, measured: Path) -> None:
    push_model(measured, MODEL)
    hub.requests.clear()
    load_pipeline(MODEL)
    fetched = {one.split("/")[-1] for one in hub.requests if "/resolve/" in one}
    assert fetched == {"config.json", "preprocessor_config.json", "model.safetensors"}


def test_weights_of_another_format_are_not_read_from_the_hub(hub: HubServer, measured: Path) -> None:
    push_model(measured, MODEL)
    repository = hub.repository(MODEL)
    files = dict(repository.files())
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    repository.commit("main", files, "a pickle")
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        load_pipeline(MODEL)


def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(hub: HubServer, measured: Path) -> None:
    push_model(measured, MODEL)
    repository = hub.repository(MODEL)
    files = dict(repository.files())
    files["config.json"] = type(files["config.json"])(b'{"model_type": "vit"}', False)
    repository.commit("main", files, "another model")
    with pytest.raises(InputError, match="vit model"):
        load_pipeline(MODEL)
    assert not [one for one in hub.requests if one.startswith("GET /lfs/")]


def test_a_private_model_is_seen_only_with_its_token(
    hub: HubServer, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_model(measured, MODEL, private=True)
    assert hub.repository(MODEL).private
    assert load_pipeline(MODEL).model.config.backbone == "tiny"
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(Path(hub_cache()))
    with pytest.raises(InputError, match="does not show you a model clinic/tiny"):
        load_pipeline(MODEL)


def hub_cache() -> str:
    import huggingface_hub.constants

    return str(huggingface_hub.constants.HF_HUB_CACHE)


def test_a_public_repository_is_refused_where_a_private_one_is_wanted(hub: HubServer, measured: Path) -> None:
    push_model(measured, MODEL)
    commits = len(hub.repository(MODEL).commits)
    with pytest.raises(InputError, match="is public"):
        push_model(measured, MODEL, private=True)
    assert len(hub.repository(MODEL).commits) == commits


# --- what is not published ------------------------------------------------------------------------------------------


def test_a_dry_run_lists_files_and_sizes_and_sends_nothing(
    hub: HubServer, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "model", str(measured), MODEL, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    size = (measured / "model.safetensors").stat().st_size
    assert re.search(rf"^ +{size:,}  model\.safetensors$", printed, re.MULTILINE)
    assert "nothing was sent" in printed
    assert hub.requests == []


def test_the_command_prints_the_revision(hub: HubServer, measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "model", str(measured), MODEL, "--private", "--message", "First"]) == 0
    printed = capsys.readouterr().out
    assert f"revision {hub.repository(MODEL).branches['main']}" in printed
    assert "(private)" in printed
    assert hub.repository(MODEL).messages[-1] == "First"


def refused(hub: HubServer, checkpoint: Path, **options: Any) -> str:
    """The sentence with which a push is refused before anything was sent."""
    with pytest.raises(InputError) as refusal:
        push_model(checkpoint, MODEL, **options)
    assert hub.requests == []
    return str(refusal.value)


def test_a_checkpoint_without_measured_results_is_refused(hub: HubServer, copy: Path) -> None:
    (copy / "metrics.json").unlink()
    assert "no measured results" in refused(hub, copy)


def test_results_of_other_weights_are_refused(hub: HubServer, copy: Path) -> None:
    edit_json(copy / "metrics.json", revision="0" * 12)
    assert "evaluate it again" in refused(hub, copy)


@pytest.mark.parametrize("provenance", [None, {}, {"note": "mine"}], ids=str)
def test_a_checkpoint_without_provenance_is_refused(
    hub: HubServer, copy: Path, provenance: dict[str, Any] | None
) -> None:
    edit_json(copy / "config.json", provenance=provenance)
    assert "where it comes from" in refused(hub, copy)


@pytest.mark.parametrize("path", [HOME + "/anna/x-rays", "C:\\Users\\anna", "~/x-rays", "/volume/7"])
def test_a_checkpoint_with_an_absolute_path_in_it_is_refused(hub: HubServer, copy: Path, path: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    edit_json(copy / "config.json", provenance=config["provenance"] | {"table": {"source": path}})
    sentence = refused(hub, copy)
    assert "config.json holds an absolute path" in sentence
    assert path not in sentence


def test_a_path_in_running_text_is_found_and_a_url_is_none(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("See https://example.org/home/page, boneage_hf/data.py and a/b.\n")
    check_files(tmp_path)
    (tmp_path / "README.md").write_text(f"Images in {HOME}/anna/x.\n")
    with pytest.raises(InputError, match="absolute path"):
        check_files(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "old/last.ckpt", "optimizer.pt"])
def test_a_folder_with_anything_but_safetensors_is_refused(hub: HubServer, copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"0")
    assert "only safetensors" in refused(hub, copy)


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "clinic/ti ny", "clinic/tiny@main", "/abs/path", ""])
def test_a_name_that_the_hub_cannot_have_is_refused(hub: HubServer, measured: Path, name: str) -> None:
    with pytest.raises(InputError, match="OWNER/NAME"):
        push_model(measured, name)
    assert hub.requests == []


# --- something in the way -------------------------------------------------------------------------------------------


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a command that fails with code 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in shown.err
    return errors[0]


COMMIT, UPLOAD, CREATE = "/commit/", "^/lfs/", "/repos/create"


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        ("*", ".", 401, "does not accept your token"),
        ("POST", CREATE, 403, "may not write to clinic/tiny"),
        ("POST", COMMIT, 403, "may not write to clinic/tiny"),
        ("POST", "preupload", 404, "no model clinic/tiny"),
        ("POST", COMMIT, 500, "in trouble"),
        ("PUT", UPLOAD, 500, "in trouble"),
        ("PUT", UPLOAD, 503, "in trouble"),
        ("POST", CREATE, 429, "too many requests"),
        ("POST", COMMIT, 429, "too many requests"),
        ("POST", "preupload", 429, "too many requests"),
        ("POST", COMMIT, 400, "refused the request"),
        ("POST", "validate-yaml", 400, "does not accept the metadata"),
    ],
)
def test_what_is_in_the_way_of_a_push_is_one_sentence_and_nothing_is_half_published(
    hub: HubServer,
    measured: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    path: str,
    status: int,
    sentence: str,
) -> None:
    headers = {"X-Error-Message": "Invalid credentials in Authorization header"} if status == 401 else {}
    with hub.fault(method, path, status=status, headers=headers):
        assert sentence in failing(["push", "model", str(measured), MODEL], capsys)
    nothing_published(hub)


def test_an_answer_that_is_no_json_is_one_sentence(
    hub: HubServer, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub.fault("POST", "validate-yaml", status=502, body=b"<html>Bad gateway</html>"):
        assert "cannot be read" in failing(["push", "model", str(measured), MODEL], capsys)
    nothing_published(hub)


def nothing_published(hub: HubServer) -> None:
    for repository in hub.repositories.values():
        assert repository.private
        assert repository.messages == ["initial commit"]
        assert set(repository.files()) == {".gitattributes"}


@pytest.mark.parametrize(
    ("token", "owner", "sentence"),
    [
        ("hf_expired", "clinic", "does not accept your token"),
        (None, "clinic", "does not accept your token"),
        (READ_ONLY, "clinic", "may not write to clinic/tiny"),
        (READ_WRITE, "university", "may not write to university/tiny"),
    ],
)
def test_a_token_that_may_not_write_is_one_sentence(
    hub: HubServer,
    measured: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    owner: str,
    sentence: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    assert sentence in failing(["push", "model", str(measured), f"{owner}/tiny"], capsys)
    assert hub.repositories == {}


@pytest.mark.parametrize("path", [CREATE, COMMIT, "preupload", "settings"])
def test_too_many_requests_are_waited_for(hub: HubServer, measured: Path, path: str) -> None:
    with hub.fault("*", path, status=429, headers={"Retry-After": "7"}, times=2):
        push_model(measured, MODEL)
    assert len(hub.repository(MODEL).messages) == 2
    assert not hub.repository(MODEL).private
    assert len(hub.waited) == 2
    assert all(seconds in (7, 8) for seconds in hub.waited)


def test_an_upload_that_is_cut_is_sent_again(hub: HubServer, measured: Path) -> None:
    with hub.fault("PUT", UPLOAD, cut=True, times=2):
        push_model(measured, MODEL)
    assert load_pipeline(MODEL).model.config.backbone == "tiny"


def test_an_upload_that_is_cut_each_time_publishes_nothing(
    hub: HubServer, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub.fault("PUT", UPLOAD, cut=True):
        assert "cannot be reached" in failing(["push", "model", str(measured), MODEL], capsys)
    nothing_published(hub)


def test_a_push_after_one_that_failed_is_whole_and_says_that_the_repository_is_private(
    hub: HubServer, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub.fault("POST", COMMIT, status=500):
        failing(["push", "model", str(measured), MODEL], capsys)
    assert "still is" in str(push_model(measured, MODEL))
    assert load_pipeline(MODEL).model.config.backbone == "tiny"
    assert hub.repository(MODEL).private


@pytest.mark.parametrize(("method", "path"), [("POST", COMMIT), ("PUT", UPLOAD), ("GET", "/api/models")])
def test_a_hub_that_does_not_answer_in_time_is_one_sentence(
    hub: HubServer,
    measured: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
) -> None:
    monkeypatch.setattr(hub_access, "TIMEOUT_SECONDS", 0.2)
    with hub.fault(method, path, seconds=5.0):
        assert "did not answer in time" in failing(["push", "model", str(measured), MODEL], capsys)
    nothing_published(hub)


def test_a_model_that_cannot_be_made_public_says_that_it_is_there(
    hub: HubServer, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub.fault("PUT", "settings", status=500):
        assert "whole, but still private" in failing(["push", "model", str(measured), MODEL], capsys)
    assert load_pipeline(MODEL).model.config.backbone == "tiny"


# --- something in the way of reading --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, "does not show you a model"),
        (403, "may not read clinic/tiny"),
        (404, "no model clinic/tiny"),
        (429, "too many requests"),
        (500, "in trouble"),
    ],
)
@pytest.mark.parametrize("path", ["/api/models", "resolve", "^/lfs/"])
def test_what_is_in_the_way_of_a_download_is_one_sentence(
    hub: HubServer, measured: Path, capsys: pytest.CaptureFixture[str], path: str, status: int, sentence: str
) -> None:
    push_model(measured, MODEL)
    with hub.fault("*", path, status=status):
        assert sentence in failing(["predict", MODEL, str(HAND), "--sex", "male"], capsys)


def test_a_branch_that_is_not_there_is_one_sentence(
    hub: HubServer, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push_model(measured, MODEL)
    sentence = failing(["predict", f"{MODEL}@older", str(HAND), "--sex", "male"], capsys)
    assert "no branch, tag or commit older" in sentence


def test_a_slow_download_is_one_sentence(
    hub: HubServer, measured: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    push_model(measured, MODEL)
    monkeypatch.setattr(hub_access, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    with hub.fault("GET", "^/lfs/", seconds=5.0):
        assert "did not answer in time" in failing(["predict", MODEL, str(HAND), "--sex", "male"], capsys)
    assert main(["predict", MODEL, str(HAND), "--sex", "male"]) == 0


def test_a_full_disk_in_the_cache_is_one_sentence_and_leaves_nothing_half_read(
    hub: HubServer, measured: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.file_download as file_download

    push_model(measured, MODEL)
    get = file_download.http_get

    def full(url: str, temp_file: Any, **options: Any) -> None:
        if "/lfs/" not in url:
            get(url, temp_file, **options)
            return
        temp_file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        sentence = failing(["predict", MODEL, str(HAND), "--sex", "male"], capsys)
    assert "disk is full" in sentence
    assert "HF_HOME" in sentence
    assert main(["predict", MODEL, str(HAND), "--sex", "male"]) == 0


# --- where the package is not installed -----------------------------------------------------------------------------

TRAVELLER = '''
"""Runs where boneage_hf cannot be imported: argv is Hub id, PNG, DICOM."""
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "boneage_hf":
            raise ImportError("No module named " + repr(name))

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModel, pipeline

model, commit, png, dicom = sys.argv[1:]
report = {}
pipe = pipeline("bone-age", model=model, trust_remote_code=True, device="cpu")
for name, file in (("png", png), ("dicom", dicom)):
    report[name] = pipe(file, sex="female")["bone_age_months"].hex()
by_commit = pipeline("bone-age", model=model, revision=commit, trust_remote_code=True, device="cpu")
report["commit"] = by_commit(png, sex="female")["bone_age_months"].hex()
without_task = pipeline(model=model, trust_remote_code=True, device="cpu")
report["without a task"] = without_task(png, sex="female")["bone_age_months"].hex()
half = AutoModel.from_pretrained(model, trust_remote_code=True, dtype=torch.bfloat16, device_map="cpu")
report["dtypes"] = sorted({str(value.dtype) for value in half.parameters()})
mapped = pipeline("bone-age", model=model, trust_remote_code=True, dtype=torch.float32, device_map="auto")
report["mapped"] = mapped(png, sex="female")["bone_age_months"].hex()
try:
    AutoModel.from_pretrained(model, trust_remote_code=True, revision="older")
except OSError as error:
    report["older"] = type(error).__name__
report["module"] = type(pipe.model).__module__
report["leaked"] = sorted(name for name in sys.modules if name.partition(".")[0] == "boneage_hf")
print(json.dumps(report))
'''


def fresh_environment(hub: HubServer, folder: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        environment.pop(name, None)
    return environment | {
        "HF_HOME": str(folder / "hf"),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": READ_WRITE,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


@pytest.mark.slow
def test_a_fresh_process_without_the_package_reads_a_model_id_and_answers_the_same_months(
    hub: HubServer, measured: Path, tmp_path: Path
) -> None:
    published = push_model(measured, MODEL)
    shutil.copy(HAND, tmp_path / "hand.png")
    (tmp_path / "hand").write_bytes(dicom(np.asarray(radiograph.read(HAND).image)))
    (tmp_path / "script.py").write_text(TRAVELLER)
    arguments = [MODEL, str(published.revision), "hand.png", "hand"]

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-I", "script.py", *arguments],
            cwd=tmp_path,
            env=fresh_environment(hub, tmp_path) | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    ours = load_pipeline(measured, device="cpu")(HAND, sex="female")["bone_age_months"].hex()
    assert {name: report[name] for name in ("png", "dicom", "commit", "without a task", "mapped")} == dict.fromkeys(
        ("png", "dicom", "commit", "without a task", "mapped"), ours
    )
    assert report["dtypes"] == ["torch.bfloat16"]
    assert report["older"] == "OSError"
    assert report["leaked"] == []
    assert report["module"].startswith("transformers_modules.")
    before = len(hub.requests)
    offline = run(HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr[-3000:]
    assert json.loads(offline.stdout.splitlines()[-1])["dicom"] == ours
    assert len(hub.requests) == before
