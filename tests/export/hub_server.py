"""A server that stands for the Hugging Face hub: repositories in memory, commits, and the LFS protocol."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

TOKEN = "hf_right"


class Hub:
    """The state of the server, and the faults that a test asks for."""

    def __init__(self):
        self.commits = {}  # from a repository to its commits in order: (identifier, {path: bytes})
        self.branches = {}  # from (repository, branch) to a commit's number
        self.objects = {}  # uploaded large files by SHA-256
        self.fault = None  # "drop upload", "drop download" or "corrupt"
        self.requests = []

    def files(self, repo, revision="main"):
        """Return the commit's identifier and files of a revision, or None."""
        commits = self.commits.get(repo)
        if not commits:
            return None
        if revision == "main":
            return commits[-1]
        if (repo, revision) in self.branches:
            return commits[self.branches[repo, revision]]
        return next((commit for commit in commits if commit[0] == revision), None)

    def commit(self, repo, files):
        """Add a commit to the main branch; return its identifier."""
        commits = self.commits[repo]
        before = commits[-1][1] if commits else {}
        identifier = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits.append((identifier, before | files))
        return identifier


def is_large(path):
    return path.endswith((".safetensors", ".bin"))


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; `self.server.hub` is the state."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Print nothing."""

    def reply(self, status, content=b"", headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code):
        self.read()
        self.reply(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def read(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def is_authorized(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server.hub
        hub.requests.append(f"{self.command} {self.path}")
        parts = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
        if self.headers.get("Authorization") and not self.is_authorized:
            return self.refuse(401, "Unauthorized")
        if len(parts) < 5 or parts[2] != "resolve":
            return self.refuse(404, "RepoNotFound")
        repo, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if repo not in hub.commits:
            return self.refuse(404, "RepoNotFound")
        found = hub.files(repo, revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound" if hub.commits[repo] else "EntryNotFound")
        identifier, files = found
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        content = files[path]
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        headers = {"X-Repo-Commit": identifier, "ETag": f'"{git}"'}
        if is_large(path):
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
            }
        if is_large(path) and hub.fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if is_large(path) and hub.fault == "drop download" and self.command == "GET":
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        return self.reply(200, content, headers)

    def do_POST(self):
        hub = self.server.hub
        hub.requests.append(f"{self.command} {self.path}")
        parts = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
        if not self.is_authorized:
            return self.refuse(401, "Unauthorized")
        body = self.read()
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            url = f"http://{self.headers['Host']}/{repo}"
            if repo in hub.commits:
                return self.reply(409, {"error": "exists", "url": url}, {"X-Error-Message": "exists"})
            hub.commits[repo] = []
            return self.reply(200, {"url": url})
        if parts == ["api", "validate-yaml"]:
            return self.reply(200, {"errors": [], "warnings": []})
        if parts[-1] == "batch":
            return self.reply(200, self.batch(json.loads(body)), {"Content-Type": "application/vnd.git-lfs+json"})
        repo = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return self.reply(200, {"files": modes})
        if parts[4] == "commit":
            files = {}
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    files[entry["value"]["path"]] = hub.objects[entry["value"]["oid"]]
            identifier = hub.commit(repo, files)
            url = f"http://{self.headers['Host']}/{repo}/commit/{identifier}"
            return self.reply(200, {"success": True, "commitUrl": url, "commitOid": identifier})
        return self.refuse(404, "RepoNotFound")

    def batch(self, asked):
        """Return where to upload large files that the server does not have."""
        objects = []
        for wanted in asked["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.hub.objects:
                href = f"http://{self.headers['Host']}/lfs/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def do_PUT(self):
        hub = self.server.hub
        hub.requests.append(f"{self.command} {self.path}")
        if hub.fault == "drop upload":
            self.rfile.read(1024)
            self.close_connection = True
            self.connection.close()
            return
        content = self.read()
        digest = hashlib.sha256(content).hexdigest()
        if not self.path.endswith(digest):
            self.reply(400)
            return
        hub.objects[digest] = content
        self.reply(200)


class Server(http.server.ThreadingHTTPServer):
    """A server whose handlers end quietly if the client has left."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        """Print nothing."""


@contextlib.contextmanager
def serve():
    """Yield the state and the address of a server."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.hub = Hub()
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.hub, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
