"""A row with its answer has the ids of the chat template applied to the finished chat, for every kind of tokenizer."""

import json

import pytest
from tiny import POSTS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from emogen.errors import InputError
from emogen.model.encode import make_encoder
from emogen.model.tokenizer import TextTokenizer
from emogen.task.answer import NO, STYLES, YES, answer_text
from emogen.task.labels import Label, LabelSet
from emogen.task.prompt import fill, load_prompt, render

LABELS = LabelSet(
    name="moods",
    task="Name the moods of a post.",
    labels=(Label(name="joy"), Label(name="anger"), Label(name="severe_toxic"), Label(name="love and care")),
)
CONTROL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|start|>", "<|channel|>",
    "<|message|>", "<|return|>", "<|end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<bos>", "<start_of_turn>", "<end_of_turn>", "<unk>",
]  # fmt: skip
CORPUS = [text for text, _ in POSTS] + ['joy, anger, severe_toxic, love and care, none, yes, no: 2, ["joy"]'] * 3
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def finish(tokenizer, eos="<|im_end|>"):
    """Wrap a trained tokenizer. The trainers make special tokens of the bytes as well, which they are not."""
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] in CONTROL]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token="<|endoftext|>", unk_token="<unk>"
    )


def byte_level(*, digits=False):
    bpe = Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits:  # as in Llama 3 and Qwen 2
        pattern = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        steps = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=500, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False),
    )
    return finish(bpe)


def sentence_piece(scheme):
    """BPE over words that begin with `▁`, with byte fallback, as in Llama 2, Mistral and Gemma."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    bpe.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback(), decoders.Fuse()]
    )
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=900, special_tokens=[*CONTROL, *BYTES], show_progress=False)
    )
    # The models use no pre-tokenizer that splits, but their merges were learnt within words.
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme == "always")
    return finish(bpe)


def old_llama():
    """As `sentence_piece`, with normalizers in the place of the pre-tokenizer: the first Llama tokenizers."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=900, special_tokens=[*CONTROL, *BYTES], show_progress=False)
    )
    bpe.pre_tokenizer = None
    return finish(bpe)


def unigram():
    """As in T5 and XLM-R, with a normalizer that changes texts."""
    model = Tokenizer(models.Unigram())
    model.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    model.decoder = decoders.Metaspace(prepend_scheme="always")
    model.train_from_iterator(
        [*CORPUS, "0123456789.,:;!?'\"()[]{}<>|/&-_=+*#%@ abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n"],
        trainers.UnigramTrainer(vocab_size=400, special_tokens=CONTROL, unk_token="<unk>", show_progress=False),
    )
    return finish(model)


TOKENIZERS = {
    "byte level": byte_level,
    "byte level, digits": lambda: byte_level(digits=True),
    "sentencepiece, always": lambda: sentence_piece("always"),
    "sentencepiece, first": lambda: sentence_piece("first"),
    "sentencepiece, never": lambda: sentence_piece("never"),
    "first llama": old_llama,
    "unigram": unigram,
}

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": _CHATML,
    "llama 2": (
        "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}<s>[INST] {{ (s if loop.first else '') + m.content.strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma": (
        "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "phi": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|end|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|end|>{% endif %}"
    ),
    "empty reasoning": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not reasoning %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "channels": (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
        "{{ m.content }}{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "dated": "{{ '<s>Today is ' + strftime_now('%d %B %Y') + '.\n' }}" + _CHATML,
    "words": (
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ '</s>' if m.role == 'assistant' else '' }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "tight": (
        "{% for m in messages %}{{ m.role }}={{ m.content }}{{ '</s>' if m.role == 'assistant' else ';' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant={% endif %}"
    ),
}
TEXTS = ["what a lovely morning", "2 late :(", "\U0001f600 ok", "über 3,5 %!", "'quoted'", "", "a  b\n\nc"]
CHOICES = [(), ("joy",), ("severe_toxic", "love and care"), LABELS.names]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def finished_ids(tokenizer, messages, text, answer):
    """What the chat template and the tokenizer make of the finished chat, with the date that emogen fixes."""
    messages = [*fill(messages, [text]), {"role": "assistant", "content": answer}]
    template = tokenizer.chat_template.replace("strftime_now('%d %B %Y')", "'26 July 2024'")

    def write(messages):
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=False, reasoning=False
        )

    try:
        if messages[0]["content"] not in write(messages):
            raise ValueError("the system turn is dropped")
        chat = write(messages)
    except Exception:
        system, user, *rest = messages
        chat = write([{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest])
    return tokenizer(chat, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "style"),
    [(name, "list") for name in TEMPLATES]
    + [(name, style) for name in ("chatml", "llama 2") for style in STYLES if style != "list"],
)
def test_a_row_with_its_answer_is_the_finished_chat_of_the_model(tokenizer, template, style, caplog):
    tokenizer.chat_template = TEMPLATES[template]
    prompt = load_prompt(f"prompts/{style}.jinja")
    encoder = make_encoder(TextTokenizer.of(tokenizer), prompt, LABELS, style)
    # Gemma's template trims what is left of the turn if the text is empty.
    for text in TEXTS if template != "gemma" else filter(None, TEXTS):
        for labels in CHOICES:
            for k, row in enumerate(encoder.rows(text, labels)):
                asked = LABELS.labels[k] if style == "yes_no" else None
                answer = answer_text(labels, LABELS, style)
                if asked:
                    answer = YES if asked.name in labels else NO
                expected = finished_ids(tokenizer, render(prompt, LABELS, label=asked), text, answer)
                own = [*encoder.prefix_ids, *row.suffix_ids]
                assert expected[: len(own)] == own, (text, answer)
                assert own[-1] in encoder.end_ids
    assert "does not write a chat as emogen does" not in caplog.text


def test_a_tokenizer_that_joins_labels_is_refused():
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.train_from_iterator(
        ["joy, anger, severe_toxic"] * 9, trainers.BpeTrainer(vocab_size=900, special_tokens=[*CONTROL, *BYTES])
    )
    tokenizer = finish(bpe)  # without words, `joy, anger` becomes one token
    tokenizer.chat_template = TEMPLATES["chatml"]
    with pytest.raises(InputError, match="no answers in the style 'list': the tokenizer joins 'joy' and ', anger'"):
        make_encoder(TextTokenizer.of(tokenizer), load_prompt("prompts/list.jinja"), LABELS)
