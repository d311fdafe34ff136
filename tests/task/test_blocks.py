import pytest

from emogen.task.blocks import find_blocks
from emogen.task.prompt import PromptError, fill, load_prompt, parse_prompt, render

MARKED = """\
{# a comment #}
{% system %}
{# improve: opening #}
{{ task }}
{# or: Say what is felt. #}
{# or:
Read the post.

Then answer.
#}
{# or: #}
{# end #}
Labels: {{ names | join(", ") }}. {# improve: tone #}Be brief.{#- or: Be  kind. -#} {# end #} Now:
{% user %}
{{ text }}
{# improve: reminder #}
{# or: The labels: #}
{# end #}
"""


def chat(source, labels):
    return [message["content"] for message in fill(render(parse_prompt(source), labels), ["hello"])]


def test_blocks_have_their_text_and_other_wordings():
    opening, tone, reminder = find_blocks(parse_prompt(MARKED)).blocks
    assert opening.name == "opening"
    assert opening.texts == ("\n{{ task }}\n", "\nSay what is felt.\n", "\nRead the post.\n\nThen answer.\n", "\n")
    assert (tone.name, tone.texts) == ("tone", ("Be brief.", "Be  kind."))
    assert (reminder.name, reminder.texts) == ("reminder", ("\n", "\nThe labels:\n"))


def test_a_template_with_its_own_texts_is_the_same_chat(labels):
    template = find_blocks(parse_prompt(MARKED))
    own = template.source([block.texts[0] for block in template.blocks])
    assert chat(own, labels) == chat(MARKED, labels)
    assert "or:" not in own
    again = find_blocks(parse_prompt(own))  # what a search finds can be searched again
    assert [block.texts for block in again.blocks] == [block.texts[:1] for block in template.blocks]


def test_other_wordings_take_the_place_of_the_text(labels):
    template = find_blocks(parse_prompt(MARKED))
    listed = ", ".join(labels.names)

    def with_choice(*choice):
        return chat(template.source([block.texts[k] for block, k in zip(template.blocks, choice, strict=True)]), labels)

    assert with_choice(1, 1, 1) == [
        f"Say what is felt.\nLabels: {listed}. Be  kind. Now:",
        "hello\nThe labels:",
    ]
    assert with_choice(2, 0, 0)[0].startswith("Read the post.\n\nThen answer.\nLabels: ")
    assert with_choice(3, 0, 0) == [f"Labels: {listed}. Be brief. Now:", "hello"]


def test_a_further_wording_is_fitted_to_its_block():
    opening, tone, _ = find_blocks(parse_prompt(MARKED)).blocks
    assert opening.fit("  New. \n") == "\nNew.\n"
    assert tone.fit("\nNew.\n") == "New."


def test_a_template_without_marks_has_no_blocks():
    template = find_blocks(load_prompt("prompts/definitions.jinja"))
    assert template.blocks == ()
    assert template.source([]) == template.prompt.source


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{# improve: a #}\nx", r"t\.jinja:3: the block 'a' is not closed"),
        ("{# improve: a #}x{# improve: b #}y{# end #}", r"t\.jinja:3: the block 'a' is not closed"),
        ("\n{# end #}", r"t\.jinja:4: a mark outside of a block"),
        ("{# or: x #}", r"t\.jinja:3: a mark outside of a block"),
        ("{# improve: #}x{# end #}", r"t\.jinja:3: a block called ''"),
        ("{# improve: two words #}x{# end #}", r"t\.jinja:3: a block called 'two words'"),
        ("{# improve: a #}x{# end #}\n{# improve: a #}y{# end #}", r"t\.jinja:4: a block called 'a'"),
        ("{# improve: a #}x{# or: y #}\nz{# end #}", r"t\.jinja:4: a text after other wordings"),
        ("{% raw %}{# improve: a #}{% endraw %}", "in a {% raw %} block or in a string"),
        ("{{ '{# end #}' }}", "in a {% raw %} block or in a string"),
    ],
)
def test_a_mark_that_is_not_understood_is_an_error(source, message):
    with pytest.raises(PromptError, match=message):
        find_blocks(parse_prompt("{% user %}\n{{ text }}\n" + source, "t.jinja"))
