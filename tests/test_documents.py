"""What documents say exists: files and headings that they link to, commands with their options, make's targets."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcformer_deploy.runtime.cli.app import COMMANDS

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("benchmarks/*/*/*.md")])
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_TARGETS = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def _links() -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        for link in _LINK.findall(document.read_text(encoding="utf-8")):
            if not link.startswith(("http://", "https://")):
                yield document, link


def _commands() -> Iterator[tuple[str, list[str]]]:
    """Lines of code blocks that call the program, and calls in the running text."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        lines = [line for block in _BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`(dcformer [^`]+)`", _BLOCK.sub("", text).replace("\n", " "))
        for line in lines:
            if line.startswith("dcformer "):
                yield document.name, shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(document: Path):
    for where, link in _links():
        if where == document:
            name, _, heading = link.partition("#")
            target = (document.parent / name) if name else document
            assert target.exists(), link
            if heading:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]
                assert heading in slugs, link


def test_commands_have_the_options_that_documents_name():
    seen = 0
    for document, words in _commands():
        if words[0].startswith(("-", "X")):
            continue
        assert words[0] in COMMANDS, (document, words)
        command = importlib.import_module(f"dcformer_deploy.runtime.cli.{COMMANDS[words[0]][0]}").command
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[1:]:
            if re.fullmatch(r"-k|--[a-z][a-z-]*", word):
                assert word in options | {"--help"}, (document, words)
        seen += 1
    assert seen > 60


def test_every_command_has_json():
    """But for the one whose output a shell reads."""
    for name, (module, _) in COMMANDS.items():
        command = importlib.import_module(f"dcformer_deploy.runtime.cli.{module}").command
        assert name == "completion" or any("--json" in parameter.opts for parameter in command.params), name


def test_targets_of_make_exist():
    for document in DOCUMENTS:
        for target in re.findall(r"`make ([a-z-]+)`", document.read_text(encoding="utf-8")):
            assert target in _TARGETS, (document.name, target)


def test_every_command_is_documented():
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert [name for name in COMMANDS if f"dcformer {name}" not in text] == []
