"""A chat template is code of others: it has limits, and it must write each turn once."""

from functools import partial

import pytest
from tiny import CHATML, make_tokenizer

from emogen.errors import ModelError
from emogen.model import chat_template
from emogen.model.encode import make_encoder
from emogen.model.tokenizer import TextTokenizer
from emogen.task.prompt import load_prompt
from emogen.task.sandbox import time_limit

TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"


@pytest.fixture
def encoder_with(labels, monkeypatch):
    """Makes an encoder with a chat template. Rendering ends after a fifth of a second instead of five."""
    monkeypatch.setattr(chat_template, "time_limit", partial(time_limit, 0.2))

    def make(chat_template):
        return make_encoder(
            TextTokenizer.of(make_tokenizer(chat_template)), load_prompt("prompts/list.jinja"), labels, "list"
        )

    return make


@pytest.mark.parametrize(
    "hostile",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'a' }}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 'a' * 10**15 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ messages['nothing']['x']['y'] }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ nothing() }}",
        "{{ raise_exception('no system role, no user role, nothing') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for",
        "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_hostile_chat_template_is_an_error(encoder_with, hostile):
    with pytest.raises(ModelError, match="the chat template"):
        encoder_with(hostile + CHATML)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("{% for", "{{ messages[0].content }}{% for"), r"writes turn 1 \(system\) 2 times"),
        (CHATML.replace(TURN, "{% if message.role != 'user' %}" + TURN + "{% endif %}"), "drops the user's text"),
        (CHATML.replace("{{ message.content }}", "{{ message.content }}{{ message.content }}"), "repeats"),
        (CHATML.replace("{{ message.content }}", "{{ message.content[:5] }}"), "drops"),
    ],
)  # fmt: skip
def test_a_chat_template_that_drops_or_doubles_a_turn_is_refused(encoder_with, template, message):
    assert template != CHATML
    with pytest.raises(ModelError, match=message):
        encoder_with(template)


def test_a_template_that_leaves_the_system_turn_out_gets_it_with_the_first_user_turn(encoder_with):
    encoder = encoder_with(CHATML.replace(TURN, "{% if message.role != 'system' %}" + TURN + "{% endif %}"))
    prefix = encoder.tokenizer.decode(encoder.prefix_ids)
    assert "<|im_start|>system" not in prefix
    assert prefix.startswith("<|im_start|>user\n")
