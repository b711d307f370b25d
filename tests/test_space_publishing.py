"""The Space as it is published: its files, its metadata, and the page that opens from exactly those files."""

import ast
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import READ_WRITE, HubServer
from make_tiny_checkpoint import CHECKPOINT
from packaging.requirements import Requirement

from boneage_hf.cli import main
from boneage_hf.errors import InputError
from boneage_hf.evaluation import evaluate_checkpoint
from boneage_hf.hub import checkpoint_revision, load_pipeline
from boneage_hf.publishing import push_model, push_space

SPACE, MODEL = "clinic/bone-age", "clinic/tiny"


@pytest.fixture
def model(hub: HubServer, prepared_phantoms: Path, tmp_path: Path) -> str:
    """A model on the Hub; returns its commit."""
    evaluate_checkpoint(str(CHECKPOINT), prepared_phantoms, split="test", out=tmp_path / "measured", progress=False)
    published = push_model(CHECKPOINT, MODEL, metrics_file=tmp_path / "measured" / "metrics.json")
    return str(published.revision)


def files_of(hub: HubServer) -> dict[str, bytes]:
    files = hub.repository(SPACE, "space").files()
    return {name: blob.content for name, blob in files.items() if not name.startswith(".")}


def metadata_of(files: dict[str, bytes]) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(files["README.md"].decode().split("---")[1])
    return loaded


def test_a_space_names_its_model_with_the_commit_it_had(hub: HubServer, model: str) -> None:
    push_space(SPACE, model=MODEL)
    files = files_of(hub)
    assert files["space_model.txt"].decode() == f"{MODEL}@{model}\n"
    assert f"{MODEL}@{model}" in files["README.md"].decode()
    assert not [name for name in files if name.endswith(".safetensors")]
    assert metadata_of(files)["models"] == [MODEL]


def test_a_space_holds_page_package_benchmarks_and_requirements(hub: HubServer, model: str) -> None:
    push_space(SPACE, model=MODEL)
    root, files = Path(__file__).parents[1], files_of(hub)
    for folder in ("boneage_hf", "benchmarks"):
        modules = {path.relative_to(root).as_posix() for path in (root / folder).rglob("*.py")}
        assert modules <= set(files)
    assert files["space_app.py"] == (root / "space_app.py").read_bytes()
    assert "boneage_hf/references/brush_foundation.csv" in files
    assert {name.split("/")[0] for name in files} == {
        *("README.md", "requirements.txt", "space_app.py", "space_model.txt", "boneage_hf", "benchmarks")
    }


def test_a_space_is_one_public_commit_of_the_gradio_kind(hub: HubServer, model: str) -> None:
    push_space(SPACE, model=MODEL)
    repository = hub.repository(SPACE, "space")
    assert repository.messages == ["initial commit", "Upload the bone-age Space"]
    assert (repository.sdk, repository.private) == ("gradio", False)


def test_the_metadata_name_the_page_and_the_versions(hub: HubServer, model: str) -> None:
    push_space(SPACE, model=f"{MODEL}@main", private=True)
    metadata = metadata_of(files_of(hub))
    assert (metadata["sdk"], metadata["app_file"]) == ("gradio", "space_app.py")
    assert metadata["sdk_version"] == importlib.metadata.version("gradio")
    assert str(metadata["python_version"]) == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert hub.repository(SPACE, "space").private


def test_the_requirements_cover_every_import_of_the_space(hub: HubServer, model: str) -> None:
    push_space(SPACE, model=MODEL)
    files = files_of(hub)
    lines = [line for line in files["requirements.txt"].decode().splitlines() if not line.startswith("--")]
    named = {Requirement(line).name.lower() for line in lines}
    assert all(Requirement(line).specifier for line in lines)
    used: set[str] = set()
    for name in ("space_app.py", *(name for name in files if name.startswith("boneage_hf/") and name.endswith(".py"))):
        for node in ast.parse(files[name]).body:  # those at the top of a module; others are of extras
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used.add(str(node.module).split(".")[0])
    used -= {*sys.stdlib_module_names, "boneage_hf", "benchmarks"}
    assert {{"PIL": "pillow", "huggingface_hub": "huggingface-hub"}.get(name, name) for name in used} <= named


def test_a_dry_run_of_a_space_lists_its_files(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "space", SPACE, "--model", "inside", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "boneage_hf/checkpoints/default/model.safetensors" in told
    assert "boneage_hf/checkpoints/default/LICENSE" in told
    assert "__pycache__" not in told
    assert hub.requests == []


@pytest.mark.parametrize("name", ["clinic/nothing", str(CHECKPOINT), "no-such-model"])
def test_a_space_of_a_model_that_is_not_on_the_hub_is_refused(hub: HubServer, name: str) -> None:
    with pytest.raises(InputError):
        push_space(SPACE, model=name)
    assert hub.repositories == {}


def test_a_space_that_cannot_be_committed_is_not_there(hub: HubServer, model: str) -> None:
    with hub.fault("POST", "/api/spaces/.*/commit/", status=500), pytest.raises(InputError, match="in trouble"):
        push_space(SPACE, model=MODEL)
    assert hub.repository(SPACE, "space").private
    assert files_of(hub) == {}


# --- opened ---------------------------------------------------------------------------------------------------------


@contextmanager
def opened(files: dict[str, bytes], folder: Path, **environment: str) -> Iterator[str]:
    """The Space running from exactly these files in a process of its own; gives its address."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    variables |= {"GRADIO_SERVER_PORT": str(port), "HF_HOME": str(folder.parent / "hf"), **environment}
    with (folder.parent / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "space_app.py"], cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                read(address)
                break
            except urllib.error.URLError:
                assert process.poll() is None, (folder.parent / "log").read_text()[-3000:]
                assert time.monotonic() < deadline, (folder.parent / "log").read_text()[-3000:]
                time.sleep(0.5)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def read(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as answer:
        content: bytes = answer.read()
    return content.decode()


@pytest.mark.slow
def test_the_page_opens_from_exactly_the_files_that_were_published(hub: HubServer, model: str, tmp_path: Path) -> None:
    push_space(SPACE, model=MODEL)
    revision = checkpoint_revision(load_pipeline(CHECKPOINT))
    online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": READ_WRITE, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    (tmp_path / "space").mkdir()
    with opened(files_of(hub), tmp_path / "space", **online) as address:
        assert "<html" in read(address)
        page = read(f"{address}/config")
        assert MODEL in page
        assert revision in page
    fetched = [one for one in hub.requests if "/resolve/" in one]
    assert all(model in one for one in fetched[-2:])


@pytest.mark.slow
def test_the_page_opens_without_the_hub_where_the_model_lies_inside(hub: HubServer, tmp_path: Path) -> None:
    push_space(SPACE, model="inside")
    (tmp_path / "space").mkdir()
    with opened(files_of(hub), tmp_path / "space") as address:
        assert checkpoint_revision(load_pipeline("default")) in read(f"{address}/config")
