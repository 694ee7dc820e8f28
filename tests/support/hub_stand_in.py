"""A stand-in for the Hugging Face Hub on the loopback address, so that tests drive the real `huggingface_hub` client.

What is here: whoami with token roles, creating repositories, branches and pull-request refs, preupload, LFS in one
part or several, Xet through a local store, commits, tree, model info, refs, commit lists, the card check, and downloads
with ranges. Any request can be made to fail (`HubStandIn.fail`). What is not: sign-in, organisations beyond names,
tags, discussions, gated access, rate-limit accounting, moving and deleting repositories, a CAS over HTTP (Xet goes to
`local://`), downloads of Xet files without Xet, redirects to a CDN, TLS.

In this file: the server, its lines and its faults. What it keeps is in `hub_holdings`, what it answers in `hub_answers`.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_answers import Reply, refuse, route
from hub_holdings import Entry, Repository, xet_hashes

if TYPE_CHECKING:
    import pytest


def use_as_hub(monkeypatch: pytest.MonkeyPatch, server: HubStandIn) -> None:
    """Let huggingface_hub take the stand-in for the Hub, as it does with `HF_ENDPOINT`, which it reads at import.

    Addresses of downloads come from a template of their own: without it they lead to the real Hub.
    """
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@dataclass
class Fault:
    """What goes wrong with a matching request; see `HubStandIn.fail`."""

    method: str
    path_part: str
    times: int
    skip: int
    status: int | None
    error_code: str | None
    message: str
    retry_after: int | None
    after_work: bool
    drop_after: int | None
    drop_reply_after: int | None
    stall_seconds: float


class HubStandIn:
    """The server. Use as a context manager.

    Args:
        folder: where large objects and the Xet store are kept.
        part_bytes: LFS uploads above this size come in parts of it; None: one part.

    Attributes:
        url: its address, for `HF_ENDPOINT` or `HfApi(endpoint=...)`.
        tokens: token -> {"name", "role" ("read", "write"), "orgs": list of names}.
        repos: id -> Repository.
        requests: (method, path, status) in order of arrival; status 0: no answer was sent.
        bytes_received: sha256 -> bytes that came in for it by LFS, repeats included.
    """

    def __init__(self, folder: Path, part_bytes: int | None = None) -> None:
        self.folder = folder
        self.part_bytes = part_bytes
        self.tokens: dict[str, dict[str, Any]] = {}
        self.repos: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.bytes_received: dict[str, int] = {}
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.xet_store.mkdir(parents=True, exist_ok=True)
        self.lfs_folder.mkdir(exist_ok=True)

    @property
    def lfs_folder(self) -> Path:
        return self.folder / "lfs"

    @property
    def xet_store(self) -> Path:
        return self.folder / "xet"

    def __enter__(self) -> HubStandIn:
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def add_user(self, token: str, name: str, role: str = "write", orgs: tuple[str, ...] = ()) -> str:
        self.tokens[token] = {"name": name, "role": role, "orgs": list(orgs)}
        return token

    def fail(
        self,
        method: str,
        path_part: str,
        *,
        times: int = 1,
        skip: int = 0,
        status: int | None = None,
        error_code: str | None = None,
        message: str = "made to fail by the test",
        retry_after: int | None = None,
        after_work: bool = False,
        drop_after: int | None = None,
        drop_reply_after: int | None = None,
        stall_seconds: float = 0.0,
    ) -> Fault:
        """Make the next matching requests fail.

        Args:
            method, path_part: which requests: their method, and a piece of their path.
            times, skip: so many fail, after so many that do not.
            status: answer this, with `message`, `error_code` and `retry_after` in the headers.
            after_work: do the work first, then fail: the answer is lost and the deed is done.
            drop_after: reset the connection after this many bytes of the request's body.
            drop_reply_after: reset it after this many bytes of the answer's body.
            stall_seconds: say nothing for so long, then continue (or fail as asked).
        """
        fault = Fault(
            *(method, path_part, times, skip, status, error_code, message, retry_after),
            *(after_work, drop_after, drop_reply_after, stall_seconds),
        )
        self.faults.append(fault)
        return fault

    def count(self, method: str, path_part: str) -> int:
        return sum(m == method and path_part in path for m, path, _ in self.requests)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, Entry]:
        commit = self.repos[repo_id].find(revision)
        assert commit is not None
        return commit.tree

    def titles(self, repo_id: str, revision: str = "main") -> list[str]:
        """Commit titles of a ref, oldest first; the first is the Hub's own."""
        return [commit.title for commit in self.repos[repo_id].refs[revision]]

    def sha256_of(self, repo_id: str, path: str, revision: str = "main") -> str:
        entry = self.files(repo_id, revision)[path]
        return entry.sha256 or hashlib.sha256(self.repos[repo_id].blobs[entry.oid]).hexdigest()

    def text_of(self, repo_id: str, path: str, revision: str = "main") -> str:
        return self.repos[repo_id].blobs[self.files(repo_id, revision)[path].oid].decode()

    def xet_hash(self, sha256: str) -> str | None:
        return xet_hashes(self.xet_store).get(sha256)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path_part in path and fault.times > 0:
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        """Hang up on everyone, so that no client keeps a line to a server that is gone."""
        super().server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what the tests are about; anything else is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _ConnectionDroppedError(Exception):
    """The stand-in cut the line on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *_: object) -> None:
        """Tests read `HubStandIn.requests` instead."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        fault = self.hub.take_fault(self.command, self.path)
        status = 0
        try:
            if fault and fault.stall_seconds:
                self.hub.closing.wait(fault.stall_seconds)
            body = self._read_body(fault.drop_after if fault else None)
            reply = self._answer(body, fault)
            self._send(reply, fault.drop_reply_after if fault else None)
            status = reply.status
        except (_ConnectionDroppedError, ConnectionError):
            self.close_connection = True
        finally:
            self.hub.requests.append((self.command, self.path, status))

    def _answer(self, body: bytes, fault: Fault | None) -> Reply:
        failing = fault is not None and fault.status is not None
        reply = Reply() if failing and not fault.after_work else route(self.hub, self, body)
        if not failing:
            return reply
        reply = refuse(fault.status, fault.message, fault.error_code)
        if fault.retry_after is not None:
            reply.headers["Retry-After"] = str(fault.retry_after)
        return reply

    def _read_body(self, drop_after: int | None) -> bytes:
        parts, total = [], 0
        for block in self._body_blocks():
            parts.append(block)
            total += len(block)
            if drop_after is not None and total >= drop_after:
                self._reset()
        if drop_after is not None:
            self._reset()
        return b"".join(parts)

    def _body_blocks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            block = self.rfile.read(min(left, 1 << 16))
            if not block:
                raise _ConnectionDroppedError
            left -= len(block)
            yield block

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise _ConnectionDroppedError

    def _send(self, reply: Reply, drop_after: int | None) -> None:
        self.send_response(reply.status)
        headers = {"Content-Length": str(len(reply.body)), "X-Request-Id": "stand-in"} | reply.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if drop_after is not None:
            self.wfile.write(reply.body[:drop_after])
            self.wfile.flush()
            self._reset()
        if self.command != "HEAD":
            self.wfile.write(reply.body)
