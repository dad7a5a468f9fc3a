"""Google Cloud Storage on this machine, for Orbax, TensorStore, gcsfs and Google's library.

Written from https://cloud.google.com/storage/docs/json_api: buckets are known, objects are
uploaded (media, multipart, resumable), read whole or in ranges, listed and deleted, each under the
preconditions on their generation on which TensorStore builds.
"""

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c

_ROUTE = re.compile(
    r"(?P<kind>/upload|/download|)/storage/v1/b/(?P<bucket>[^/]+)(?:(?P<objects>/o)(?:/(?P<name>.+))?)?"
)


class Refusal(Exception):
    """An answer with an HTTP status of 300 or more."""


class Object(NamedTuple):
    content: bytes
    generation: int


class Cloud(http.server.ThreadingHTTPServer):
    """Serves gs://bucket.

    writes_left: so many more requests that change something are granted; None for all.
    """

    request_queue_size = 64
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.writes_left: int | None = None
        self.objects: dict[str, Object] = {}
        self.uploads: dict[str, tuple[str, dict, bytes]] = {}  # id -> name, query, what has come
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()

    def handle_error(self, *_):
        """Silent where a client is gone: some are killed."""

    def grant(self) -> None:
        if self.writes_left == 0:
            raise Refusal(403, "You may\nnot write.")
        if self.writes_left is not None:
            self.writes_left -= 1

    def check(self, name: str, query: dict) -> None:
        now = self.objects[name].generation if name in self.objects else 0
        if query.get("ifGenerationMatch", str(now)) != str(now):
            raise Refusal(412, "At least one of the pre-conditions you specified did not hold.")
        if query.get("ifGenerationNotMatch") == str(now):
            raise Refusal(304, "")

    def put(self, name: str, query: dict, content: bytes) -> dict:
        self.check(name, query)
        self.objects[name] = Object(content, next(self.numbers))
        return self.describe(name)

    def get(self, name: str, query: dict) -> Object:
        self.check(name, query)
        if name not in self.objects:
            raise Refusal(404, f"No such object: bucket/{name}")
        return self.objects[name]

    def describe(self, name: str) -> dict:
        found = self.objects[name]
        return {
            "kind": "storage#object", "name": name, "bucket": "bucket",
            "generation": str(found.generation), "metageneration": "1",
            "size": str(len(found.content)), "contentType": "application/octet-stream",
            "crc32c": crc32c(found.content), "md5Hash": md5(found.content),
            "timeCreated": "2026-01-01T00:00:00Z", "updated": "2026-01-01T00:00:00Z",
        }  # fmt: skip

    def list(self, query: dict) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in sorted(self.objects):
            late = "endOffset" in query and name >= query["endOffset"]
            if not name.startswith(prefix) or name < query.get("startOffset", "") or late:
                continue
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        try:
            with self.server.lock:
                self.route(_ROUTE.fullmatch(url.path), query, body)
        except Refusal as refusal:
            status, message = refusal.args
            error = {"error": {"code": status, "message": message}}
            self.answer(status, b"" if status == 304 else json.dumps(error).encode())

    do_POST = do_PUT = do_DELETE = do_GET

    def route(self, found: re.Match | None, query: dict, body: bytes) -> None:
        if found is None:
            raise Refusal(501, f"not emulated: {self.command} {self.path}")
        if found["bucket"] != "bucket":
            raise Refusal(404, "The specified bucket does not exist.")
        name = urllib.parse.unquote(found["name"] or "")
        match self.command, found["kind"], bool(found["objects"]), bool(name):
            case "GET", "", False, False:
                self.tell({"kind": "storage#bucket", "name": "bucket", "location": "US"})
            case "GET", "", True, False:
                self.tell(self.server.list(query))
            case "GET", _, True, True:
                found = self.server.get(name, query)
                if query.get("alt") == "media":
                    self.send_content(found)
                else:
                    self.tell(self.server.describe(name))
            case "DELETE", "", True, True:
                self.server.grant()
                self.server.get(name, query)
                del self.server.objects[name]
                self.answer(204, b"")
            case "POST" | "PUT", "/upload", True, False:
                self.upload(query, body)
            case _:
                raise Refusal(501, f"not emulated: {self.command} {self.path}")

    def upload(self, query: dict, body: bytes) -> None:
        if "upload_id" in query:
            return self.go_on(query["upload_id"], body)
        self.server.grant()
        match query["uploadType"]:
            case "media":
                self.tell(self.server.put(query["name"], query, body))
            case "multipart":
                boundary, newline = re.match(rb"(--[^\r\n]+)(\r?\n)", body).groups()
                parts = body.split(newline + boundary)
                described, content = (part.partition(2 * newline)[2] for part in parts[:2])
                self.tell(self.server.put(json.loads(described)["name"], query, content))
            case "resumable":
                name = query.get("name") or json.loads(body)["name"]
                number = str(next(self.server.numbers))
                self.server.uploads[number] = (name, query, b"")
                where = f"{self.server.url}/upload/storage/v1/b/bucket/o?upload_id={number}"
                self.answer(200, b"", Location=where)

    def go_on(self, number: str, body: bytes) -> None:
        """The next piece of a resumable upload: bytes 0-99/*, or bytes 100-149/150 at the end."""
        name, query, before = self.server.uploads[number]
        total = self.headers["Content-Range"].rpartition("/")[2]
        content = before + body
        if total == str(len(content)):
            self.tell(self.server.put(name, query, content))
        else:
            self.server.uploads[number] = (name, query, content)
            self.answer(308, b"", Range=f"bytes=0-{len(content) - 1}")

    def send_content(self, found: Object) -> None:
        headers = {
            "x-goog-generation": str(found.generation), "x-goog-metageneration": "1",
            "x-goog-hash": f"crc32c={crc32c(found.content)},md5={md5(found.content)}",
        }  # fmt: skip
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(200, found.content, **headers)
        size, (first, last) = len(found.content), wanted.groups()
        start = int(first) if first else max(size - int(last), 0)
        end = min(int(last) + 1, size) if first and last else size
        if start >= size:
            raise Refusal(416, "The requested range cannot be satisfied.")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self.answer(206, found.content[start:end], **headers)

    def tell(self, answer: dict) -> None:
        self.answer(200, json.dumps(answer).encode(), **{"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def crc32c(content: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


def md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content).digest()).decode()


@contextlib.contextmanager
def running() -> Iterator[Cloud]:
    with Cloud() as cloud:
        threading.Thread(target=cloud.serve_forever, daemon=True).start()
        yield cloud
        cloud.shutdown()
