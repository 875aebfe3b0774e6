"""Whether the tokenizer that a GGUF file will state gives the ids that tokenizer.json gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

from realm_jax.convert.agreement_worker import SECONDS
from realm_jax.convert.fields import Fields
from realm_jax.convert.folder import HFFolder
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.lora.fitting import shown
from realm_jax.tokenizer import Tokenizer

# What known tokenizers cut in different ways: letters, numbers, symbols, white space. Nothing where readers
# of GGUF are known to simplify: combining marks, and letters that are neither large nor small.
TEXTS = (
    "Hello world, hello again.",
    " leading,  two,   three and trailing  ",
    "one\ntwo\n\nthree\n\n\n  four\r\n\tfive\t\tsix \n seven",
    "It's he'll they've I'm we'd you're don't 'tis",
    "IT'S HE'LL THEY'VE I'M WE'D",
    "0 1 12 123 1234 12345 1234567 3.14159 1,000,000 2x4 v1.2.3",
    "caf\u00e9 na\u00efve Gr\u00f6\u00dfe",
    "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "def f(x): return x**2  # !!!???... <a href='b'>&amp;</a> [x](y) {z} a_b-c/d\\e @f $5 50% ~^|",
    "\U0001f44d \U0001f680\U0001f680 \u00a1\u00bf \u2014 \u2018q\u2019 \u201cq\u201d \u2026 \u20ac5",
)


def check(folder: HFFolder, ours: Tokenizer) -> None:
    """Raises UnsupportedError that shows the first text on which the two differ."""
    for text, expected in zip(TEXTS, _theirs(folder.path / "tokenizer.json"), strict=True):
        if (found := ours.encode(text, add_special=False, parse_special=True)) != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), -1)
            raise UnsupportedError(
                f"tokenizer.json: {text!a} is {expected[at:][:5]}... from token {at} on, and would be "
                f"{found[at:][:5]}... in a GGUF file ({ours.kind}): GGUF cannot state this tokenizer exactly"
            )


def _theirs(path: Path) -> list[list[int]]:
    """The ids of each text, by a process that a hostile file may break."""
    path_of_modules = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "realm_jax.convert.agreement_worker", path],
            check=False,
            input=json.dumps(TEXTS).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            env={"PYTHONPATH": path_of_modules, "TOKENIZERS_PARALLELISM": "false"},
        )
    except subprocess.TimeoutExpired:
        raise ModelFileError(f"{path.name}: a page of text takes longer than {SECONDS} s") from None
    if done.returncode:
        raise ModelFileError(f"{path.name}: breaks the tokenizers library, or takes too much time or memory")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ModelFileError(f"{path.name}: {shown(answer['error'])}")
    return answer["ids"]


def hints(generation: Fields) -> dict[str, float | int]:
    """What generation_config.json advises for sampling, by GGUF's keys; nothing where it advises not to."""
    if not generation.flag("do_sample", False):
        return {}
    names = {
        "temperature": "temp",
        "top_p": "top_p",
        "min_p": "min_p",
        "repetition_penalty": "penalty_repeat",
    }
    found: dict[str, float | int] = {
        f"general.sampling.{key}": generation.real(name)
        for name, key in names.items()
        if generation.get(name)
    }
    if generation.has("top_k"):
        found["general.sampling.top_k"] = generation.count("top_k", 1 << 24, least=0)
    return found
