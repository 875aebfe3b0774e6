"""ChatTemplate: messages to the text that a model was trained on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from realm_jax.chat import sandbox
from realm_jax.chat.messages import checked, one_line, plain
from realm_jax.errors import ModelFileError, RequestError, UnsupportedError

KEY = "tokenizer.chat_template"
# Templates read by people and found harmless: these render here, all others in a process of their own.
KNOWN_GOOD = frozenset(
    {
        "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",  # SmolLM2 Instruct
        "af9c0233881b083b52ff773580215222b5440ac3d0beeeca99b76329b048f8db",  # Qwen2 Instruct
        "268b6082ceb7176dc6ed80557a2f7837f9f0339592fbee677d405a553af15f88",  # Phi-3 Instruct
    }
)


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template of a model file and the texts of the special tokens that it may name."""

    template: str
    source: str = "metadata"
    bos_token: str = ""
    eos_token: str = ""
    unk_token: str = ""
    pad_token: str = ""
    trusted: bool = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.template.encode("utf-8", "surrogateescape")).hexdigest()
        object.__setattr__(self, "trusted", digest in KNOWN_GOOD)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], source: str = "metadata", *, name: str | None = None, **tokens: str
    ) -> "ChatTemplate | None":
        """The template of a model file, None if it has none; `tokens`: `bos_token` and the like.

        A file may have several: `name` chooses `tokenizer.chat_template.NAME`. Raises RequestError for a name
        that the file lacks and ModelFileError for a template that is no string.
        """
        key = KEY if name is None else f"{KEY}.{name}"
        template = metadata.get(key)
        if template is None and name is not None:
            names = sorted(k.removeprefix(f"{KEY}.") for k in metadata if k.startswith(f"{KEY}."))
            raise RequestError(
                f"chat template is {name!r}; {source} has {', '.join(names) or 'none with a name'}"
            )
        if template is not None and not isinstance(template, str):
            raise ModelFileError(f"{source}: {key} is of type {type(template).__name__}; it must be a string")
        return None if template is None else cls(template, source, **tokens)

    @classmethod
    def require(cls, metadata: Mapping[str, Any], source: str = "metadata", **options: Any) -> "ChatTemplate":
        """Like `from_metadata`; raises UnsupportedError if the file has no template."""
        template = cls.from_metadata(metadata, source, **options)
        if template is None:
            raise UnsupportedError(
                f"{source} has no chat template ({KEY}): give the model a plain text with --raw"
            )
        return template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text for a conversation; with `add_generation_prompt` it ends where the assistant begins.

        Raises RequestError for bad messages and where the template refuses them; ModelFileError where the
        template is broken or exceeds its bounds.
        """
        known = {name: getattr(self, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        given = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        variables = plain({"messages": checked(messages), **known, **given, **variables})
        if self.trusted:
            from realm_jax.chat.template_worker import outcome

            result = outcome(self.template, variables)
        else:
            result = sandbox.outcome(self.template, variables)
        match result:
            case {"text": str(text)}:
                return text
            case {"refused": str(words)}:
                raise RequestError(f"the chat template refuses these messages: {one_line(words)}")
            case _:
                problem = one_line(str(result.get("error", "gave no answer")))
                raise ModelFileError(f"{self.source}: the chat template {problem} (--raw does without it)")
