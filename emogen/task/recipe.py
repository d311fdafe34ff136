"""One flat YAML file, and `key=value` overrides, -> a validated run. Every error is reported at once, with its line.

The keys are TRL's and transformers' own (every field of `SFTConfig` and `ModelConfig`), beside emogen's few, which
are the fields of `Recipe`.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from emogen import paths
from emogen.errors import InputError

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

# Names from other tools and older versions that people have in their fingers.
OLD_NAMES = {
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "torch_dtype": "dtype",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "evaluation_strategy": "eval_strategy",
    "num_epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size",
    "load_in_nf4": "load_in_4bit",
}


# Fields of SFTConfig that emogen settles itself: a recipe that sets one expects something that would not happen.
SETTLED = {
    "packing": "rows share their instruction instead (`shared_prefix`)",
    "padding_free": "rows share their instruction instead (`shared_prefix`)",
    "assistant_only_loss": "the loss is always on the answer alone",
    "completion_only_loss": "the loss is always on the answer alone",
    "dataset_text_field": "`text_column` names the text",
    "truncation_mode": "a text that is too long is shortened inside the prompt",
    "chat_template_path": "the model's own chat template is used, or a plain one for a base model",
    "eos_token": "the chat template says how an answer ends",
    "label_names": "`labels` names the label set",
    "remove_unused_columns": "emogen encodes the rows itself",
    "hub_token": "a recipe is kept, and no place for secrets: set HF_TOKEN, or log in with `hf auth login`",
}


# Where emogen's default differs from TRL's. bf16 and gradient checkpointing are for GPUs, and wanted only by some.
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
    """A recipe that cannot be used. `problems` are lines such as `demo.yaml:7: lora_rr: no such key; ...`."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class SelectBest(BaseModel):
    """Which checkpoint a run ends with: of those within a tolerance of the best metric, the one with the lowest loss.

    The rows that this is judged by are held out from the training rows, never those that are scored in the end.
    """

    model_config = ConfigDict(extra="forbid")

    metric: str = "f1_macro"
    within: float = Field(0.002, ge=0)
    then: str = "eval_loss"
    fraction: float = Field(0.1, gt=0, lt=1)
    patience: int | None = Field(None, ge=1)

    @field_validator("metric")
    @classmethod
    def _by_its_name(cls, value: str) -> str:
        return {"macro_f1": "f1_macro", "micro_f1": "f1_micro"}.get(value, value)


