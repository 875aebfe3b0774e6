"""Regular expressions that come from a file, matched in a process of their own under a limit of its time.

Python's matcher takes exponential time for some expressions, and cannot be stopped from inside.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from realm_jax.errors import ModelFileError
from realm_jax.lora.fitting import shown

CPU_SECONDS = 2
MEMORY_BYTES = 512 << 20
WALL_SECONDS = 60  # for a machine that is busy with other things

WORKER = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
sys.stdin.reconfigure(encoding="utf-8")
names, expressions = json.load(sys.stdin)
answers = []
for expression, whole in expressions:
    try:
        compiled = re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        sys.exit(print(json.dumps(str(error))))
    match = compiled.fullmatch if whole else compiled.match
    answers.append([number for number, name in enumerate(names) if match(name)])
print(json.dumps(answers))
"""


class Expression(NamedTuple):
    """A regular expression, which has to match a name's start, or all of it."""

    text: str
    whole: bool


def match(expressions: Sequence[Expression], names: Sequence[str], source: str) -> list[set[str]]:
    """For each expression, the names that it matches.

    Raises ModelFileError, which begins with `source`, for what is no expression or takes too long.
    """
    if not expressions:
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", WORKER],
            input=json.dumps([list(names), list(expressions)]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=WALL_SECONDS,
            check=False,
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        answer = None
    if answer is None:
        longest = max(expressions, key=lambda each: len(each.text)).text
        raise ModelFileError(
            f"{source}: matching its regular expressions takes more than {CPU_SECONDS} s or "
            f"{MEMORY_BYTES >> 20} MiB, such as {shown(longest)} (name the modules in a list)"
        )
    if isinstance(answer, str):
        raise ModelFileError(f"{source}: no regular expression: {shown(answer)}")
    found: list[list[int]] = answer
    return [{names[number] for number in numbers} for numbers in found]
