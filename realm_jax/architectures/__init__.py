"""GGUF architectures as data: which metadata and tensors each has, and what they mean.

An entry of `ARCHITECTURES` states facts; `read_config` and `parameters` apply them to a file.
"""

from realm_jax.architectures.reading import read_config
from realm_jax.architectures.table import ARCHITECTURES
from realm_jax.architectures.tensors import Parameter, Part, parameters, unread_tensors

__all__ = ["ARCHITECTURES", "Parameter", "Part", "parameters", "read_config", "unread_tensors"]
