"""A stand-in of the model hub on this machine: what huggingface_hub calls to push a model and to load it.

Repositories are kept in memory: commits of files, branches, and which are private. Weights take the way of LFS.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN, OWNER = "hf_of_the_stand_in", "someone"


class Repository:
    def __init__(self, private):
        self.private, self.branches, self.commits, self.messages = private, {}, {}, []
        self.commit("main", {}, "initial commit")

    def commit(self, branch, files, message):
        """Put files, by name, on a branch; the id of the commit."""
        self.messages.append(message)
        oid = hashlib.sha1(f"{id(self)} {len(self.messages)}".encode()).hexdigest()
        self.branches[branch], self.commits[oid] = oid, dict(files)
        return oid

    def files(self, revision="main"):
        """The bytes of each file, by name."""
        return self.commits[self.branches.get(revision, revision)]


class Hub:
    """The repositories, by id, and the requests that came, each `METHOD path`."""

    def __init__(self):
        self.repositories, self.objects, self.requests, self.url = {}, {}, [], ""
        self.failures = []  # words of paths: the next request of each is answered with an error

    def put(self, name, folder, private=False):
        """A repository with the files of a folder."""
        self.repositories[name] = Repository(private)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.repositories[name].commit("main", files, "put")

    def run(self, code, *arguments, cache, token=TOKEN):
        """Run Python code in a process that knows this hub alone, with a cache of its own; what it printed."""
        cache.mkdir(parents=True, exist_ok=True)
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = kept | own | ({"HF_TOKEN": token} if token else {})
        command = [sys.executable, "-c", code, *map(str, arguments)]
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, env=environment, text=True, check=False, **both)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout


@contextmanager
def stand_in():
    """A hub that answers within."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self._body()
        try:
            if failing := [word for word in self.hub.failures if word in path]:
                self.hub.failures.remove(failing[0])
                raise _Refused(503, "", "out of order")
            for method, pattern, call in ROUTES:
                if self.command in method.split() and (found := re.fullmatch(pattern, path)):
                    self._send(200, *call(self, body, *found.groups()))
                    return
            raise _Refused(404, "", f"no such endpoint: {self.command} {path}")
        except _Refused as error:
            code, kind, message, *more = error.args
            said = {"X-Error-Code": kind, "X-Error-Message": message}
            self._send(code, {"error": message} | dict(*more), said)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status, content, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name, writes=False):
        repository = self.hub.repositories.get(name)
        if repository is None or ((repository.private or writes) and not self._known()):
            raise _Refused(404 if self._known() else 401, "RepoNotFound", "Repository not found")
        return repository

    def _commit_of(self, repository, revision):
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    # --- the endpoints: each takes the body and what its path names, and returns an answer and perhaps headers -------

    def whoami(self, body):
        if not self._known():
            raise _Refused(401, "", "Invalid username or password.")
        return ({"type": "user", "name": OWNER, "orgs": []},)

    def yaml(self, body):
        return ({"errors": [], "warnings": []},)

    def create(self, body):
        if not self._known():
            raise _Refused(401, "", "Invalid username or password.")
        given = json.loads(body)
        if (given.get("organization") or OWNER) != OWNER:
            raise _Refused(403, "", f"You don't have the rights to create a model under {given['organization']}")
        name = f"{OWNER}/{given['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            raise _Refused(409, "", "You already created this model repo", {"url": url})
        self.hub.repositories[name] = Repository(given.get("visibility") == "private" or bool(given.get("private")))
        return ({"url": url, "name": name},)

    def branch(self, body, name, branch):
        repository = self._repository(name, writes=True)
        if branch in repository.branches:
            raise _Refused(409, "", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return ({},)

    def preupload(self, body, name, revision):
        self._commit_of(self._repository(name, writes=True), revision)
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for one in json.loads(body)["files"]
        ]
        return ({"files": files},)

    def lfs_batch(self, body, name):
        self._repository(name, writes=True)
        objects = [
            {
                "oid": one["oid"],
                "size": one["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}},
            }
            for one in json.loads(body)["objects"]
        ]
        return ({"transfer": "basic", "objects": objects},)

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "", "the content is not that of its hash")
        self.hub.objects[oid] = body
        return (b"",)

    def commit(self, body, name, revision):
        repository = self._repository(name, writes=True)
        files, message = dict(repository.commits[self._commit_of(repository, revision)]), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refused(400, "", f"unknown operation {line['key']}")
        oid = repository.commit(revision, files, message)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        return ({"success": True, "commitOid": oid, "commitUrl": url},)

    def info(self, body, name, revision=None):
        repository = self._repository(name)
        oid = self._commit_of(repository, revision or "main")
        siblings = [{"rfilename": file} for file in sorted(repository.commits[oid])]
        return ({"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []},)

    def tree(self, body, name, revision, folder=None):
        repository = self._repository(name)
        files = repository.commits[self._commit_of(repository, revision)]
        if folder:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        rows = [
            {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for file, content in sorted(files.items())
        ]
        return (rows,)

    def resolve(self, body, name, revision, file):
        repository = self._repository(name)
        oid = self._commit_of(repository, revision)
        if file not in repository.commits[oid]:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        content = repository.commits[oid][file]
        return content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": oid}


_NAME, _REV = r"([\w.-]+/[\w.-]+)", r"([\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.yaml),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", f"/api/models/{_NAME}/branch/{_REV}", _Handler.branch),
    ("POST", f"/api/models/{_NAME}/preupload/{_REV}", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]+)", _Handler.lfs_put),
    ("POST", f"/api/models/{_NAME}/commit/{_REV}", _Handler.commit),
    ("GET", f"/api/models/{_NAME}", _Handler.info),
    ("GET", f"/api/models/{_NAME}/revision/{_REV}", _Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/{_REV}(?:/(.+))?", _Handler.tree),
    ("GET HEAD", f"/{_NAME}/resolve/{_REV}/(.+)", _Handler.resolve),
]
