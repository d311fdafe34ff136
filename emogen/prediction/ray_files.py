"""Prediction on a Ray cluster: Ray Data maps the rows of Parquet files over workers, each with its own model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emogen.console import no_bar
from emogen.distribution import install_hint
from emogen.errors import InputError
from emogen.prediction.ensemble import Ensemble
from emogen.prediction.files import CHUNK
from emogen.task.columns import rows_from_records
from emogen.task.rows import checked

if TYPE_CHECKING:
    import pyarrow


def predict_on_ray(
    runs: list[Path], source: Path, output: Path, overrides: list[str], *, batch_size: int = 32, force: bool = False
) -> int:
    """Label Parquet files on a Ray cluster: one worker per GPU, or a single worker on a cluster without GPUs.

    Args:
        runs, overrides: as for `predict_file`. Every machine of the cluster needs access to the folders.
        source: a Parquet file, or a folder of them.
        output: the folder to create. Its Parquet files have the columns of the source, a 0/1 column and a
            `prob_<label>` column per label and, with a single model, `raw` (the answer). Columns of the source with
            these names are dropped.

    Returns:
        The number of rows.

    Raises:
        InputError: Ray is not installed, the output exists, or the runs or the source cannot be used.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics are sent
    try:
        import ray
    except ImportError:
        raise InputError(f"--engine ray needs Ray: {install_hint('ray')}") from None
    if output.exists():
        raise InputError(f"{output}: exists; name a new folder")
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    ensemble = Ensemble(runs, overrides, force=force)  # reports errors of the runs once, before any worker starts
    names = ensemble.label_set.names
    if clashing := sorted({*names} & {"raw", *map(_prob_column, names)}):
        raise InputError(
            f"--engine ray writes columns of its own that are named as labels: {', '.join(clashing)}; leave it out"
        )
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)  # RAY_ADDRESS, or a cluster on this machine
    n_gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    scratch = output.with_name(f".{output.name}.partial")
    data: Any = ray.data.read_parquet(str(source.resolve()))
    data.map_batches(
        Worker,
        fn_constructor_args=([run.resolve() for run in runs], overrides, batch_size, force),
        batch_size=CHUNK,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=max(1, n_gpus)),
        num_gpus=1 if n_gpus else 0,
    ).write_parquet(str(scratch.resolve()))
    scratch.replace(output)
    return int(ray.data.read_parquet(str(output.resolve())).count())


def _prob_column(label: str) -> str:
    return f"prob_{label}"


class Worker:
    """A process of the cluster that holds the models of some runs and labels one table after another."""

    def __init__(self, runs: list[Path], overrides: list[str], batch_size: int, force: bool):
        self.ensemble, self.batch_size = Ensemble(runs, overrides, force=force), batch_size

    def __call__(self, table: "pyarrow.Table") -> "pyarrow.Table":
        """Label the rows of a table; see `predict_on_ray` for the columns of the result."""
        import pyarrow

        recipe, label_set = self.ensemble.recipe, self.ensemble.label_set
        records = enumerate(table.to_pylist(), start=1)
        unlabelled = [name for name in table.column_names if name not in label_set.names]
        rows = checked(
            rows_from_records(
                "a shard", unlabelled, records, label_set, [],
                text_column=recipe.text_column, id_column=recipe.id_column,
            )
        )  # fmt: skip
        batch = self.ensemble.predict(
            rows,
            with_prob=True,
            batch_size=self.batch_size,
            bar=no_bar,
        )
        assert batch.prob is not None
        added: dict[str, Any] = {name: batch.pred[:, k] for k, name in enumerate(label_set.names)}
        added |= {_prob_column(name): batch.prob[:, k] for k, name in enumerate(label_set.names)}
        if batch.predictions is not None:
            added["raw"] = [prediction.raw for prediction in batch.predictions]
        table = table.select([name for name in table.column_names if name not in added])
        for name, values in added.items():
            table = table.append_column(name, pyarrow.array(values))
        return table
