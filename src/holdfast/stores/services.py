"""From an address to obstore's client: credentials, endpoints, patience.

Credentials come from where each service's own tools take them: AWS_*, AZURE_*, GOOGLE_* variables, the machine's or
the pod's role, and for S3 a profile of ~/.aws (AWS_PROFILE, or `?profile=` in the URL).
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from obstore.store import AzureStore, GCSStore, S3Store

from holdfast.core.errors import MissingDependency, StoreError
from holdfast.stores.address import Address

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3CredentialProvider

__all__ = ["Client", "open_client"]

Client = S3Store | GCSStore | AzureStore

CONNECT_SECONDS = 10.0
RETRIES = 8
RETRY_SECONDS = 60.0  # in all: as long as a lease, after which a holder that hears nothing must find out
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 10.0


def open_client(address: Address, *, request_seconds: float, bucket_in_host: bool = False) -> Client:
    """Return a client whose requests may each take `request_seconds`. With `bucket_in_host` an endpoint of S3 is taken
    for the bucket's own.

    Requests that failed on the way, or with 429 or 5xx, are tried again with growing pauses and jitter.

    Raises:
        StoreError: the service cannot be spoken to with what the environment says.
        MissingDependency: a profile is asked for, and boto3, which reads profiles, is not installed.
    """
    retry: RetryConfig = {
        "max_retries": RETRIES,
        "retry_timeout": timedelta(seconds=RETRY_SECONDS),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_PAUSE_SECONDS),
            "max_backoff": timedelta(seconds=LONGEST_PAUSE_SECONDS),
            "base": 2,
        },
    }
    try:
        if address.service == "s3":
            return _s3(address, retry, request_seconds, bucket_in_host=bucket_in_host)
        if address.service == "gs":
            return _gcs(address, retry, request_seconds)
        return _azure(address, retry, request_seconds)
    except (StoreError, MissingDependency):
        raise
    except Exception as e:  # noqa: BLE001 - obstore raises ValueError and its own kinds alike for a bad environment
        raise StoreError(f"{address.url}: cannot be opened: {str(e).partition(chr(10))[0][:200]}") from None


def _patience(endpoint: str, request_seconds: float, *, allow_http: bool) -> ClientConfig:
    """Return the options of the HTTP client. Unencrypted HTTP is for this machine, or where it is allowed."""
    here = urlsplit(endpoint).hostname in ("127.0.0.1", "localhost", "::1")
    return {
        "timeout": timedelta(seconds=request_seconds),
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "allow_http": allow_http or here,
    }


def _says_yes(*names: str) -> bool:
    return any(os.environ.get(name, "").lower() in ("1", "true") for name in names)


def _s3(address: Address, retry: RetryConfig, request_seconds: float, *, bucket_in_host: bool) -> S3Store:
    env = os.environ
    endpoint = address.endpoint or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or ""
    config: dict[str, str] = {}
    provider = None
    profile = address.profile or env.get("AWS_PROFILE", "")
    if profile:
        provider, found = _profile(profile)
        config |= found
        endpoint = address.endpoint or found.get("endpoint", "") or endpoint
    if endpoint:
        config["endpoint"] = endpoint
    if bucket_in_host:
        config["virtual_hosted_style_request"] = "true"
    return S3Store(
        address.bucket,
        prefix=address.prefix or None,
        config=config,  # type: ignore[arg-type]
        client_options=_patience(
            endpoint or env.get("AWS_ENDPOINT", ""), request_seconds, allow_http=_says_yes("AWS_ALLOW_HTTP")
        ),
        retry_config=retry,
        credential_provider=provider,
    )


def _profile(name: str) -> tuple[S3CredentialProvider, dict[str, str]]:
    """Return who gives a profile's credentials, and what else it says."""
    try:
        import botocore.session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as e:
        raise MissingDependency(
            f"profile {name!r} of ~/.aws is read by boto3: pip install 'holdfast[aws]', or set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY instead"
        ) from e
    session = botocore.session.Session(profile=name)
    said = session.get_scoped_config()
    config = {"endpoint": said.get("endpoint_url", ""), "region": session.get_config_variable("region") or ""}
    return Boto3CredentialProvider(session), {k: v for k, v in config.items() if v}


def _gcs(address: Address, retry: RetryConfig, request_seconds: float) -> GCSStore:
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    base = os.environ.get("GOOGLE_BASE_URL", "")
    config: dict[str, str] = {}
    if emulator:
        base = emulator if "://" in emulator else f"http://{emulator}"
        nobody = {"gcs_base_url": base, "disable_oauth": True, "client_email": "", "private_key": ""}
        config["service_account_key"] = json.dumps(nobody | {"private_key_id": ""})
    return GCSStore(
        address.bucket,
        prefix=address.prefix or None,
        config=config,  # type: ignore[arg-type]
        client_options=_patience(base, request_seconds, allow_http=bool(emulator)),
        retry_config=retry,
    )


def _azure(address: Address, retry: RetryConfig, request_seconds: float) -> AzureStore:
    endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT") or ""
    allow_http = _says_yes("AZURE_ALLOW_HTTP", "AZURE_STORAGE_USE_EMULATOR")
    config = {"account_name": address.account} if address.account else {}
    return AzureStore(
        address.bucket,
        prefix=address.prefix or None,
        config=config,  # type: ignore[arg-type]
        client_options=_patience(endpoint, request_seconds, allow_http=allow_http),
        retry_config=retry,
    )
