"""A small Hub on loopback, for the real `huggingface_hub` client over real HTTP.

Covered, with the status codes and headers that the client acts on: who am I, create a repository (private or not),
model info, refs, branches, tree and paths-info, README validation, preupload, LFS batch, upload in one part or in
several, verification, commits as ndjson (with deletions, `parentCommit` and pull requests), and downloads (HEAD with
commit and etag, LFS files by redirect, byte ranges). A read or write without the right token is refused.

Not covered, so a test here says nothing about it: xet storage (clients run with HF_HUB_DISABLE_XET=1), datasets and
spaces, copies, discussions beside the pull request's own ref, gated repositories, rate limits, quotas, TLS, webhooks,
.gitignore, and whatever the Hub checks in a card beyond its YAML being a mapping. History is kept as whole trees.

Faults: `drops` says of an LFS object how often the connection is closed in the middle of its upload. `chaos` closes
any connection, at random: in the middle of a request, after it was carried out but before the answer, or in the
middle of the answer. A client process sets it by `POST /_faults/SHARE/SEED`, copies a repository by
`POST /_copy/FROM/TO` and reads what is on a main branch by `GET /_state/REPO`; none of these three is ever disturbed.
"""

import base64
import hashlib
import json
import random
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_FROM = 10 << 20
"""Other files from this size on are LFS objects; `LFS_NAMES` are at any size, as the Hub's .gitattributes say."""
LFS_NAMES = (".safetensors", ".bin", ".onnx", ".png", ".model")


@dataclass(frozen=True)
class File:
    """One file of a commit; an LFS file is stored under its sha256."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """git's own hash: of the content, or of the LFS pointer."""
        data = self.content
        if self.lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n"
            data = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Commit:
    files: dict[str, File]
    message: str
    parent: str | None
    sha: str


@dataclass
class Repository:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def commit(self, ref: str, files: dict[str, File], message: str, parent: str | None) -> Commit:
        seed = json.dumps(
            [self.name, ref, message, parent, {n: f.blob_id for n, f in files.items()}, len(self.commits)]
        )
        made = Commit(files, message, parent, hashlib.sha1(seed.encode()).hexdigest())
        self.commits[made.sha] = made
        self.refs[ref] = made.sha
        return made

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


class Hub:
    """The state, and the server's thread. Use as a context manager; `url` is its HF_ENDPOINT."""

    def __init__(self, token: str = "hf_" + "t" * 34, user: str = "me", part_size: int | None = None) -> None:
        self.token, self.user, self.part_size = token, user, part_size
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.drops: dict[str, int] = {}
        self.dropped = 0
        self.chaos: tuple[float, random.Random] | None = None
        self.requests: list[str] = []
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def storage(self) -> str:
        """Large files come from another host than the Hub itself."""
        return f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Content by path."""
        commit = self.repositories[name].find(revision)
        assert commit is not None
        return {path: file.content for path, file in commit.files.items()}

    def create(self, name: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repository:
        """A repository with its first commit, as if someone had made it before."""
        made = self.repositories[name] = Repository(name, private)
        first = {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}
        made.commit("main", first, "initial commit", None)
        if files is not None:
            both = {**first, **{path: File(content, _is_lfs(path, len(content))) for path, content in files.items()}}
            made.commit("main", both, "files", made.refs["main"])
        return made


def _is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_NAMES) or size >= LFS_FROM)


class _Stop(Exception):
    """Ends a request with this status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REV = r"(?P<rev>[^/]+)"


