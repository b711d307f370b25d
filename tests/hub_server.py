"""A small Hub on the loopback interface: what huggingface_hub, transformers and datasets ask of the real one.

Models, data sets and Spaces with branches and commits, private repositories, tokens, LFS uploads, and resolving with
HEAD, GET and Range. Faults can be put in its way: any status, a slow answer, an upload cut in the middle. Not Xet:
clients need HF_HUB_DISABLE_XET=1.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

#: Files that the Hub keeps in LFS, besides all above this size in bytes.
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".png", ".jpg")
LFS_BYTES = 5_000_000

READ_WRITE, READ_ONLY = "hf_write_token", "hf_read_token"

#: Status -> the header by which clients tell what is missing.
_NOT_FOUND = {"repo": "RepoNotFound", "revision": "RevisionNotFound", "entry": "EntryNotFound"}


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        """As git names it: of an LFS file, its pointer."""
        content = self.content
        if self.lfs:
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
            content = text.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    kind: str
    name: str
    private: bool
    sdk: str | None = None
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        state = sorted((path, blob.git_oid) for path, blob in files.items())
        parent = self.branches.get(branch, "")
        oid = hashlib.sha1(json.dumps([self.kind, self.name, parent, message, state]).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid


@dataclass
class Fault:
    """What meets the next `times` requests whose method and path match.

    `status` answers with it and `body`; `seconds` lets them wait first; `cut` reads half of the body and hangs up.
    """

    method: str
    path: str
    times: int = 1_000_000
    status: int | None = None
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    cut: bool = False


class HubServer(ThreadingHTTPServer):
    """Use as a context manager; `url` is its endpoint."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        #: Where large files lie: another host, to which clients must not send their token.
        self.content_url = self.url.replace("127.0.0.1", "localhost")
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.users = {READ_WRITE: ("clinic", True), READ_ONLY: ("clinic", False)}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        #: Seconds that a client of this process would have slept between two attempts.
        self.waited: list[float] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]

    @contextlib.contextmanager
    def fault(self, method: str, path: str, **options: Any) -> Iterator[Fault]:
        """A [`Fault`] while the block runs; `path` is searched for as a regular expression."""
        fault = Fault(method, path, **options)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def meet(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in (method, "*") and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Answer(Exception):
    """Ends a request with a status."""

    def __init__(self, status: int, body: Any = None, **headers: str) -> None:
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def _missing(what: str, **headers: str) -> _Answer:
    return _Answer(404, {"error": f"{what} not found"}, X_Error_Code=_NOT_FOUND[what], **headers)


def _unknown_user() -> _Answer:
    message = "Invalid username or password."
    return _Answer(401, {"error": message}, X_Error_Message=message)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.server.meet(self.command, path)
        try:
            if fault is not None and fault.cut:
                self.rfile.read(length // 2)
                self.close_connection = True
                return
            self.body = self.rfile.read(length) if length else self._chunked()
            if fault is not None:
                self.server.closing.wait(fault.seconds)
                if fault.status is not None:
                    raise _Answer(fault.status, fault.body or {"error": "as told"}, **fault.headers)
            with self.server.lock:
                self._route(path)
        except _Answer as answer:
            self._send(answer.status, answer.body, answer.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _chunked(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return b""
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = dict(headers or {})
        headers.setdefault(
            "Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json"
        )
        headers.setdefault("Content-Length", str(len(content)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # --- who asks for what ------------------------------------------------------------------------------------------

    def _user(self) -> tuple[str, bool] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not token:
            return None
        if token not in self.server.users:
            message = "Invalid credentials in Authorization header"
            raise _Answer(401, {"error": message}, X_Error_Message=message)
        return self.server.users[token]

    def _writer(self, namespace: str) -> None:
        user = self._user()
        if user is None:
            raise _Answer(
                401, {"error": "Invalid username or password."}, X_Error_Message="Invalid username or password."
            )
        if user[0] != namespace or not user[1]:
            message = "You don't have the rights to write in this namespace"
            raise _Answer(403, {"error": message}, X_Error_Message=message)

    def _repository(self, kind: str, name: str) -> Repository:
        """The repository, if the one who asks may see it; the real Hub hides what is missing from strangers."""
        user = self._user()
        found = self.server.repositories.get((kind, name))
        visible = found is not None and (not found.private or (user is not None and user[0] == name.split("/")[0]))
        if found is not None and visible:
            return found
        if user is None:
            raise _Answer(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        raise _missing("repo")

    @staticmethod
    def _commit(repository: Repository, revision: str) -> str:
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise _missing("revision")
        return oid

    def _route(self, path: str) -> None:
        for methods, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                getattr(self, action)(**match.groupdict())
                return
        raise _missing("entry")

    # --- accounts and repositories ----------------------------------------------------------------------------------

    def _whoami(self) -> None:
        user = self._user()
        if user is None:
            raise _Answer(
                401, {"error": "Invalid username or password."}, X_Error_Message="Invalid username or password."
            )
        role = "write" if user[1] else "read"
        raise _Answer(
            200,
            {"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": {"role": role, "displayName": "t"}}},
        )

    def _create(self) -> None:
        asked = json.loads(self.body)
        kind = asked.get("type") or "model"
        user = self._user()
        namespace = asked.get("organization") or (user[0] if user else "")
        self._writer(namespace)
        name = f"{namespace}/{asked['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        if (kind, name) in self.server.repositories:
            raise _Answer(409, {"error": "You already created this repo", "url": f"{self.server.url}/{prefix}{name}"})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repository = Repository(kind, name, private, asked.get("sdk"))
        repository.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.server.repositories[kind, name] = repository
        raise _Answer(200, {"url": f"{self.server.url}/{prefix}{name}", "name": name, "id": name})

    def _settings(self, kind: str, name: str) -> None:
        repository = self._repository(kind, name)
        self._writer(name.split("/")[0])
        asked = json.loads(self.body)
        if "visibility" in asked:
            repository.private = asked["visibility"] == "private"
        raise _Answer(200, {"private": repository.private})

    def _branch(self, kind: str, name: str, branch: str) -> None:
        repository = self._repository(kind, name)
        self._writer(name.split("/")[0])
        if branch in repository.branches:
            raise _Answer(409, {"error": "Reference already exists"})
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repository.branches[branch] = self._commit(repository, start)
        raise _Answer(200, {})

    def _refs(self, kind: str, name: str) -> None:
        repository = self._repository(kind, name)
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oid}
            for branch, oid in repository.branches.items()
        ]
        raise _Answer(200, {"branches": branches, "tags": [], "converts": []})

    def _validate(self) -> None:
        content = json.loads(self.body)["content"]
        match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        errors = []
        try:
            if match is None or not isinstance(yaml.safe_load(match.group(1)), dict):
                errors.append({"message": "no metadata"})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        raise _Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    # --- uploads ----------------------------------------------------------------------------------------------------

    def _preupload(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        self._writer(name.split("/")[0])
        present = repository.files(self._commit(repository, revision))
        answers = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
            known = present.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if known is None else known.sha256 if known.lfs else known.git_oid,
                }
            )
        raise _Answer(200, {"files": answers})

    def _lfs_batch(self, name: str, prefix: str | None) -> None:
        kind = {None: "model", "datasets/": "dataset", "spaces/": "space"}[prefix]
        self._repository(kind, name)
        self._writer(name.split("/")[0])
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = dict(asked)
            if asked["oid"] not in self.server.objects:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append(answer)
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Answer(400, {"error": "content does not match its hash"})
        self.server.objects[oid] = self.body
        raise _Answer(200, b"")

    def _lfs_get(self, oid: str) -> None:
        if oid not in self.server.objects:
            raise _Answer(404, b"")
        self._content(self.server.objects[oid], {"ETag": f'"{oid}"'})

    def _receive_commit(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        self._writer(name.split("/")[0])
        if revision not in repository.branches:
            raise _missing("revision")
        files = dict(repository.files(revision))
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise _Answer(400, {"error": "an LFS object was not uploaded"})
                files[value["path"]] = Blob(self.server.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                files.pop(value["path"])
            elif key == "deletedFolder":
                for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                    del files[path]
            else:
                raise _Answer(400, {"error": f"unknown operation {key}"})
        oid = repository.commit(revision, files, message)
        raise _Answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    # --- downloads --------------------------------------------------------------------------------------------------

    def _info(self, kind: str, name: str, revision: str | None = None) -> None:
        repository = self._repository(kind, name)
        oid = self._commit(repository, revision or "main")
        files = repository.files(oid)
        readme = files.get("README.md")
        match = re.match(rb"---\n(.*?)\n---", readme.content, re.DOTALL) if readme else None
        card = yaml.safe_load(match.group(1)) if match else {}
        raise _Answer(
            200,
            {
                "_id": hashlib.sha1(name.encode()).hexdigest()[:24],
                "id": name,
                "author": name.split("/")[0],
                "sha": oid,
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "tags": list(card.get("tags", [])),
                "cardData": card,
                "sdk": repository.sdk,
                **({"pipeline_tag": card["pipeline_tag"]} if "pipeline_tag" in card else {}),
                "siblings": [{"rfilename": path} for path in sorted(files)],
            },
        )

    @staticmethod
    def _entry(path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_oid}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
        return entry

    @staticmethod
    def _folder(path: str) -> dict[str, Any]:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}

    def _tree(self, kind: str, name: str, revision: str, folder: str | None = None) -> None:
        repository = self._repository(kind, name)
        files = repository.files(self._commit(repository, revision))
        start = f"{folder}/" if folder else ""
        below = {path: blob for path, blob in files.items() if path.startswith(start)}
        if folder and not below:
            raise _missing("entry")
        recursive = self.query.get("recursive", [""])[0].lower() in ("1", "true")
        folders = {
            "/".join(path.split("/")[:depth])
            for path in below
            for depth in range(start.count("/") + 1, path.count("/") + 1)
        }
        depth = start.count("/")
        entries = [self._folder(path) for path in sorted(folders) if recursive or path.count("/") == depth]
        entries += [
            self._entry(path, blob) for path, blob in sorted(below.items()) if recursive or path.count("/") == depth
        ]
        raise _Answer(200, entries)

    def _paths_info(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        files = repository.files(self._commit(repository, revision))
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        paths = [paths] if isinstance(paths, str) else paths
        entries = [self._entry(path, files[path]) for path in paths if path in files]
        entries += [self._folder(path) for path in paths if any(file.startswith(path + "/") for file in files)]
        raise _Answer(200, entries)

    def _resolve(self, prefix: str | None, name: str, rest: str) -> None:
        kind = {None: "model", "datasets/": "dataset", "spaces/": "space"}[prefix]
        repository = self._repository(kind, name)
        # A branch may hold slashes.
        known = [*repository.branches, *repository.commits]
        revision = max((one for one in known if rest.startswith(f"{one}/")), key=len, default=None)
        if revision is None:
            raise _missing("revision")
        oid = self._commit(repository, revision)
        blob = repository.files(oid).get(rest[len(revision) + 1 :])
        if blob is None:
            raise _missing("entry", X_Repo_Commit=oid)
        if blob.lfs:  # as the real one, which hands on to its content network
            raise _Answer(
                302,
                b"",
                Location=f"{self.server.content_url}/lfs/{blob.sha256}",
                X_Repo_Commit=oid,
                X_Linked_Etag=f'"{blob.sha256}"',
                X_Linked_Size=str(len(blob.content)),
            )
        self._content(blob.content, {"ETag": f'"{blob.git_oid}"', "X-Repo-Commit": oid})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        headers["Accept-Ranges"] = "bytes"
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, content, headers)
            return
        size = len(content)
        first, last = asked.groups()
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= size:
            raise _Answer(416, b"", Content_Range=f"bytes */{size}")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._send(206, content[start:stop], headers)


_REPO = r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", "_whoami"),
    ("POST", r"/api/repos/create", "_create"),
    ("POST", r"/api/validate-yaml", "_validate"),
    ("PUT", _REPO + r"/settings", "_settings"),
    ("POST", _REPO + r"/branch/(?P<branch>.+)", "_branch"),
    ("GET", _REPO + r"/refs", "_refs"),
    ("POST", _REPO + r"/preupload/(?P<revision>.+)", "_preupload"),
    ("POST", _REPO + r"/commit/(?P<revision>.+)", "_receive_commit"),
    ("GET", _REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "_tree"),
    ("POST", _REPO + r"/paths-info/(?P<revision>.+)", "_paths_info"),
    ("GET", _REPO + r"/revision/(?P<revision>.+)", "_info"),
    ("GET", _REPO, "_info"),
    ("POST", r"/(?P<prefix>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "_lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "_lfs_put"),
    ("GET HEAD", r"/lfs/(?P<oid>[0-9a-f]{64})", "_lfs_get"),
    ("GET HEAD", r"/(?P<prefix>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<rest>.+)", "_resolve"),
)
