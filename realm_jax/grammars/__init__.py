"""Grammars as masks of tokens: which tokens may follow, so that a text keeps the form that was asked for.

The grammar library is llguidance, which needs no other; it is imported when the first grammar is compiled.
"""

from realm_jax.grammars.compiler import Grammar, Grammars
from realm_jax.grammars.matcher import Matcher, Verdict

__all__ = ["Grammar", "Grammars", "Matcher", "Verdict"]
