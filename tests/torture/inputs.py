"""Mutated recipes, label sets, templates and data files; hostile templates; texts that look like tokens."""

import gzip
import json
import random
import signal
import string
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

from tiny import CHATML, make_tokenizer

from emogen import paths
from emogen.errors import InputError, ModelError
from emogen.model import chat_template, encode
from emogen.model.tokenizer import TextTokenizer
from emogen.task import prompt as prompts
from emogen.task.labels import load_label_set
from emogen.task.prompt import load_prompt, render
from emogen.task.readers import read_rows, stream_rows
from emogen.task.recipe import load_recipe
from emogen.task.sandbox import time_limit

LIMIT = 10  # seconds
WORDS = (
    "null", "true", "~", "[]", "{}", "&a", "*a", "<<", "!!python/object:os.system", "!!binary x", "0x10", "1e999", ".nan", "-.inf",
    "2024-02-30", "9" * 5000, "\x00", "\x1b[31m", "\u2028", "\ufeff", "é", "e\u0301", "\ud83d", "🙂", "{{", "}}", "{%", "%}", "{#",
    "'", '"', "`", "|", ">", "- ", ": ", "\t", "\r", "\n\n", ",", ";", "\\", "/", "../..", "~nosuchuser/x", "%20", "#", "?", "=1+1",
    "<script>", "<|im_end|>", "</s>", "[INST]", "[red]", "learning_rate", "labels", "name", "text", "ID", "Tweet", "anger", "joy",
)  # fmt: skip


class HangError(Exception):
    """A case takes longer than LIMIT seconds."""


