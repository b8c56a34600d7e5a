"""A local server with the part of the Hugging Face hub's interface that downloads use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPOSITORY = "someone/networks"
COMMIT = "c" * 40
REVISIONS = ("main", "v1", COMMIT)


@contextlib.contextmanager
def hub(folder: Path, *, damaged: str = "") -> Iterator[dict[str, str]]:
    """Serve a folder's files as ``REPOSITORY``; yields the environment that points a process to it.

    Args:
        folder: its files.
        damaged: name of a file of which one byte is changed on the way.
    """

    class Handler(BaseHTTPRequestHandler):
        def answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            owner = f"/{REPOSITORY}/resolve/"
            listing = f"/api/models/{REPOSITORY}/tree/"
            if not path.startswith((owner, listing)):
                return self.fail("RepoNotFound")
            revision, _, name = path.removeprefix(owner).removeprefix(listing).partition("/")
            if revision not in REVISIONS:
                return self.fail("RevisionNotFound")
            if path.startswith(listing):
                files = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0"}
                    for p in folder.iterdir()
                ]
                return self.send(json.dumps(files).encode(), {"Content-Type": "application/json"}, body)
            if not (folder / name).is_file():
                return self.fail("EntryNotFound")
            content = (folder / name).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            if name == damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)

        def send(self, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def fail(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    finally:
        server.shutdown()
        server.server_close()


def environment(cache: Path, **more: str) -> dict[str, str]:
    """This process's environment with a cache of the hub of its own."""
    return {**os.environ, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **more}
