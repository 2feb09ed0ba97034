"""The commands that run things. Each imports what is heavy when it is called, so that `chiasm plugins` stays light."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from chiasm_experiments.submit import submit
from chiasm_experiments.watch import watch

EXISTING = click.Path(exists=True, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW = click.Path(path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
COUNT = click.IntRange(min=1)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine.")


@click.command()
@click.argument("file", type=EXISTING)
@click.option(
    "--text", type=COUNT, default=64, show_default=True, help="Positions of text in the sample that is costed."
)
@click.option("--answer", type=COUNT, default=32, show_default=True, help="Those of its answer.")
@click.option(
    "--gpu-memory",
    type=click.FloatRange(min=0, min_open=True),
    help="GiB of the GPU; names the cells whose steps are to take more.",
)
@click.option(
    "--workers", type=COUNT, default=1, show_default=True, help="GPUs that the language model is spread over (FSDP2)."
)
@as_json
def plan(file: Path, text: int, answer: int, gpu_memory: float | None, workers: int, as_json: bool) -> None:
    """Say what a RUN or STUDY file would do, without loading a weight.

    For each cell: whether its parts fit and why not, visual tokens of one image, parameters by part, operations of
    one sample in training and to answer, and the peak memory of a step on a GPU. Of a study also its factors, what each
    fidelity tries, what constraints leave out, and all trials and operations together. Exits with 1 if a sweep would
    refuse the study, or the run cannot work.
    """
    from chiasm.config import load_run
    from chiasm.cost import SampleSize
    from chiasm.plan import plan_run
    from chiasm.yamlfile import load_yaml
    from chiasm_experiments.study.config import Study, is_study
    from chiasm_experiments.study.overview import plan_study
    from chiasm_experiments.study.plans import plans_as_text, study_as_text

    sample = SampleSize(text, answer)
    if is_study(load_yaml(file)):
        whole = plan_study(Study(file), sample)
        values, works = whole.summary(workers), whole.refused is None
        shown = study_as_text(whole, gpu_memory, workers)
    else:
        item = plan_run(load_run(file), sample)
        values, works = {"cells": [{"label": file.stem, **item.summary(workers)}]}, item.valid
        shown = f"{file.name}: one run\n" + plans_as_text([(file.stem, item)], sample, gpu_memory, workers)
    click.echo(json.dumps(values, indent=2) if as_json else shown)
    if not works:
        raise SystemExit(1)


@click.command()
@click.argument("run_file", metavar="RUN", type=EXISTING)
@click.option("--out", type=NEW, required=True, help="Folder of the results; a run found there is taken up.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="How it is executed, say cache=on.")
@as_json
def train(run_file: Path, out: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Train and evaluate one RUN file in this process.

    Stopped anywhere, it goes on from its last checkpoint when it is called again; Ctrl-C or SIGTERM let it write one
    first, and a second Ctrl-C ends it at once. Writes the configuration (run.json), weights in safetensors for each
    stage, metrics.jsonl, a row for each question (questions.parquet) and the manifest with scores and cost. What --set
    takes are the fields of a study's `resources` that concern one run, among them loader_workers, checkpoint_seconds,
    strategy, cache, pack, compile, activation_checkpointing, loggers and profile.

    \b
    chiasm train experiments/recipes/demo.yaml --out runs/one --set checkpoint_seconds=60
    """
    from chiasm.config import load_run
    from chiasm.errors import ConfigError
    from chiasm.plan import plan_run
    from chiasm_experiments.folders import expect_run, new_folder
    from chiasm_experiments.training.execution import parse_execution
    from chiasm_experiments.training.local import SignalledError, run_here
    from chiasm_experiments.training.run import Job, check_data

    execution = parse_execution(settings)
    expect_run(run_file)
    run = load_run(run_file)
    problems = plan_run(run).problems
    if problems:
        raise ConfigError("this run cannot work:\n" + "\n".join(f"  {problem}" for problem in problems))
    check_data(run)
    folder = new_folder(out)
    labels: dict[str, Any] = {"trial": folder.name, "study": None, "cell": {}}
    values = run.model_dump(mode="json")
    job = Job(values, str(folder), labels, execution)
    try:
        manifest = run_here(job, quiet=as_json)
    except SignalledError as stopped:
        click.echo(f"{stopped}; to go on from there, give the same command again", err=True)
        raise SystemExit(128 + stopped.number) from None
    _print_scores(manifest, folder, as_json)


