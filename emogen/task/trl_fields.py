"""The fields of TRL's `SFTConfig` and `ModelConfig`, and what their constructors refuse.

TRL takes seconds to import, and a recipe is read by every command. So what is read here is remembered for each
installed version.
"""

import dataclasses
import os
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from emogen.memo import remembered

PACKAGES = ("trl", "transformers", "accelerate", "peft", "torch")  # whose code decides

# The types of values that a recipe can have. The names are what is remembered of an annotation.
_TYPES: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "dict": dict,
    "list[str]": list[str],
    "None": None,
}


class Field(NamedTuple):
    """A field of a configuration: its type, for pydantic, and its default; None if it has none."""

    type: Any
    default: Any


@cache
def sft_fields() -> dict[str, Field]:
    """The fields of TRL's `SFTConfig`, by their names."""
    fields = _fields("SFTConfig")
    # A run continues from its own newest checkpoint.
    return fields | {"resume_from_checkpoint": Field(bool | None, fields["resume_from_checkpoint"].default)}


@cache
def lm_fields() -> dict[str, Field]:
    """The fields of TRL's `ModelConfig`, by their names."""
    fields = _fields("ModelConfig")
    # The annotation excludes the string "all-linear".
    return fields | {"lora_target_modules": Field(str | list[str] | None, fields["lora_target_modules"].default)}


def _fields(config: str) -> dict[str, Field]:
    known = remembered("trl-fields", config, lambda: _read_fields(config), packages=PACKAGES)
    return {
        name: Field(typing.Union[tuple(_TYPES[each] for each in names)] if names else Any, default)  # noqa: UP007
        for name, (names, default) in known.items()
    }


def _read_fields(config: str) -> dict[str, tuple[list[str], Any]]:
    """The names of the types of each field, and its default."""
    import trl

    kind = getattr(trl, config)
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        if field.init:
            default = None if field.default is dataclasses.MISSING else field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            found[field.name] = (_names(hints[field.name]), default)
    return found


def _names(annotation: Any) -> list[str]:
    """The types of an annotation that a YAML value can have. An enumeration is named by a string."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return list(dict.fromkeys(name for each in typing.get_args(annotation) for name in _names(each)))
    if typing.get_origin(annotation) is typing.Literal:
        return list(dict.fromkeys(type(value).__name__ for value in typing.get_args(annotation)))
    if typing.get_origin(annotation) is list:
        return ["list[str]"]
    name = "None" if annotation is type(None) else (typing.get_origin(annotation) or annotation).__name__
    return [name] if name in _TYPES else []


def constructor_errors(sft_args: dict[str, Any], lm_args: dict[str, Any]) -> dict[str, str]:
    """The errors that TRL's own constructors raise for values of the right type, by the names of the configurations.

    That there are none is remembered.
    """

    def construct() -> dict[str, str]:
        import torch
        from trl import ModelConfig, SFTConfig

        # A recipe for a GPU can be checked on a machine without one. Training there fails when it starts.
        anywhere = {} if torch.accelerator.is_available() else {"use_cpu": True}
        errors = {}
        for config, values in ((SFTConfig, sft_args | anywhere), (ModelConfig, lm_args)):
            try:
                config(**values)
            except (ValueError, TypeError, ImportError) as error:
                errors[config.__name__] = str(error)
        return errors

    values = [sft_args, lm_args, _machine()]
    return dict(remembered("trl-accepts", values, construct, packages=PACKAGES, keep=lambda errors: not errors))


def _machine() -> list[Any]:
    """What the constructors ask of the machine: its accelerators, and who launched this process."""
    devices = [name for name in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri") if Path(name).exists()]
    names = ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "HIP_VISIBLE_DEVICES")
    launched = sorted(f"{k}={v}" for k, v in os.environ.items() if k in names or k.startswith("ACCELERATE_"))
    return [os.uname().nodename, devices, launched]
