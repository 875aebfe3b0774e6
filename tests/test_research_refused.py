"""What research cannot do is one error that names it; and what it says of the last token is of the last."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import write_model

from realm_jax import LLM, research
from realm_jax.errors import RequestError
from realm_jax.research import Forward
from realm_jax.research.probe import asked

WEIGHTS = "layers.0.attention.weights"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = write_model(tmp_path_factory.mktemp("research") / "m.gguf", layers=1)
    return LLM(path, dtype="float32", ctx_size=64)


@pytest.fixture(scope="module")
def found(llm: LLM) -> Forward:
    capture = ["layers.*.resid_post", "layers.*.mlp.hidden", WEIGHTS]
    return research.run(llm, [[5, 6, 7], [8, 9, 10, 11, 12]], capture=capture)


def test_the_last_token_of_weights_is_their_last_row(found: Forward):
    last = found.last(WEIGHTS)
    for row, end in enumerate((2, 4)):
        np.testing.assert_array_equal(last[row], found[WEIGHTS][row, :, end])
        post = found["layers.0.resid_post"]
        np.testing.assert_array_equal(found.last("layers.0.resid_post")[row], post[row, end])


def forward(llm: LLM, tokens: Any) -> Forward:
    return jax.eval_shape(lambda p: research.forward(llm.transformer, p, tokens), llm.model.params)


def wide(found: Forward) -> Forward:
    """As of a prompt that is too long for a picture."""
    return found.replace(lengths=jnp.array([3, 5000]))  # pyright: ignore[reportAttributeAccessIssue]


WRONG: dict[str, Callable[[LLM, Forward, Path], Any]] = {
    "edit of 'norm' is a int": lambda llm, found, to: research.run(llm, "a", edit={"norm": 3}),
    r"gives float32 \[1, 4, 64\]; .* \[2, 4, 64\]": lambda llm, found, to: research.variant(
        llm, edit={"norm": lambda x: x[:1]}
    ),
    r"tokens is int32 \[1, 0\]": lambda llm, found, to: forward(llm, np.zeros((1, 0), np.int32)),
    "tokens is 0; give 1": lambda llm, found, to: research.names(llm.transformer, llm.model.params, 0),
    "best is 321; give from 1 to 320": lambda llm, found, to: research.logit_lens(llm, found, best=321),
    "best is 0": lambda llm, found, to: research.logit_lens(llm, found, best=0),
    "last dimension must be 64": lambda llm, found, to: research.logit_lens(llm, found, "mlp.hidden"),
    "row is 2; give from 0 to 1": lambda llm, found, to: research.plot_logprobs(llm, found, to, row=2),
    "row is -1": lambda llm, found, to: research.plot_attention(llm, found, 0, to, row=-1),
    "first is 3; give from 0 to 2": lambda llm, found, to: research.plot_lens(
        llm, found, research.logit_lens(llm, found), to, first=3
    ),
    "draw fewer tokens or heads": lambda llm, found, to: research.plot_attention(
        llm, wide(found), 0, to, row=1
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_is_named(said: str, llm: LLM, found: Forward, tmp_path: Path):
    with pytest.raises(RequestError, match=said) as raised:
        WRONG[said](llm, found, tmp_path / "x.png")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("capture", "edit", "said"),
    [
        (None, None, "capture is None; give a list of names"),
        ([3], None, "3 is no name; give one such as"),
        ([["norm"]], None, r"\['norm'\] is no name"),
        ([], ["norm"], "edit is a list; give a dict"),
        ([], {7: abs}, "7 is no name"),
        ([], {"norm": np.ones(3)}, "edit of 'norm' is a ndarray; give a function"),
    ],
)
def test_what_is_no_name_or_function(capture: Any, edit: Any, said: str):
    with pytest.raises(RequestError, match=said):
        asked(capture, edit)
