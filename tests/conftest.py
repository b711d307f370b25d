"""What holds for every test: no network, no telemetry, caches of its own, one thread per process."""

import atexit
import ipaddress
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import READ_WRITE, HubServer

# Hugging Face libraries, Gradio, PyTorch and matplotlib read these once, when they are imported: so they are set here,
# before any test module is. Test processes of pytest-xdist inherit HF_HOME from the process that started them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _hf_home = tempfile.mkdtemp(prefix="boneage-tests-")
    atexit.register(shutil.rmtree, _hf_home, ignore_errors=True)
    os.environ["HF_HOME"] = _hf_home
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "MPLBACKEND": "Agg",
}
# The order in which threads add up would show in the last digits of golden outputs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A user's own token, mirror, caches and proxy have no say in a test.
for _name in (
    *("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"),
    *("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
):
    os.environ.pop(_name, None)


class OutsideNetworkError(RuntimeError):
    """A test tried to leave this machine. Not an OSError: libraries swallow those and go on."""


def _refuse_unless_loopback(host: object) -> None:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost"):
        return
    try:
        address = ipaddress.ip_address(str(host))
    except ValueError:
        pass
    else:
        if address.is_loopback or address.is_unspecified:
            return
    raise OutsideNetworkError(f"a test tried to reach {host}; tests use the loopback interface only")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuse connections and name look-ups other than loopback in this process; Unix sockets (no tuple) pass."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple):
            _refuse_unless_loopback(address[0])
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        if isinstance(address, tuple):
            _refuse_unless_loopback(address[0])
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        _refuse_unless_loopback(host)
        return getaddrinfo(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that this process talks to, with a token that may write to `clinic/...`, and an empty cache."""
    import datasets.config
    import huggingface_hub.constants as constants
    import huggingface_hub.utils._http as http

    from boneage_hf import publishing

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
        monkeypatch.setenv("HF_TOKEN", READ_WRITE)
        no_wait = SimpleNamespace(**{**vars(time), "sleep": server.waited.append})
        monkeypatch.setattr(http, "time", no_wait)
        monkeypatch.setattr(publishing, "time", no_wait)
        http.close_session()  # made anew with these settings
        yield server
        http.close_session()


@pytest.fixture(scope="session")
def prepared_phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 48 drawn hands; eight of them are its validation split."""
    from boneage_hf.data import prepare_phantoms

    folder = tmp_path_factory.mktemp("drawn-hands") / "prepared"
    prepare_phantoms(48, folder, size=64, progress=False)
    return folder


@pytest.fixture(scope="session")
def prepared_rsna(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared data set of `BONEAGE_PREPARED_DIR`, or else `BONEAGE_RSNA_DIR` prepared, which takes minutes."""
    folder = os.environ.get("BONEAGE_PREPARED_DIR")
    if folder:
        return Path(folder)
    source = request.getfixturevalue("rsna_dir")
    from boneage_hf.data import prepare

    out = tmp_path_factory.mktemp("rsna") / "prepared"
    prepare(source, out, progress=False)
    return out


@pytest.fixture(scope="session")
def rsna_dir() -> Path:
    """A folder in the layout of the RSNA challenge, for development tests on real radiographs."""
    folder = os.environ.get("BONEAGE_RSNA_DIR")
    if not folder:
        pytest.skip("BONEAGE_RSNA_DIR does not name a folder in the layout of the RSNA challenge")
    return Path(folder)