class _Broken(Exception):
    """The connection was closed on purpose."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    fault: str | None = None
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet

    ROUTES: tuple[tuple[str, str, str], ...] = (
        ("POST", r"/_faults/(?P<share>[\d.]+)/(?P<seed>\d+)", "faults"),
        ("POST", rf"/_copy/{_REPO}/to/(?P<target>.+)", "copy"),
        ("GET", rf"/_state/{_REPO}", "state"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", rf"/api/models/{_REPO}/refs", "refs"),
        ("POST", rf"/api/models/{_REPO}/branch/{_REV}", "branch"),
        ("POST", rf"/api/models/{_REPO}/preupload/{_REV}", "preupload"),
        ("POST", rf"/api/models/{_REPO}/commit/{_REV}", "commit"),
        ("GET", rf"/api/models/{_REPO}/tree/{_REV}(?:/(?P<path>.*))?", "tree"),
        ("POST", rf"/api/models/{_REPO}/paths-info/{_REV}", "paths"),
        ("GET", rf"/api/models/{_REPO}(?:/revision/{_REV})?", "info"),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?", "upload"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", "complete"),
        ("POST", r"/lfs/verify", "verify"),
        ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "object"),
        ("HEAD", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "resolve"),
        ("GET", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "resolve"),
    )

    # The wire --------------------------------------------------------------------------------------------------

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.hub.requests.append(f"{self.command} {address.path}")
        self.fault = None if address.path.startswith("/_") else self._draw_fault()
        try:
            self._route(address.path)
        except _Broken:
            self.hub.dropped += 1
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _draw_fault(self) -> str | None:
        with self.hub.lock:
            if self.hub.chaos is None or self.hub.chaos[1].random() >= self.hub.chaos[0]:
                return None
            return self.hub.chaos[1].choice(["request", "before the answer", "answer"])

    def _route(self, address: str) -> None:
        if self.fault == "request":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            raise _Broken
        for method, pattern, name in self.ROUTES:
            found = re.fullmatch(pattern, address)
            if method == self.command and found:
                action: Callable[..., None] = getattr(self, f"_{name}")
                groups = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                try:
                    action(**groups)
                except _Stop as stop:
                    self._drain()
                    headers = {"X-Error-Message": stop.message}
                    if stop.code is not None:
                        headers["X-Error-Code"] = stop.code
                    self._send(stop.status, json.dumps({"error": stop.message}).encode(), headers)
                return
        self._drain()
        self._send(501, f"{self.command} {address} is not part of this Hub".encode())

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if self.fault == "before the answer":
            raise _Broken
        self.send_response(status)
        fields = {"Content-Length": str(len(body)), **(headers or {})}
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.fault else body)
        if self.fault:
            self.wfile.flush()
            raise _Broken

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _body(self) -> bytes:
        self._read = True
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _drain(self) -> None:
        """A body that nobody read would be taken for the next request."""
        if not getattr(self, "_read", False) and self.command in ("POST", "PUT"):
            self._body()

    def handle_one_request(self) -> None:
        self._read = False
        super().handle_one_request()

    # Who may -----------------------------------------------------------------------------------------------------

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _must_write(self, name: str) -> None:
        if not self._known():
            raise _Stop(401, "Invalid username or password.")
        if name.partition("/")[0] not in (self.hub.user, "my-org"):
            raise _Stop(403, f"You don't have the rights to write to {name}.")

    def _repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._known()):
            raise _Stop(404 if self._known() else 401, "Repository not found", "RepoNotFound")
        return found

    def _at(self, repository: Repository, revision: str) -> Commit:
        found = repository.find(revision)
        if found is None:
            raise _Stop(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # For tests of faults -----------------------------------------------------------------------------------------

    def _faults(self, share: str, seed: str) -> None:
        self.hub.chaos = (float(share), random.Random(int(seed))) if float(share) else None
        self._json({})

    def _copy(self, repo: str, target: str) -> None:
        files = {name: content for name, content in self.hub.files(repo).items() if name != ".gitattributes"}
        self.hub.create(target, files)
        self._json({})

    def _state(self, repo: str) -> None:
        found = self.hub.repositories.get(repo)
        commit = None if found is None else found.find("main")
        files = {} if commit is None else {path: file.sha256 for path, file in commit.files.items()}
        self._json({"commits": len(found.commits) if found else 0, "files": files})

    # Accounts and repositories -----------------------------------------------------------------------------------

    def _whoami(self) -> None:
        if not self._known():
            raise _Stop(401, "Invalid username or password.")
        self._json({"type": "user", "name": self.hub.user, "orgs": [{"type": "org", "name": "my-org"}]})

    def _create(self) -> None:
        wanted = json.loads(self._body())
        name = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        self._must_write(name)
        with self.hub.lock:
            if name in self.hub.repositories:
                message = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
                return self._json(message, 409)
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.create(name, private=private)
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _validate(self) -> None:
        content = json.loads(self._body())["content"]
        block = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            good = block is not None and isinstance(yaml.safe_load(block[1]), dict)
        except yaml.YAMLError:
            good = False
        if good:
            self._json({"errors": [], "warnings": []})
        else:
            self._json({"errors": [{"message": "the metadata is no YAML mapping"}], "warnings": []}, 400)

    def _info(self, repo: str, rev: str = "main") -> None:
        repository = self._repository(repo)
        commit = self._at(repository, rev)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        shown = {"_id": "0" * 24, "id": repo, "modelId": repo, "sha": commit.sha, "siblings": siblings, "tags": []}
        self._json({**shown, "private": repository.private, "disabled": False, "gated": False, "downloads": 0})

    def _refs(self, repo: str) -> None:
        branches, requests = [], []
        for name, sha in self._repository(repo).refs.items():
            entry = {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            (requests if name.startswith("refs/pr/") else branches).append(entry)
        for entry in requests:
            entry["ref"] = entry["name"]
        asked = "include_prs" in self.query
        self._json({"branches": branches, "tags": [], "converts": [], "pullRequests": requests if asked else None})

    def _branch(self, repo: str, rev: str) -> None:
        wanted = json.loads(self._body() or b"{}")
        self._must_write(repo)
        repository = self._repository(repo)
        with self.hub.lock:
            if rev in repository.refs:
                raise _Stop(409, f"Reference already exists: refs/heads/{rev}")
            repository.refs[rev] = self._at(repository, wanted.get("startingPoint", "main")).sha
        self._json({})

    def _entry(self, path: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
        return entry

    def _tree(self, repo: str, rev: str, path: str = "") -> None:
        commit = self._at(self._repository(repo), rev)
        top = f"{path.rstrip('/')}/" if path else ""
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for name, file in sorted(commit.files.items()):
            if not name.startswith(top):
                continue
            folders = name[len(top) :].split("/")[:-1]
            for i in range(len(folders) if deep else min(1, len(folders))):
                folder = top + "/".join(folders[: i + 1])
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
            if deep or not folders:
                entries[name] = self._entry(name, file)
        if path and not entries:
            raise _Stop(404, f"{path} does not exist", "EntryNotFound")
        self._json(list(entries.values()))

    def _paths(self, repo: str, rev: str) -> None:
        body = self._body().decode()
        kind = self.headers.get("Content-Type", "")
        wanted = json.loads(body)["paths"] if "json" in kind else parse_qs(body).get("paths", [])
        commit = self._at(self._repository(repo), rev)
        paths = [wanted] if isinstance(wanted, str) else wanted
        self._json([self._entry(path, commit.files[path]) for path in paths if path in commit.files])

    # Uploads -----------------------------------------------------------------------------------------------------

    def _preupload(self, repo: str, rev: str) -> None:
        wanted = json.loads(self._body())
        self._must_write(repo)
        there = self._at(self._repository(repo), rev).files
        files = []
        for file in wanted["files"]:
            path = file["path"]
            mode = "lfs" if _is_lfs(path, file["size"]) else "regular"
            oid = None
            if path in there:
                oid = there[path].sha256 if there[path].lfs else there[path].blob_id
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _batch(self, repo: str) -> None:
        wanted = json.loads(self._body())
        self._must_write(repo)
        self._repository(repo)
        several = self.hub.part_size if "multipart" in wanted["transfers"] else None
        objects = []
        for entry in wanted["objects"]:
            oid, size = entry["oid"], entry["size"]
            found: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}", "header": {}}
                if several is not None and size > several:
                    parts = {str(i + 1): f"{upload['href']}/{i + 1}" for i in range(-(-size // several))}
                    upload = {"href": f"{upload['href']}/complete", "header": {"chunk_size": str(several), **parts}}
                found["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            objects.append(found)
        transfer = "basic" if several is None else "multipart"
        self._json({"transfer": transfer, "objects": objects})

    def _upload(self, oid: str, part: str | None = None) -> None:
        if self.hub.drops.get(oid):
            with self.hub.lock:
                self.hub.drops[oid] -= 1
                self.hub.dropped += 1
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 1000)) // 2))
            self.close_connection = True
            self.connection.close()
            self.rfile.close()
            return
        content = self._body()
        if part is None:
            if hashlib.sha256(content).hexdigest() != oid:
                raise _Stop(400, "The content does not have the announced sha256")
            self.hub.objects[oid] = content
        else:
            self.hub.parts[oid, int(part)] = content
        self._send(200, b"", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def _complete(self, oid: str) -> None:
        wanted = json.loads(self._body())
        content = b"".join(self.hub.parts[oid, part["partNumber"]] for part in wanted["parts"])
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Stop(400, "The parts do not have the announced sha256")
        self.hub.objects[oid] = content
        self._json({})

    def _verify(self) -> None:
        wanted = json.loads(self._body())
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Stop(404, "The object is not there")
        self._json({})

    def _commit(self, repo: str, rev: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines() if line.strip()]
        self._must_write(repo)
        repository = self._repository(repo)
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            base = self._at(repository, rev)
            if header.get("parentCommit") not in (None, base.sha):
                raise _Stop(412, "A commit has happened since. Please refresh and try again.")
            files = dict(base.files)
            for line in lines:
                self._apply(files, line["key"], line["value"])
            ref, pull_request = rev, None
            if self.query.get("create_pr") == ["1"]:
                repository.pull_requests += 1
                ref = f"refs/pr/{repository.pull_requests}"
                pull_request = f"{self.hub.url}/{repo}/discussions/{repository.pull_requests}"
            made = repository.commit(ref, files, header["summary"], base.sha)
        address = f"{self.hub.url}/{repo}/commit/{made.sha}"
        self._json({"success": True, "commitOid": made.sha, "commitUrl": address, "pullRequestUrl": pull_request})

    def _apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise _Stop(400, f"The LFS object of {value['path']} was not uploaded")
            files[value["path"]] = File(self.hub.objects[value["oid"]], True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise _Stop(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            for path in [path for path in files if path.startswith(value["path"])]:
                del files[path]
        elif key != "header":
            raise _Stop(400, f"{key} is not part of this Hub")

    # Downloads ---------------------------------------------------------------------------------------------------

    def _resolve(self, repo: str, rev: str, path: str) -> None:
        commit = self._at(self._repository(repo), rev)
        if path not in commit.files:
            raise _Stop(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.blob_id}"'}
        if file.lfs:
            linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            self.hub.objects.setdefault(file.sha256, file.content)
            self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/lfs/{file.sha256}"})
        else:
            self._send(200, file.content, headers)

    def _object(self, oid: str) -> None:
        content = self.hub.objects.get(oid)
        if content is None:
            raise _Stop(404, "Entry not found", "EntryNotFound")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, content, {"ETag": f'"{oid}"'})
            return
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        where = {"Content-Range": f"bytes {first}-{last}/{len(content)}", "ETag": f'"{oid}"'}
        self._send(206, content[first : last + 1], where)