@contextmanager
def limited():
    def stop(*_):
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(action: Callable) -> list[str]:
    """What is wrong with how an action ended: it may succeed, or raise one of the two errors of users."""
    try:
        with limited():
            action()
    except (InputError, ModelError) as error:
        return [] if str(error).strip() else ["an error without a message"]
    except HangError:
        return ["hangs"]
    except BaseException:
        return [traceback.format_exc()[-1500:]]
    return []


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Change a file in one to four places: bytes, words, lines."""
    for _ in range(draw.randint(1, 4)):
        content = _mutate_once(content, draw)
    return content


def _mutate_once(content: bytes, draw: random.Random) -> bytes:
    place, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    end = min(end, place + draw.choice([0, 1, 5, 60]))
    word = draw.choice(WORDS).encode("utf-8", "surrogatepass")
    lines = content.split(b"\n")
    line = draw.randrange(len(lines))
    key = lines[line].partition(b":")[0]
    ways = [
        content[:place] + word + content[end:],
        content[:place] + content[end:],
        content[:place] + draw.randbytes(draw.randint(1, 4)) + content[end:],
        b"\n".join([*lines[:line], lines[line], *lines[line:]]),
        b"\n".join(lines[:line] + lines[line + 1 :]),
        b"\n".join([*lines[:line], b" " * draw.randint(1, 9) + lines[line], *lines[line + 1 :]]),
        b"\n".join([*lines[:line], key + b": " + word, *lines[line + 1 :]]),
        content[:place] + (b"[" * draw.choice([3, 2000])) + content[place:],
    ]
    return draw.choice(ways)


def mutated(kind: str, number: int, scratch: Path) -> list[str]:
    """Read a mutated file of a kind."""
    draw = random.Random(f"{kind}-{number}")
    content, suffix = draw.choice(sources(kind))
    folder = scratch / f"mutated-{kind}"
    folder.mkdir(exist_ok=True)
    path = folder / f"{number}{suffix}"
    changed = mutate(content, draw)
    path.write_bytes(gzip.compress(changed) if suffix.endswith(".gz") else changed)
    found = outcome(partial(READERS[kind], path))
    if not found:
        path.unlink()
    return found


@cache
def sources(kind: str) -> list[tuple[bytes, str]]:
    """The files that mutations start from, with their suffixes."""
    if kind == "data":
        header, rows = (
            ["ID", "Tweet", "anger", "joy"],
            [["a", 'so, "happy"', "0", "1"], ["b", "é 🙂\nnew line", "1", "0"], ["c", "x", "0", "0"]],
        )
        table = [dict(zip(header, row, strict=True)) for row in rows]
        quoted = "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in [header, *rows])
        plain = "\n".join("\t".join(cell.replace("\n", " ") for cell in row) for row in [header, *rows])
        lists = "\n".join(json.dumps({"id": row["ID"], "text": row["Tweet"], "labels": ["joy"]}) for row in table)
        return [
            (quoted.encode(), ".csv"), (plain.encode(), ".tsv"), (plain.encode(), ".txt"), (lists.encode(), ".jsonl"),
            (json.dumps(table).encode(), ".json"), (quoted.encode("utf-16"), ".csv"), (quoted.encode(), ".csv.gz"),
        ]  # fmt: skip
    folders = {"recipe": "recipes/*.yaml", "labels": "prompts/labels/*.yaml", "template": "prompts/*.jinja"}
    folder, _, pattern = folders[kind].rpartition("/")
    return [(path.read_bytes(), path.suffix) for path in sorted(paths.shipped(folder).glob(pattern))]


def read_data(path: Path) -> None:
    labels = load_label_set("semeval2018")
    read_rows(path, labels)
    for _ in stream_rows(path, labels, size=2):
        pass


def read_template(path: Path) -> None:
    labels = load_label_set("semeval2018")
    render(load_prompt(str(path)), labels)


READERS = {"recipe": load_recipe, "labels": load_label_set, "template": read_template, "data": read_data}

HOSTILE = (
    "{% for i in range(LARGE) %}{% for j in range(LARGE) %}BODY{% endfor %}{% endfor %}",
    "{{ 'a' * LARGE * LARGE }}", "{{ ('a' * LARGE) ~ ('b' * LARGE) }}", "{{ LARGE ** LARGE }}", "{{ '%0LARGE9d' % 1 }}",
    "{{ '{:>LARGE9}'.format(1) }}", "{% set ns = namespace(x='ab') %}{% for i in range(LARGE) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% macro m(n) %}{{ m(n + 1) }}BODY{% endmacro %}{{ m(0) }}", "{{ OBJECT.__class__.__mro__[1].__subclasses__() }}",
    "{{ OBJECT.__init__.__globals__ }}", "{{ OBJECT.parse_raw('x', proto='pickle', allow_pickle=True) }}",
    "{{ OBJECT|attr('__class__') }}", "{{ OBJECT.format.__globals__ }}", "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ self.__init__.__globals__ }}", "{{ OBJECT['x' * LARGE] }}", "{{ OBJECT[LARGE] }}", "{{ 1 / 0 }}", "{{ OBJECT() }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os.system('touch MARK') }}", "{{ lipsum.__globals__.os.system('touch MARK') }}",
    "{{ range(LARGE)|list|join('x' * LARGE) }}", "{{ ([[]] * LARGE)|map('list')|list }}", "{{ 'x'|replace('', 'y' * LARGE)|replace('', 'z' * LARGE) }}",
    "{{ OBJECT|pprint * LARGE }}", "{{ 'x'|center(LARGE) * LARGE }}", "{{ 'x'|indent(LARGE) }}", "{{ dict(a=1).update.__self__ }}",
    "{% for x in OBJECT recursive %}{{ loop(OBJECT) }}{% endfor %}", "{{ 'a'.join(['b'] * LARGE) * LARGE }}", "{{ ''.__class__ }}{{ nothing.at.all }}",
)  # fmt: skip


def hostile(number: int, scratch: Path) -> list[str]:
    """Render a hostile template, as a prompt or as a chat template; the limit is a second instead of five."""
    draw = random.Random(f"hostile-{number}")
    mark = scratch / f"template-code-{number}"
    source = HOSTILE[number % len(HOSTILE)]
    values = {
        "LARGE": draw.choice(["99999", "9999999", "10**9", "2**40"]),
        "BODY": draw.choice(["", "x", "{{ 'y' * 99 }}", "{% set z = [1] * 99 %}"]),
        "OBJECT": draw.choice(["labels", "labels[0]", "messages", "messages[0]", "names", "''", "[]", "{}", "examples", "namespace()"]),
        "MARK": str(mark),
    }  # fmt: skip
    for name, value in values.items():
        source = source.replace(name, value)
    labels, style = load_label_set("semeval2018"), "list"
    limit = partial(time_limit, 1.0)
    prompts.time_limit, chat_template.time_limit = limit, limit
    try:
        if draw.random() < 0.5:
            path = scratch / f"hostile-{number}.jinja"
            path.write_text("{% user %}\n" + source + "\n{{ text }}\n")
            found = outcome(lambda: render(load_prompt(str(path)), labels))
            path.unlink()
        else:
            tokenizer = make_tokenizer(source + CHATML)
            found = outcome(
                lambda: encode.make_encoder(
                    TextTokenizer.of(tokenizer), load_prompt("prompts/list.jinja"), labels, style
                )
            )
    finally:
        prompts.time_limit, chat_template.time_limit = time_limit, time_limit
    if mark.exists():
        found.append(f"code has run: {source}")
    return [f"{source}: {problem}" for problem in found]


SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


@cache
def encoder() -> encode.Encoder:
    return encode.make_encoder(
        TextTokenizer.of(make_tokenizer()),
        load_prompt("prompts/list.jinja"),
        load_label_set("semeval2018"),
        "list",
    )


def text(number: int, scratch: Path) -> list[str]:
    """Encode a text that contains what looks like special tokens: none of its ids is one."""
    draw = random.Random(f"text-{number}")
    alphabet = [*SPECIAL, "<|im_", "start|>", "\u200b", "<", "|", ">", "é", "🙂", "\n", " ", *string.ascii_letters[:9]]
    content = "".join(draw.choice(alphabet) for _ in range(draw.randint(0, 60)))
    special = set(encoder().tokenizer.special_ids)
    plain = encoder().rows("x")[0]
    n_special = sum(i in special for i in plain.suffix_ids)
    found: list[str] = []

    def check() -> None:
        row = encoder().rows(content)[0]
        if sum(i in special for i in row.suffix_ids) != n_special:
            found.append(f"a special token in {content!r}")

    return outcome(check) or found
