"""A flat YAML file and `key=value` overrides -> a validated recipe. All errors are reported together, with their lines.

The keys are every field of TRL's `SFTConfig` and `ModelConfig`, and emogen's own, which are the fields of `Recipe`.
"""

import difflib
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from emogen import paths
from emogen.errors import InputError
from emogen.task.trl_fields import constructor_errors, lm_fields, sft_fields
from emogen.task.trl_keys import (
    IDLE,
    LIMITS,
    OBEYED_BY_EMOGEN,
    OBEYED_BY_TRAINER,
    OLD_NAMES,
    REMOVED,
    SETTLED,
    SETTLED_FOR_HEADS,
    SETTLED_FOR_SHARED_PREFIXES,
)
from emogen.task.yaml_files import read_keys, read_value

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

# Defaults that differ from TRL's. bf16 and gradient checkpointing are useful on some GPUs only.
DEFAULTS = {
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_peft": True,
    "lora_target_modules": "all-linear",
    "max_length": 512,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 10,
    "disable_tqdm": False,
}


class RecipeError(InputError):
    """An invalid recipe. `problems` are lines such as `demo.yaml:7: lora_rr: no such key; did you mean lora_r?`."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class SelectBest(BaseModel):
    """How to choose the final checkpoint: the lowest loss among those whose metric is close to the best.

    The checkpoints are compared on rows held out from the training rows, never on the rows of the final evaluation.

    Attributes:
        metric: metric to maximise.
        within: maximum distance from its best value.
        then: metric to minimise among the checkpoints within that distance.
        fraction: share of the training rows to hold out.
        patience: number of evaluations without a new choice after which training stops; None for no early stopping.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    metric: str = "f1_macro"
    within: float = Field(0.002, ge=0)
    then: str = "eval_loss"
    fraction: float = Field(0.1, gt=0, lt=1)
    patience: int | None = Field(None, ge=1)

    @field_validator("metric")
    @classmethod
    def _own_name(cls, value: str) -> str:
        return {"macro_f1": "f1_macro", "micro_f1": "f1_micro"}.get(value, value)


