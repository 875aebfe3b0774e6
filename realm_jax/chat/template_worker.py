"""Renders chat templates. As a program, it renders those that are not known to be good.

A Jinja sandbox keeps a template from Python's objects but bounds neither time nor memory. The program bounds
both for itself, then answers one JSON line with one JSON line until its input ends. It imports neither JAX
nor NumPy: what it costs to start it is what it costs to replace it.
"""

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from realm_jax.chat.sandbox import SECONDS

MEMORY_BYTES = 256 << 20
OUTPUT_BYTES = 1 << 20


class Refusal(jinja2.TemplateError):
    """The template called `raise_exception`: it does not take this conversation."""


class Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; rendering shows what it encloses."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise Refusal(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    return environment.from_string(template)


def outcome(template: str, variables: Mapping[str, Any], limit: int | None = None) -> dict[str, str]:
    """{"text"}, {"refused": the template's own words}, or {"error": what went wrong}; never raises.

    `limit`: bytes of UTF-8 that the text may have.
    """
    parts, size = [], 0
    try:
        for part in _compiled(template).generate(variables):
            size += len(part.encode("utf-8", "surrogatepass"))
            if limit is not None and size > limit:
                return {"error": f"made more than {limit:,} bytes of text"}
            parts.append(part)
    except Refusal as refusal:
        return {"refused": str(refusal.message)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"has a syntax error in line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": f"needed more than {MEMORY_BYTES >> 20} MB of memory"}
    except Exception as error:  # a stranger's template may raise anything: all of it is its failure
        return {"error": f"failed: {type(error).__name__}: {error}"}
    return {"text": "".join(parts)}


def _bound_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _bound_time() -> None:
    """Allow the next answer its seconds. The caller kills by the clock; this ends an orphan."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + int(SECONDS) + 1, resource.RLIM_INFINITY))


def main() -> None:
    _bound_memory()
    print("{}", flush=True)
    for line in sys.stdin:
        _bound_time()
        request = json.loads(line)
        print(json.dumps(outcome(request["template"], request["variables"], OUTPUT_BYTES)), flush=True)


if __name__ == "__main__":
    main()
