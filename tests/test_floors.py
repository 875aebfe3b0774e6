"""The house keeps its floors: a module imports only from lower ones."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import realm_jax

PACKAGE = Path(realm_jax.__file__).parent
ROOT = PACKAGE.parent

FLOORS = {
    0: {
        "errors",
        "config",
        "buckets",
        "ggml",
        "params",
        "structured",
        "serving",
    },  # serving/__init__.py imports nothing
    1: {
        "lora",
        "quant",
        "nodes",
        "native_nodes",
        "experts",
        "kernels",
        "rope",
        "cache",
        "delta_rule",
        "recurrent_cache",
        "sampling",
        "sampling_rows",
        "sequence_cache",
        "processors",
    }
    | {"tokenizer", "grammars", "chat", "tools", "gguf", "metadata", "hub", "runtime", "programs"},
    2: {"model", "layers", "prompts", "weights", "banks", "projections", "architectures", "parallel"},
    3: {"loading", "decoding", "drafters", "speculative", "inspection", "scoring", "convert", "quantization"}
    | {"slot_copies"}
    | {
        f"serving.{name}"
        for name in (
            "scheduler",
            "fairness",
            "plans",
            "slots",
            "adapters",
            "request",
            "tenants",
            "transcript",
            "drafting",
        )
    },
    4: {"memory"}
    | {f"serving.{name}" for name in ("engine", "in_flight", "registry", "runner", "packing", "stopwatch")},
    5: {"llm", "speculation", "perplexity", "research", "training", "evaluation", "benchmark"}
    | {
        f"serving.{name}"
        for name in (
            "server",
            "serve_config",
            "model_entries",
            "batch",
            "bodies",
            "calling",
            "answers",
            "keys",
            "metrics",
        )
    },
    6: {"cli", "__main__"},
}
WITHIN_A_FLOOR = {
    ("serving.engine", "serving.in_flight"),
    ("serving.in_flight", "serving.packing"),
    ("serving.server", "serving.keys"),
    ("lora", "quant"),
    ("lora", "kernels"),
    ("lora", "nodes"),
    ("lora", "gguf"),
    ("quant", "kernels"),
    ("nodes", "kernels"),
    ("nodes", "rope"),
    ("experts", "kernels"),
    ("experts", "nodes"),
    ("native_nodes", "nodes"),
    ("native_nodes", "kernels"),
    ("runtime", "kernels"),
    ("programs", "kernels"),  # the tuning table decides what is compiled
    ("weights", "projections"),
    ("banks", "architectures"),
    ("banks", "weights"),
    ("banks", "parallel"),
    ("weights", "parallel"),
    ("parallel", "model"),
    ("parallel", "architectures"),
    ("parallel", "projections"),
    ("sampling", "kernels"),
    ("sampling", "sampling_rows"),
    ("params", "structured"),
    ("grammars", "tokenizer"),
    ("tools", "chat"),
    ("tokenizer", "gguf"),  # Tokenizer.from_gguf
    ("hub", "gguf"),  # whether a folder is a checkpoint
    ("model", "layers"),
    ("weights", "architectures"),
    ("serving.scheduler", "serving.request"),
    ("serving.scheduler", "serving.fairness"),
    ("serving.fairness", "serving.request"),
    ("serving.scheduler", "serving.slots"),
    ("serving.scheduler", "serving.plans"),
    ("serving.scheduler", "serving.drafting"),
    ("serving.plans", "serving.adapters"),
    ("serving.plans", "serving.request"),
    ("serving.request", "serving.drafting"),
    ("serving.engine", "serving.stopwatch"),
    ("drafters", "decoding"),
    ("slot_copies", "decoding"),
    ("speculative", "decoding"),
    ("speculative", "drafters"),
    ("llm", "speculation"),
    ("serving.scheduler", "serving.adapters"),
    ("serving.slots", "serving.request"),
    ("serving.engine", "serving.runner"),
    ("serving.engine", "serving.registry"),
    ("serving.registry", "serving.runner"),
    ("serving.engine", "serving.packing"),
    ("serving.runner", "serving.packing"),
    ("perplexity", "llm"),
    ("buckets", "config"),
    ("cache", "kernels"),
    ("sequence_cache", "cache"),
    ("sequence_cache", "kernels"),
    ("research", "llm"),
    ("delta_rule", "kernels"),
    ("convert", "quantization"),
    ("recurrent_cache", "delta_rule"),
    ("cache", "recurrent_cache"),
    ("serving.transcript", "serving.request"),
    ("serving.serve_config", "serving.model_entries"),
    ("serving.batch", "llm"),
    ("serving.batch", "serving.bodies"),
    ("serving.batch", "serving.answers"),
    ("serving.answers", "serving.bodies"),
    *((f"serving.{above}", "serving.calling") for above in ("bodies", "answers", "server")),
    ("serving.calling", "llm"),
    *(
        ("serving.server", unit)
        for unit in ("llm", "serving.bodies", "serving.answers", "serving.model_entries")
    ),
    ("serving.bodies", "llm"),
    ("evaluation", "llm"),
    ("benchmark", "llm"),
    ("__main__", "cli"),
} | {(unit, "errors") for unit in FLOORS[0]}
FLOOR_OF = {unit: floor for floor, units in FLOORS.items() for unit in units}
WITHOUT_JAX = ("errors", "ggml", "params", "gguf", "tokenizer", "grammars", "chat", "tools", "hub")
WITHOUT_JAX += ("serving.request", "serving.scheduler", "serving.tenants")
MAX_LINES = 330
SHAPELESS_NAMES = {"utils", "util", "helpers", "helper", "manager", "managers", "misc", "common"}


def unit_of(module: str) -> str:
    """The part of the house that a dotted name inside realm_jax belongs to; "" for the package itself."""
    parts = module.split(".")
    return ".".join(parts[:2] if parts[0] == "serving" else parts[:1])


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every dotted name inside realm_jax that the source imports, wherever the statement stands."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                names = [alias.name for alias in names]
            case ast.ImportFrom(base, aliases, level):
                above = ["realm_jax", *filter(None, package)]
                prefix = [*above[: len(above) - level + 1], base] if level else [base]
                names = [".".join([*filter(None, prefix), alias.name]) for alias in aliases]
            case ast.Call(
                ast.Name("import_module") | ast.Attribute(_, "import_module"), [ast.Constant(str(n))]
            ):
                names = [n]
            case _:
                continue
        yield from (n.removeprefix("realm_jax").lstrip(".") for n in names if n.split(".")[0] == "realm_jax")


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What the module imports against the floors, one sentence each."""
    unit = unit_of(module)
    if unit not in FLOOR_OF:
        return [f"{module}: assign it a floor in tests/test_floors.py"]
    found = []
    for name in imported(source, module, is_package):
        first = name.split(".")[0]
        target = unit_of(realm_jax._HOME.get(first, name))
        if target in ("", "__version__", unit) or (unit, target) in WITHIN_A_FLOOR:
            continue
        if target not in FLOOR_OF:
            found.append(f"{module} imports {name}: assign it a floor in tests/test_floors.py")
        elif FLOOR_OF[target] >= FLOOR_OF[unit]:
            found.append(f"{module} (floor {FLOOR_OF[unit]}) imports {name} (floor {FLOOR_OF[target]})")
    return found


