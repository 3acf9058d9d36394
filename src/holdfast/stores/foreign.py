"""obstore's errors in our words, once, here.

Its texts are for its authors: pages of structure, the server's whole answer, and addresses that may carry a signature.
What is shown is the operation, the server's status and its own short code and message.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from holdfast.core.errors import AlreadyExists, NotFound, OutOfSpace, PermissionDenied, StoreError
from holdfast.stores.base import LOOKING

__all__ = ["is_out_of_range", "is_unsupported", "translated"]

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,60})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,200})")
_FULL = {
    "QuotaExceeded",
    "InsufficientStorage",
    "XMinioStorageFull",
    "StorageFull",
    "AccountStorageQuotaExceeded",
}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"}
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}


@contextlib.contextmanager
def translated(doing: str, place: str) -> Iterator[None]:
    """Turn what obstore raises into our tree. `place` is what is acted on, as a message may show it."""
    try:
        yield
    except (BaseError, FileNotFoundError, OSError) as e:
        if isinstance(e, StoreError):
            raise
        # Not chained: the foreign text may hold a signed address.
        raise _ours(e, doing, place) from None


def _ours(e: Exception, doing: str, place: str) -> StoreError:
    text = str(e)
    status = _found(_STATUS, text)
    code = _found(_CODE, text)
    said = ", ".join(part for part in (status and f"status {status}", code, _found(_MESSAGE, text)) if part)
    failed = f"could not {doing} {place}: {said or _cause(text)}"
    if code in _NO_BUCKET:
        return StoreError(f"{failed}; create the bucket first, or check its name")
    if status == "507" or code in _FULL:
        return OutOfSpace(
            f"{failed}; free some space or raise the quota; what was committed before is intact"
        )
    if (
        isinstance(e, (PermissionDeniedError, UnauthenticatedError))
        or status in ("401", "403")
        or code in _DENIED
    ):
        return PermissionDenied(
            f"{failed}; check the credentials in the environment and what they may do there"
        )
    if doing == "create" and is_unsupported(e):
        return StoreError(
            f"{failed}; the server does not know conditional puts, which every commit needs. Use one that honours "
            "If-None-Match; or, if never more than one process writes there, add ?single_writer=1 to the URL"
        )
    if isinstance(e, AlreadyExistsError):
        return AlreadyExists(f"{place} exists already")
    if isinstance(e, FileNotFoundError) and doing in LOOKING:
        return NotFound(f"no object {place}")
    return StoreError(failed)


def is_out_of_range(e: Exception) -> bool:
    """Return whether a read began behind the end of its object."""
    return _found(_STATUS, str(e)) == "416" or "Wanted range starting at" in str(e)


def is_unsupported(e: Exception) -> bool:
    """Return whether a server says that it does not know what was asked of it."""
    return isinstance(e, NotSupportedError) or _found(_STATUS, str(e)) in ("501", "405")


def _found(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def _cause(text: str) -> str:
    """Return the reason at the bottom of an error that did not come from the server."""
    if "BadScheme" in text:
        return "the endpoint is http://; set AWS_ALLOW_HTTP=true if it is meant to be, or use https://"
    if "TimedOut" in text or "operation timed out" in text:
        return "no answer in time"
    for pattern in (r'message: "([^"]{1,120})"', r'error: "([^"]{1,120})"'):
        if found := _found(re.compile(pattern), text):
            return found
    return re.sub(r"\?\S*", "", text.partition("\n")[0])[:200]