class Recipe(BaseModel):
    """A validated recipe: emogen's own keys as fields, and TRL's in `sft_args` and `lm_args`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), strict=True)

    train_file: str | None = Field(None, description="training data: a CSV, TSV, JSONL or Parquet file")
    eval_file: str | None = Field(None, description="labelled file to evaluate on, during training and at its end")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="without eval_file: share of the training rows to hold out, stratified by label"
    )
    eval_samples: int | None = Field(
        200, ge=1, description="number of rows to generate answers for in each evaluation during training; null for all"
    )
    dataset_name: str | None = Field(None, description="dataset on the Hugging Face Hub, instead of train_file")
    dataset_config: str | None = Field(None, description="configuration of the dataset, such as subtask5.english")
    dataset_train_split: str = Field("train", description="split of the dataset to train on")
    dataset_test_split: str | None = Field(None, description="split of the dataset to evaluate on")
    text_column: str | None = Field(None, description="name of the text column; detected by default")
    id_column: str | None = Field(None, description="name of the id column; detected by default")
    labels_column: str | None = Field(
        None, description="name of the one column that holds all labels; detected by default"
    )
    soft_labels: bool = Field(
        False,
        description="the training rows have probabilities, from 0 to 1, in place of 0 and 1: a head learns them, and "
        "answers are drawn from them; labels_column is then theirs alone",
    )
    separator: str | None = Field(None, description="character between columns, or \\t for a tab; detected by default")
    quoting: Literal["csv", "none"] | None = Field(
        None,
        description="csv: quotation marks quote the cells of a CSV or TSV file; none: they are plain text; detected by "
        "default",
    )
    encoding: str | None = Field(None, description="encoding of the files; detected by default")
    labels: str = Field("semeval2018", description="label set: name of a shipped one, or path of a YAML file")
    prompt: str = Field("prompts/list.jinja", description="path of the prompt template")
    examples: int = Field(0, ge=0, description="number of few-shot examples to draw from the training rows")
    examples_by: Literal["drawn", "coverage", "nearest"] = Field(
        "drawn",
        description="few-shot examples: drawn: the same for all texts, at random; coverage: the same for all texts, "
        "each label once before one is shown again; nearest: for each text the training rows that resemble it most "
        "by `features`, for the model of an endpoint",
    )
    answer: Literal["list", "count", "json", "yes_no", "head"] = Field(
        "list", description="style of the answer; head: train a classification head instead of generating answers"
    )
    order: Literal["canonical", "frequent_first", "rare_first"] = Field(
        "canonical",
        description="order of the labels in answers: the label set's own order, or by frequency in the training rows",
    )
    decode: Literal["constrained", "free"] = Field(
        "constrained", description="constrained: generate valid answers only; free: generate any text"
    )
    prob: Literal["marginal", "maximum"] = Field(
        "marginal",
        description="probability of a label: marginal over all answers, or maximum over the steps of the greedy answer",
    )
    predict_by: Literal["answer", "thresholds", "stack"] = Field(
        "answer",
        description="predict the labels of the generated answer, or those with a probability above their threshold; "
        "stack: combine several runs by a regression per label",
    )
    tune: Literal["f1_macro", "f1_micro"] = Field(
        "f1_macro",
        description="what thresholds are tuned for: macro-F1, with a threshold for each label, or micro-F1, with one "
        "for all",
    )
    label_weights: Literal["none", "within", "across"] = Field(
        "none",
        description="loss weight of the tokens that name a label: none: 1; within: negatives over positives of the "
        "label; across: rarity of the label among all labels",
    )
    sampling: Literal["none", "rare"] = Field("none", description="rare: repeat training rows that have rare labels")
    text_loss_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="loss weight of the text's tokens, relative to the answer's: 0, or .01 to .1",
    )
    teacher_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="answer: head: share that a teacher has in what is learnt, such as 0.5; the rest is the labels. "
        "The teacher is a stack of baselines, one for each of `features`, cross-fitted to the training rows",
    )
    select_best: SelectBest | None = Field(
        None,
        description="choose the final checkpoint: of those within a tolerance (`within`) of the best `metric`, the one "
        "with the lowest `then` (a loss), on a held-out `fraction` of the training rows; stop after `patience` "
        "evaluations without a new choice",
    )
    init_adapter: str | None = Field(None, description="run folder whose adapter is the starting point of training")
    shared_prefix: bool = Field(True, description="compute the instruction once for all rows of a batch")
    features: list[str] = Field(
        ["tfidf"],
        min_length=1,
        description="what texts are described by, for emogen baseline, teacher_weight and examples_by: nearest: "
        "tfidf, emoji, a sentence encoder (a name on the Hub, or a folder), or MODULE:FUNCTION, a function of yours "
        "from texts to an array",
    )
    api_base: str | None = Field(
        None,
        description="address of an OpenAI-compatible endpoint, such as http://127.0.0.1:8080/v1: its model is prompted "
        "with the texts, and not tuned",
    )
    api_model: str | None = Field(None, description="name of the model at the endpoint")
    api_requests: int = Field(8, ge=1, le=256, description="requests to the endpoint at a time")
    api_prices: list[float] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="dollars for a million tokens that the endpoint reads, and that it writes, such as [0.15, 0.6]",
    )
    max_dollars: float | None = Field(
        None, gt=0, description="the most that a call may spend at the endpoint, by api_prices"
    )

    path: Path = Field(exclude=True)
    sft_args: dict[str, Any] = Field(exclude=True)
    lm_args: dict[str, Any] = Field(exclude=True)
    notices: list[str] = Field(default_factory=list, exclude=True)

    @property
    def name(self) -> str:
        """The name of the recipe file, without its suffix."""
        return self.path.stem

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.sft_args["output_dir"])

    @property
    def model_name(self) -> str:
        """The name of the base model on the Hub, or its folder."""
        return str(self.lm_args["model_name_or_path"])

    @property
    def file_form(self) -> dict[str, Any]:
        """How the files of the recipe are written, as `read_rows` takes it."""
        return {"separator": self.separator, "quoting": self.quoting, "encoding": self.encoding}

    @property
    def max_length(self) -> int | None:
        """The maximum number of tokens of a row."""
        return self.sft_args["max_length"]

    @property
    def trusts_code(self) -> bool:
        """Whether code from the model repository may run on this machine."""
        return bool(self.sft_args.get("trust_remote_code"))

    @property
    def seed(self) -> int:
        """The random seed."""
        return int(self.sft_args.get("seed", 42))

    def require_own_model(self, what: str) -> None:
        """Refuse a recipe whose model is behind an endpoint.

        Args:
            what: what such a model is not for, as in "is not tuned".

        Raises:
            RecipeError: it is.
        """
        if self.api_base:
            raise RecipeError([f"{self.path}: api_base: the model of an endpoint {what}; use emogen predict or cv"])

    def find(self, path: str) -> Path:
        """Resolve a path in this recipe: beside the recipe, in the current folder, or among the shipped files."""
        return paths.find(path, self.path.parent)

    def sft_config(self, **changes: Any) -> "SFTConfig":
        """TRL's configuration of the trainer.

        Args:
            changes: keys to override.

        Raises:
            RecipeError: this machine does not support a setting.
        """
        from trl import SFTConfig

        try:
            return SFTConfig(**(self.sft_args | changes))
        except ValueError as error:
            raise RecipeError([f"{self.path}: not possible on this machine: {error}"]) from None

    def lm_config(self) -> "ModelConfig":
        """TRL's configuration of the model and its adapter."""
        from trl import ModelConfig

        config = ModelConfig(**self.lm_args)
        modules = self.lm_args.get("lora_target_modules")
        if isinstance(modules, list) and modules != ["all-linear"]:
            config.lora_target_modules = modules  # TRL makes a string of a single name, which peft takes for a pattern
        return config

    def to_yaml(self, **changes: Any) -> str:
        """The resolved recipe as YAML: all of emogen's keys, and TRL's keys that the recipe or a default sets.

        Args:
            changes: keys to override.
        """
        flat = self.model_dump() | self.lm_args | self.sft_args | changes
        return yaml.safe_dump(flat, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: the recipe file.
        overrides: `key=value` strings, whose values are YAML.

    Raises:
        RecipeError: every error in the recipe and the overrides.
    """
    found = paths.find(path)
    if not found.is_file():
        raise RecipeError([_no_such_recipe(str(path))])
    try:
        values, where, problems = read_keys(path)
    except InputError as error:
        raise RecipeError([str(error)]) from None
    if values.get("trust_remote_code") and not any(word.startswith("trust_remote_code=") for word in overrides):
        problems.append(
            f"{where['trust_remote_code']}: trust_remote_code: a file cannot allow the code of others; add "
            "trust_remote_code=true to the command if you trust the model's repository"
        )
    own_code = [name for name in values.get("features") or () if is_own_code(str(name))]
    if own_code and not any(word.startswith("features=") for word in overrides):
        problems.append(
            f"{where['features']}: features: {own_code[0]}: a file cannot run code; add features=[...] to the "
            "command if you trust the module"
        )
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            problems.append(f"{override!r}: expected key=value")
            continue
        values[key] = read_value(value)
        where[key] = repr(override if key != "hub_token" else "hub_token=...")  # messages must not repeat secrets
    return _validate(found, values, where, problems)


def is_encoder(feature: str) -> bool:
    """Whether an entry of `features` names a sentence encoder: on the Hub, OWNER/NAME, or a folder."""
    return "/" in feature


def is_own_code(feature: str) -> bool:
    """Whether an entry of `features` names a function of the user, MODULE:FUNCTION."""
    return ":" in feature and not is_encoder(feature)


def _no_such_recipe(path: str) -> str:
    folder = paths.shipped("recipes")
    shipped = [f"recipes/{file.relative_to(folder)}" for file in folder.rglob("*.yaml")]
    near = difflib.get_close_matches(path, shipped, 1)
    hint = f"did you mean {near[0]}?" if near else f"the shipped ones are: {', '.join(sorted(shipped))}"
    return f"{path}: no such recipe; {hint}"


@cache
def default_values() -> dict[str, Any]:
    """The default of every key: emogen's own, and those of TRL."""
    found = {name: field.default for name, field in (sft_fields() | lm_fields()).items()}
    return found | {name: field.default for name, field in Recipe.model_fields.items()}


class _Keys(NamedTuple):
    """The values of a recipe, separated by the configuration that they belong to."""

    own: dict[str, Any]
    sft_args: dict[str, Any]
    lm_args: dict[str, Any]
    notices: list[str]


def _validate(path: Path, values: dict[str, Any], where: dict[str, str], problems: list[str]) -> Recipe:
    """Check the values of a recipe.

    Args:
        values: value of each key.
        where: place of each key, for messages.
        problems: messages found so far.

    Raises:
        RecipeError: there is a problem.
    """
    keys = _separate(values, where, problems)
    keys.sft_args["output_dir"] = keys.sft_args.get("output_dir") or f"runs/{path.stem}"
    if keys.own.get("api_base") and "model_name_or_path" not in keys.lm_args:
        keys.lm_args["model_name_or_path"] = keys.own.get("api_model")
    if not keys.lm_args.get("model_name_or_path") and not keys.own.get("api_base"):
        problems.append(f"{path}: model_name_or_path: missing; name a model on the Hub or a folder")
    if keys.own.get("select_best"):
        # Any checkpoint may be the one that is chosen, so all of them are kept, unless the recipe sets a limit.
        keys.sft_args["load_best_model_at_end"] = True
        if "save_total_limit" not in values:
            keys.sft_args["save_total_limit"] = None
    recipe = None
    try:
        recipe = Recipe(**keys.own, path=path, sft_args=keys.sft_args, lm_args=keys.lm_args, notices=keys.notices)
    except ValidationError as error:
        for key, value in {str(e["loc"][0]): e["input"] for e in error.errors()}.items():
            problems.append(f"{where.get(key, path)}: {key}: {_reasons(error, key)}, got {value!r}")
    problems += _check_trl(path, keys, where)
    if recipe is not None:
        problems += _conflicts(recipe, where)
        recipe.notices.extend(_idle_keys(recipe, where))
    if recipe is None or problems:
        raise RecipeError(problems)
    return recipe


def _separate(values: dict[str, Any], where: dict[str, str], problems: list[str]) -> _Keys:
    """Assign each key to its configuration, after emogen's defaults. TRL's values are checked against their types."""
    sft_keys, lm_keys = sft_fields(), lm_fields()
    own = {name for name, field in Recipe.model_fields.items() if not field.exclude}
    keys = _Keys(
        own={},
        sft_args={key: value for key, value in DEFAULTS.items() if key in sft_keys},
        lm_args={key: value for key, value in DEFAULTS.items() if key in lm_keys},
        notices=[],
    )
    for key, value in values.items():
        here = where[key]
        if key in OLD_NAMES and key not in sft_keys | lm_keys:
            keys.notices.append(f"{here}: {key} is now called {OLD_NAMES[key]}; it is read as that")
            key = OLD_NAMES[key]
        if refusal := SETTLED.get(key) or REMOVED.get(key):
            problems.append(f"{here}: {key}: cannot be set: {refusal}")
        elif key in own:
            keys.own[key] = value
        elif key in OBEYED_BY_EMOGEN | OBEYED_BY_TRAINER and key in sft_keys | lm_keys:
            target, fields = (keys.sft_args, sft_keys) if key in sft_keys else (keys.lm_args, lm_keys)
            try:
                target[key] = _checked_value(key, fields[key].type, value)
            except ValidationError as error:
                problems.append(f"{here}: {key}: {_reasons(error)}, got {value!r}")
        elif key in sft_keys | lm_keys:
            problems.append(
                f"{here}: {key}: a newer TRL has added this key, and this emogen does not know if a run obeys it; "
                "leave it out"
            )
        else:
            near = difflib.get_close_matches(key, [*own, *OBEYED_BY_EMOGEN, *OBEYED_BY_TRAINER, *OLD_NAMES], 1)
            hint = f"did you mean {near[0]}?" if near else "`emogen keys` lists all keys"
            problems.append(f"{here}: {key}: no such key; {hint}")
    return keys


def _checked_value(key: str, annotation: Any, value: Any) -> Any:
    """A value of one of TRL's keys, unchanged: `"8"` is not taken for 8, nor `true` for 1.

    Raises:
        ValidationError: it is not of the type, or outside of the limits that make sense.
    """
    limits = LIMITS.get(key)
    expected: Any = typing.Annotated[annotation, *limits] if limits and value is not None else annotation
    return TypeAdapter(expected).validate_python(value, strict=True)


def _check_trl(path: Path, keys: _Keys, where: dict[str, str]) -> Iterator[str]:
    """The errors that TRL's own constructors raise for values of the right type."""
    for config, message in constructor_errors(keys.sft_args, keys.lm_args).items():
        values = keys.sft_args if config == "SFTConfig" else keys.lm_args
        # The message does not always contain the key, but then it contains the value.
        key = next((k for k in where if k in message or (isinstance(v := values.get(k), str) and v in message)), None)
        yield f"{where[key]}: {key}: {message}" if key else f"{path}: {message}"


def _conflicts(recipe: Recipe, where: dict[str, str]) -> Iterator[str]:
    """The errors of keys that are valid one by one."""
    if not recipe.train_file and not recipe.dataset_name:
        yield f"{recipe.path}: train_file: missing; name a data file, or a Hub dataset with dataset_name"
    if not recipe.lm_args["use_peft"] and recipe.answer != "head":
        yield f"{where['use_peft']}: use_peft: must be true, except with answer: head; a generator needs a LoRA adapter"
    if recipe.train_file and recipe.dataset_name:
        yield f"{where['train_file']}: train_file: cannot be combined with dataset_name; choose one"
    if recipe.api_base and not recipe.api_model:
        yield f"{where['api_base']}: api_base: needs api_model, the name of the model at the endpoint"
    if recipe.api_base and not recipe.api_base.startswith(("http://", "https://")):
        yield f"{where['api_base']}: api_base: expected an address that begins with http:// or https://"
    if recipe.api_base and recipe.answer in ("head", "yes_no"):
        yield f"{where['api_base']}: api_base: cannot be combined with answer: {recipe.answer}; use list, json or count"
    if recipe.examples_by == "nearest" and not recipe.api_base:
        yield f"{where['examples_by']}: examples_by: nearest is for the model of an endpoint; others share one prompt"
    if recipe.examples_by != "drawn" and not recipe.examples:
        by = recipe.examples_by
        yield f"{where['examples_by']}: examples_by: {by} needs `examples`, the number of rows to show, such as 8"
    if recipe.max_dollars is not None and recipe.api_prices is None:
        yield f"{where['max_dollars']}: max_dollars: needs api_prices, the prices of the endpoint: [0.15, 0.6]"
    if recipe.api_prices and min(recipe.api_prices) < 0:
        yield f"{where['api_prices']}: api_prices: expected prices of 0 or more, got {recipe.api_prices}"
    known = ("tfidf", "emoji")
    if unknown := [name for name in recipe.features if name not in known and ":" not in name and not is_encoder(name)]:
        yield (
            f"{where['features']}: features: {unknown[0]}: expected tfidf, emoji, MODULE:FUNCTION, or a sentence "
            "encoder (sentence-transformers/all-MiniLM-L6-v2, or ./FOLDER)"
        )
    for key in ("eval_fraction", "select_best"):
        if recipe.soft_labels and getattr(recipe, key):
            yield (
                f"{where[key]}: {key}: cannot be combined with soft_labels: rows without certain labels cannot be "
                "scored; name labelled rows with eval_file"
            )
    if recipe.teacher_weight and recipe.answer != "head":
        yield f"{where['teacher_weight']}: teacher_weight: only for answer: head; a generator learns whole answers"
    if recipe.teacher_weight and recipe.soft_labels:
        yield f"{where['teacher_weight']}: teacher_weight: cannot be combined with soft_labels; choose one"
    if recipe.eval_file and recipe.eval_fraction:
        yield f"{where['eval_fraction']}: eval_fraction: cannot be combined with eval_file; choose one"
    if recipe.answer == "head":
        settled, when, hint = SETTLED_FOR_HEADS, "answer: head", ""
    elif recipe.shared_prefix:
        settled, when, hint = SETTLED_FOR_SHARED_PREFIXES, "shared_prefix: true", "; or set shared_prefix: false"
    else:
        return
    for key in settled.keys() & where.keys():
        if recipe.sft_args.get(key) not in (sft_fields()[key].default, None):
            yield f"{where[key]}: {key}: cannot be combined with {when}: {settled[key]}{hint}"


def _idle_keys(recipe: Recipe, where: dict[str, str]) -> Iterator[str]:
    """Warnings about keys that have no effect in this recipe."""
    defaults = DEFAULTS | {name: field.default for name, field in Recipe.model_fields.items()}
    values = recipe.model_dump() | recipe.lm_args | recipe.sft_args
    # A resolved recipe, as in a run folder, contains the defaults as well.
    given = [key for key in where if key not in defaults or values.get(key) != defaults[key]]
    for applies, why, keys in IDLE:
        idle = [key for key in keys if key in given]
        if idle and applies(recipe):
            yield f"{where[idle[0]]}: no effect, as {why}: {', '.join(idle)}"


def _reasons(error: ValidationError, key: str | None = None) -> str:
    """pydantic's messages (about one key), each once: a union type gives one for each member."""
    errors = [e for e in error.errors() if key is None or e["loc"][0] == key]
    return " or ".join(dict.fromkeys(e["msg"][:1].lower() + e["msg"][1:] for e in errors))
