"""Files that `realm quantize` writes beside llama.cpp's of the same source: bytes, perplexities, time.

Perplexities are ours, in float32 with weights expanded. Where all tensors of the two files are the same byte
for byte, one is measured. Without --calibration the importance matrix is made on pydoc's texts.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import llama_quantizer

from realm_jax import LLM, gguf
from realm_jax.perplexity import perplexities
from realm_jax.quantization import importance
from realm_jax.quantization.file_types import FILE_TYPES, FileType
from realm_jax.quantization.importance import ImportanceMatrix
from realm_jax.quantization.observed import observe
from realm_jax.quantization.requantizing import Quantization

WINDOW = 512


def opened(path: Path) -> LLM:
    return LLM(path, ctx_size=WINDOW, dtype="float32", max_num_seqs=4)


def perplexity(path: Path, text: str) -> float:
    """As `realm perplexity --dtype float32` prints it."""
    llm = opened(path)
    ids = llm.tokenizer.encode(text, add_special=True)
    bos = llm.tokenizer.bos_id if llm.tokenizer.add_bos else None
    return list(perplexities(llm, ids, window=WINDOW, bos=bos))[-1]


def importance_of(model: Path, text: str, chunks: int, path: Path) -> ImportanceMatrix:
    """The importance matrix over so many windows of the text."""
    llm = opened(model)
    ids = llm.tokenizer.encode(text[: 40 * WINDOW * chunks], add_special=True)
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(chunks)]
    squares = observe(llm.transformer, llm.model.params, llm.model.numerics, windows)
    importance.write(path, squares, chunks=chunks, chunk_size=WINDOW, dataset="calibration")
    return importance.read(path)


def is_same(ours: Path, theirs: Path) -> bool:
    """Whether all tensors have the same types and bytes."""
    with gguf.open(ours) as a, gguf.open(theirs) as b:
        return a.tensors.keys() == b.tensors.keys() and all(
            info.ggml_type == b.tensors[name].ggml_type and bytes(a.data(name)) == bytes(b.data(name))
            for name, info in a.tensors.items()
        )


def row(
    model: Path, folder: Path, text: str, kind: FileType, matrix: ImportanceMatrix | None, threads: int
) -> dict[str, object]:
    """One file type, with the importance matrix or without any."""
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    start = time.perf_counter()
    with gguf.open(model) as file:
        Quantization(file, kind, matrix, allow_requantize=True, threads=threads).write(ours)
    middle = time.perf_counter()
    llama_quantizer.quantize(model, theirs, kind, None if matrix is None else matrix.means, threads=threads)
    end = time.perf_counter()
    same = is_same(ours, theirs)
    value = perplexity(ours, text)
    return {
        "type": kind.name,
        "imatrix": matrix is not None,
        "mib": ours.stat().st_size / 2**20,
        "same": same,
        "ours": value,
        "theirs": value if same else perplexity(theirs, text),
        "time_ratio": (middle - start) / (end - middle),
    }


def rows(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, object]]:
    text = args.file.read_text()
    if args.imatrix:
        matrix = importance.read(args.imatrix)
    else:
        calibration = args.calibration.read_text() if args.calibration else "\n".join(topics.values())
        matrix = importance_of(args.model, calibration, args.chunks, folder / "imatrix.gguf")
    print(json.dumps({"type": "source", "ours": perplexity(args.model, text)}), file=sys.stderr)
    for kind in [FILE_TYPES[name] for name in args.types]:
        for each in (None, matrix) if kind.name not in ("F32", "F16", "BF16", "Q8_0") else (None,):
            if each is not None or kind.name != "Q2_K_S":
                yield row(args.model, folder, text, kind, each, args.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True, help="in F32, F16 or BF16")
    parser.add_argument("-f", "--file", type=Path, required=True, help="the text to predict")
    parser.add_argument("--imatrix", type=Path, help="an importance matrix, instead of one made here")
    parser.add_argument("--calibration", type=Path, help="the text of the importance matrix")
    parser.add_argument("--chunks", type=int, default=32, help="windows of that text")
    parser.add_argument("--types", nargs="+", choices=FILE_TYPES, default=list(FILE_TYPES))
    parser.add_argument("-t", "--threads", type=int, default=2)
    args = parser.parse_args()
    print("| type | imatrix | MiB | ours | llama.cpp's | ratio | tensors | time |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for each in rows(args, Path(folder)):
            print(json.dumps(each), file=sys.stderr, flush=True)
            ours, theirs = each["ours"], each["theirs"]
            assert isinstance(ours, float)
            assert isinstance(theirs, float)
            print(
                f"| {each['type']} | {'yes' if each['imatrix'] else ''} | {each['mib']:.1f} | {ours:.4f} "
                f"| {theirs:.4f} | {ours / theirs:.4f} | {'the same' if each['same'] else 'differ'} "
                f"| {each['time_ratio']:.1f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
