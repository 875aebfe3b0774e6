"""StructuredOutput: what the form of an answer must be. No JAX and no grammar library: requests carry it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from realm_jax.errors import RequestError

MAX_TEXT = 1 << 16
"""Bytes of a schema, an expression, a grammar, or of all choices together, quoted as JSON."""

MAX_DEPTH = 64
"""Objects and lists inside each other in a JSON schema."""

MAX_CHOICES = 1000


@dataclass(frozen=True)
class StructuredOutput:
    """The form of an answer: exactly one of these.

    json_object: any JSON object. json_schema: JSON that the schema (a mapping, or its text) accepts.
    regex: text that the whole expression matches (Rust's syntax). grammar: text of a Lark grammar, as
    llguidance reads it, or of a GBNF one, as llama.cpp does. choice: one of these texts.
    """

    json_object: bool = False
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Iterable[str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in FIELDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = "has none of" if not given else f"has {', '.join(given)}, and takes one of"
            raise RequestError(f"structured_output {found} {', '.join(FIELDS)}; give one")
        name = given[0]
        value = _READ[name](getattr(self, name))
        object.__setattr__(self, name, value)
        size = len(self.text.encode("utf-8", "surrogatepass"))
        if size > MAX_TEXT:
            raise RequestError(f"{name} has {size:,} bytes; the limit is {MAX_TEXT:,}")

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(name for name in FIELDS if getattr(self, name) not in (None, False))

    @property
    def text(self) -> str:
        """The given field as text; choices as a JSON list."""
        match self.kind:
            case "json_object":
                return '{"type": "object"}'
            case "choice":
                return json.dumps(self.choice)
            case name:
                return getattr(self, name)


FIELDS = ("json_object", "json_schema", "regex", "grammar", "choice")


def _json_object(value: object) -> bool:
    if value is not True:
        raise RequestError(f"json_object is {value!r}; it must be true or false")
    return True


def _json_schema(value: object) -> str:
    """The schema's text: what a later change to the mapping does not change."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        if not isinstance(schema, Mapping | bool):
            raise RequestError(f"json_schema is {str(schema)[:40]!r}; it must be a JSON object")
        _check_depth(schema)
        return json.dumps(schema if isinstance(schema, bool) else dict(schema), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"json_schema is no JSON: {error}") from None


def _check_depth(schema: object) -> None:
    level, depth = [schema], 0
    while level := [each for value in level for each in _inside(value)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"json_schema is nested more than {MAX_DEPTH} deep; make it flatter")


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _regex(value: object) -> str:
    return _text("regex", value)


def _grammar(value: object) -> str:
    return _text("grammar", value)


def _choice(value: object) -> tuple[str, ...]:
    choices = tuple(value) if isinstance(value, list | tuple) else ()
    if not choices or not all(isinstance(each, str) and each for each in choices):
        raise RequestError(f"choice is {str(value)[:60]!r}; it must be a list of texts, none of them empty")
    if len(choices) > MAX_CHOICES:
        raise RequestError(f"choice has {len(choices):,} texts; the limit is {MAX_CHOICES:,}")
    return tuple(_text("choice", each) for each in choices)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} is {value!r}; it must be a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} has U+{ord(value[error.start]):04X}: not Unicode text") from None
    return value


_READ = {
    "json_object": _json_object,
    "json_schema": _json_schema,
    "regex": _regex,
    "grammar": _grammar,
    "choice": _choice,
}


def read_structured_output(body: Mapping[str, Any]) -> StructuredOutput | None:
    """What a request body asks for: OpenAI's `response_format`, or vLLM's `structured_outputs`.

    Raises RequestError naming the field.
    """
    if body.get("structured_outputs") is None:
        return _response_format(body.get("response_format"))
    if body.get("response_format") not in (None, {"type": "text"}):
        raise RequestError("response_format and structured_outputs are both given; leave one out")
    return _vllm(body["structured_outputs"])


def _vllm(given: object) -> StructuredOutput:
    """`structured_outputs`: {"json" | "regex" | "choice" | "grammar" | "json_object": ...}."""
    names = {"json": "json_schema", **{name: name for name in FIELDS if name != "json_schema"}}
    if not isinstance(given, Mapping) or not given.keys() <= names.keys():
        raise RequestError(f"structured_outputs must be an object with one of {', '.join(names)}")
    try:
        return StructuredOutput(**{names[name]: value for name, value in given.items()})
    except RequestError as error:
        raise RequestError(f"structured_outputs: {error}") from None


def _response_format(given: object) -> StructuredOutput | None:
    """`response_format`; `strict` changes nothing: a schema is always kept."""
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or kind not in ("text", "json_object", "json_schema"):
        raise RequestError(
            f"response_format is {str(given)[:60]!r}; "
            'its "type" must be "text", "json_object" or "json_schema"'
        )
    if kind != "json_schema":
        return StructuredOutput(json_object=True) if kind == "json_object" else None
    inner = given.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(schema, Mapping):
        raise RequestError('response_format.json_schema must be an object with the schema as "schema"')
    if not isinstance(inner.get("strict", None) or False, bool):
        raise RequestError(f"response_format.json_schema.strict is {str(inner['strict'])[:40]!r}; not a bool")
    try:
        return StructuredOutput(json_schema=schema)
    except RequestError as error:
        raise RequestError(f"response_format: {error}") from None
