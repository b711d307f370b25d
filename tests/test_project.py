"""The repository as a whole: who imports whom, what ships, what must never be in it, whether its texts are true."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from email import message_from_bytes
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

import boneage_hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "boneage_hf"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]

COMMANDS = (
    *("prepare", "explore", "train", "fit-interval", "evaluate", "predict", "explain"),
    *("fit-gate", "calibrate", "summary", "card", "convert-lite0", "fold", "push", "demo"),
)

# --- who may import whom --------------------------------------------------------------------------------------------

BASE = {"errors", "sex"}
LAID_ON = BASE | {"interval_boneage", "correction_boneage", "quality"}
CONFIGURATION = LAID_ON | {"configuration_boneage"}
MODEL = CONFIGURATION | {"backbones_boneage", "modeling_boneage"}
#: The files that a checkpoint carries to the Hub.
TRAVELLING = {
    "errors": set(),
    "sex": {"errors"},
    "interval_boneage": {"errors"},
    "correction_boneage": {"errors", "interval_boneage"},
    "quality": BASE,
    "configuration_boneage": LAID_ON,
    "radiograph": CONFIGURATION,
    "image_processing_boneage": CONFIGURATION,
    "backbones_boneage": CONFIGURATION,
    "modeling_boneage": CONFIGURATION | {"backbones_boneage"},
    "pipeline_boneage": MODEL | {"radiograph", "image_processing_boneage"},
}
TRAVELS = set(TRAVELLING)
LEAF = BASE | {"radiograph"}
#: Module of the package -> the modules of the package it may import. A new module gets its place here first.
ALLOWED: dict[str, set[str]] = {
    **TRAVELLING,
    # leaves
    "files": set(),
    "memory": set(),
    "phantom": LEAF,
    "augmentation": LEAF,
    "metrics": BASE | {"splits"},
    "evaluate_metric": {"metrics"},
    "clinical": LEAF,
    "explain": LEAF | MODEL,
    "growth_plot": BASE | {"clinical"},
    "report": LEAF | {"clinical", "growth_plot"},
    "calibration": LAID_ON | {"metrics"},
    # the data set, drawn hands included
    "stored_image": LEAF,
    "splits": BASE,
    "label_tables": BASE | {"splits"},
    "data_card": BASE | {"label_tables", "splits"},
    "own_table": BASE | {"hub_access", "splits"},
    "data": LEAF
    | {"files", "hub_access", "own_table", "phantom", "stored_image", "splits", "label_tables", "data_card"},
    "explore": LEAF | {"splits", "data", "stored_image", "augmentation", "image_processing_boneage"},
    # put together
    "registration": TRAVELS,
    "initial_weights": MODEL,
    "prepared": BASE | {"radiograph", "image_processing_boneage"},
    "distillation": MODEL | {"features", "image_processing_boneage", "prepared"},
    "features": MODEL | {"augmentation", "image_processing_boneage", "prepared"},
    "recipes": BASE,
    "hub_access": BASE,
    "hub": TRAVELS | {"registration", "hub_access"},
    "summary": MODEL | {"hub"},
    "folding": MODEL | {"hub"},
    "evaluation_plots": BASE | {"files", "splits"},
    "evaluation": TRAVELS | {"files", "memory", "metrics", "data", "splits", "prepared", "hub", "evaluation_plots"},
    "calibrated_checkpoints": TRAVELS | {"calibration", "data", "hub", "evaluation"},
    "fitted_gate": TRAVELS | {"calibrated_checkpoints", "data", "hub", "memory", "prepared"},
    "training": TRAVELS
    | {"files", "data", "splits", "augmentation", "prepared", "recipes", "initial_weights", "hub", "evaluation"}
    | {"distillation", "features", "folding", "memory", "publishing"},
    "batch": TRAVELS | {"clinical"},
    # the Space
    "service": TRAVELS | {"batch", "explain"},
    "uploads": LEAF | {"batch", "report"},
    "page": LEAF | {"batch", "clinical", "growth_plot", "report", "service"},
    "card": CONFIGURATION | {"metrics", "recipes", "summary", "hub"},
    "publishing": CONFIGURATION | {"files", "data", "data_card", "hub_access", "hub", "card"},
}
ALLOWED["cli"] = set(ALLOWED)
ALLOWED["__main__"] = {"cli"}
ALLOWED["__init__"] = set(ALLOWED) - {"cli", "__main__"}

#: What a checkpoint may ask for on the machine that loads it.
TRAVELLING_NEEDS = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
#: Names that differ between import and distribution.
DISTRIBUTIONS = {"PIL": "pillow", "gdcm": "python-gdcm"}


@cache
def tracked() -> tuple[Path, ...]:
    """Files that git knows or would add, relative to the root."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(sorted({Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}))


