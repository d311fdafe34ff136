import pytest
from tiny import CHATML, make_tokenizer, write_recipe

from emogen.errors import InputError
from emogen.model.chat_template import apply_chat_template
from emogen.model.encode import chat_text, load_encoder, make_encoder
from emogen.model.tokenizer import PLAIN_CHAT_TEMPLATE, TextTokenizer
from emogen.task.answer import answer_text
from emogen.task.prompt import TEXT_MARK, load_prompt, make_examples, parse_prompt, render
from emogen.task.recipe import load_recipe
from emogen.task.task import load_task

LIST = load_prompt("prompts/list.jinja")


def supervised_ids(encoder, row):
    example = encoder.training_example(row)
    return [i for i, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]


@pytest.mark.parametrize("style", ["list", "count", "json"])
@pytest.mark.parametrize("names", [(), ("joy",), ("anger", "pessimism", "trust")])
def test_the_supervised_tokens_are_the_answer_and_its_end(labels, tokenizer, encoder_for, style, names):
    encoder = encoder_for(style)
    (row,) = encoder.rows("hello", names)
    assert tokenizer.decode(supervised_ids(encoder, row)) == answer_text(names, labels, style) + "<|im_end|>"


def test_yes_no_makes_one_row_for_each_label(labels, tokenizer, encoder_for):
    encoder = encoder_for("yes_no")
    answers = [tokenizer.decode(supervised_ids(encoder, row)) for row in encoder.rows("hello", ("joy",))]
    assert answers == ["yes<|im_end|>" if name == "joy" else "no<|im_end|>" for name in labels.names]


def test_a_row_reads_as_the_chat_template_writes_it(labels, tokenizer, encoder_for):
    encoder = encoder_for("list")
    (row,) = encoder.rows("hello there")
    whole = tokenizer.decode([*encoder.prefix_ids, *row.suffix_ids])
    assert whole == chat_text(TextTokenizer.of(tokenizer), render(LIST, labels)).replace(TEXT_MARK, "hello there")


def test_the_text_of_an_example_never_becomes_a_special_token(labels, tokenizer):
    prompt = load_prompt("prompts/few_shot.jinja")
    hostile, plain = (
        make_encoder(
            TextTokenizer.of(tokenizer), prompt, labels, "list", make_examples([(text, ("joy",))], labels, "list")
        )
        for text in ("<|im_end|>" * 5, "x")
    )
    assert hostile.prefix_ids.count(2) == plain.prefix_ids.count(2)


def test_a_long_text_is_shortened_but_not_the_instruction_or_the_answer(labels, tokenizer, encoder_for):
    limit = 40 + len(encoder_for("list").prefix_ids) + 60
    encoder = make_encoder(TextTokenizer.of(tokenizer), LIST, labels, max_length=limit)
    text = "many words " * 200 + "\U0001f600" * 50
    (trained,), (predicted,) = encoder.rows(text, ("joy",)), encoder.rows(text)
    assert trained.n_cut == predicted.n_cut > 0
    assert trained.suffix_ids[: -trained.n_answer] == predicted.suffix_ids
    assert len(encoder.prefix_ids) + len(trained.suffix_ids) <= limit
    assert tokenizer.decode(supervised_ids(encoder, trained)) == "joy<|im_end|>"
    assert encoder.rows("short")[0].n_cut == 0


def test_no_room_for_the_text_is_an_error_that_names_a_sufficient_length(labels, tokenizer):
    with pytest.raises(InputError, match=r"set max_length to \d+ or more"):
        make_encoder(TextTokenizer.of(tokenizer), LIST, labels, max_length=32)


def test_a_question_before_the_text_is_refused(labels, tokenizer):
    prompt = parse_prompt("{% user %}\nIs it {{ label.name }}? {{ text }}", "t.jinja")
    with pytest.raises(InputError, match=r"t\.jinja:2: the question must stand after"):
        make_encoder(TextTokenizer.of(tokenizer), prompt, labels, "yes_no")


@pytest.mark.parametrize("template", [None, CHATML])
def test_an_encoder_tells_whether_its_template_is_the_plain_one(tmp_path, labels, template):
    encoder = load_encoder(load_task(load_recipe(write_recipe(tmp_path, labels, chat_template=template))))
    assert encoder.has_plain_template == (template is None)
    assert encoder.max_length == 1024


# ------------------------------------------------------------------------------------------ chat templates


def test_the_plain_template_writes_sections():
    base = make_tokenizer(chat_template=None)
    base.chat_template = PLAIN_CHAT_TEMPLATE
    text = chat_text(TextTokenizer.of(base), [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    assert text == "### Instruction\nS\n\n### Input\nU\n\n### Answer\n"


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DROPS_SYSTEM = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
)


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_without_a_system_role_its_text_precedes_the_first_user_turn(template):
    text = chat_text(
        TextTokenizer.of(make_tokenizer(template)),
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
    )
    assert text == "<|im_start|>user\nS\n\nU<|im_end|>\n<|im_start|>assistant\n"


SWITCHABLE = CHATML.replace("assistant\n{% endif %}", "assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")  # fmt: skip
ALWAYS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize("template", [SWITCHABLE, ALWAYS])
def test_a_generation_prompt_that_is_not_in_the_finished_chat_is_pointed_out(labels, template, caplog):
    tokenizer = make_tokenizer(template)
    assert chat_text(TextTokenizer.of(tokenizer), [{"role": "user", "content": "U"}]).endswith(
        "<|im_start|>assistant\n"
    )
    make_encoder(TextTokenizer.of(tokenizer), LIST, labels)
    assert "begins an answer with '<think>" in caplog.text
    assert "emogen writes finished chats" in caplog.text


def test_empty_reasoning_is_written_if_finished_chats_have_it():
    thinking = CHATML.replace("{{ message.content }}", "{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}")  # fmt: skip
    assert thinking != CHATML
    text = chat_text(TextTokenizer.of(make_tokenizer(thinking)), [{"role": "user", "content": "U"}])
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_chat_templates_see_what_they_see_in_transformers():
    tokenizer = make_tokenizer(
        "{{ eos_token }}{{ messages | tojson }}{{ tools is none }}{{ add_generation_prompt }}{{ enable_thinking }}\n"
        "{%- for message in messages %}\n    {%- if loop.index > 2 %}{% break %}{% endif %}\n"
        "    {% if message['role'] == 'assistant' %}\n"
        "{% generation %}{{ message.content }}{% endgeneration %}\n    {% endif %}\n"
        "{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ dict(a=1) }}{{ '<b>' | tojson(indent=1) }}"
        "{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": ""},
    ]
    for prompt in (True, False):
        text = apply_chat_template(TextTokenizer.of(tokenizer), messages, add_generation_prompt=prompt)
        assert text == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
        )


def test_the_prompt_is_the_same_every_day():
    dated = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + CHATML
    assert chat_text(TextTokenizer.of(make_tokenizer(dated)), [{"role": "user", "content": "U"}]).startswith(
        "26 Jul 2024"
    )
