"""What the stand-in for the Hub answers: one function for each of the client's requests, and the table of them.

Not here: what is kept (`hub_holdings`), lines and faults (`hub_stand_in`). The card check knows a dozen licenses.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_holdings import Entry, Repository

if TYPE_CHECKING:
    from http.server import BaseHTTPRequestHandler

    from hub_stand_in import HubStandIn

LFS_SUFFIXES = {".safetensors", ".ckpt", ".pt", ".bin", ".png", ".jpg", ".jpeg", ".webp"}
LFS_FROM_BYTES = 10_000_000
LICENSES = {
    *("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0"),
    *("cc-by-nc-4.0", "bigscience-openrail-m", "gpl-3.0", "unknown", "other"),
}


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, **headers: str) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


def refuse(status: int, message: str, code: str | None = None) -> Reply:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return as_json({"error": message}, status, **headers)


@dataclass
class Call:
    """A request, parsed."""

    hub: HubStandIn
    handler: BaseHTTPRequestHandler
    body: bytes
    query: dict[str, list[str]]
    parts: tuple[str, ...]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def user(self) -> dict[str, Any] | None:
        scheme, _, token = (self.handler.headers.get("Authorization") or "").partition(" ")
        return self.hub.tokens.get(token) if scheme == "Bearer" else None

    def may_write(self, repo_id: str) -> bool:
        owner = repo_id.partition("/")[0]
        user = self.user
        return user is not None and user["role"] == "write" and owner in (user["name"], *user["orgs"])

    def may_read(self, repo_id: str) -> bool:
        repo, user = self.hub.repos.get(repo_id), self.user
        owner = repo_id.partition("/")[0]
        return repo is not None and (not repo.private or (user is not None and owner in (user["name"], *user["orgs"])))


def route(hub: HubStandIn, handler: BaseHTTPRequestHandler, body: bytes) -> Reply:
    address = urlsplit(handler.path)
    for method, pattern, kind, answer in _ROUTES:
        match = re.fullmatch(pattern, address.path)
        if method == handler.command and match:
            parts = tuple(unquote(part) for part in match.groups())
            call = Call(hub, handler, body, parse_qs(address.query), parts)
            refusal = _check_token(call) or (_check_access(call, kind) if kind else None)
            with hub.lock:
                return refusal or answer(call)
    return refuse(404, f"the stand-in does not serve {handler.command} {address.path}")


def _check_token(call: Call) -> Reply | None:
    if call.handler.headers.get("Authorization") and call.user is None:
        return refuse(401, "Invalid credentials in Authorization header")
    return None


def _check_access(call: Call, kind: str) -> Reply | None:
    repo_id = call.parts[0]
    if not call.may_read(repo_id):
        return refuse(404 if call.user else 401, "Repository not found", "RepoNotFound")
    if kind == "write" and not call.may_write(repo_id):
        return refuse(403, "Forbidden: pass a token with write access to this repository")
    if kind == "read at" and call.hub.repos[repo_id].find(call.parts[1]) is None:
        return refuse(404, f"Invalid rev id: {call.parts[1]}", "RevisionNotFound")
    return None


def _whoami(call: Call) -> Reply:
    user = call.user
    if user is None:
        return refuse(401, "Invalid username or password.")
    token = {"displayName": "test", "role": user["role"], **user.get("token", {})}
    return as_json(
        {
            "type": "user",
            "name": user["name"],
            "orgs": [{"name": name} for name in user["orgs"]],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def _create_repo(call: Call) -> Reply:
    wish = call.json
    if call.user is None:
        return refuse(401, "Invalid username or password.")
    repo_id = f"{wish.get('organization') or call.user['name']}/{wish['name']}"
    if not call.may_write(repo_id):
        return refuse(403, "You don't have the rights to create a model under this namespace")
    answer = {"url": f"{call.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
    if repo_id in call.hub.repos:
        return as_json({"error": "You already created this model repo", **answer}, 409)
    private = wish.get("visibility") == "private" or wish.get("private") is True
    repo = call.hub.repos[repo_id] = Repository(private)
    repo.commit("main", "initial commit", {".gitattributes": repo.add_blob(b"*.safetensors filter=lfs\n")})
    return as_json(answer)


def _create_branch(call: Call) -> Reply:
    repo, name = call.hub.repos[call.parts[0]], call.parts[1]
    if name in repo.refs:
        return refuse(409, "Reference already exists")
    start = repo.find(call.json.get("startingPoint", "main") if call.body else "main")
    repo.refs[name] = [start]
    return as_json({})


def _validate_card(call: Call) -> Reply:
    front = re.match(r"---\n(.*?)\n---", call.json["content"], re.DOTALL)
    try:
        facts = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError as error:
        return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    errors = []
    if "license" in facts and facts["license"] not in LICENSES:
        errors.append({"message": f'"license" must be one of {sorted(LICENSES)}'})
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", facts.get("base_model", "a/b")):
        errors.append({"message": '"base_model" must be a Hub id'})
    warnings = [] if facts else [{"message": "empty or missing yaml metadata in repo card"}]
    return as_json({"errors": errors, "warnings": warnings}, 400 if errors else 200)


def _preupload(call: Call) -> Reply:
    repo, (_, revision) = call.hub.repos[call.parts[0]], call.parts
    head = repo.find(revision)
    if head is None:
        return refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    files = []
    for wish in call.json["files"]:
        large = Path(wish["path"]).suffix in LFS_SUFFIXES or wish["size"] > LFS_FROM_BYTES
        there = head.tree.get(wish["path"])
        facts = {"path": wish["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        files.append(facts | ({"oid": there.sha256 or there.oid} if there else {}))
    return as_json({"files": files})


def _lfs_batch(call: Call) -> Reply:
    return as_json({"transfer": "basic", "objects": [_lfs_object(call, wish) for wish in call.json["objects"]]})


def _lfs_object(call: Call, wish: dict[str, Any]) -> dict[str, Any]:
    hub, oid, size = call.hub, wish["oid"], wish["size"]
    if (hub.lfs_folder / oid).exists() or hub.xet_hash(oid):
        return {"oid": oid, "size": size}
    upload: dict[str, Any] = {"href": f"{hub.url}/_lfs/{oid}"}
    if hub.part_bytes is not None and size > hub.part_bytes:
        parts = -(-size // hub.part_bytes)
        upload["href"] = f"{hub.url}/_lfs/{oid}/complete"
        upload["header"] = {"chunk_size": str(hub.part_bytes)} | {
            str(part): f"{hub.url}/_lfs/{oid}/{part}" for part in range(1, parts + 1)
        }
    verify = {"href": f"{hub.url}/_lfs/{oid}/verify"}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}


def _store_object(call: Call) -> Reply:
    oid = call.parts[0]
    call.hub.bytes_received[oid] = call.hub.bytes_received.get(oid, 0) + len(call.body)
    if hashlib.sha256(call.body).hexdigest() != oid:
        return refuse(400, "the content does not have the announced sha256")
    (call.hub.lfs_folder / oid).write_bytes(call.body)
    return Reply()


def _store_part(call: Call) -> Reply:
    oid, part = call.parts
    call.hub.bytes_received[oid] = call.hub.bytes_received.get(oid, 0) + len(call.body)
    (call.hub.lfs_folder / f"{oid}.{part}").write_bytes(call.body)
    return Reply(headers={"ETag": f'"{part}"'})


def _complete_parts(call: Call) -> Reply:
    oid, folder = call.parts[0], call.hub.lfs_folder
    content = b"".join((folder / f"{oid}.{part['partNumber']}").read_bytes() for part in call.json["parts"])
    if hashlib.sha256(content).hexdigest() != oid:
        return refuse(400, "the parts do not make the announced sha256")
    (folder / oid).write_bytes(content)
    return as_json({})


def _verify_object(call: Call) -> Reply:
    path = call.hub.lfs_folder / call.parts[0]
    good = path.exists() and path.stat().st_size == call.json["size"]
    return as_json({}) if good else refuse(404, "no such object")


def _commit(call: Call) -> Reply:
    repo, (repo_id, revision) = call.hub.repos[call.parts[0]], call.parts
    head = repo.find(revision)
    if head is None:
        return refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    lines = [json.loads(line) for line in call.body.splitlines()]
    header, tree = lines[0]["value"], dict(head.tree)
    if header.get("parentCommit") not in (None, head.oid):
        return refuse(412, "A commit has happened since. Please refresh and try again.")
    for line in lines[1:]:
        problem = _apply(call.hub, repo, tree, line["key"], line["value"])
        if problem:
            return refuse(400, problem)
    opens_request = "create_pr" in call.query
    ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.refs) + 1}" if opens_request else revision
    commit = repo.commit(ref, header["summary"], tree)
    answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{call.hub.url}/{repo_id}/commit/{commit.oid}"}
    if opens_request:
        answer["pullRequestUrl"] = f"{call.hub.url}/{repo_id}/discussions/{ref.rpartition('/')[2]}"
    return as_json(answer)


def _apply(hub: HubStandIn, repo: Repository, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> str | None:
    """One line of a commit; returns what is wrong with it."""
    path = value["path"]
    if key == "file":
        tree[path] = repo.add_blob(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        sha256 = value["oid"]
        if not (hub.lfs_folder / sha256).exists() and not hub.xet_hash(sha256):
            return f"{path}: its content was never uploaded"
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {value['size']}\n".encode()
        tree[path] = Entry(repo.add_blob(pointer).oid, value["size"], sha256)
    else:
        gone = [p for p in tree if p == path or (key == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
        if not gone:
            return f"{path}: a file with this name doesn't exist"
        for each in gone:
            del tree[each]
    return None


def _xet_token(call: Call) -> Reply:
    store, expires = f"local://{call.hub.xet_store}", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
    return as_json({"casUrl": store, "accessToken": "xet", "exp": expires}, **headers)


def _model_info(call: Call) -> Reply:
    repo_id, revision = call.parts[0], call.parts[1] if len(call.parts) > 1 else "main"
    repo = call.hub.repos[repo_id]
    commit = repo.find(revision)
    facts = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": repo.private, "tags": []}
    card = commit.tree.get("README.md")
    front = re.match(r"---\n(.*?)\n---", repo.blobs[card.oid].decode(), re.DOTALL) if card else None
    files = [
        {"rfilename": path, "size": entry.size} for path, entry in commit.tree.items()
    ]  # sizes as with ?blobs=true
    return as_json(facts | {"siblings": files} | ({"cardData": yaml.safe_load(front[1])} if front else {}))


def _tree_entry(hub: HubStandIn, path: str, entry: Entry) -> dict[str, Any]:
    facts: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
    if entry.sha256:
        facts["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}
        if xet_hash := hub.xet_hash(entry.sha256):
            facts["xetHash"] = xet_hash
    return facts


def _tree(call: Call) -> Reply:
    files = call.hub.files(call.parts[0], call.parts[1])
    return as_json([_tree_entry(call.hub, path, entry) for path, entry in sorted(files.items())])


def _paths_info(call: Call) -> Reply:
    files = call.hub.files(call.parts[0], call.parts[1])
    wanted = call.json["paths"] if call.body[:1] == b"{" else parse_qs(call.body.decode())["paths"]
    return as_json([_tree_entry(call.hub, path, files[path]) for path in wanted if path in files])


def _refs(call: Call) -> Reply:
    repo = call.hub.repos[call.parts[0]]
    found = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": log[-1].oid} for name, log in repo.refs.items()
    ]
    requests = [entry | {"ref": entry["name"]} for entry in found if entry["name"].startswith("refs/pr/")]
    branches = [entry for entry in found if not entry["name"].startswith("refs/pr/")]
    return as_json({"branches": branches, "converts": [], "tags": [], "pullRequests": requests})


def _commits(call: Call) -> Reply:
    history = call.hub.repos[call.parts[0]].refs[call.parts[1]]
    date = "2026-11-22T00:00:00.000Z"
    return as_json(
        [{"id": c.oid, "title": c.title, "message": "", "authors": [], "date": date} for c in reversed(history)]
    )


def _resolve(call: Call) -> Reply:
    repo_id, revision, path = call.parts
    hub, repo = call.hub, call.hub.repos[repo_id]
    commit = repo.find(revision)
    entry = commit.tree.get(path)
    if entry is None:
        reply = refuse(404, "Entry not found", "EntryNotFound")
        reply.headers["X-Repo-Commit"] = commit.oid
        return reply
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.sha256 or entry.oid}"', "Accept-Ranges": "bytes"}
    if entry.sha256 is None:
        return _slice(call, repo.blobs[entry.oid], headers)
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    if xet_hash := hub.xet_hash(entry.sha256):
        refresh = f"{hub.url}/api/models/{repo_id}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{refresh}>; rel="xet-auth"'}
        return Reply(
            200, b"", headers | {"Content-Length": str(entry.size)} if call.handler.command == "HEAD" else headers
        )
    return _slice(call, (hub.lfs_folder / entry.sha256).read_bytes(), headers)


def _slice(call: Call, content: bytes, headers: dict[str, str]) -> Reply:
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.handler.headers.get("Range") or "")
    if not wanted:
        return Reply(200, content, headers)
    start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
    part = content[start : end + 1]
    return Reply(206, part, headers | {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"})


def _auth_check(_call: Call) -> Reply:
    return as_json({})


_ID = "([^/]+/[^/]+)"
_REPO = f"/api/models/{_ID}"
_ROUTES: list[tuple[str, str, str | None, Callable[[Call], Reply]]] = [
    ("GET", "/api/whoami-v2", None, _whoami),
    ("POST", "/api/repos/create", None, _create_repo),
    ("POST", "/api/validate-yaml", None, _validate_card),
    ("GET", f"{_REPO}/auth-check", "read", _auth_check),
    ("GET", f"{_REPO}/auth-check/write", "write", _auth_check),
    ("POST", f"{_REPO}/branch/(.+)", "write", _create_branch),
    ("POST", f"{_REPO}/preupload/([^/]+)", "write", _preupload),
    ("POST", f"{_REPO}/commit/([^/]+)", "write", _commit),
    ("POST", f"/{_ID}\\.git/info/lfs/objects/batch", "write", _lfs_batch),
    ("PUT", "/_lfs/([0-9a-f]{64})", None, _store_object),
    ("PUT", "/_lfs/([0-9a-f]{64})/([0-9]+)", None, _store_part),
    ("POST", "/_lfs/([0-9a-f]{64})/complete", None, _complete_parts),
    ("POST", "/_lfs/([0-9a-f]{64})/verify", None, _verify_object),
    ("GET", f"{_REPO}/xet-write-token/([^/]+)", "write", _xet_token),
    ("GET", f"{_REPO}/xet-read-token/([^/]+)", "read", _xet_token),
    ("GET", f"{_REPO}/tree/([^/]+)", "read at", _tree),
    ("POST", f"{_REPO}/paths-info/([^/]+)", "read at", _paths_info),
    ("GET", f"{_REPO}/commits/([^/]+)", "read at", _commits),
    ("GET", f"{_REPO}/refs", "read", _refs),
    ("GET", f"{_REPO}/revision/([^/]+)", "read at", _model_info),
    ("GET", _REPO, "read", _model_info),
    ("GET", f"/{_ID}/resolve/([^/]+)/(.+)", "read at", _resolve),
    ("HEAD", f"/{_ID}/resolve/([^/]+)/(.+)", "read at", _resolve),
]