def texts() -> dict[Path, str]:
    """The tracked files that are text."""
    found = {}
    for path in tracked():
        content = (ROOT / path).read_bytes()
        if b"\0" not in content:
            found[path] = content.decode("utf-8")
    return found


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(tree: ast.AST) -> set[str]:
    """Every module that a syntax tree imports anywhere, absolute and dotted; ``boneage_hf.x`` for relative imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["boneage_hf" if node.level else "", node.module]))
            found.add(module)
            # `from . import x` and `from boneage_hf import x` may name a module
            if module == "boneage_hf":
                found |= {f"boneage_hf.{alias.name}" for alias in node.names if alias.name in MODULES}
    return found


def own_imports(module: str) -> set[str]:
    """Modules of the package that ``module`` imports."""
    imported = imports_of(tree_of(PACKAGE / f"{module}.py"))
    return {name.split(".")[1] for name in imported if name.startswith("boneage_hf.")}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_lies_below_it(module: str) -> None:
    assert module in ALLOWED, f"{module}.py has no place in the import rule yet"
    assert own_imports(module) <= ALLOWED[module]


def test_the_import_rule_itself_has_no_circle() -> None:
    placed: set[str] = set()
    waiting = {module: set(below) for module, below in ALLOWED.items() if module != "__init__"}
    while waiting:
        free = {module for module, below in waiting.items() if below <= placed | {module}}
        assert free, f"circle among {sorted(waiting)}"
        placed |= free
        waiting = {module: below for module, below in waiting.items() if module not in free}


@pytest.mark.parametrize("module", MODULES)
def test_the_package_never_imports_the_benchmarks(module: str) -> None:
    outside = {name.split(".")[0] for name in imports_of(tree_of(PACKAGE / f"{module}.py"))}
    assert outside.isdisjoint({"benchmarks", "tests"})
    assert "space_app" not in outside or module == "cli"


@pytest.mark.parametrize("module", sorted(TRAVELS & set(MODULES)))
def test_a_travelling_file_imports_siblings_in_the_one_form_that_survives_the_hub(module: str) -> None:
    path = PACKAGE / f"{module}.py"
    relative = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.ImportFrom) and n.level]
    assert all(node.level == 1 and node.module and "." not in node.module for node in relative)
    # transformers finds siblings by regular expression on the text: a docstring line of this form breaks saving
    found = re.findall(r"^\s*(?:from\s+\.(\S*)\s+import|import\s+\.(\S+))", path.read_text("utf-8"), re.MULTILINE)
    assert sorted(filter(None, (name for pair in found for name in pair))) == sorted(n.module or "" for n in relative)


@pytest.mark.parametrize("module", sorted(TRAVELS & set(MODULES)))
def test_a_travelling_file_needs_torch_and_transformers_only(module: str) -> None:
    tree = tree_of(PACKAGE / f"{module}.py")
    # transformers asks for every import but those inside `try`
    tried = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and not getattr(n, "level", 0)]
    required = {name.split(".")[0] for node in imports if id(node) not in tried for name in imports_of(node)}
    optional = {name.split(".")[0] for node in imports if id(node) in tried for name in imports_of(node)}
    assert required <= TRAVELLING_NEEDS | set(sys.stdlib_module_names)
    assert optional <= TRAVELLING_NEEDS | {"pydicom", "gdcm"}


def test_every_import_of_the_package_is_a_declared_dependency() -> None:
    declared = {Requirement(line).name for line in PYPROJECT["project"]["dependencies"]}
    declared |= {Requirement(line).name for extra in ("dicom", "train") for line in EXTRAS[extra]}
    sources = [*PACKAGE.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *ROOT.glob("space_app.py")]
    own = {"boneage_hf", "benchmarks", "space_app"} | set(sys.stdlib_module_names)
    used = {name.split(".")[0] for path in sources for name in imports_of(tree_of(path))} - own
    assert {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in used} <= declared


def test_every_module_says_what_it_is_for() -> None:
    paths = [path for path in tracked() if path.suffix == ".py" and path.parts[0] != "tests"]
    assert [str(path) for path in paths if not ast.get_docstring(tree_of(ROOT / path))] == []


# --- what must not be in the repository -----------------------------------------------------------------------------


def test_no_file_names_a_path_of_one_machine() -> None:
    of_a_machine = re.compile(r"(?<![\w.:/>-])/(?:work|root|home|Users|opt|mnt)/[\w.]|[A-Z]:\\Users\\")
    hits = {f"{path}: {hit.group()}" for path, text in texts().items() for hit in of_a_machine.finditer(text)}
    assert not hits


def test_no_tracked_file_is_a_pickle_an_image_store_or_a_dicom() -> None:
    unwanted = {".pth", ".pt", ".pkl", ".pickle", ".ckpt", ".bin", ".joblib", ".h5", ".parquet", ".arrow", ".dcm"}
    assert [str(path) for path in tracked() if path.suffix.lower() in unwanted] == []


def test_no_tracked_table_has_the_columns_of_the_label_table() -> None:
    for path, text in texts().items():
        if path.suffix.lower() in {".csv", ".tsv"}:
            columns = {column.strip().lower() for column in re.split(r"[,;\t]", text.splitlines()[0])}
            assert not {"boneage", "male"} <= columns, f"{path} looks like the label table of the challenge"
            assert "reference_months" not in columns, f"{path} holds labels beside its predictions"


def calls_of(path: Path) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)}


def test_nothing_reads_a_pickle_but_the_converter_of_initial_weights() -> None:
    for path in tracked():
        if path.suffix == ".py" and path.parts[0] != "tests":
            names = {name.split(".")[0] for name in imports_of(tree_of(ROOT / path))}
            assert names.isdisjoint({"pickle", "dill", "cloudpickle", "joblib", "shelve"}), path
            if path != Path("boneage_hf/initial_weights.py"):
                assert calls_of(ROOT / path).isdisjoint({"torch.load", "torch.save"}), path


def test_the_converter_loads_tensors_only() -> None:
    path = PACKAGE / "initial_weights.py"
    if not path.exists():
        pytest.skip("there is no converter")
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    loads = [node for node in calls if ast.unparse(node.func) == "torch.load"]
    assert len(loads) == 1
    assert {k.arg: ast.unparse(k.value) for k in loads[0].keywords}.get("weights_only") == "True"


# --- the command line and what the texts say of it ------------------------------------------------------------------


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


LAZY = """
import contextlib, io, sys
import boneage_hf.cli
for arguments in [[], *([command] for command in {commands!r})]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        boneage_hf.cli.main([*arguments, "--help"])
heavy = {{"torch", "transformers", "datasets", "accelerate", "evaluate", "gradio", "pandas", "numpy", "PIL", "scipy",
          "matplotlib", "huggingface_hub", "pydicom"}}
