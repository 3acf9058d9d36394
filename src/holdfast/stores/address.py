"""What the URL of an object store says: service, bucket, prefix, and a few options that are no secrets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from holdfast.core.errors import StoreError

__all__ = ["SERVICES", "Address", "is_prefix", "parse_address", "shown"]

SERVICES = {
    "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs",
    "az": "az", "azure": "az", "adl": "az", "abfs": "az", "abfss": "az",
}  # fmt: skip
OPTIONS = ("single_writer", "profile", "endpoint")
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")
_AZURE = re.compile(r"\.(?:dfs|blob)\.core\.windows\.net\Z")
_QUOTED = str.maketrans({mark: f"%{ord(mark):02X}" for mark in "%?#"})  # what means something else in a URL
_YES = {"1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a run lies in an object store.

    `account` is Azure's, where the URL names it. `profile` is one of ~/.aws/config; `endpoint` the address of an
    S3-compatible server.
    """

    service: str
    bucket: str
    prefix: str
    account: str = ""
    single_writer: bool = False
    profile: str = ""
    endpoint: str = ""

    @property
    def url(self) -> str:
        """The address as text; `parse_address` gives the same address again."""
        bucket = f"{self.bucket}@{self.account}.dfs.core.windows.net" if self.account else self.bucket
        place = f"{bucket}/{self.prefix.translate(_QUOTED)}".rstrip("/")
        options = {
            "single_writer": "1" if self.single_writer else "",
            "profile": self.profile,
            "endpoint": self.endpoint,
        }
        query = urlencode({k: v for k, v in options.items() if v}, safe="/:")
        return f"{'abfs' if self.account else self.service}://{place}{f'?{query}' if query else ''}"


def shown(url: str) -> str:
    """Return a URL as a message may show it: without user, password, query and fragment, where secrets travel."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    if ":" in host and not host.rpartition(":")[2].isdigit():
        return f"{parts.scheme}://…"  # no port: user and half of a password that holds a slash
    return f"{parts.scheme}://{host}{parts.path}"


def parse_address(url: str) -> Address:
    """Return what a URL of an object store names.

    Raises:
        StoreError: it names no bucket, or holds what does not belong there; the message never repeats that.
    """
    parts = urlsplit(url)
    service = SERVICES[parts.scheme]
    user, _, host = parts.netloc.rpartition("@")
    bucket, account = host, ""
    if user and parts.scheme in ("abfs", "abfss") and ":" not in user:
        bucket, account = user, _AZURE.sub("", host)
        if not account or "." in account:
            raise StoreError(
                f"{shown(url)}: expected {parts.scheme}://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX; another "
                "host is given by AZURE_STORAGE_ENDPOINT, with az://CONTAINER/PREFIX"
            )
    elif user:
        raise StoreError(
            f"{shown(url)}: the URL holds a user or a password. Credentials come from the environment or a profile, "
            "never from a URL"
        )
    if parts.fragment:
        raise StoreError(f"{shown(url)}: '#' has no meaning in the URL of a store")
    prefix = unquote(parts.path).strip("/")
    if not bucket or ":" in bucket:
        raise StoreError(f"{shown(url)}: names no bucket; expected {parts.scheme}://BUCKET/PREFIX")
    if prefix and not is_prefix(prefix):
        raise StoreError(f"{shown(url)}: the prefix has an empty part, '.', '..' or a control character")
    options = _options(url, service)
    return Address(
        service,
        bucket,
        prefix,
        account,
        single_writer=_YES[options.get("single_writer", "0")],
        profile=options.get("profile", ""),
        endpoint=options.get("endpoint", ""),
    )


def is_prefix(text: str) -> bool:
    """Return whether a run may lie under this prefix in a bucket."""
    return text.isprintable() and not any(part in ("", ".", "..") for part in text.split("/"))


def _options(url: str, service: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in parse_qsl(urlsplit(url).query, keep_blank_values=True):
        if name not in OPTIONS or name in found:
            raise StoreError(
                f"{shown(url)}: its query holds something else than one each of {', '.join(OPTIONS)}. "
                "Credentials and tokens come from the environment or a profile, never from a URL"
            )
        if name != "single_writer" and service != "s3":
            raise StoreError(f"{shown(url)}: {name}= is for s3:// alone")
        if name == "endpoint" and not _is_plain(value):
            raise StoreError(
                f"{shown(url)}: endpoint= must be http://HOST[:PORT] or https://HOST[:PORT], nothing else"
            )
        if name == "single_writer" and value not in _YES:
            raise StoreError(f"{shown(url)}: single_writer= takes 1 or 0")
        found[name] = value
    return found


def _is_plain(endpoint: str) -> bool:
    parts = urlsplit(endpoint)
    plain = not parts.query and not parts.fragment and parts.path in ("", "/")
    return parts.scheme in ("http", "https") and _HOST.fullmatch(parts.netloc) is not None and plain