@click.command()
@click.argument("study", type=EXISTING)
@click.option("--out", type=NEW, help="Folder of the results. Default: $CHIASM_RUNS or runs/, then the study's name.")
@click.option("--fresh", is_flag=True, help="Delete earlier results of this study first.")
@click.option("--retry-failed", is_flag=True, help="Start trials that failed again, from their last checkpoints.")
@click.option(
    "--add-seeds",
    type=COUNT,
    default=None,
    metavar="N",
    help="N more seeds than the study has: for every cell, in a search for the best ones. Later calls remember them.",
)
@click.option("--only", metavar="CELL", help="Run only cells whose label has this in it; the others wait.")
@as_json
def sweep(
    study: Path,
    out: Path | None,
    fresh: bool,
    retry_failed: bool,
    add_seeds: int | None,
    only: str | None,
    as_json: bool,
) -> None:
    """Run every trial of a STUDY file through Ray and write its report.

    Invalid cells and unreadable data stop it before anything runs. Call it again to take up what was interrupted:
    finished trials are kept, others go on from their checkpoints. The study may be edited in between: what changed is
    said, and what is still valid is kept. Several calls at once share the work. Set RAY_ADDRESS to use a running
    cluster.

    Ctrl-C or SIGTERM let running trials write a checkpoint first; a second Ctrl-C ends them at once.

    Exits with 0 if all trials ended well, 1 if one failed or too many did, 130 after Ctrl-C, 143 after SIGTERM.
    """
    from chiasm_experiments.folders import expect_study
    from chiasm_experiments.report import write_report
    from chiasm_experiments.study.sweep import Options
    from chiasm_experiments.study.sweep import sweep as run_study

    expect_study(study)
    options = Options(fresh, retry_failed, add_seeds or 0, only)
    again = shlex.join(["chiasm", "sweep", str(study), *(["--out", str(out)] if out is not None else [])])
    try:
        ended = run_study(study, out, options, say=lambda line: click.echo(line, err=as_json))
    except KeyboardInterrupt:
        click.echo(f"ended at once; `{again}` goes on from the last checkpoints", err=True)
        raise SystemExit(130) from None
    if ended.exit_code:
        click.echo(f"{ended.stopped}: {ended.complete} trials are complete, {ended.left} are left; `{again}` goes on")
        raise SystemExit(ended.exit_code)
    if not ended.complete and ended.failed:
        raise click.ClickException(f"all {ended.failed} trials failed; the first error is in {ended.folder}/trials")
    if not ended.complete:
        raise click.ClickException(f"no trial was finished; {ended.left} are left, and `{again}` goes on")
    report = write_report(ended.folder)
    if as_json:
        values = {"folder": str(ended.folder), "report": str(report.html), "complete": ended.complete}
        values |= {"pruned": ended.pruned, "failed": ended.failed, "left": ended.left, "stopped": ended.stopped}
        click.echo(json.dumps(values))
    else:
        click.echo(report.markdown.read_text(encoding="utf-8").partition("\n## Effects")[0].rstrip())
        click.echo(f"\nreport: {report.html}")
        if ended.left:
            click.echo(f"{ended.left} trials are left: {ended.stopped or 'they were not asked for'}; `{again}` goes on")
    if ended.failed:
        raise SystemExit(1)


@click.command()
@click.argument("run_folder", metavar="RUN_FOLDER", type=FOLDER)
@click.option("--out", type=NEW_FILE, help="Where to write the rows of all questions, as parquet.")
@as_json
def evaluate(run_folder: Path, out: Path | None, as_json: bool) -> None:
    """Evaluate a trained run again, from its saved weights.

    RUN_FOLDER is what `chiasm train` wrote, or one trial of a study. The benchmarks, the form of the prompt and the
    preprocessing are those of the run. Nothing in the folder changes.

    \b
    chiasm evaluate runs/demo/trials/NAME --out rows.parquet
    """
    from chiasm_experiments.evaluation import write_rows
    from chiasm_experiments.folders import new_folder, trained_run
    from chiasm_experiments.training.local import evaluate_here

    trained_run(run_folder)
    if out is not None:
        new_folder(out.parent)
    rows, scores = evaluate_here(run_folder)
    if out is not None:
        write_rows(out, rows)
    values = {
        name: {"accuracy": score, "questions": sum(r["benchmark"] == name for r in rows)}
        for name, score in scores.items()
    }
    if as_json:
        click.echo(json.dumps(values))
    else:
        for name, value in values.items():
            click.echo(f"{name}: {100 * value['accuracy']:.1f} on {value['questions']} questions")


@click.command()
@click.argument("study_folder", metavar="STUDY_FOLDER", type=FOLDER)
@as_json
def report(study_folder: Path, as_json: bool) -> None:
    """Write the report of a study from its trials.

    STUDY_FOLDER is what `chiasm sweep` writes into; the study may be unfinished. Writes report.md, report.html (one
    file that needs no network), report.png and results.parquet (a row for each question of each trial) there.
    """
    from chiasm_experiments.report import write_report

    written = write_report(study_folder)
    click.echo(json.dumps({"report": str(written.html)}) if as_json else f"report: {written.html}")


@click.command()
@click.argument("run_folder", metavar="RUN_FOLDER", type=FOLDER)
@click.argument("image", type=EXISTING)
@click.argument("question")
@click.option("--max-new-tokens", type=COUNT, default=64, show_default=True, help="The longest answer.")
@as_json
def ask(run_folder: Path, image: Path, question: str, max_new_tokens: int, as_json: bool) -> None:
    """Ask a trained run about an image and print its answer.

    RUN_FOLDER is what `chiasm train` wrote, or one trial of a study; IMAGE a file that Pillow reads. The answer is the
    greedy one, to the QUESTION as it stands: a run that learned from instructions such as "Answer with a letter."
    expects them.

    \b
    chiasm ask runs/demo/trials/NAME photo.jpg "How many stars are there?"
    """
    from chiasm_experiments.folders import trained_run
    from chiasm_experiments.training.local import ask_here

    response = ask_here(trained_run(run_folder), image, question, max_new_tokens)
    click.echo(json.dumps({"answer": response}) if as_json else response)


def _print_scores(manifest: dict[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "scores": manifest["scores"]}))
        return
    for name, score in manifest["scores"].items():
        click.echo(f"{name}: {100 * score:.1f}")
    click.echo(f"manifest: {folder / 'manifest.json'}")


COMMANDS = (plan, train, sweep, submit, watch, evaluate, report, ask)
