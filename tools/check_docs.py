"""Check the documentation without running anything: links, commands, code blocks, and the generated pages.

    python tools/check_docs.py            exits with 1 and a list of problems, `file:line: message`
    python tools/check_docs.py --write    first writes docs/commands.md and docs/keys.md

A relative link has to lead to a file, and to a heading if it has an anchor. A command has to parse, and its keys and
files have to exist; the README has to name every command. Files may be missing if readers bring them (`PLACEHOLDERS`),
if the page makes them (`emogen init`, `-o`, the title of a code block, a script in one), or if they are in runs/.
Python has to compile; recipes, label sets and templates have to be valid. It takes a few seconds, and torch is not
loaded.
"""

import ast
import importlib.util
import json
import posixpath
import re
import shlex
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import reference
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pydantic import TypeAdapter, ValidationError
from site_pages import EXTRA_PAGES, site_path

import emogen
from emogen.cli.shared import split_overrides
from emogen.cli.training import STARTER_FILES
from emogen.task.labels import LabelSet, load_label_set
from emogen.task.prompt import make_examples, parse_prompt, render
from emogen.task.recipe import Recipe
from emogen.task.trl_keys import SETTLED

ROOT = Path(__file__).resolve().parent.parent
GENERATED = {"docs/commands.md": reference.commands_page, "docs/keys.md": reference.keys_page}
PLACEHOLDERS = {  # files that readers bring
    *(
        "mine.csv",
        "mine.yaml",
        "test.csv",
        "new.csv",
        "truth.csv",
        "reviews.csv",
        "labelled.csv",
        "first.csv",
        "second.csv",
    ),
    *("big.parquet", "shards", "2018-E-c-En-train.txt"),
}
OUTPUTS = ("output", "jsonl", "figure", "figures", "into")  # options whose files a command writes
OTHER_COMMANDS = (  # nothing is checked about them
    *("apt-get", "curl", "export", "llama-server", "pre-commit", "sbatch", "source"),
)
CONFIGURATIONS = ("SFTConfig", "_BaseConfig", "ModelConfig", "TrainingArguments")  # TRL's, and what they inherit from
FILE_KEYS = ("train_file", "eval_file", "labels", "prompt", "init_adapter")
KEY_VALUE = re.compile(r"([a-z_]\w*)=(.*)", re.DOTALL)
FOREIGN = re.compile(
    r"pip install\s[^`\n]*(?<![\w/.-])emogen(?![\w/-])"
)  # the package of that name is another project's
INSIDE = re.compile(r"(?:emogen|recipes|prompts|docs|benchmarks|tests|tools|runpod|sample)/[\w./*-]*")  # a file of ours


@dataclass
class Page:
    """A Markdown file of the repository. `made` are the files that its commands and code blocks make."""

    path: str
    text: str
    made: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    def report(self, line: int, message: str) -> None:
        self.problems.append(f"{self.path}:{line}: {message}")


def main() -> None:
    """Check all pages, print the problems, and exit with 1 if there are any."""
    problems = []
    for path, make in GENERATED.items():
        text = make()
        if "--write" in sys.argv[1:]:
            (ROOT / path).write_text(text, encoding="utf-8")
        elif not (ROOT / path).is_file() or (ROOT / path).read_text(encoding="utf-8") != text:
            problems.append(f"{path}: not up to date; run: python tools/check_docs.py --write")
    paths = ["README.md", *EXTRA_PAGES, *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]
    for path in paths:
        page = Page(path, (ROOT / path).read_text(encoding="utf-8"))
        check_page(page)
        problems += page.problems
    problems += missing_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(paths)} pages, {len(problems)} problems")
    sys.exit(bool(problems))


def missing_commands(readme: str) -> list[str]:
    """Commands that the table of the README lacks."""
    names = [name for name, command in reference.all_commands() if not hasattr(command, "commands")]
    return [
        f"README.md: the table of commands lacks {name}"
        for name in names
        if not (re.search(rf"^\| `{name}[ `]", readme, re.MULTILINE) or name.startswith("emogen pod "))  # all in a row
    ]


