"""Multipart uploads that were begun and never ended: their parts cost money, and no listing shows them.

obstore has no call for them, but it signs addresses, with whatever credentials it has. The address of the listing is
made by giving it an endpoint that ends in the query; what it appends, a path, becomes the value of a parameter that
services pass over. S3 and what speaks like it alone: Azure drops uncommitted blocks after a week, and Google Cloud
Storage wants a lifecycle rule.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

import obstore

from holdfast.core.errors import StoreError
from holdfast.stores.address import Address
from holdfast.stores.services import Client, open_client

__all__ = ["abort_uploads"]

ANSWER_SECONDS = 30.0
ANSWER_BYTES = 16 << 20
MAX_PAGES = 1_000
_ANY = "k"
_PASSED_OVER = "x-of"


@dataclass(frozen=True, slots=True)
class _Upload:
    key: str
    id: str
    begun: float


def abort_uploads(address: Address, before: float) -> int:
    """Abort the uploads below an address that were begun before a time; return how many there were.

    Raises:
        StoreError: the service does not list them, or not to us.
    """
    if address.service != "s3":
        return 0
    whole = replace(address, prefix="")
    bucket = (
        _sign(open_client(whole, request_seconds=ANSWER_SECONDS), "GET")
        .partition("?")[0]
        .removesuffix(f"/{_ANY}")
    )
    aborted = 0
    for upload in _uploads(whole, bucket, f"{address.prefix}/" if address.prefix else ""):
        if upload.begun < before:
            _ask(whole, "DELETE", f"{bucket}/{quote(upload.key)}", {"uploadId": upload.id})
            aborted += 1
    return aborted


def _uploads(address: Address, bucket: str, prefix: str) -> Iterator[_Upload]:
    """Yield what the service lists, page by page."""
    query = {"uploads": "", "prefix": prefix}
    for _ in range(MAX_PAGES):
        page = _parsed(_ask(address, "GET", bucket, query), address)
        for found in page.iterfind("{*}Upload"):
            try:
                begun = datetime.fromisoformat(found.findtext("{*}Initiated", "").replace("Z", "+00:00"))
            except ValueError:  # one that does not say how old it is may be somebody's at work
                continue
            upload = _Upload(
                found.findtext("{*}Key", ""), found.findtext("{*}UploadId", ""), begun.timestamp()
            )
            if upload.key.startswith(prefix) and upload.id:
                yield upload
        if page.findtext("{*}IsTruncated", "").lower() != "true":
            return
        query |= {
            "key-marker": page.findtext("{*}NextKeyMarker", ""),
            "upload-id-marker": page.findtext("{*}NextUploadIdMarker", ""),
        }


def _parsed(answer: bytes, address: Address) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(answer)
    except ElementTree.ParseError as e:
        raise StoreError(f"{address.url}: the list of unfinished uploads is not XML: {e}") from e


def _ask(address: Address, method: str, place: str, query: dict[str, str]) -> bytes:
    """Return the answer to a signed request to an address with a query."""
    endpoint = f"{place}?{urlencode(query)}&{_PASSED_OVER}="
    url = _sign(
        open_client(replace(address, endpoint=endpoint), request_seconds=ANSWER_SECONDS, bucket_in_host=True),
        method,
    )
    doing = f"could not {'list' if method == 'GET' else 'abort'} unfinished uploads of {address.url}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method=method), timeout=ANSWER_SECONDS
        ) as answer:
            return bytes(answer.read(ANSWER_BYTES))
    except urllib.error.HTTPError as e:
        if method == "DELETE" and e.code == 404:  # another sweeper was first, or it was completed
            return b""
        raise StoreError(f"{doing}: status {e.code}") from None  # the cause holds the signed address
    except (OSError, http.client.HTTPException) as e:
        raise StoreError(f"{doing}: {e}") from None


def _sign(client: Client, method: str) -> str:
    return obstore.sign(
        client, "DELETE" if method == "DELETE" else "GET", _ANY, timedelta(seconds=ANSWER_SECONDS)
    )