print(*sorted(heavy & set(sys.modules)))
"""


def test_help_loads_no_heavy_library() -> None:
    done = run_python("-c", LAZY.format(commands=COMMANDS))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_help_answers_at_once() -> None:
    """Under 0.1 s on a free machine; three times that, best of five, on a busy one."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = run_python("-c", "import boneage_hf.cli as c; c.main(['--help'])")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 0.3


def help_of(main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--help"])
    assert left.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from boneage_hf.cli import main

    assert command in help_of(main, [], capsys)
    assert len(help_of(main, [command], capsys).splitlines()) > 3


def commands_in(text: str) -> list[list[str]]:
    """The command lines in the fenced blocks of a Markdown text."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fences if language in ("", "bash", "sh", "shell", "console")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.strip()]


def test_command_lines_are_read_as_a_shell_reads_them() -> None:
    shell = "```bash\n$ make test  # all\nboneage predict \\\n  --sex male 'a b.png'\n```\n"
    text = f"```python\nmake = 1\n```\nit's text\n{shell}`make no`\n"
    assert commands_in(text) == [["make", "test"], ["boneage", "predict", "--sex", "male", "a b.png"]]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "model_card.md"])
def test_the_commands_in_a_document_exist(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not (ROOT / document).exists():
        pytest.skip(f"there is no {document}")
    import benchmarks.cli
    import boneage_hf.cli

    mains = {"boneage": boneage_hf.cli.main, "boneage-benchmark": benchmarks.cli.main}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets, variables = re.findall(r"^([a-z]+):", makefile, re.MULTILINE), re.findall(r"^(\w+) \?=", makefile, re.M)
    for program, *arguments in commands_in((ROOT / document).read_text(encoding="utf-8")):
        name = Path(program).name
        if name == "make":
            assert {a for a in arguments if "=" not in a and not a.startswith("-")} <= set(targets)
            assert {a.split("=")[0] for a in arguments if "=" in a} <= set(variables)
        elif name in mains:
            words = [a for a in arguments[: 2 if arguments[:1] == ["push"] else 1] if not a.startswith("-")]
            explained = help_of(mains[name], words, capsys)
            flags = {a.split("=")[0] for a in arguments if a.startswith("--")} - {"--help"}
            assert flags <= set(re.findall(r"--[a-z0-9][a-z0-9-]*", explained)), " ".join([name, *arguments])


def test_readme_has_a_clause_for_every_module_and_dependency() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [f"{module}.py" for module in MODULES if f"{module}.py" not in readme]
    extras = [line for extra in ("dicom", "mcp", "train") for line in EXTRAS[extra]]
    names = {Requirement(line).name for line in [*PYPROJECT["project"]["dependencies"], *extras]}
    missing += sorted(name for name in names if name.lower() not in readme.lower())
    assert missing == []


def test_readme_says_that_weights_have_terms_of_their_own() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in readme
    assert re.search(r"non-commercial", readme, re.IGNORECASE)
    assert "boneage_hf/checkpoints/default/LICENSE" in readme


def test_the_changelog_opens_with_the_version_of_the_package() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert versions[0] == boneage_hf.__version__


# --- the distribution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", [*PYPROJECT["project"]["dependencies"], *(line for e in EXTRAS.values() for line in e)]
)
def test_a_dependency_is_bounded_on_both_sides(line: str) -> None:
    requirement = Requirement(line)
    if requirement.name != PYPROJECT["project"]["name"]:
        assert sorted(s.operator for s in requirement.specifier) == ["<", ">="]


def test_makefile_and_metadata_name_the_same_python_versions() -> None:
    lowest, above = re.findall(r"3\.(\d+)", PYPROJECT["project"]["requires-python"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"(3, {lowest}) <= sys.version_info[:2] <= (3, {int(above) - 1})" in makefile
    assert f"Python 3.{lowest} to 3.{int(above) - 1} is needed" in makefile


def ships(path: Path) -> bool:
    """Whether a tracked file belongs in the wheel."""
    if path.parts[:2] == ("boneage_hf", "checkpoints"):
        return path.parts[2] == "default"
    return path.parts[0] in {"boneage_hf", "benchmarks"} or path == Path("space_app.py")


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_benchmarks_and_the_space_and_nothing_else(tmp_path: Path) -> None:
    """Built through the source distribution, so that this too is known to be complete."""
    source = tmp_path / "source"
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
    stray = source / "boneage_hf" / "checkpoints" / "another" / "model.safetensors"
    stray.parent.mkdir()
    stray.write_bytes(b"not to be shipped")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr

    (archived,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archived) as sources:
        inside = {Path(*Path(name).parts[1:]) for name in sources.getnames()}
    assert not [
        path
        for path in inside
        if path.suffix == ".safetensors" and "default" not in path.parts and "tests" not in path.parts
    ]
    assert Path("boneage_hf/checkpoints/default/model.safetensors") in inside

    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert {n for n in names if not n.startswith(info)} == {p.as_posix() for p in tracked() if ships(p)}
    assert metadata["Version"] == boneage_hf.__version__
    assert metadata["License-Expression"] == "Apache-2.0 AND MIT AND LicenseRef-RSNA-Research-Weights"
    licenses = {"LICENSE", "boneage_hf/checkpoints/default/LICENSE", "benchmarks/attention_boxes/LICENSE"}
    assert set(metadata.get_all("License-File") or []) == licenses
    assert {f"{info}/licenses/{name}" for name in licenses} <= names
    assert "boneage = boneage_hf.cli:main" in scripts
    assert "boneage-benchmark = benchmarks.cli:main" in scripts


# --- the tests' own rules -------------------------------------------------------------------------------------------


def test_a_test_cannot_leave_this_machine() -> None:
    with socket.socket() as client, pytest.raises(RuntimeError, match="loopback interface only"):
        client.connect(("192.0.2.1", 80))
    with socket.socket() as client, pytest.raises(RuntimeError, match="loopback interface only"):
        client.connect_ex(("192.0.2.1", 80))
    with pytest.raises(RuntimeError, match="loopback interface only"):
        socket.create_connection(("name.invalid", 443), timeout=1)


def test_a_test_may_use_loopback() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as client,
        server.accept()[0] as accepted,
    ):
        client.sendall(b"here")
        assert accepted.recv(4) == b"here"


def test_hugging_face_libraries_are_offline_and_use_a_cache_of_their_own() -> None:
    import huggingface_hub.constants

    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert Path(huggingface_hub.constants.HF_HOME).name.startswith("boneage-tests-")


# --- PyTorch without CUDA packages where there is no GPU ------------------------------------------------------------


@pytest.fixture(scope="module")
def install_torch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_torch", ROOT / ".ci" / "install_torch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report_of(*requirements: str) -> dict[str, Any]:
    return {"install": [{"metadata": {"name": "torch", "requires_dist": list(requirements)}}]}


CPU_BUILD = report_of("filelock", "sympy>=1.13.3", 'optree>=0.13.0; extra == "optree"')
CUDA_BUILD = report_of(
    "filelock",
    'cuda-toolkit[cudart,nvrtc]==13.0.2; platform_system == "Linux"',
    'nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"',
    'triton==3.7.0; platform_system == "Linux"',
)


def test_cuda_packages_are_found_in_the_report_of_pip(install_torch: ModuleType) -> None:
    assert install_torch.cuda_requirements(CPU_BUILD) == []
    assert install_torch.cuda_requirements(CUDA_BUILD) == ["cuda-toolkit", "nvidia-cudnn-cu13"]


@pytest.mark.parametrize(
    ("platform", "gpu", "offered", "index"),
    [
        ("linux", False, CPU_BUILD, None),
        ("linux", False, CUDA_BUILD, "https://download.pytorch.org/whl/cpu"),
        ("linux", True, CUDA_BUILD, None),
        ("darwin", False, CUDA_BUILD, None),
    ],
)
def test_the_cpu_index_is_used_only_where_pip_would_bring_cuda_without_a_gpu(
    install_torch: ModuleType, platform: str, gpu: bool, offered: dict[str, Any], index: str | None
) -> None:
    def ask(spec: str, asked_index: str | None) -> dict[str, Any]:
        return CPU_BUILD if asked_index else offered

    assert install_torch.choose_index("torch==2.13.0", index=None, platform=platform, gpu=gpu, ask=ask) == index


def test_an_index_that_the_user_names_is_used_unasked(install_torch: ModuleType) -> None:
    def ask(spec: str, index: str | None) -> dict[str, Any]:
        raise AssertionError("pip was asked")

    named = "https://example.org/cu130"
    assert install_torch.choose_index("torch", index=named, platform="linux", gpu=False, ask=ask) == named


def test_without_a_cpu_build_within_reach_one_sentence_names_the_cure(install_torch: ModuleType) -> None:
    def ask(spec: str, index: str | None) -> dict[str, Any]:
        if index:
            raise install_torch.NotToBeHadError("No matching distribution found for torch==2.13.0")
        return CUDA_BUILD

    with pytest.raises(install_torch.NotToBeHadError, match="TORCH_INDEX") as refused:
        install_torch.choose_index("torch==2.13.0", index=None, platform="linux", gpu=False, ask=ask)
    assert "2 CUDA packages" in str(refused.value)
