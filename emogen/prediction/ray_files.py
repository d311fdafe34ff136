"""Prediction on many machines, handed to Ray Data: the labelling of `predict`, mapped over the shards of a data set."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emogen.distribution import install_hint
from emogen.errors import InputError
from emogen.prediction.ensemble import Ensemble
from emogen.prediction.files import CHUNK
from emogen.task.columns import rows_from_records
from emogen.task.rows import checked

if TYPE_CHECKING:
    import pyarrow


def predict_on_ray(runs: list[Path], source: Path, output: Path, overrides: list[str], *, batch_size: int = 32) -> int:
    """Label Parquet files on a Ray cluster: on each of its GPUs with a model of its own, or without any on one process.

    Args:
        runs, overrides: as for `predict.predict_file`; every machine has to see the folders.
        source: a Parquet file, or a folder of them.
        output: a folder that is made: Parquet files with the columns of the source, a 0/1 column for each label,
            `prob_<label>`, and with one model `raw`, what it answered. Columns of the source with these names are left
            out.

    Returns:
        How many rows were labelled.

    Raises:
        InputError: Ray is not installed, the output exists, or runs and source cannot be used.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        import ray
    except ImportError:
        raise InputError(f"--engine ray needs Ray: {install_hint('ray')}") from None
    if output.exists():
        raise InputError(f"{output}: exists; name a folder that does not")
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    Ensemble(runs, overrides)  # what is wrong with the runs is said here, and not by each worker
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)  # the cluster of RAY_ADDRESS, or one of this machine
    n_gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    scratch = output.with_name(f".{output.name}.partial")
    data: Any = ray.data.read_parquet(str(source.resolve()))
    data.map_batches(
        Worker,
        fn_constructor_args=([run.resolve() for run in runs], overrides, batch_size),
        batch_size=CHUNK,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=max(1, n_gpus)),
        num_gpus=1 if n_gpus else 0,
    ).write_parquet(str(scratch.resolve()))
    scratch.replace(output)
    return int(ray.data.read_parquet(str(output.resolve())).count())


class Worker:
    """The models of some runs, in a process of their own, which label one table after another."""

    def __init__(self, runs: list[Path], overrides: list[str], batch_size: int):
        self.ensemble, self.batch_size = Ensemble(runs, overrides), batch_size

    def __call__(self, table: "pyarrow.Table") -> "pyarrow.Table":
        """Rows of the source -> the same rows, labelled."""
        import pyarrow

        recipe, label_set = self.ensemble.recipe, self.ensemble.label_set
        records = enumerate(table.to_pylist(), start=1)
        unlabelled = [name for name in table.column_names if name not in label_set.names]
        found = rows_from_records(
            "a shard", unlabelled, records, label_set, [],
            text_column=recipe.text_column, id_column=recipe.id_column,
        )  # fmt: skip
        done = self.ensemble.predict(
            checked(found),
            with_prob=True,
            batch_size=self.batch_size,
            bar=lambda what, n: nullcontext(lambda done: None),
        )
        assert done.prob is not None
        added: dict[str, Any] = {name: done.pred[:, k] for k, name in enumerate(label_set.names)}
        added |= {f"prob_{name}": done.prob[:, k] for k, name in enumerate(label_set.names)}
        if done.predictions is not None:
            added["raw"] = [prediction.raw for prediction in done.predictions]
        table = table.select([name for name in table.column_names if name not in added])
        for name, values in added.items():
            table = table.append_column(name, pyarrow.array(values))
        return table
