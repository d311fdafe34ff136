"""Fixtures of the tests of the model room."""

from functools import cache

import pytest

from emogen.model.encode import make_encoder
from emogen.model.shared_prefix import share_prefix
from emogen.model.tokenizer import TextTokenizer
from emogen.task.prompt import load_prompt


@pytest.fixture(scope="session")
def encoder_for(tokenizer, labels):
    """Returns the encoder of an answer style. Tests do not change it."""
    return cache(
        lambda style: make_encoder(TextTokenizer.of(tokenizer), load_prompt(f"prompts/{style}.jinja"), labels, style)
    )


@pytest.fixture(scope="session")
def both_attentions():
    """Loops over a model's attentions: first it is left as it is, then it is switched to shared-prefix attention."""

    def loop(model):
        yield "plain"
        assert share_prefix(model)
        yield "shared"

    return loop
