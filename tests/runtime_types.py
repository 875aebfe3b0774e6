"""The runtime type checker of the tests: an int is a float, as PEP 484 says.

JAX describes the arguments of a compiled program in their own structure, an `ArgInfo` in place of each array.
"""

import jax
from beartype import BeartypeConf, FrozenDict, beartype

OVERRIDES = FrozenDict({jax.Array: jax.Array | jax.stages.ArgInfo})
check = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=OVERRIDES))
