"""Names: what a tree path, a tag and a store key may look like, and how globs match paths.

Names that come out of a file are data. They are checked here and never joined to a path of the file system.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from holdfast.core.errors import InvalidFormat, PolicyError

__all__ = [
    "check_key",
    "check_path",
    "check_tag",
    "file_stems",
    "is_key",
    "join_path",
    "matches",
    "name_in_file",
    "step_name",
]

MAX_PATH_BYTES = 1024
STEP_DIGITS = 12
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
_MADE_STEM = re.compile(r"part-\d+$", re.IGNORECASE)
_KEY_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,254}")
_KEY = re.compile(rf"{_KEY_PART.pattern}(?:/{_KEY_PART.pattern})*")


def step_name(step: int) -> str:
    """Return the fixed-width name of a step, so that names sort as numbers do."""
    if not 0 <= step < 10**STEP_DIGITS:
        raise PolicyError(
            f"step {step} is outside 0 … 10^{STEP_DIGITS}-1, the range a checkpoint name can hold"
        )
    return f"{step:0{STEP_DIGITS}d}"


def join_path(*parts: object) -> str:
    """Join tree-path components with `/`."""
    if len(parts) == 2 and parts[0] != "" and parts[1] != "":
        return f"{parts[0]}/{parts[1]}"
    return "/".join(str(p) for p in parts if str(p) != "")


def check_path(path: str) -> str:
    """Return `path` if it may name a tensor or a value; raise InvalidFormat otherwise.

    Allowed: NFC text of 1 to 1024 UTF-8 bytes without control characters or lone surrogates.
    """
    if not path:
        raise InvalidFormat("a tensor name is empty; expected 1 to 1024 bytes of text")
    if path.isascii():
        if len(path) <= MAX_PATH_BYTES and path.isprintable():
            return path
        raise InvalidFormat(
            f"tensor name {path[:80]!r} is longer than {MAX_PATH_BYTES} bytes or holds control characters"
        )
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise InvalidFormat(f"tensor name {path[:80]!r} is not valid Unicode") from None
    if size > MAX_PATH_BYTES:
        raise InvalidFormat(
            f"tensor name {path[:80]!r}… has {size} bytes; at most {MAX_PATH_BYTES} are allowed"
        )
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in path):
        raise InvalidFormat(f"tensor name {path[:80]!r} holds control characters")
    if unicodedata.normalize("NFC", path) != path:
        raise InvalidFormat(f"tensor name {path[:80]!r} is not in Unicode normal form C")
    return path


def check_tag(tag: str) -> str:
    """Return `tag` if it may name a tag; raise PolicyError otherwise."""
    if not _TAG.fullmatch(tag):
        raise PolicyError(
            f"tag {tag[:80]!r} is not allowed: use 1 to 128 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )
    if tag == "latest" or tag.isdigit():
        raise PolicyError(
            f"tag {tag!r} is not allowed: it means the newest checkpoint or a step; choose another name"
        )
    return tag


def check_key(key: str) -> str:
    """Return `key` if it may name an object of a store; raise InvalidFormat otherwise.

    A key is a relative path of plain components: no empty part, no `.` or `..`, no backslash, no leading slash.
    """
    for part in key.split("/"):
        if not _KEY_PART.fullmatch(part):
            raise InvalidFormat(
                f"store key {key[:120]!r} is not allowed: component {part[:40]!r} is not a plain name"
            )
    return key


def is_key(text: str) -> bool:
    """Return whether `text` may name an object of a store."""
    return _KEY.fullmatch(text) is not None


def name_in_file(part: str, path: str) -> str:
    """Return the name a tensor has inside its part's data files: its path without the part's name in front."""
    return path.removeprefix(f"{part}/")


def file_stems(parts: Iterable[str]) -> dict[str, str]:
    """Return the file name, without its ending, of each part's data.

    That is the part's own name where it is a plain name that no other part's name equals but for case, does not look
    like a made one, and means nothing to Windows; else "part-<position>".
    """
    parts = list(parts)
    seen = Counter(part.lower() for part in parts)
    plain = {
        part
        for part in parts
        if _KEY_PART.fullmatch(part)
        and len(part) <= 100
        and seen[part.lower()] == 1
        and not _MADE_STEM.match(part)
        and not _DEVICE.fullmatch(part)
        and not part.endswith(".")
    }
    return {part: part if part in plain else f"part-{i}" for i, part in enumerate(parts)}


@functools.lru_cache(maxsize=512)
def _compile(glob: str) -> re.Pattern[str]:
    out, i = "", 0
    while i < len(glob):
        if glob.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
        elif glob.startswith("**", i):
            out, i = out + ".*", i + 2
        elif glob[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif glob[i] == "?":
            out, i = out + "[^/]", i + 1
        else:
            out, i = out + re.escape(glob[i]), i + 1
    return re.compile(out, re.DOTALL)


def matches(path: str, globs: tuple[str, ...] | list[str] | str) -> bool:
    """Return whether `path` matches any glob: `*` stays inside a component, `**` crosses components."""
    if isinstance(globs, str):
        globs = (globs,)
    return any(_compile(g).fullmatch(path) is not None for g in globs)
