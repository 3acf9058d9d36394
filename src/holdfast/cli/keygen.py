"""`holdfast keygen`: a key pair to sign checkpoints with."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from holdfast.catalog.keyfiles import PASSPHRASE_VARIABLE, write_key_pair
from holdfast.cli.options import Json
from holdfast.cli.output import ask_secret, emit, line
from holdfast.format.signing import Algorithm, SigningKey

__all__ = ["keygen"]

_TYPES: dict[str, Algorithm] = {"ed25519": "ed25519", "p256": "ecdsa-p256-sha256"}


def keygen(
    path: Annotated[
        str,
        typer.Argument(metavar="KEY.pem", help="The private key's file to write.", show_default=False),
    ],
    type: Annotated[
        Literal["ed25519", "p256"],
        typer.Option("--type", help="p256 is for exports that model signing verifies."),
    ] = "ed25519",
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help=f"Ask for a passphrase; or set {PASSPHRASE_VARIABLE}.")
    ] = False,
    json: Json = False,
) -> None:
    """Make a key pair: KEY.pem for its owner alone, and KEY.pub to give away.

    A file that is there is never overwritten.
    """
    passphrase = os.environ.get(PASSPHRASE_VARIABLE)
    if encrypt and passphrase is None:
        passphrase = ask_secret("passphrase", PASSPHRASE_VARIABLE, twice=True)
    key = SigningKey.generate(_TYPES[type])
    public = write_key_pair(path, key, passphrase)
    if json:
        emit({"private": path, "public": public, "id": key.public.id, "key": key.public.text()})
        return
    line((path, "bold"), "  the private key, ", "encrypted" if passphrase else "not encrypted")
    line((public, "bold"), "  the public key ", (key.public.id, "cyan"))
