"""The commands and programs that Markdown pages show, and which of them no test may run, and why.

A fenced block of `console` (commands after `$ `), `sh` or `python` is run. A comment before it excepts it:

    <!-- not run: REASON -->                  the whole block
    <!-- not run "realm eval": REASON -->     the commands that begin so

A comment whose first line is `<!-- setup` and whose last is `-->` holds Python that readers need not see: it
is run where it stands, so that what follows has the names that it uses.
"""

import re
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RUN = {"console", "sh", "python"}
OTHER_SPELLINGS = {"bash", "shell", "shell-session", "zsh", "terminal", "py", "pycon", "python3"}
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<language>[\w-]*)[^`]*$")
SETUP, SETUP_END = "<!-- setup", re.compile(r" *--> *")
MARKER = re.compile(r'<!--\s*not run(?:\s+"(?P<prefix>[^"]+)")?:\s*(?P<reason>.*?)\s*-->')
SHORTEST_REASON = 10  # characters


class PageError(AssertionError):
    """A page breaks the rule of its blocks: names the page, the line and the remedy."""


@dataclass(frozen=True)
class Exempt:
    """A reason not to run the commands that begin with the prefix; "" is all of the block."""

    prefix: str
    reason: str
    line: int


@dataclass(frozen=True)
class Command:
    """One command as a person would type it, with its lines."""

    line: int
    text: str


@dataclass(frozen=True)
class Block:
    """A fenced block that a test runs, but for what is exempt."""

    page: str
    line: int  # of its first line of text, from 1
    language: str
    text: str
    exempt: tuple[Exempt, ...]

    def reason(self, command: str) -> str | None:
        """Why the command is not run; None where it is."""
        return next((each.reason for each in self.exempt if command.startswith(each.prefix)), None)

    def commands(self) -> list[Command]:
        """Of a shell block: its commands, each with the lines that continue it."""
        prompt = "$ " if self.language == "console" else ""
        found: list[Command] = []
        is_open = False
        for number, line in enumerate(self.text.splitlines(), self.line):
            if is_open:
                found[-1] = Command(found[-1].line, f"{found[-1].text}\n{line}")
            elif line.startswith(prompt) and line.strip() and not line.lstrip("$ ").startswith("#"):
                found.append(Command(number, line.removeprefix(prompt)))
            else:
                continue  # what a command prints, or a comment
            is_open = not _is_whole(found[-1].text)
        if is_open:
            raise PageError(f"{self.page}:{found[-1].line}: the command does not end: {found[-1].text}")
        return found

    def check(self) -> None:
        """Every exemption is for something that is there. Raises PageError."""
        texts = [self.text] if self.language == "python" else [each.text for each in self.commands()]
        for each in self.exempt:
            if not any(text.startswith(each.prefix) for text in texts):
                raise PageError(
                    f'{self.page}:{each.line}: no command of the block begins with "{each.prefix}"; '
                    "remove the marker or mend it"
                )


def _is_whole(command: str) -> bool:
    """Whether a shell would run this rather than wait for more."""
    if command.endswith("\\"):
        return False
    if not re.search(r"[<'\"(){}`]|\b(?:do|then|case)\b", command):
        return True
    done = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and "here-document" not in done.stderr


def blocks(page: str, text: str) -> list[Block]:
    """The page's blocks that are to be run, in order. Raises PageError where it breaks the rule above."""
    lines, exempt, found = text.splitlines(), list[Exempt](), list[Block]()
    numbers = iter(range(len(lines)))
    for i in numbers:
        if "<!--" in lines[i] and "not run" in lines[i]:
            exempt += _exemptions(page, i + 1, lines[i])
        elif lines[i].strip() == SETUP:
            inside = _inside(page, i, lines, SETUP_END, numbers)
            found.append(Block(page, i + 2, "python", textwrap.dedent("\n".join(inside)), ()))
        elif fence := FENCE.match(lines[i]):
            end = re.compile(rf" *{fence['ticks'][0]}{{{len(fence['ticks'])},}} *")
            inside = list(_inside(page, i, lines, end, numbers))
            language = fence["language"].lower()
            if language in OTHER_SPELLINGS:
                raise PageError(f"{page}:{i + 1}: a block of {language!r}; write console, sh or python")
            if language in RUN:
                found.append(Block(page, i + 2, language, textwrap.dedent("\n".join(inside)), tuple(exempt)))
                found[-1].check()
                exempt = []
        if exempt and lines[i].strip() and "<!--" not in lines[i]:
            raise PageError(f"{page}:{exempt[0].line}: 'not run' stands before no block of {sorted(RUN)}")
    if exempt:
        raise PageError(f"{page}:{exempt[0].line}: 'not run' stands before no block of {sorted(RUN)}")
    return found


def _exemptions(page: str, line: int, text: str) -> list[Exempt]:
    """What the comment says. Raises PageError for one without a reason."""
    found = [Exempt(each["prefix"] or "", each["reason"], line) for each in MARKER.finditer(text)]
    if not found or any(len(each.reason) < SHORTEST_REASON for each in found):
        raise PageError(f"{page}:{line}: {text.strip()}; write <!-- not run: REASON --> with a true reason")
    return found


def _inside(
    page: str, start: int, lines: list[str], end: re.Pattern[str], numbers: Iterator[int]
) -> Iterator[str]:
    """The lines up to the one that is the end, which are taken from the numbers."""
    for i in numbers:
        if end.fullmatch(lines[i]):
            return
        yield lines[i]
    raise PageError(f"{page}:{start + 1}: the block does not end")


def pages(root: Path) -> dict[str, str]:
    """README.md and every page of docs/, by their paths from the root."""
    files = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return {file.relative_to(root).as_posix(): file.read_text("utf-8") for file in files}
