"""Types of model files, by llama.cpp's names and numbers; which tensors are quantized, and what stands in."""

from dataclasses import dataclass

from realm_jax.errors import UnsupportedError
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.gguf import TensorInfo, writer
from realm_jax.gguf.writer import TensorPlan
from realm_jax.quant.encoding import ENCODERS

T = GGMLType

QUANTIZATION_VERSION = 2
PLAIN = (T.F32, T.F16, T.BF16)
"""Types that hold numbers as they are; all others round them in blocks."""


@dataclass(frozen=True)
class FileType:
    """A choice of types. number: `general.file_type`. kind: of most matrices."""

    name: str
    number: int
    kind: GGMLType
    is_uniform: bool = False  # all matrices but the head are of it

    def metadata(self) -> dict[str, bytes]:
        """What a file of this type says of it."""
        return {
            "general.file_type": writer.count_value(self.number),
            "general.quantization_version": writer.count_value(QUANTIZATION_VERSION),
        }


FILE_TYPES = {
    each.name: each
    for each in (
        FileType("F32", 0, T.F32),
        FileType("F16", 1, T.F16),
        FileType("BF16", 32, T.BF16),
        FileType("Q4_0", 2, T.Q4_0),
        FileType("Q4_1", 3, T.Q4_1),
        FileType("Q5_0", 8, T.Q5_0),
        FileType("Q5_1", 9, T.Q5_1),
        FileType("Q8_0", 7, T.Q8_0),
        FileType("Q2_K", 10, T.Q2_K),
        FileType("Q2_K_S", 21, T.Q2_K),
        FileType("Q3_K_S", 11, T.Q3_K),
        FileType("Q3_K_M", 12, T.Q3_K),
        FileType("Q3_K_L", 13, T.Q3_K),
        FileType("Q4_K_S", 14, T.Q4_K),
        FileType("Q4_K_M", 15, T.Q4_K),
        FileType("Q5_K_S", 16, T.Q5_K),
        FileType("Q5_K_M", 17, T.Q5_K),
        FileType("Q6_K", 18, T.Q6_K),
        FileType("IQ4_NL", 25, T.IQ4_NL),
        FileType("MXFP4_MOE", 38, T.MXFP4),
        FileType("MXFP4", 38, T.MXFP4, is_uniform=True),
    )
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# A type of blocks of 256 -> one of 32, for rows that are no multiple of 256.
SMALLER_BLOCKS = {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}

# Parts of names of matrices that stay as they are: small, or not multiplied.
KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel"),
    *("per_layer_model_proj", "position_embd", "token_types", "ssm_conv1d", "shortconv.conv.weight"),
    *("indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *(f"time_mix_{part}.weight" for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2")),
    *(f"time_mix_{part}.weight" for part in ("g1", "g2", "decay_w1", "decay_w2", "lerp_fused")),
)

INTEGERS = (T.I8, T.I16, T.I32, T.I64)  # tables, not weights


def file_type_of(kind: GGMLType) -> FileType:
    """The type of a file whose matrices are all of this one.

    Raises UnsupportedError that names those that can be written.
    """
    if kind not in ENCODERS:
        names = ", ".join(each.name for each in ENCODERS)
        raise UnsupportedError(f"matrices cannot be written as {kind.name}; there are {names}")
    return FILE_TYPES[ALIASES.get(kind.name, kind.name)]


def pure_type(info: TensorInfo | TensorPlan, kind: GGMLType) -> GGMLType:
    """The tensor's type in a file whose matrices are all of `kind`: its own, if it is not quantized."""
    return fitting(kind, info.shape[-1]) if is_quantizable(info) else info.ggml_type


def fitting(kind: GGMLType, inputs: int) -> GGMLType:
    """The type, or the one that stands in for it where rows of `inputs` are no multiple of its block."""
    for each in (kind, SMALLER_BLOCKS.get(kind, kind)):
        if inputs % BLOCK_SIZES[each].elements == 0:
            return each
    return T.F16


def is_quantizable(info: TensorInfo | TensorPlan) -> bool:
    """Whether files of another type hold this tensor in another type: matrices that are multiplied."""
    is_matrix = len(info.shape) - next((i for i, n in enumerate(info.shape) if n > 1), len(info.shape)) > 1
    is_kept = info.ggml_type in INTEGERS or any(part in info.name for part in KEPT)
    return is_matrix and info.name.endswith("weight") and not is_kept