def modules() -> dict[str, Path]:
    """Dotted name inside realm_jax -> file, for every module but the package's own __init__."""
    files = sorted(PACKAGE.rglob("*.py"))
    named = {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in files}
    return {name.removesuffix(".__init__"): file for name, file in named.items() if name != "__init__"}


def test_every_module_imports_only_from_lower_floors():
    found = [
        sentence
        for name, file in modules().items()
        for sentence in violations(name, file.read_text(), is_package=file.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gguf", "from realm_jax.llm import LLM"),
        ("gguf", "from realm_jax import LLM"),
        ("gguf", "def late():\n    import realm_jax.cli.main"),
        ("gguf", "from .tokenizer import Tokenizer"),
        ("quant", "from realm_jax.lora import LoRA"),
        ("serving.scheduler", "from . import engine"),
        ("serving.scheduler", "from ..decoding import Strategy"),
        ("hub", "from importlib import import_module\nimport_module('realm_jax.llm')"),
        ("novelty", "import numpy"),
        ("cli", "from realm_jax import novelty"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lora", "from realm_jax.quant import QuantizedTensor"),
        ("hub.sources", "from realm_jax.hub.download import fetch\nfrom .download import fetch"),
        ("serving.scheduler", "from .request import Request\nfrom realm_jax import errors"),
        ("cli.generate", "from realm_jax import LLM, SamplingParams, __version__\nimport jax"),
    ],
)
def test_an_allowed_import_is_not_reported(module: str, source: str):
    assert violations(module, source) == []


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_module_does_not_load_jax(module: str):
    if module not in modules():
        pytest.skip(f"realm_jax.{module} does not exist")
    code = f"import sys, realm_jax.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_files_are_short_and_named_for_what_they_do():
    files = [f for folder in ("realm_jax", "tests", "scripts") for f in (ROOT / folder).rglob("*.py")]
    long = {str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"
    assert not [f for f in files if f.stem in SHAPELESS_NAMES]
