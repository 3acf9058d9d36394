"""A small Google Cloud Storage: the XML API as object_store speaks it, with generation preconditions.

Single puts and multipart uploads, ranged reads, listing by pages, deletion. What it does not know is answered by 501, so
that a client that comes to ask for more is noticed.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 50  # of a listing; few, so that pages are seen


@dataclass(frozen=True)
class Blob:
    data: bytes
    generation: int
    modified: float
    metadata: dict[str, str]

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest()}"'


@dataclass
class Bucket:
    """Everything there is, and every request that was made."""

    port: int = 0
    blobs: dict[str, Blob] = field(default_factory=dict)
    uploads: dict[str, tuple[str, dict[int, bytes]]] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    generations: Iterator[int] = field(default_factory=lambda: itertools.count(1_700_000_000_000_001))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet
    disable_nagle_algorithm = True
    bucket: Bucket

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        self.key = unquote(parts.path).lstrip("/").partition("/")[2]
        self.body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.bucket.seen.append(f"{self.command} {self.path}")
        with self.bucket.lock:
            act = getattr(self, f"{self.command.lower()}_{'object' if self.key else 'bucket'}", None)
            if act is None:
                return self.say(501, b"<Error><Code>NotImplemented</Code></Error>")
            act()
        return None

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def get_object(self) -> None:
        blob = self.bucket.blobs.get(self.key)
        if blob is None:
            return self.say(404, b"<Error><Code>NoSuchKey</Code></Error>")
        headers = {
            "ETag": blob.etag,
            "Last-Modified": email.utils.formatdate(blob.modified, usegmt=True),
            "x-goog-generation": str(blob.generation),
            **blob.metadata,
        }
        asked = self.headers.get("range")
        if asked is None:
            return self.say(200, blob.data, headers)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1 if last else len(blob.data), len(blob.data))
        if start >= len(blob.data):
            return self.say(416, b"<Error><Code>InvalidRange</Code></Error>")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(blob.data)}"
        return self.say(206, blob.data[start:end], headers)

    head_object = get_object

    def put_object(self) -> None:
        if "uploadId" in self.query:
            upload = self.bucket.uploads.get(self.query["uploadId"])
            if upload is None:
                return self.say(404, b"<Error><Code>NoSuchUpload</Code></Error>")
            upload[1][int(self.query["partNumber"])] = self.body
            return self.say(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})
        if not self.precondition_holds():
            return self.say(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        return self.store(self.body)

    def precondition_holds(self) -> bool:
        asked = self.headers.get("x-goog-if-generation-match")
        present = self.bucket.blobs.get(self.key)
        return asked is None or int(asked) == (present.generation if present else 0)

    def store(self, data: bytes, answer: bytes = b"") -> None:
        metadata = {k: v for k, v in self.headers.items() if k.lower().startswith("x-goog-meta-")}
        blob = Blob(data, next(self.bucket.generations), time.time(), metadata)
        self.bucket.blobs[self.key] = blob
        self.say(200, answer, {"ETag": blob.etag, "x-goog-generation": str(blob.generation)})

    def post_object(self) -> None:
        if "uploads" in self.query:
            name = f"u{next(self.bucket.generations)}"
            self.bucket.uploads[name] = (self.key, {})
            return self.say(200, xml("InitiateMultipartUploadResult", f"<UploadId>{name}</UploadId>"))
        if self.query.get("uploadId") not in self.bucket.uploads:
            return self.say(404, b"<Error><Code>NoSuchUpload</Code></Error>")
        _, pieces = self.bucket.uploads.pop(self.query["uploadId"])
        data = b"".join(pieces[number] for number in sorted(pieces))
        etag = escape(f'"{hashlib.md5(data).hexdigest()}"')
        return self.store(data, xml("CompleteMultipartUploadResult", f"<ETag>{etag}</ETag>"))

    def delete_object(self) -> None:
        if "uploadId" in self.query:
            self.bucket.uploads.pop(self.query["uploadId"], None)
            return self.say(204, b"")
        found = self.bucket.blobs.pop(self.key, None)
        return self.say(204 if found else 404, b"" if found else b"<Error><Code>NoSuchKey</Code></Error>")

    def get_bucket(self) -> None:
        prefix = self.query.get("prefix", "")
        after = max(self.query.get("start-after", ""), self.query.get("continuation-token", ""))
        keys = sorted(k for k in self.bucket.blobs if k.startswith(prefix) and k > after)
        page, rest = keys[:PAGE], keys[PAGE:]
        said = f"<IsTruncated>{'true' if rest else 'false'}</IsTruncated>"
        if rest:
            said += f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"
        for key in page:
            blob = self.bucket.blobs[key]
            stamp = (
                time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(blob.modified))
                + f".{int(blob.modified % 1 * 1000):03d}Z"
            )
            said += (
                f"<Contents><Key>{escape(key)}</Key><Size>{len(blob.data)}</Size><ETag>{escape(blob.etag)}</ETag>"
                f"<LastModified>{stamp}</LastModified></Contents>"
            )
        self.say(200, xml("ListBucketResult", said))

    def say(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def xml(name: str, body: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><{name}>{body}</{name}>'.encode()


@contextlib.contextmanager
def serving_gcs() -> Iterator[Bucket]:
    bucket = Bucket()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"bucket": bucket}))
    server.daemon_threads = True
    bucket.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
