"""A stand-in for the Hugging Face hub, which tests cannot reach: the few of its routes that one commit and one download take.

The library under test is the real one. What stands in is the other end of the wire: repositories in memory, no large-file storage.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_a_user"

Files = dict[str, bytes]


class Hub:
    """Repositories by name, each with branches, each of which is {path: content}; commits are kept by their hash."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []  # method and path of every request
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.asked.append(f"{self.command} {self.path}")
                known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                status, headers, content = hub.answer(self.command, unquote(urlsplit(self.path).path), body, known)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_HEAD = _answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, method: str, path: str, body: bytes, known: bool) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of a request."""
        if path == "/api/repos/create":
            return self._create(json.loads(body)) if known else _error(401, "", "Invalid username or password.")
        if path == "/api/validate-yaml":  # of a model card
            front = json.loads(body)["content"].split("---\n")[1]
            return _json({"errors": [] if isinstance(yaml.safe_load(front), dict) else [{"message": "no settings"}], "warnings": []})
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        repo, (what, revision, *rest) = "/".join(words[:2]), (*words[2:], "revision", "main")[: max(2, len(words) - 2)]
        if repo not in self.repos or (repo in self.private and not known):
            return _error(401 if not known else 404, "RepoNotFound", "Repository Not Found")
        branches = self.repos[repo]
        if what == "branch":
            if revision in branches:
                return _error(409, "", "Reference already exists")
            branches[revision] = dict(branches["main"])
            return _json({})
        files = next((files for name, files in branches.items() if revision in (name, commit_of(files))), None)
        if files is None:
            return _error(404, "RevisionNotFound", "Invalid rev id")
        if what == "resolve":
            name = "/".join(rest)
            if name not in files:
                return _error(404, "EntryNotFound", "Entry not found")
            headers = {"X-Repo-Commit": commit_of(files), "ETag": f'"{_hash(files[name])}"', "Content-Type": "application/octet-stream"}
            return 200, headers, files[name]
        if what == "tree":
            return _json([{"type": "file", "path": name, "size": len(data), "oid": _hash(data)} for name, data in files.items()])
        if what == "preupload":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return _json({"files": [{"path": file["path"], **how} for file in json.loads(body)["files"]]})
        if what == "commit":
            if not known:
                return _error(403, "", "Forbidden: you may not write here")
            _commit(files, body)
            return _json({"commitUrl": f"{self.url}/{repo}/commit/{commit_of(files)}", "commitOid": commit_of(files)})
        return _json({"id": repo, "modelId": repo, "sha": commit_of(files), "siblings": [], "tags": [], "private": repo in self.private})

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.repos:
            return _json({"url": f"{self.url}/{repo}"}, 409)
        self.repos[repo] = {"main": {}}
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(repo)
        return _json({"url": f"{self.url}/{repo}"})


def commit_of(files: Files) -> str:
    """A commit has no history here: its hash is that of what it holds."""
    return _hash(json.dumps(sorted((name, _hash(data)) for name, data in files.items())).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _commit(files: Files, body: bytes) -> None:
    for line in body.splitlines():
        entry = json.loads(line)
        if entry["key"] == "file":
            files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        elif entry["key"] == "deletedFile":
            del files[entry["value"]["path"]]


def _json(value: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": message}, json.dumps({"error": message}).encode()
