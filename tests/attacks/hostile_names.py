"""Names that a hostile writer would like us to take for something else."""

from __future__ import annotations

UP = [
    "..", "../x", "../../etc/passwd", "a/..", "a/../b", "a/../../b", "data/../../x", "./x", "a/./b", ".", "...", ".../x",
    "..\\x", "a\\..\\..\\b", "..%2fx", "%2e%2e/x", "%2e%2e%2fx", "..;/x", "a/..;/b", "\uff0e\uff0e/x", "\u2025/x", "\u2024\u2024/x",
    "..\u2215x", "..\u2044x", "..\uff0fx", "..\u29f5x", "..\uff3cx", "\u200b../x", "..\u200d/x", ".\u0301./x", ". ./x", ".. /x", "..\t/x", "~", "~/x", "~root/x", "$HOME/x", "${HOME}", "`id`", "$(id)",
]  # fmt: skip
ABSOLUTE = [
    "/", "/etc/passwd", "//etc/passwd", "///x", "\\\\server\\share", "\\x", "C:\\x", "C:/x", "c:x", "file:///etc/passwd", "s3://other/x", "http://x/y",
    "/proc/self/environ", "/dev/zero", "\\\\?\\C:\\x", "\\\\.\\pipe\\x",
]  # fmt: skip
EMPTY = ["", "a//b", "a/", "/a/", "a/b/", " ", "a/ /b", "\u00a0", "\u3164"]
CONTROL = [
    "\x00", "a\x00b", "a.json\x00.txt", "a\n", "a\nb", "a\rb", "a\tb", "a\x1b[2Jb", "a\x7fb", "a\x85b", "a\u2028b", "a\ud800b", "a\udcffb", "\ufeffa", "a\u202eb",
    "a\u2066b", "a\x08b", "\x1b]0;x\x07",
]  # fmt: skip
HIDDEN = [
    ".hidden",
    "a/.hidden",
    ".git/config",
    ".tmp-000000000000",
    "a/.tmp-x",
    ".ssh/authorized_keys",
    ".nfs0001",
]
LONG = ["x" * 256, "x/" + "y" * 300, "x" * 100_000, "/".join("x" * 200 for _ in range(100)) + "/" + "y" * 256]
UNICODE = [
    "\u00e9",
    "e\u0301",
    "\u212b",
    "\uff41",
    "\u0430",
    "stra\u00dfe",
    "\U0001f600",
    "\u0130",
    "\u017f",
    "\u1e9e",
    "\u2126",
]
PUNCTUATION = [
    "a:b", "a|b", "a*b", "a?b", 'a"b', "a<b", "a>b", "a;b", "a&b", "a'b", "a b", "-rf", "--", "-", "@x", "=x", "+x", "a#b", "a%00b", "a,b", "a(b)",
    "a[b]", "a{b}", "a!b", "a^b",
]  # fmt: skip

NO_KEYS = [*UP, *ABSOLUTE, *EMPTY, *CONTROL, *HIDDEN, *LONG, *UNICODE, *PUNCTUATION]

# Plain names that other systems take for more than a name. They are keys; no name of ours is ever made of one.
DEVICES = [
    "CON", "con", "PRN", "AUX", "aux", "NUL", "nul", "COM1", "com9", "LPT1", "lpt9", "NUL.json", "con.safetensors", "Aux.tar.gz", "COM0",
]  # fmt: skip