class Recipe(BaseModel):
    """A validated recipe: emogen's own keys, and TRL's in two dictionaries."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    train_file: str | None = Field(None, description="CSV, TSV, JSONL or Parquet file to learn from")
    eval_file: str | None = Field(None, description="labelled file to score on, during training and at its end")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="without eval_file: the share of the training rows to hold out, stratified"
    )
    eval_samples: int | None = Field(
        200, ge=1, description="how many rows are generated for at each evaluation during training; null for all"
    )
    dataset_name: str | None = Field(None, description="a dataset on the Hugging Face Hub, instead of train_file")
    dataset_config: str | None = Field(None, description="its configuration, such as subtask5.english")
    dataset_train_split: str = Field("train", description="its split to learn from")
    dataset_test_split: str | None = Field(None, description="its split to score on")
    text_column: str | None = Field(None, description="the column of the text, where it is not detected")
    id_column: str | None = Field(None, description="the column of the id, where it is not detected")
    separator: str | None = Field(None, description="the character between columns, where it is not detected")
    encoding: str | None = Field(None, description="the files' encoding, where it is not detected")
    labels: str = Field("semeval2018", description="a shipped label set, or the path of a YAML file")
    prompt: str = Field("prompts/list.jinja", description="the template of the chat")
    examples: int = Field(0, ge=0, description="few-shot examples drawn from the training rows for the template")
    answer: Literal["list", "count", "json", "yes_no", "head"] = Field(
        "list", description="the style of the answer; head: none is generated, a classification head is trained"
    )
    order: Literal["canonical", "frequent_first", "rare_first"] = Field(
        "canonical",
        description="in which answers name the labels: the label set's, or by their number in training rows",
    )
    decode: Literal["constrained", "free"] = Field("constrained", description="allow valid answers only, or anything")
    prob: Literal["marginal", "maximum"] = Field(
        "marginal",
        description="a label's probability: over all answers, or the most it had at a step of the greedy one",
    )
    predict_by: Literal["answer", "thresholds", "stack"] = Field(
        "answer",
        description="labels are those of the generated answer, or those more probable than their threshold; stack: "
        "of several runs, weighed for each label by a regression",
    )
    label_weights: Literal["none", "within", "across"] = Field(
        "none",
        description="what the tokens that name a label count in the loss: 1; its negatives over its positives; or by "
        "its rarity among the labels",
    )
    sampling: Literal["none", "rare"] = Field("none", description="rare: rows with rare labels are repeated")
    text_loss_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="what the tokens of the text count in the loss, beside the answer's; .01 to .1, or 0",
    )
    select_best: SelectBest | None = Field(
        None,
        description="end with the checkpoint that `metric` (within a tolerance, `within`) and `then` the lowest loss "
        "choose, judged by a `fraction` of the training rows; stop after `patience` evaluations without a new one",
    )
    init_adapter: str | None = Field(None, description="a run folder whose adapter this run goes on with")
    shared_prefix: bool = Field(True, description="compute the instruction once for all rows of a batch")

    path: Path = Field(exclude=True)
    sft_args: dict[str, Any] = Field(exclude=True)
    lm_args: dict[str, Any] = Field(exclude=True)
    notices: list[str] = Field(default_factory=list, exclude=True)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.sft_args["output_dir"])

    @property
    def model_name(self) -> str:
        return str(self.lm_args["model_name_or_path"])

    @property
    def max_length(self) -> int | None:
        return self.sft_args["max_length"]

    @property
    def trusts_code(self) -> bool:
        """Whether the model repository's own code may run on this machine."""
        return bool(self.sft_args.get("trust_remote_code"))

    @property
    def seed(self) -> int:
        return int(self.sft_args.get("seed", 42))

    def find(self, path: str) -> Path:
        """Resolve a path of this recipe: beside the recipe, in the current folder, or among the shipped files."""
        return paths.find(path, self.path.parent)

    def sft_config(self, **changes: Any) -> "SFTConfig":
        """TRL's configuration of the trainer. Raises RecipeError if this machine cannot do what it asks for."""
        from trl import SFTConfig

        try:
            return SFTConfig(**(self.sft_args | changes))
        except ValueError as error:
            raise RecipeError([f"{self.path}: not on this machine: {error}"]) from None

    def lm_config(self) -> "ModelConfig":
        """TRL's configuration of the model and its adapter."""
        from trl import ModelConfig

        return ModelConfig(**self.lm_args)

    def to_yaml(self, **changes: Any) -> str:
        """The resolved recipe as YAML: every key that is not at TRL's default, and all of emogen's."""
        flat = self.model_dump() | self.lm_args | self.sft_args | changes
        return yaml.safe_dump(flat, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides, whose values are YAML.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    found = paths.find(path)
    if not found.is_file():
        shipped = [
            f"recipes/{p.relative_to(paths.shipped('recipes'))}" for p in paths.shipped("recipes").rglob("*.yaml")
        ]
        near = difflib.get_close_matches(str(path), shipped, 1)
        hint = f"did you mean {near[0]}?" if near else f"the shipped ones are: {', '.join(sorted(shipped))}"
        raise RecipeError([f"{path}: no such recipe; {hint}"])
    problems: list[str] = []
    values, where = _read_yaml(found, str(path), problems)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            problems.append(f"{override!r}: expected key=value")
            continue
        try:
            values[key] = yaml.load(value, _Loader)  # noqa: S506 - _Loader is a SafeLoader
        except yaml.YAMLError:
            values[key] = value
        where[key] = repr(override if key != "hub_token" else "hub_token=...")  # messages repeat no secret
    return _validate(found, values, where, problems)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML file of `key: value` lines -> its values, and where each key stands. Raises RecipeError."""
    problems: list[str] = []
    values, where = _read_yaml(paths.find(path), str(path), problems)
    if problems:
        raise RecipeError(problems)
    return values, where


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, which is how people read them: `2e-4` is a number, and `no` (eval_strategy: no) is a word."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^([Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(path: Path, shown: str, problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML file -> its values, and where each key stands (`file:line`)."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError([f"{shown}{line}: not valid YAML: {getattr(error, 'problem', error)}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"{shown}: cannot be read: {error}"]) from None
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError([f"{shown}:1: expected `key: value` lines"])
    where: dict[str, str] = {}
    for key, _ in node.value:
        here = f"{shown}:{key.start_mark.line + 1}"
        if key.value in where:
            problems.append(f"{here}: {key.value}: stands twice (first at {where[key.value]})")
        where[key.value] = here
    loaded = yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    return {str(key): value for key, value in loaded.items()}, where


@cache
def field_types() -> tuple[dict[str, Any], dict[str, Any]]:
    """The types of the fields of TRL's two configurations."""
    from trl import ModelConfig, SFTConfig

    def types(config: type) -> dict[str, Any]:
        hints = typing.get_type_hints(config)
        return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}

    sft = types(SFTConfig)
    sft["resume_from_checkpoint"] = bool | str | None
    lm = types(ModelConfig)
    lm["lora_target_modules"] = str | list[str] | None  # "all-linear" is a string, whatever the annotation says
    return sft, lm