def check_page(page: Page) -> None:
    """Add everything that is wrong with a page to its problems."""
    for line, block, title in _code_blocks(page):
        if title:
            page.made.add(title)
        if title.endswith(".py"):  # a script of the page makes the tables that it names
            page.made |= set(re.findall(r'"([\w.-]+\.csv)"', block.content))
        check_block(page, line, block, title)
    for line, child in _inline(page):
        if child.type == "link_open":
            check_link(page, line, str(child.attrs["href"]))
        elif child.type == "image":
            check_link(page, line, str(child.attrs["src"]))
        elif child.type == "code_inline":
            check_inline_code(page, line, child.content)
    for number, written in enumerate(page.text.splitlines(), start=1):
        if FOREIGN.search(written):
            page.report(
                number, "the package called emogen on PyPI is another project's; do not tell people to install it"
            )


# ---------------------------------------------------------------------------------------------------------------- links


def check_link(page: Page, line: int, address: str) -> None:
    """A relative link leads to a file, and to a heading of it if it has an anchor."""
    if re.match(r"[a-z]+:", address):
        return
    path, _, anchor = address.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page.path), path)) if path else page.path
    if target != page.path and not (ROOT / target).exists():
        page.report(line, f"the link {address} leads to no file")
        return
    if page.path.startswith("docs/") and site_path(target) is None:
        page.report(line, f"the link {address} leaves the site; name the file without a link")
    if not anchor:
        return
    linked = page if target == page.path else Page(target, (ROOT / target).read_text(encoding="utf-8"))
    if anchor not in _anchors(linked, _github_slug, "-"):
        page.report(line, f"the link {address} leads to no heading of {target}")
    elif site_path(target) and anchor not in _anchors(linked, _mkdocs_slug, "_"):
        page.report(line, f"the heading of {address} has another anchor in the site; word it without signs")


def _anchors(page: Page, slug_of: Callable[[str], str], joint: str) -> set[str]:
    """The anchors of a page's headings; `joint` stands before the number of a heading that occurs again."""
    found: Counter[str] = Counter()
    anchors = set()
    for opening, content in pairwise(page.tokens):
        if opening.type == "heading_open":
            slug = slug_of("".join(child.content for child in content.children or ()))
            anchors.add(f"{slug}{joint}{found[slug]}" if found[slug] else slug)
            found[slug] += 1
    return anchors


