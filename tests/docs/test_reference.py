"""The reference is complete: every public name, argument, verb, option, exit code, error; links lead somewhere."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import verbs
from markdown_pages import DOCS, PAGES, ROOT, anchors, links, page_id, sections

import holdfast
from holdfast import core, policies
from holdfast.cli.exits import BROKEN_PIPE, CODES
from holdfast.core import errors
from holdfast.policies import EVENTS, presets
from holdfast.policies.rules import Rule

API, RULES, CLI, ERRORS = (DOCS / "reference" / f"{n}.md" for n in ("api", "rules", "cli", "errors"))
WORDS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def api_sections() -> dict[str, str]:
    return {**sections(API, 2), **sections(API, 3)}


def rule_names() -> set[str]:
    return {n for n in holdfast.__all__ if getattr(holdfast, n).__module__.startswith("holdfast.policies")}


def parameters(of: object) -> set[str]:
    names = set(inspect.signature(of).parameters)  # type: ignore[arg-type]
    return names - {"self", "args", "kwargs"}


def test_every_public_name_has_its_place() -> None:
    documented = set(sections(API, 2)) - {"What these return"}
    assert documented == set(holdfast.__all__) - rule_names(), (
        "the sections of reference/api.md are the public names"
    )
    text = RULES.read_text()
    for name in rule_names():
        assert f"`{name}(" in text or f"## {name}\n" in text, f"reference/rules.md does not have {name}"


@pytest.mark.parametrize(
    "name", sorted(set(holdfast.__all__) - rule_names() - {"HoldfastError", "RestoreReport"})
)
def test_every_argument_is_documented(name: str) -> None:
    written = set(WORDS.findall(api_sections()[name]))
    missing = parameters(getattr(holdfast, name)) - written
    assert not missing, f"reference/api.md, {name}: {sorted(missing)} missing"


@pytest.mark.parametrize("name", sorted(rule_names()))
def test_every_argument_of_a_rule_is_documented(name: str) -> None:
    found = [p for p in re.split(r"\n(?=\| `|```text|## )", RULES.read_text()) if f"{name}(" in p]
    written = set(WORDS.findall(" ".join(found)))
    missing = parameters(getattr(holdfast, name)) - written
    assert not missing, f"reference/rules.md, {name}: {sorted(missing)} missing"


@pytest.mark.parametrize("name", sorted(presets.__all__))
def test_every_argument_of_a_preset_is_documented(name: str) -> None:
    row = next(line for line in RULES.read_text().splitlines() if line.startswith(f"| `{name}("))
    assert parameters(getattr(presets, name)) <= set(WORDS.findall(row))


@pytest.mark.parametrize(
    ("section", "cls"),
    [
        ("Checkpointer", holdfast.Checkpointer),
        ("ResumableSampler", holdfast.ResumableSampler),
        ("Run", holdfast.Run),
        ("Checkpoint", type(holdfast.save("memory://docs-reference", {"x": [1]}))),
        ("RestoreReport", holdfast.RestoreReport),
        ("Clock", core.clock.Clock),
        ("Verdict", policies.Verdict),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_every_member_is_documented(section: str, cls: type) -> None:
    written = set(WORDS.findall(api_sections()[section]))
    public = {n for n in dir(cls) if not n.startswith("_")} - {"store", "identity", "reader", "begin_pass"}
    missing = public - written
    assert not missing, f"reference/api.md, {section}: {sorted(missing)} missing"
    for name in public:
        member = inspect.getattr_static(cls, name)
        if inspect.isfunction(member):
            lost = parameters(member) - written
            assert not lost, f"reference/api.md, {section}.{name}: {sorted(lost)} missing"


def test_every_way_to_limit_a_rule_and_every_event_is_documented() -> None:
    text = RULES.read_text()
    for name in ("after", "until", "at_most"):
        assert f"a.{name}(" in text
        assert parameters(getattr(Rule, name)) <= set(WORDS.findall(text))
    for event in EVENTS:
        assert f'`"{event}"`' in text, f"event {event!r}"


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_verb_and_option_is_documented(verb: str) -> None:
    section = sections(CLI, 2)[verb]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    written = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rows))
    assert written == set(verbs()[verb]) - {"-h", "--help"}, f"the options in reference/cli.md, {verb}"
    assert f"`holdfast {verb} " in section
    assert f"$ holdfast {verb} " in section, "an example that is run"


def test_no_verb_is_documented_that_is_not_there() -> None:
    assert set(sections(CLI, 2)) - {"Exit codes"} == set(verbs())


def test_exit_codes_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", sections(CLI, 2)["Exit codes"], re.MULTILINE)
    written = {int(code): text.replace("`", "") for code, text in rows}
    assert written == {code: text for code, text in CODES.items() if code != BROKEN_PIPE}


def test_the_tree_of_errors_is_that_of_the_code() -> None:
    drawn = ERRORS.read_text().split("```text\n")[1].split("```")[0]
    assert errors.__doc__ is not None
    assert drawn == errors.__doc__.split("```\n")[1]
    assert set(WORDS.findall(drawn)) >= set(errors.__all__)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page_id(page)}: {link} leads nowhere"
        assert not (DOCS in page.parents and DOCS not in target.parents and target != DOCS), (
            f"{link} leaves docs/"
        )
        if anchor:
            assert anchor in anchors(target), f"{page_id(page)}: {link}: no such heading"


def test_every_page_can_be_reached_from_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")
    found: set[str] = set()

    def walk(entry: object) -> None:
        if isinstance(entry, str):
            found.add(entry)
        elif isinstance(entry, list):
            for one in entry:
                walk(one)
        elif isinstance(entry, dict):
            for one in entry.values():
                walk(one)

    walk(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert found | {"design/index.md"} == {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "format" / "index.html").is_file()
