"""Commands for rented GPUs: plan, and pod launch, list, logs, fetch, stop, terminate, reap."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emogen.cli.shared import JsonOption, Overrides, RecipeArgument
from emogen.cli.training import print_findings
from emogen.console import err, message, out
from emogen.errors import ModelError

if TYPE_CHECKING:
    from emogen.cloud.plan import Plan

app = typer.Typer(
    help="Train on a GPU rented from Runpod.\n\n"
    "Needs an extra, `pods`: without it, a command says how to install it.\n\n"
    "RUNPOD_API_KEY, and HF_TOKEN for models that need it, are read from the environment or from "
    "~/.config/emogen/keys (lines of KEY=VALUE, mode 600). Experimental: tested against Runpod's API document, but "
    "not yet on a real pod.",
    no_args_is_help=True,
)

PodArgument = Annotated[str, typer.Argument(help="A pod: its id, its name, or the beginning of its name.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list the pods.")]


def plan(recipe: RecipeArgument, overrides: Overrides = None, as_json: JsonOption = False) -> None:
    """Estimate the GPU memory, hours and dollars of a run.

    With a Runpod key the prices are live; otherwise they are built in. Memory and hours are estimates, unless a
    finished run of the same model beside this one's output_dir gives a measured speed.
    """
    from emogen.cloud import runpod
    from emogen.cloud.plan import make_plan

    keys, live = runpod.read_keys(), None
    with err.status("Counting tokens ..."):
        if "RUNPOD_API_KEY" in keys:
            try:
                with runpod.open_api(keys) as api:
                    live = runpod.quotes(api)
            except ModelError as error:
                err.print(message("no live prices", "yellow", str(error)), soft_wrap=True)
        plan = make_plan(recipe, overrides or [], live)
    if as_json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        show_plan(out, plan)


def show_plan(console: Console, plan: "Plan") -> None:
    """Print a plan: tokens, memory by part, and hours and dollars on each GPU type."""
    tokens = plan.tokens
    source = "" if tokens.exact else " (estimated: the tokenizer is not available here)"
    _print(
        console,
        f"{plan.model}: {tokens.rows:,} training rows, {tokens.scored:,} rows to score; "
        f"{tokens.prefix} shared tokens, {tokens.rest:.0f} more per row{source}; "
        f"{plan.train_tokens:,} tokens in training",
    )
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in plan.memory.items() if size)
    _print(console, f"GPU memory: {plan.peak / 2**30:.1f} GiB = {parts}")
    console.print(_options_table(plan))
    for option in plan.options:
        if ":" in option.basis:
            _print(console, f"{option.gpu}: {option.basis}")
    _print(console, f"Prices: {plan.prices}. Estimated speeds can be wrong by a factor of two.")
    if plan.fitting:
        best = plan.fitting[0]
        hours = " + ".join(f"{hours:.2f} {part}" for part, hours in best.hours.items())
        _print(console, f"Cheapest fit: {best.gpu}, {hours} = {best.total_hours:.2f} hours, about ${best.dollars:.2f}")


def _options_table(plan: "Plan") -> Table:
    stock = ["stock"] if any(option.stock for option in plan.options) else []
    view = Table("GPU", "memory", "fits", "hours", "$/h", "dollars", *stock, "speed", box=None, pad_edge=False)
    view.columns[0].no_wrap = True
    for option in plan.options:
        cost = [f"{option.price:.2f}", f"{option.dollars:.2f}"] if option.price is not None else ["", ""]
        memory = f"{option.memory:.0f} GB" if option.memory else ""
        fits = "yes" if option.fits else Text("no", "red")
        left = [(option.stock or "").lower()] if stock else []
        view.add_row(option.gpu, memory, fits, f"{option.total_hours:.2f}", *cost, *left, option.basis.split(":")[0])
    return view


@app.command("launch")
def launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[
        list[str] | None, typer.Option(help="Consider only this GPU type, such as 'NVIDIA L40S'; can be repeated.")
    ] = None,
    volume: Annotated[
        str | None, typer.Option(help="Id of a network volume. It keeps models and checkpoints when the pod is gone.")
    ] = None,
    max_hours: Annotated[float, typer.Option(min=0.5, help="Stop the pod after this many hours.")] = 6.0,
    max_dollars: Annotated[float, typer.Option(min=0.1, help="Stop the pod when its GPU has cost this much.")] = 10.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the first request, and send nothing that costs money.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the log, fetch the run and terminate the pod.")
    ] = False,
) -> None:
    """Rent the cheapest GPU that fits a recipe, and train there.

    Code, recipe, prompt and data go to the pod as one archive over SSH with your own key. API keys are only in the
    request that creates the pod.

    With --follow the pod is terminated at the end, and also after an error, Ctrl-C or a lost connection; if a finished
    run cannot be fetched, the pod is stopped instead. Without --follow the pod stops itself. A second launch of the
    same job finds the pod of the first.
    """
    from emogen.cloud import launch as jobs
    from emogen.cloud import runpod
    from emogen.cloud.runpod import Polling
    from emogen.task.recipe import load_recipe

    words, limits = overrides or [], jobs.Limits(max_hours, max_dollars)
    if print_findings(err, recipe, words):
        raise typer.Exit(2)
    keys = runpod.read_keys()
    with ExitStack() as stack:
        api = stack.enter_context(runpod.open_api(keys)) if not dry_run or "RUNPOD_API_KEY" in keys else None
        with err.status("Planning ..."):
            plan, job, bodies = jobs.prepare(recipe, words, limits, gpus=gpu or [], volume=volume, api=api)
        show_plan(err, plan)
        if dry_run or api is None:
            _show_request(bodies, keys)
            types = ", ".join(body["gpu"]["id"] for body in bodies)
            _print(err, f"{job.name}: {len(job.files)} files, {job.size / 1e6:.1f} MB; GPU types in order: {types}")
            return
        folder = load_recipe(recipe, words).output_dir if follow else None
        pod = jobs.launch_job(api, job, bodies, keys, _say, Polling(), folder)
        if not folder:
            _say(
                f"Training has started. Next: emogen pod logs {pod.id}, emogen pod fetch {pod.id}, "
                f"emogen pod terminate {pod.id}"
            )


def _show_request(bodies: list[dict[str, Any]], keys: dict[str, str]) -> None:
    """Print the first request that a launch would send, without keys and without the text of the start script."""
    start = f"{len(bodies[0]['env']['EMOGEN_START']):,} characters of base64: runpod/start.sh"
    env = bodies[0]["env"] | {"EMOGEN_START": start} | dict.fromkeys(keys, "***")
    print(json.dumps(bodies[0] | {"env": env}, indent=2))


@app.command("list")
def list_pods() -> None:
    """List the pods of this project: status, cost, time limit."""
    from emogen.cloud import runpod

    with runpod.open_api(runpod.read_keys()) as api:
        pods = runpod.list_pods(api)
    view = Table("pod", "id", "status", "GPU", "$/h", "hours", "limit in", box=None, pad_edge=False)
    view.columns[0].overflow = "fold"  # the pods of one job differ in the end of their names
    for pod in pods:
        age, left = (time.time() - pod.started) / 3600, (pod.deadline - time.time()) / 3600
        limit = f"{left:.1f} h" if left > 0 else Text("overdue", "red")
        gpu = pod.gpu.id if pod.gpu else ""
        view.add_row(pod.name, pod.id, pod.status.lower(), gpu, f"{pod.cost:.2f}", f"{age:.1f}", limit)
    out.print(view if pods else "no pods")


@app.command("logs")
def logs(name: PodArgument) -> None:
    """Print the log of a pod's job until the pod ends.

    Ctrl-C stops printing; the pod keeps running.
    """
    from emogen.cloud import runpod
    from emogen.cloud.runpod import Polling

    with runpod.open_api(runpod.read_keys()) as api:
        for line in runpod.logs(api, runpod.find_pod(api, name), Polling()):
            _say(line)


@app.command("fetch")
def fetch(
    name: PodArgument,
    into: Annotated[Path | None, typer.Option(help="Folder for the run. Default: runs/<recipe name>.")] = None,
) -> None:
    """Fetch the run folder of a job, without its checkpoints.

    A stopped pod is started for it, and stopped again.
    """
    from emogen.cloud import launch as jobs
    from emogen.cloud import runpod
    from emogen.cloud.runpod import Polling

    with runpod.open_api(runpod.read_keys()) as api:
        pod = runpod.find_pod(api, name)
        folder = into or Path("runs") / pod.recipe
        jobs.fetch_run(api, pod, folder, Polling())
    _say(f"The run is in {folder}. The pod still exists: emogen pod terminate {pod.id}")


@app.command("stop")
def stop(name: PodArgument) -> None:
    """Stop a pod: only its storage is kept, and costs money."""
    from emogen.cloud import runpod

    with runpod.open_api(runpod.read_keys()) as api:
        pod = runpod.find_pod(api, name)
        runpod.act(api, pod, "stop")
    _say(f"{pod.name}: stopped")


@app.command("terminate")
def terminate(name: PodArgument) -> None:
    """Terminate a pod; network volumes remain."""
    from emogen.cloud import runpod

    with runpod.open_api(runpod.read_keys()) as api:
        pod = runpod.find_pod(api, name)
        runpod.terminate(api, pod.name)
    _say(f"{pod.name}: terminated")


@app.command("reap")
def reap(dry_run: DryRun = False) -> None:
    """Terminate the pods that are past their limit.

    Stopped pods are terminated too: fetch their runs first.
    """
    from emogen.cloud import runpod

    with runpod.open_api(runpod.read_keys()) as api:
        late = runpod.overdue(runpod.list_pods(api), time.time())
        failed = False
        for pod in late:
            try:
                if not dry_run:
                    runpod.terminate(api, pod.name)
            except runpod.ApiError as error:  # continue: the other pods cost money, too
                err.print(message("error", "red", f"{pod.name}: {error}"), soft_wrap=True)
                failed = True
            else:
                _say(f"{pod.name} ({pod.id}): {'would be ' if dry_run else ''}terminated")
    if not late:
        _say("no pod is past its limit")
    if failed:
        raise typer.Exit(1)


def _say(line: str) -> None:
    _print(out, line)


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True)
