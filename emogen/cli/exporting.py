"""Commands that take a model elsewhere: export, push."""

from pathlib import Path
from typing import Annotated

import typer

from emogen.console import err, out, progress_bar

TARGETS = ("merged", "gguf", "ollama", "onnx")


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a finished run.")],
    to: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.")] = "merged",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new folder. Default: RUN_DIR-TARGET.")
    ] = None,
    type: Annotated[str, typer.Option(help="The type of the weights in a GGUF file: f16 or q8_0.")] = "f16",
    force: Annotated[
        bool, typer.Option("--force", help="Keep an export that scores otherwise than the run, or that is not scored.")
    ] = False,
) -> None:
    """Write the model of a run for other programs, and score it there.

    merged: the adapter merged into the base model, in its own precision, for transformers and vLLM. gguf: for
    llama.cpp. ollama: a GGUF file with a Modelfile. These folders are run folders, too: emogen predict takes them.
    onnx: a classification head for onnxruntime, on servers, phones and in browsers.

    The held-out rows of the run are labelled again by what was exported, in the program that will run it, and the
    difference is printed and kept in export.json. A change of macro-F1 above 0.005 is an error.
    """
    from emogen.exporting.export import export, export_folder
    from emogen.exporting.llama_cpp import TYPES

    if to not in TARGETS:
        raise typer.BadParameter(f"--to is one of {', '.join(TARGETS)}, not {to}")
    if type not in TYPES:
        raise typer.BadParameter(f"--type is one of {', '.join(TYPES)}, not {type}")
    folder = output or export_folder(run, to)
    shifts = export(run, folder, to, kind=type, force=force, bar=progress_bar)
    if not shifts:
        err.print("It was not scored: the run has no held-out rows.")
    out.print(f"The export is in {folder}", soft_wrap=True)


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a finished run, or of an export.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private repository.")] = False,
    with_examples: Annotated[
        bool, typer.Option("--with-examples", help="Publish the training rows that the prompt shows, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, and send nothing.")] = False,
) -> None:
    """Publish a run on the Hugging Face Hub.

    Weights, tokenizer, prompt, labels, thresholds, model card, and the recipe without paths are published; rows,
    predictions, logs and reports are not. Set HF_TOKEN, or run hf auth login.
    """
    import tempfile

    from emogen.exporting.push import check_repository, sizes, stage
    from emogen.exporting.push import push as publish

    check_repository(repository)
    with tempfile.TemporaryDirectory(prefix="emogen-push-") as scratch:
        staged = Path(scratch)
        for name, size in sizes(staged, stage(run, staged, with_examples=with_examples)):
            out.print(f"{size / 1e6:10.2f} MB  {name}", soft_wrap=True)
        if dry_run:
            return
        with err.status("Uploading ..."):
            address = publish(staged, run.resolve().name, repository, private=private)
    out.print(f"Published: {address}", soft_wrap=True)
