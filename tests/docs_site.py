"""Pages of the site that are made from the program when it is built, so that they are never out of date.

MkDocs calls `on_files`, `on_page_markdown` and `on_config` (mkdocs.yml, `hooks`).
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import docs_diagram  # noqa: E402  after the path

from realm_jax import cli  # noqa: E402

REPOSITORY = "https://github.com/realm-jax/realm_jax/blob/main"
TAKEN_OVER = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of docs/, the diagram, the reference of commands, and pages of the project's folder."""
    made = {
        "architecture.svg": docs_diagram.svg(),
        "reference/commands.md": commands_page(),
        **{page: (ROOT / source).read_text("utf-8") for page, source in TAKEN_OVER.items()},
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Links of a page that stands elsewhere in the checkout, and links to files outside docs/, lead there."""
    here = page.file.src_uri
    source = ROOT / TAKEN_OVER[here] if here in TAKEN_OVER else ROOT / "docs" / here
    outside = {path: name for name, path in TAKEN_OVER.items()}

    def target(link: re.Match[str]) -> str:
        path = (source.parent / link["path"]).resolve()
        anchor = link["anchor"] or ""
        if not path.exists() or not path.is_relative_to(ROOT):
            return link[0]  # MkDocs says what is wrong with it
        name = path.relative_to(ROOT).as_posix()
        up = "../" * here.count("/")
        if name in outside:
            return up + outside[name] + anchor
        if name.startswith("docs/"):
            return up + name.removeprefix("docs/") + anchor
        return f"{REPOSITORY}/{name}{anchor}"

    return LINK.sub(target, markdown)


def commands_page() -> str:
    """What `--help` prints, command by command."""
    text = ["# Command line", "", "What `--help` of each command prints."]
    for name, shown in helps(typer.main.get_command(cli.app), "realm"):
        text += ["", f"## {name}", "", "```text", shown.rstrip(), "```"]
    return "\n".join(text) + "\n"


def helps(command: Any, name: str, parent: Any = None) -> Iterator[tuple[str, str]]:
    """Each command by its whole name, and its help."""
    context = type(command).context_class(
        command, info_name=name.rpartition(" ")[2], parent=parent, terminal_width=100, max_content_width=100
    )
    yield name, command.get_help(context)
    for each, sub in getattr(command, "commands", {}).items():
        yield from helps(sub, f"{name} {each}", context)