def _validate(path: Path, values: dict[str, Any], where: dict[str, str], problems: list[str]) -> Recipe:
    sft_types, lm_types = field_types()
    own = {name for name, field in Recipe.model_fields.items() if not field.exclude}
    own_values: dict[str, Any] = {}
    sft_args: dict[str, Any] = {k: v for k, v in DEFAULTS.items() if k in sft_types}
    lm_args: dict[str, Any] = {k: v for k, v in DEFAULTS.items() if k in lm_types}
    notices = []

    for key, value in values.items():
        here = where[key]
        if key in OLD_NAMES and key not in sft_types | lm_types:
            notices.append(f"{here}: {key} is called {OLD_NAMES[key]} now; read as that")
            key = OLD_NAMES[key]
        if key in SETTLED:
            problems.append(f"{here}: {key}: cannot be set: {SETTLED[key]}")
        elif key in own:
            own_values[key] = value
            where[key] = here
        elif key in sft_types or key in lm_types:
            target, types = (sft_args, sft_types) if key in sft_types else (lm_args, lm_types)
            try:
                target[key] = TypeAdapter(types[key]).validate_python(value)
            except ValidationError as error:
                problems.append(f"{here}: {key}: {_reasons(error)}, got {value!r}")
        else:
            near = difflib.get_close_matches(key, [*own, *sft_types, *lm_types, *OLD_NAMES], 1)
            hint = f"; did you mean {near[0]}?" if near else "; `emogen train --help` says where the keys are listed"
            problems.append(f"{here}: {key}: no such key{hint}")

    sft_args.setdefault("output_dir", None)
    sft_args["output_dir"] = sft_args["output_dir"] or f"runs/{path.stem}"
    lm_args.setdefault("model_name_or_path", None)
    if not lm_args["model_name_or_path"]:
        problems.append(f"{path}: model_name_or_path: missing; name a model on the Hub or a folder")
    if own_values.get("select_best"):
        # Any checkpoint may turn out to be the one, so all are kept until the end, unless the recipe says otherwise.
        sft_args["load_best_model_at_end"] = True
        if "save_total_limit" not in values:
            sft_args["save_total_limit"] = None
    recipe: Recipe | None
    try:
        recipe = Recipe(**own_values, path=path, sft_args=sft_args, lm_args=lm_args, notices=notices)
    except ValidationError as error:
        for key, value in {str(e["loc"][0]): e["input"] for e in error.errors()}.items():
            problems.append(f"{where.get(key, path)}: {key}: {_reasons(error, key)}, got {value!r}")
        recipe = None
    problems += _construct(path, sft_args, lm_args, where)
    if recipe is None:
        raise RecipeError(problems)
    if not recipe.train_file and not recipe.dataset_name:
        problems.append(f"{path}: train_file: missing; name a data file, or a Hub dataset with dataset_name")
    if not lm_args["use_peft"] and recipe.answer != "head":
        problems.append(
            f"{where['use_peft']}: use_peft: cannot be false but with answer: head; a generator gets a LoRA adapter"
        )
    if recipe.train_file and recipe.dataset_name:
        problems.append(f"{where['train_file']}: train_file: cannot stand beside dataset_name; choose one")
    if recipe.eval_file and recipe.eval_fraction:
        problems.append(f"{where['eval_fraction']}: eval_fraction: cannot stand beside eval_file; choose one")
    if problems:
        raise RecipeError(problems)
    return recipe


def _construct(path: Path, sft_args: dict[str, Any], lm_args: dict[str, Any], where: dict[str, str]) -> list[str]:
    """What TRL's own constructors say of values that have the right type."""
    import torch
    from trl import ModelConfig, SFTConfig

    # A recipe for a GPU is checked on machines that have none; training on one says so when it starts.
    anywhere = {} if torch.cuda.is_available() else {"use_cpu": True}
    problems = []
    for config, values in ((SFTConfig, sft_args | anywhere), (ModelConfig, lm_args)):
        try:
            config(**values)
        except (ValueError, TypeError, ImportError) as error:
            # These errors do not always name the key; they do name its value.
            message = str(error)
            key = next(
                (k for k in where if k in message or (isinstance(v := values.get(k), str) and v in message)), None
            )
            problems.append(f"{where[key]}: {key}: {message}" if key else f"{path}: {message}")
    return problems


def _reasons(error: ValidationError, key: str | None = None) -> str:
    """What pydantic says (of one key), once for each different reason: a union gives one for each member."""
    errors = [e for e in error.errors() if key is None or e["loc"][0] == key]
    return " or ".join(dict.fromkeys(e["msg"][:1].lower() + e["msg"][1:] for e in errors))
