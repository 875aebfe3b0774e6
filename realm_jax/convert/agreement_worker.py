"""The ids that the tokenizers library gives, as a program: it bounds its time and memory for itself.

A hostile tokenizer.json may send the library round for ever, or make it panic, which prints what is no user's
business. Usage: PATH as the argument, a list of texts as JSON on stdin; answers one JSON object.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

SECONDS = 60
MEMORY_BYTES = 4 << 30
MOST_IDS = 100_000


def answer(path: str, texts: list[str]) -> dict[str, Any]:
    """{"ids": a list for each text}, or {"error": the library's words}."""
    import tokenizers

    try:
        found = tokenizers.Tokenizer.from_str(Path(path).read_text("utf-8"))
        found.no_truncation()
        found.no_padding()
        ids = [found.encode(text, add_special_tokens=False).ids for text in texts]
    except BaseException as error:  # whatever the library makes of a broken file; its panics are no Exception
        return {"error": str(error)}
    if (count := sum(map(len, ids))) > MOST_IDS:
        return {"error": f"a page of text is {count:,} tokens"}
    return {"ids": ids}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    json.dump(answer(sys.argv[1], json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