def _github_slug(heading: str) -> str:
    """The anchor of a heading on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _mkdocs_slug(heading: str) -> str:
    """The anchor of a heading in the site."""
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


# ----------------------------------------------------------------------------------------------------------------- code


def check_block(page: Page, line: int, block: Token, title: str) -> None:
    """A code block, by its language."""
    language = block.info.split()[0] if block.info.strip() else ""
    try:
        if language in ("sh", "bash") or block.type == "code_block":
            for number, words in _command_lines(line, block.content):
                check_command(page, number, words)
        elif language == "python":
            check_python(page, line, block.content)
        elif language == "yaml":
            check_yaml(page, line, block.content, title)
        elif language == "jinja":
            check_template(block.content)
        elif language == "json":
            json.loads(block.content)
        elif language not in ("text", "csv"):
            page.report(
                line, f"a code block of the language {language!r}; use sh, python, yaml, jinja, json, csv or text"
            )
    except (SyntaxError, ValueError, yaml.YAMLError) as error:  # an InputError is a ValueError
        page.report(line, f"{language or 'code'}: {error}")


def check_python(page: Page, line: int, source: str) -> None:
    """It compiles, and takes from emogen what emogen promises."""
    compile(source, page.path, "exec")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "emogen":
            if node.attr not in emogen.__all__:
                page.report(line, f"emogen.{node.attr} is not public")
        elif isinstance(node, ast.ImportFrom) and node.module and not importlib.util.find_spec(node.module):
            page.report(line, f"there is no module {node.module}")


def check_yaml(page: Page, line: int, source: str, title: str) -> None:
    """A label set, or a recipe (or a part of one, or a search space) whose keys exist."""
    values = yaml.safe_load(source)
    if isinstance(values.get("labels"), list):
        LabelSet.model_validate(values)
        return
    for key, value in values.items():
        check_key(page, line, key)
        described = Recipe.model_fields.get(key)
        is_range = isinstance(value, list | dict) and title == "space.yaml"
        if described is not None and not is_range:
            try:
                TypeAdapter(Any if described.annotation is None else described.annotation).validate_python(value)
            except ValidationError as error:
                page.report(line, f"{key}: {error.errors()[0]['msg']}, got {value!r}")
        if key in FILE_KEYS:
            check_file(page, line, value, posixpath.dirname(title))


def check_template(source: str) -> None:
    """A prompt template that can be rendered."""
    prompt = parse_prompt(source, "the template")
    label_set = load_label_set("semeval2018")
    asked = label_set.labels[0] if "label" in prompt.variables else None
    examples = make_examples([("a text", ("joy",))], label_set, "yes_no" if asked else "list")
    render(prompt, label_set, examples if "examples" in prompt.variables else (), asked)


def check_inline_code(page: Page, line: int, code: str) -> None:
    """Code within a sentence: a command, recipe keys, or a file of the repository."""
    words = code.split()
    if words[:1] == ["emogen"] and len(words) > 1:
        check_mention(page, line, [word.strip("[]").removesuffix("...") for word in words[1:]])
    elif words[:1] == ["make"] and len(words) > 1:
        check_make(page, line, words[1:])
    elif words and code != "key=value" and all(KEY_VALUE.fullmatch(word) for word in words):
        for word in words:
            check_key(page, line, word.partition("=")[0])
    elif INSIDE.fullmatch(code) and not list(ROOT.glob(code.rstrip("/"))):
        page.report(line, f"{code}: there is no such file")


# ------------------------------------------------------------------------------------------------------------- commands


def check_command(page: Page, line: int, words: list[str]) -> None:
    """One command of a shell."""
    program, *arguments = words
    if program == "emogen":
        check_emogen(page, line, arguments)
    elif program == "runpod/launch.sh":
        check_emogen(page, line, ["pod", "launch", "--follow", *arguments])
    elif program in ("accelerate", "python"):
        check_python_command(page, line, arguments)
    elif program == "make":
        check_make(page, line, arguments)
    elif program == "pip":
        if arguments[:1] != ["install"]:
            page.report(line, f"pip {' '.join(arguments)}: expected pip install")
    elif program not in OTHER_COMMANDS:
        page.report(
            line, f"{program}: an unknown command; if it is right, add it to OTHER_COMMANDS in tools/check_docs.py"
        )


def check_python_command(page: Page, line: int, arguments: list[str]) -> None:
    """`python SCRIPT`, `accelerate launch SCRIPT` or `... -m MODULE`: the script exists; emogen's arguments parse."""
    for k, word in enumerate(arguments):
        before = arguments[k - 1] if k else ""
        if before == "--config_file":
            check_file(page, line, word)
        elif before == "-m":
            if not importlib.util.find_spec(word):
                page.report(line, f"there is no module {word}")
            if word.startswith("emogen"):
                check_emogen(page, line, [*([] if word == "emogen.cli" else ["train"]), *arguments[k + 1 :]])
            return
        elif word.endswith(".py"):
            check_file(page, line, word)
            if word == "emogen/train.py":
                check_emogen(page, line, ["train", *arguments[k + 1 :]])
            return
    page.report(line, f"{' '.join(arguments)}: names no script")


