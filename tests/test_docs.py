"""What README and docs/ show can be typed: every command and program in them is run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from command_line import ROOT
from docs_blocks import PageError, blocks, pages
from docs_diagram import direct, svg, units
from docs_sandbox import Sandbox
from docs_site import helps

import realm_jax
from realm_jax import cli

pytestmark = pytest.mark.unoptimized

PAGES = {name: text for name, text in pages(ROOT).items() if blocks(name, text)}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One for all pages: they share the compiled programs of its models."""
    made = Sandbox(tmp_path_factory.mktemp("docs"))
    yield made
    made.close()


def failures(sandbox: Sandbox, folder: Path, name: str, text: str) -> list[str]:
    """What a page shows and does not work, one sentence each."""
    found = []
    with sandbox.page(folder) as page:
        for block in blocks(name, text):
            found += page.run(block)
    return found


@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_a_page_runs(sandbox: Sandbox, tmp_path: Path, name: str):
    found = failures(sandbox, tmp_path / "page", name, PAGES[name])
    assert not found, "\n".join(found)


WRONG = {
    "an unknown flag": (
        "```console\n$ realm tokenize hello --idz\n```",
        "page:2: realm tokenize hello --idz: exit 2",
    ),
    "a model that is not there": ("text\n\n```sh\nrealm inspect no.gguf\n```", "page:4:"),
    "a command that fails": ("```sh\ncat no-such-file | sort\n```", "page:2: cat no-such-file"),
    "a program that fails": ("```python\nx = 1\nassert x == 2\n```", "page:3: AssertionError"),
    "no program": ("```python\nx = = 1\n```", "page:2: invalid syntax"),
    "an extra that is not there": ("```sh\npip install '.[servers]'\n```", "no such extra: servers"),
    "a script without a marker": ("```sh\nscripts/demo\n```", "say why: <!-- not run: REASON -->"),
    "exempt, with an unknown flag": (
        "<!-- not run: it needs a device -->\n```sh\nrealm bench --batches 4\n```",
        "page:3: realm bench --batches 4",
    ),
    "exempt, with an unknown command": (
        "<!-- not run: it needs a device -->\n```sh\nrealm fly\n```",
        "page:3:",
    ),
    "exempt, of a script that is not there": (
        "<!-- not run: it takes hours -->\n```sh\nscripts/bench_all\n```",
        "there is no scripts/bench_all",
    ),
    "exempt, of a script that has no such flag": (
        "<!-- not run: it takes hours -->\n```sh\nscripts/bench_cpu --depths 1\n```",
        "scripts/bench_cpu has no --depths",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_work_is_found(sandbox: Sandbox, tmp_path: Path, case: str):
    text, wanted = WRONG[case]
    (found,) = failures(sandbox, tmp_path / "page", "page", text)
    assert wanted in found


def test_each_command_of_a_block_is_told_apart(sandbox: Sandbox, tmp_path: Path):
    """What is printed, comments, lines that go on, quotes; one that fails hides no other."""
    text = """<!-- not run "cat no": the file is not there -->
```console
# a comment
$ false
what it prints
$ test "a
b" = 'a
b'
$ cat <<END > made; cat no-such-file
$ more
END
$ test "$(cat < /dev/null)" = "x" \\
    || exit 3
$ cat no-such-file
```
"""
    found = failures(sandbox, tmp_path / "page", "page", text)
    assert [each.split(": ")[0] for each in found] == ["page:4", "page:9", "page:12"], found


def test_names_and_files_last_for_a_page(sandbox: Sandbox, tmp_path: Path):
    """What a reader need not see is run as well, and what is exempt is not."""
    text = """<!-- setup
x = 1
-->
```python
import pathlib
pathlib.Path("made").write_text(str(x))
```
```sh
test "$(cat made)" = 1
```
<!-- not run: it would fail -->
```python
raise ValueError
```
<!-- setup
x = missing
-->
"""
    (found,) = failures(sandbox, tmp_path / "page", "page", text)
    assert found.startswith("page:16: NameError")


@pytest.mark.parametrize(
    "text",
    [
        "<!-- not run -->\n```sh\ntrue\n```",
        "<!-- not run: -->\n```sh\ntrue\n```",
        "<!-- not run: slow -->\n```sh\ntrue\n```",
        '<!-- not run "fals": there is no such command -->\n```sh\ntrue\n```',
        "<!-- not run: there is no block after it -->\ntext\n```sh\ntrue\n```",
        "```sh\ntrue\n```\n<!-- not run: there is no block after it -->",
        "```bash\ntrue\n```",
        "```sh\ntrue\n",
        "```sh\necho 'a\n```",
    ],
)
def test_a_marker_needs_a_reason_and_a_block_needs_an_end(text: str):
    with pytest.raises(PageError):
        [block.commands() for block in blocks("page", text)]


def test_the_site_builds_without_warnings_and_has_every_public_name(tmp_path: Path):
    """As scripts/docs builds it. Every page of docs/ is in the navigation, or MkDocs warns."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "reference" / "python.html").read_text()
    homes = {name: home for name, home in realm_jax._HOME.items() if name in realm_jax.__all__}
    assert not [name for name, home in homes.items() if f'id="realm_jax.{home}.{name}"' not in reference]
    commands = (tmp_path / "reference" / "commands.html").read_text()
    names = {name for name, _ in helps(typer.main.get_command(cli.app), "realm")}
    assert {"realm generate", "realm lora train", "realm serve keys create"} < names
    assert not [name for name in names if f"Usage: {name}" not in commands]


def test_the_diagram_has_every_unit_and_every_import():
    """A line for each import, or a way of lines that leads there."""
    imports = units()
    drawn, drawing = direct(imports), svg()
    assert all(f"<title>{unit} imports " in drawing for unit in imports)
    assert drawing.count("<path") == sum(map(len, drawn.values()))
    for unit, below in imports.items():
        reached, new = set[str](), set(drawn[unit])
        while new:
            reached |= new
            new = {each for known in new for each in drawn[known]} - reached
        assert below <= reached, unit
