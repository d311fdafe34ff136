"""Whether the weights of a run are those that it was scored with: its adapter, and the base model below it."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from emogen import paths
from emogen.errors import InputError
from emogen.evaluation.run_folder import ADAPTER, BASELINE, MODEL, kind_of, member_folders, read_manifest, read_recipe
from emogen.model.identity import identify
from emogen.model.sources import locate

log = logging.getLogger(__name__)

BASE = "base model"  # the key of its identity in the manifest


def hash_weights(run: Path) -> dict[str, str]:
    """The digests of the files of an adapter, or the identity of a model that was tuned in full, by their paths."""
    if (run / MODEL).is_dir():
        return {MODEL: identify(run / MODEL) or ""}
    files = [path for path in (run / ADAPTER).iterdir() if path.is_file() and path.suffix != ".md"]
    return {f"{ADAPTER}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def identity_of_base(run: Path, overrides: Sequence[str] = ()) -> str | None:
    """The identity of the base model of a run, a cross-validation or a recipe; None if it has none on this machine."""
    member = member_folders([run])[0]
    if kind_of(member) == BASELINE:
        return None
    recipe, _ = read_recipe(member, overrides)
    if recipe.api_base:
        return f"{recipe.api_model} at {recipe.api_base}"
    return identify(locate(recipe.model_name, recipe.lm_args.get("model_revision", "main")))


def check_weights(run: Path, location: str | None, *, force: bool = False) -> None:
    """Compare the weights of a run folder with what its manifest says.

    Manifests of emogen 0.1, and of runs that have not finished, say nothing: that is a warning.

    Args:
        run: a run folder, or a recipe file, of which there is nothing to check.
        location: of the base model, as returned by `sources.locate`; None for a model that was tuned in full.
        force: warn instead of raising.

    Raises:
        InputError: a file was changed, or the base model is another one.
    """
    if not run.is_dir():
        return
    manifest = read_manifest(run)
    recorded, now = manifest["weights"], hash_weights(run)
    changed = [name for name in sorted(recorded.keys() | now.keys()) if recorded.get(name) != now.get(name)]
    wrong = [f"{name} changed since the run was scored" for name in changed] if recorded else []
    base = manifest["sha256"].get(BASE)
    if not recorded:
        log.warning(f"{run}: its manifest has no digests of its weights, so they are not verified")
    if base and location and (found := identify(location)) and found != base:
        wrong.append(f"{location} is not the base model that it was tuned from ({manifest.get('model')})")
    if not wrong:
        return
    message = f"{run}: {'; '.join(wrong)}"
    if not force:
        raise InputError(f"{message}. Its predictions would not be those of the run. --force predicts all the same")
    log.warning(message)


def name_base_model(adapter: Path, model_name: str) -> None:
    """Replace the base model in the configuration of an adapter, a folder of this machine, by its name."""
    path = adapter / "adapter_config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": model_name}
        with paths.writing(path) as file:
            json.dump(config, file, indent=2)