def check_make(page: Page, line: int, arguments: Sequence[str]) -> None:
    """The targets are in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in arguments:
        if "=" not in word and not re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE):
            page.report(line, f"make {word}: there is no such target")


def check_emogen(page: Page, line: int, words: list[str]) -> None:
    """A command of emogen: it parses, its keys and its files exist."""
    if words in (["--version"], ["--help"]):
        return
    command, rest = _find_command(words)
    shown = f"emogen {' '.join(words)}"
    if command is None or hasattr(command, "commands"):
        page.report(line, f"{shown}: there is no such command")
        return
    try:
        values = command.make_context("emogen", list(rest)).params
    except Exception as error:  # the exceptions of the command line library are its own
        page.report(line, f"{shown}: {getattr(error, 'message', error)}")
        return
    if command.callback.__name__ == "init":
        page.made |= {posixpath.join(str(values["folder"]), name) for name in STARTER_FILES}
        return
    named: list[str] = []
    overrides: list[str] = []
    for name, value in values.items():
        several = list(value) if isinstance(value, list | tuple) else [value]
        if name in OUTPUTS:
            page.made |= {str(path) for path in several if path is not None}
        elif name == "words":
            named, overrides = split_overrides(several)
        elif name == "overrides":
            overrides = value or []
        elif name in ("recipe", "space", "gold", "pred", "runs", "tuned", "seed_with", "labels"):
            named += [str(path) for path in several if path is not None]
    for path in named:
        check_file(page, line, path)
    for word in overrides:
        check_override(page, line, word)


def check_override(page: Page, line: int, word: str) -> None:
    match = KEY_VALUE.fullmatch(word)
    if not match:
        page.report(line, f"{word}: expected key=value")
        return
    key, value = match.groups()
    check_key(page, line, key)
    if key in FILE_KEYS:
        check_file(page, line, value)


def check_mention(page: Page, line: int, words: list[str]) -> None:
    """A command within a sentence, such as `emogen cv RECIPE [--folds 5]`: command and options exist."""
    if words in (["--version"], ["--help"]):
        return
    command, rest = _find_command([word.partition("|")[0] for word in words])
    for part in words[1].split("|") if len(words) > 1 and "|" in words[1] else []:
        if f"emogen {words[0]} {part}" not in dict(reference.all_commands()):
            page.report(line, f"emogen {words[0]} {part}: there is no such command")
    if command is None:
        page.report(line, f"emogen {' '.join(words)}: there is no such command")
        return
    options = {"--help"} | {option for parameter in command.params for option in parameter.opts}
    for word in rest:
        if word.startswith("-") and word != "-" and word not in options:
            page.report(line, f"emogen {' '.join(words)}: there is no option {word}")


def _find_command(words: Sequence[str]) -> tuple[Any | None, list[str]]:
    """The command that words begin with, and the words after it."""
    known = dict(reference.all_commands())
    name, rest = "emogen", list(words)
    while rest and f"{name} {rest[0]}" in known:
        name = f"{name} {rest.pop(0)}"
    return (known[name], rest) if name != "emogen" else (None, rest)


# ------------------------------------------------------------------------------------------------------- keys and files


def check_key(page: Page, line: int, key: str) -> None:
    if key not in _known_keys():
        page.report(line, f"{key}: there is no such recipe key")


@cache
def _known_keys() -> set[str]:
    """emogen's keys and the fields of TRL's two configurations, read off the source: torch is not loaded."""
    keys = {name for name, described in Recipe.model_fields.items() if not described.exclude}
    for package, pattern in (("trl", "trainer/*_config.py"), ("transformers", "training_args.py")):
        spec = importlib.util.find_spec(package)
        assert spec, f"{package} is not installed"
        for file in Path(str(spec.origin)).parent.glob(pattern):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and node.name in CONFIGURATIONS:
                    fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
                    keys |= {target.id for target in fields if isinstance(target, ast.Name)}
    return keys - SETTLED.keys()


def check_file(page: Page, line: int, name: str, folder: str = "") -> None:
    """A file that a command or a recipe names exists, or may be missing here."""
    path = posixpath.normpath(posixpath.join(folder, name))
    is_pattern = re.fullmatch(r"[A-Z_.]+(\.\w+)?", posixpath.basename(path))  # YOUR.csv, RUN_DIR, ...
    if is_pattern or path.startswith("runs/") or posixpath.basename(path) in PLACEHOLDERS or path in page.made:
        return
    if not any((ROOT / place).exists() for place in (path, posixpath.normpath(name), f"prompts/labels/{name}.yaml")):
        page.report(line, f"{name}: there is no such file, and the page does not make it")


# ------------------------------------------------------------------------------------------------------------- Markdown


def _code_blocks(page: Page) -> Iterator[tuple[int, Token, str]]:
    """The code blocks of a page, each with its first line and its title (or "")."""
    for token in page.tokens:
        if token.type in ("fence", "code_block") and token.map:
            title = re.search(r'title="([^"]+)"', token.info)
            yield token.map[0] + (2 if token.type == "fence" else 1), token, title[1] if title else ""


def _inline(page: Page) -> Iterator[tuple[int, Token]]:
    """The links, images and code within sentences, each with the line that its paragraph begins on."""
    for token in page.tokens:
        for child in token.children or ():
            yield (token.map[0] + 1 if token.map else 0), child


def _command_lines(line: int, block: str) -> Iterator[tuple[int, list[str]]]:
    """The commands of a shell block, each with its line; comments are left out, and continued lines are joined."""
    number, pending = line, ""
    for k, written in enumerate(block.splitlines()):
        if not pending:
            number = line + k
        pending += written.strip()
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        words = shlex.split(pending, comments=True)
        pending = ""
        if words:
            yield number, words


if __name__ == "__main__":
    main()
