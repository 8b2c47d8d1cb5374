"""The command ``dfqs-nb``: one function for each subcommand, heavy imports inside them."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from dfqs_nb import __version__
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.report import figures as report_figures


def add_run(commands: Any) -> None:
    """``dfqs-nb run``: the notebooks in order."""
    parser = commands.add_parser("run", help="execute the notebooks in order into outputs/RUN/")
    parser.add_argument("notebooks", nargs="*", help="some of them, as 01 or 01_merge_shards (default: all)")
    parser.add_argument("--model", help="a name of `dfqs-nb models`, a file, or hf://owner/repo/file")
    parser.add_argument("--run", help="the folder's name under outputs/ (default: nano, or from the model)")
    parser.add_argument("--fresh", action="store_true", help="do again what an earlier run left")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE")
    parser.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> int:
    from dfqs_nb.core.paths import tilde
    from dfqs_nb.workbook import run as workbook

    paths = workbook.find_notebooks(arguments.notebooks)
    assignments = arguments.parameter + ([f"model={arguments.model}"] if arguments.model else [])
    parameters = workbook.parse_parameters(assignments, paths)
    name = (
        arguments.run
        or parameters.pop("run_name", None)
        or workbook.default_run_name(parameters.get("model"))
    )
    parameters.pop("run_name", None)
    bar = sys.stderr.isatty()
    result = workbook.run_workbook(
        name,
        parameters,
        paths,
        fresh=arguments.fresh,
        progress=bar,
        started=lambda path: print(f"{path.stem} ...", flush=True),
        finished=lambda done: print(f"{done.name}: {done.seconds:.1f} s -> {tilde(done.path)}", flush=True),
    )
    print(f"\n{workbook.summary_text(result)}")
    return 0


def add_stamp(commands: Any) -> None:
    """``dfqs-nb stamp``: the public address, from pyproject.toml into badges and set-up cells."""
    parser = commands.add_parser("stamp", help="write the public address into badges and set-up cells")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if out of date")
    parser.set_defaults(function=stamp)


def stamp(arguments: argparse.Namespace) -> int:
    from dfqs_nb.core.paths import tilde
    from dfqs_nb.workbook import run as workbook

    changed = workbook.stamp(check=arguments.check)
    for path in changed:
        print(f"{tilde(path)}: {'out of date; run `make stamp`' if arguments.check else 'stamped'}")
    return int(arguments.check and bool(changed))


def add_refresh(commands: Any) -> None:
    """``dfqs-nb refresh``: the notebooks executed in place."""
    parser = commands.add_parser("refresh", help="execute the notebooks in place and store clean outputs")
    parser.add_argument("notebooks", nargs="*", help="some of them, as 01 or 01_merge_shards (default: all)")
    parser.set_defaults(function=refresh)


def refresh(arguments: argparse.Namespace) -> int:
    import tempfile

    from dfqs_nb.workbook import run as workbook

    paths = workbook.find_notebooks(arguments.notebooks)
    with tempfile.TemporaryDirectory(prefix="dfqs-refresh-") as folder:
        outputs = Path(os.environ.get("DFQS_OUTPUTS") or folder)
        workbook.stamp()
        workbook.refresh_notebooks(paths, outputs)
    print(f"stored the outputs of {', '.join(path.stem for path in paths)}")
    return 0


def add_models(commands: Any) -> None:
    """``dfqs-nb models``: what the registry knows."""
    parser = commands.add_parser("models", help="list the models known by name")
    parser.set_defaults(function=models)


def models(arguments: argparse.Namespace) -> int:
    from dfqs_nb.gguf import models as registry

    for row in registry.describe():
        print(
            f"{row['name']}\n    {row['title']}\n    {row['files']} file(s), {row['gigabytes']:,} GB, "
            f"{row['licence']}, {row['source']}\n    {row['note']}"
        )
    return 0


def add_inspect(commands: Any) -> None:
    """``dfqs-nb inspect``: what a file is, from its headers alone."""
    parser = commands.add_parser("inspect", help="say what a file is, in milliseconds; changes nothing")
    parser.add_argument("paths", nargs="+", metavar="FILE")
    parser.add_argument("--llama-cpp", action="store_true", help="also ask llama.cpp's loader")
    parser.set_defaults(function=inspect)


def inspect(arguments: argparse.Namespace) -> int:
    from dfqs_nb.merge.kind import diagnose, llama_cpp_verdict

    sound = True
    for path in arguments.paths:
        found = diagnose(path)
        sound &= found.sound
        print(f"{path}: {found.kind}\n  {found.finding}")
        if found.next_step:
            print(f"  -> {found.next_step}")
        if found.sound:
            _print_header(path)
        else:
            _print_rows(dict(found.evidence))
        if arguments.llama_cpp:
            print(f"  {'llama.cpp:':<28}{llama_cpp_verdict(path).reason or 'loads'}")
    return int(not sound)


def _print_rows(rows: dict[str, Any]) -> None:
    for what, value in rows.items():
        print(f"  {what + ':':<28}{value:,}" if type(value) is int else f"  {what + ':':<28}{value}")


def _print_header(path: str) -> None:
    """The whole model's facts, from all its shards when they are there."""
    from dfqs_nb.core.errors import ShardError
    from dfqs_nb.gguf import facts as header_facts
    from dfqs_nb.gguf.header import read_header
    from dfqs_nb.gguf.shards import open_shards

    try:
        header = open_shards(path).as_one
    except ShardError:
        header = read_header(path)
    experts = header_facts.experts(header)
    rows = header_facts.identity(header) | header_facts.architecture(header)
    _print_rows({what: value for what, value in rows.items() if value != "not stated"})
    if experts.total:
        _print_rows(
            {
                "experts": f"{experts.used} of {experts.total} a token, {experts.shared} shared, "
                f"{experts.moe_layers} layers, {experts.hash_layers} of them by hash"
            }
        )
    for row in header_facts.class_sizes(header):
        _print_rows(
            {
                row["class"]: f"{row['bytes']:>16,} bytes {row['bits_per_weight']:7.2f} bits a weight  "
                f"{row['types']}"
            }
        )


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing output once the new one is proven"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_merge(commands: Any) -> None:
    """``dfqs-nb merge``: shards, or byte parts, into one file."""
    parser = commands.add_parser("merge", help="merge shards (or join byte parts) into one proven file")
    parser.add_argument(
        "paths", nargs="+", metavar="SHARD", help="any one shard, or all; or a registered name"
    )
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument(
        "--consume",
        action="store_true",
        help="release shards while they are copied, and remove them at the end: needs 64 MiB of extra disk",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    _add_writing(parser)
    parser.set_defaults(function=merge)


def merge(arguments: argparse.Namespace) -> int:
    from dfqs_nb.gguf import models as registry
    from dfqs_nb.merge import repair
    from dfqs_nb.merge.merge import check_output

    paths = [found for path in arguments.paths for found in registry.resolve(path)]
    model = paths[0] if len(paths) == 1 else paths
    if arguments.dry_run:
        plan = repair.plan_any(model)
        check_output(Path(arguments.output), plan, overwrite=arguments.overwrite, consume=arguments.consume)
        print(
            f"{len(plan.sources)} file(s) -> {arguments.output}: {plan.nbytes:,} bytes, "
            f"{len(plan.copies):,} copies; nothing was written"
        )
        return 0
    return _report(
        repair.merge_any(
            model,
            arguments.output,
            overwrite=arguments.overwrite,
            consume=arguments.consume,
            progress=not arguments.quiet,
        )
    )


def _report(*results: Any) -> int:
    for result in results:
        print(
            f"{result.path}: {result.nbytes:,} bytes, read back equal, in {result.seconds:,.1f} s\n"
            f"SHA-256 {result.sha256}"
        )
    return 0


def add_repair(commands: Any) -> None:
    """``dfqs-nb repair``: the merge that a raw concatenation should have been."""
    parser = commands.add_parser("repair", help="make a sound model of shards that were glued together")
    parser.add_argument("path", metavar="FILE")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("-o", "--output")
    target.add_argument("--in-place", action="store_true", help="replace FILE: needs 64 MiB of extra disk")
    _add_writing(parser)
    parser.set_defaults(function=repair)


def repair(arguments: argparse.Namespace) -> int:
    from dfqs_nb.merge.repair import repair as make

    return _report(
        make(
            arguments.path,
            arguments.output,
            in_place=arguments.in_place,
            overwrite=arguments.overwrite,
            progress=not arguments.quiet,
        )
    )


def add_split(commands: Any) -> None:
    """``dfqs-nb split``: the shards that a raw concatenation was made from."""
    parser = commands.add_parser("split", help="cut glued shards apart again, at their inner headers")
    parser.add_argument("path", metavar="FILE")
    parser.add_argument("-d", "--folder", help="where the shards go (default: beside FILE)")
    _add_writing(parser)
    parser.set_defaults(function=split)


def split(arguments: argparse.Namespace) -> int:
    from dfqs_nb.merge.repair import split as cut

    return _report(
        *cut(arguments.path, arguments.folder, overwrite=arguments.overwrite, progress=not arguments.quiet)
    )


def add_routing(commands: Any) -> None:
    """``dfqs-nb routing``: is routing deterministic, and what changes it."""
    parser = commands.add_parser("routing", help="say whether routing is deterministic, and what changes it")
    parser.add_argument("model", metavar="MODEL", help="a name of `dfqs-nb models`, or a file")
    parser.add_argument("--run", default="routing", help="folder under outputs/ for traces and tables")
    parser.add_argument("--tokens", type=int, default=384, help="length of the text (default: %(default)s)")
    parser.add_argument("--other", metavar="MODEL", default="", help="another quantization to compare with")
    parser.add_argument("--fresh", action="store_true", help="record again what an earlier run left")
    parser.set_defaults(function=routing)


def routing(arguments: argparse.Namespace) -> int:
    from dfqs_nb.core.paths import run_dir, tilde
    from dfqs_nb.gguf import models as registry
    from dfqs_nb.routing import experiment as routing_experiment
    from dfqs_nb.routing import verdict as routing_verdict
    from dfqs_nb.serve.client import check_in_process

    check_in_process(arguments.model, "routing")
    path, folder = registry.resolve(arguments.model)[0], run_dir(arguments.run)
    found = routing_experiment.run_experiment(
        path,
        folder / "routing",
        n_tokens=arguments.tokens,
        fresh=arguments.fresh,
        others=routing_experiment.quantizations(path, arguments.other),
    )
    verdict = routing_verdict.judge(found.table)
    columns = [
        "condition",
        "against",
        "n_choices",
        "n_differ",
        "margin_differ",
        "logits_equal",
        "logit_drift",
        "same_output",
        "status",
    ]
    print(found.table.reindex(columns=columns).to_string(index=False, float_format="{:.3g}".format))
    print("\n".join(["", verdict.text, "", *routing_verdict.advice(found.table), ""]))
    for row in routing_verdict.claims(found).itertuples():
        print(f'"{row.claim}": {row.status}\n  {row.evidence}')
    written = routing_verdict.write_tables(found, folder)
    print(f"\nwrote {', '.join(path.name for path in written)} to {tilde(folder)}/")
    return int(not verdict.passed)


def add_verify(commands: Any) -> None:
    """``dfqs-nb verify``: a file's bytes against its manifest, a published hash, its shards."""
    parser = commands.add_parser("verify", help="compare every tensor with its manifest, a hash, the shards")
    parser.add_argument("path", metavar="FILE")
    parser.add_argument("--sha256", help="what the file's SHA-256 should be")
    parser.add_argument("--against", nargs="+", metavar="SHARD", help="any one shard, or all")
    parser.add_argument(
        "--write-manifest", action="store_true", help="also keep the hashes beside FILE, for a later check"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(function=verify)


def verify(arguments: argparse.Namespace) -> int:
    from dfqs_nb.merge import verify as verifying

    against = arguments.against
    found = verifying.verify(
        arguments.path,
        sha256=arguments.sha256,
        against=against[0] if against and len(against) == 1 else against,
        progress=not arguments.quiet,
    )
    print(f"{found.path}: {found.nbytes:,} bytes, {len(found.tensors):,} tensors, SHA-256 {found.sha256}")
    for sentence in found.meaning:
        print(f"  {sentence}")
    if arguments.write_manifest:
        print(f"  kept in {verifying.write_manifest(arguments.path, progress=not arguments.quiet).name}")
    return int(not found.diagnosis.sound)


def add_score(commands: Any) -> None:
    """``dfqs-nb score``: a model's reasoning and code, with intervals."""
    parser = commands.add_parser("score", help="score a model's reasoning and code; continues a stopped run")
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="",
        help="a GGUF file, any of its shards, or the URL of an OpenAI-compatible server",
    )
    parser.add_argument("--endpoint", metavar="URL", default="", help="score this server instead of a file")
    parser.add_argument("--endpoint-model", metavar="NAME", default="", help="which of the server's models")
    parser.add_argument(
        "--key-variable",
        metavar="NAME",
        default="",
        help="the environment variable that holds the server's key",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=1,
        help="requests at once to a server; more than 1 can change answers",
    )
    parser.add_argument("--tier", default="standard", choices=("nano", "standard"))
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME", help="only these sets, or JSONL files"
    )
    parser.add_argument("--n-ctx", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only so many questions a set; nothing is scored then")
    parser.add_argument("--run", help="the folder's name under outputs/ (default: from the model)")
    parser.add_argument("--samples", type=int, default=1, help="of code: answers a task; pass@k up to that k")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--long-context", action="store_true", help="of a server: also measure retrieval at growing lengths"
    )
    parser.add_argument(
        "--longest", type=int, default=1024, metavar="TOKENS", help="of them (default: %(default)s)"
    )
    parser.add_argument("--shortest", type=int, metavar="TOKENS", help="default: the prompt set's")
    parser.add_argument("--fresh", action="store_true", help="answer again what an earlier run answered")
    parser.add_argument(
        "--allow-unsandboxed", action="store_true", help="run generated code without a sandbox"
    )
    parser.set_defaults(function=score)


def score(arguments: argparse.Namespace) -> int:
    from dfqs_nb.core import paths
    from dfqs_nb.core.files import sha256_of
    from dfqs_nb.llama import model as runtime
    from dfqs_nb.scores import item_sets
    from dfqs_nb.scores import run as scores
    from dfqs_nb.serve import client as endpoint
    from dfqs_nb.workbook import run as workbook

    url = arguments.endpoint or (arguments.model if endpoint.is_url(arguments.model) else "")
    if bool(arguments.endpoint) == bool(arguments.model):
        raise DfqsError("say what to score", hint="give a GGUF file, or --endpoint URL, and not both")
    if arguments.long_context and not url:
        raise DfqsError(
            "--long-context is for a server",
            where=arguments.model,
            hint="of a file, notebook 05 measures it: dfqs-nb run 01 05 --model FILE",
        )
    chosen = [item_sets.load_item_set(name) for name in arguments.set] or item_sets.sets_of_tier(
        arguments.tier
    )
    settings = runtime.OpenSettings(n_ctx=arguments.n_ctx, n_threads=arguments.threads or None)
    sampling = runtime.Sampling(temperature=arguments.temperature)
    ks = [k for k in (10, 100) if k <= arguments.samples]
    with contextlib.ExitStack() as stack:
        if url:
            model = endpoint.connect(
                url,
                arguments.endpoint_model,
                key_variable=arguments.key_variable,
                concurrency=arguments.concurrency,
            )
            identity, score_set, name = "", endpoint.score_set, Path(f"endpoint-{model.model}").name
        else:
            model = stack.enter_context(runtime.open_model(arguments.model, settings))
            identity, score_set, name = (
                sha256_of(model.path),
                scores.score_set,
                workbook.default_run_name(arguments.model),
            )
        run_folder = paths.run_dir(arguments.run or name)
        folder = run_folder / "scores"
        for one in chosen:
            found = score_set(
                model,
                one,
                folder,
                model_id=identity,
                sampling=sampling,
                ks=ks if one.kind == "code" else (),
                n_samples=arguments.samples if one.kind == "code" else 1,
                limit=arguments.limit,
                allow_unsandboxed=arguments.allow_unsandboxed,
                fresh=arguments.fresh,
            )
            print("\n".join(s.sentence for s in (found.score, *found.pass_at.values())), flush=True)
        if arguments.long_context:
            _long_context(model, arguments, run_folder / "long_context")
    print(f"answers: {paths.tilde(folder)}/")
    return 0


def _long_context(server: Any, arguments: argparse.Namespace, folder: Path) -> None:
    """The curve of retrieval over an endpoint, and where it ends."""
    from dfqs_nb.context.prompts import PROBES
    from dfqs_nb.core import paths
    from dfqs_nb.serve import client as endpoint

    found = endpoint.measure_long_context(
        server,
        folder,
        prompt_set=PROBES[arguments.tier],
        longest=arguments.longest,
        shortest=arguments.shortest,
        fresh=arguments.fresh,
    )
    if found.failure:
        print(f"{found.failure.length:,} tokens: {found.failure.message}")
    if len(found.items):
        columns = ["length", "correct", "n", "accuracy", "low", "high", "curve"]
        print(found.curve()[columns].to_string(index=False, float_format="{:.3f}".format))
        print(f"retrieval {found.boundary().sentence}")
    print(f"haystacks: {paths.tilde(folder)}/")


def add_quantize(commands: Any) -> None:
    """``dfqs-nb quantize``: one rung of the ladder, by llama.cpp's own quantizer."""
    parser = commands.add_parser("quantize", help="quantize a model tensor by tensor as a recipe says")
    parser.add_argument("source", metavar="MODEL", help="F32, F16 or BF16 weights: a name or a file")
    parser.add_argument("recipe", metavar="RECIPE", help="a name in data/quantize/, or a .toml file")
    parser.add_argument("-o", "--output", help="required unless --dry-run")
    matrix = parser.add_mutually_exclusive_group()
    matrix.add_argument("--imatrix", metavar="FILE", help="an importance matrix, of llama-imatrix or of here")
    matrix.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="collect one over this text file or prompt set; it is kept beside the output",
    )
    parser.add_argument("--threads", type=int, default=0, help="default: the usable cores")
    parser.add_argument("--dry-run", action="store_true", help="list types and exact sizes; write nothing")
    _add_writing(parser)
    parser.set_defaults(function=quantize)


def quantize(arguments: argparse.Namespace) -> int:
    from dfqs_nb.gguf import models as registry
    from dfqs_nb.ladder import quantize as quantizing

    source, recipe = registry.resolve(arguments.source)[0], quantizing.load_recipe(arguments.recipe)
    if not (arguments.output or arguments.dry_run):
        raise DfqsError("no output was named", hint="pass -o FILE, or --dry-run to see what it would be")
    matrix = arguments.imatrix
    if arguments.calibrate and recipe.weights:
        matrix = _calibrated(source, arguments)
    if arguments.dry_run:
        planned = quantizing.plan(source, recipe, matrix)
    else:
        planned = quantizing.quantize(
            source,
            recipe,
            arguments.output,
            imatrix=matrix,
            n_threads=arguments.threads,
            overwrite=arguments.overwrite,
            progress=not arguments.quiet,
        ).plan
    print(planned.by_class().to_string(index=False, float_format="{:.2f}".format))
    size = f"{planned.nbytes:,} bytes, {planned.bits_per_weight:.2f} bits a weight"
    where = "would be" if arguments.dry_run else f"{arguments.output}:"
    print("\n".join([*planned.fallbacks, f"{where} {size}"]))
    return 0


def _calibrated(source: Path, arguments: argparse.Namespace) -> Any:
    """An importance matrix over the text that was named; written beside the output where there is one."""
    from dfqs_nb.ladder import divergence, imatrix, ladder

    text = divergence.load_text(arguments.calibrate, "calibration")
    settings = ladder.Settings(n_threads=arguments.threads)
    matrix = ladder.calibrated(source, text, settings, progress=not arguments.quiet)
    if arguments.output and not arguments.dry_run:
        imatrix.write_imatrix(Path(f"{arguments.output}.imatrix.gguf"), matrix)
    return matrix


def add_report(commands: Any) -> None:
    """``dfqs-nb report``: everything that a run found, as DFQS 1.0 asks for it."""
    parser = commands.add_parser("report", help="write the DFQS report of a run, or check one")
    parser.add_argument(
        "run",
        nargs="?",
        default="nano",
        metavar="RUN",
        help="a run's name under outputs/, or its folder (default: %(default)s)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing: check the report that is there, and the files it stands on",
    )
    parser.set_defaults(function=report)


def report(arguments: argparse.Namespace) -> int:
    from dfqs_nb.core import figures as plots
    from dfqs_nb.core.paths import outputs_dir, tilde
    from dfqs_nb.report import metrics as reports
    from dfqs_nb.report import stages as report_files
    from dfqs_nb.report import text as report_text

    folder = Path(arguments.run) if Path(arguments.run).is_dir() else outputs_dir() / arguments.run
    if arguments.check:
        found = reports.read_report(folder)
        reports.check_sources(found, folder)
        print(f"{tilde(folder / reports.FILE)}: as it was written, with {len(found['sources'])} files")
        for name in report_files.check_beside(folder):
            print(f"{tilde(folder / name)}.json: as it was written")
        return 0
    made = reports.build_report(folder)
    plots.save(report_figures.report_shares(reports.shares(made)), folder / "report_shares.png")
    made = reports.with_figures(made, folder, ["report_shares.png"])
    written = [reports.write_report(folder, made), *report_text.write_texts(folder, made)]
    print("\n".join([*[report_text.NANO] * (made["tier"] == "nano"), *reports.sentences(made)]))
    print(f"wrote {', '.join(path.name for path in written)} to {tilde(folder)}/")
    return 0


def add_compare(commands: Any) -> None:
    """``dfqs-nb compare``: reports side by side, item by item."""
    parser = commands.add_parser("compare", help="compare reports made under equal conditions, item by item")
    parser.add_argument(
        "reports",
        nargs="+",
        metavar="REPORT",
        help="a run's folder, or the report.json in it; the first is the baseline",
    )
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="FIELD",
        help="compare although this differs; only chat_template_sha256",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="receives comparison.json, .md, .csv and .png (default: compare-<run>-<run> under outputs/)",
    )
    parser.set_defaults(function=compare)


def compare(arguments: argparse.Namespace) -> int:
    from dfqs_nb.core.paths import run_dir, tilde
    from dfqs_nb.report import compare as report_compare

    found = report_compare.compare_reports(arguments.reports, accept=arguments.accept)
    folder = arguments.output or run_dir("-".join(["compare", *(run.report["run"] for run in found.runs)]))
    written = report_compare.write_comparison(found, folder)
    print(report_compare.markdown(found))
    print(f"wrote {', '.join(path.name for path in written)} to {tilde(folder)}/")
    return 0


def add_leaderboard(commands: Any) -> None:
    """``dfqs-nb leaderboard``: the reports of a folder, ranked within equal conditions."""
    parser = commands.add_parser("leaderboard", help="rank the reports of a folder, within equal conditions")
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="default: outputs/")
    parser.set_defaults(function=leaderboard)


def leaderboard(arguments: argparse.Namespace) -> int:
    from dfqs_nb.core.paths import outputs_dir, tilde
    from dfqs_nb.report import leaderboard as boards

    folder = Path(arguments.folder or outputs_dir())
    table = boards.leaderboard(folder)
    written = boards.write_leaderboard(folder, table)
    print(boards.markdown(folder, table))
    print(f"wrote {', '.join(path.name for path in written)} to {tilde(folder)}/")
    return int(bool((table["problem"] != "").any()))


def add_sweep(commands: Any) -> None:
    """``dfqs-nb sweep``: the workbook for every row of a table."""
    parser = commands.add_parser("sweep", help="run the workbook for many models")
    parser.add_argument("table", metavar="MODELS.CSV", help="columns: model, run, and any notebook parameter")
    parser.add_argument("--jobs", type=int, help="rows at once (default: 1 here, all workers of a cluster)")
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="of a Dask cluster that sees the same files, tcp://HOST:8786"
    )
    parser.add_argument("--name", help="the folder under outputs/ (default: sweep-<the table's name>)")
    parser.add_argument(
        "--notebook", action="append", default=[], metavar="NN", help="only these (default: all)"
    )
    parser.add_argument("--fresh", action="store_true", help="do again what an earlier sweep did")
    parser.set_defaults(function=sweep)


def sweep(arguments: argparse.Namespace) -> int:
    from dfqs_nb.core.paths import tilde
    from dfqs_nb.report import leaderboard as boards
    from dfqs_nb.workbook import run as workbook
    from dfqs_nb.workbook import sweep as sweeps

    notebooks = workbook.find_notebooks(arguments.notebook)
    rows = sweeps.read_rows(arguments.table, notebooks)
    if not arguments.scheduler and (warning := sweeps.crowding(rows, arguments.jobs or 1)):
        print(f"dfqs-nb: {warning}", file=sys.stderr)
    found = sweeps.sweep(
        arguments.table,
        jobs=arguments.jobs,
        scheduler=arguments.scheduler,
        name=arguments.name,
        notebooks=notebooks,
        fresh=arguments.fresh,
        started=lambda row: print(f"{row.run} ({row.model}) ...", flush=True),
        finished=lambda row, answer: print(
            f"{row.run}: {answer['status']} {answer['reason']}".rstrip(), flush=True
        ),
    )
    shown = found.rows[["line", "run", "status", "seconds", "beside", "reason"]]
    print(f"\n{shown.to_string(index=False)}\n\n{boards.markdown(found.folder, found.leaderboard)}")
    print(f"{len(found.rows) - found.n_failed} of {len(found.rows)} rows done: {tilde(found.folder)}/")
    return int(found.n_failed > 0)


def add_deploy(commands: Any) -> None:
    """``dfqs-nb deploy``: files and commands that run the model elsewhere."""
    parser = commands.add_parser("deploy", help="write the recipe that runs a model with another program")
    parser.add_argument("target", nargs="?", metavar="TARGET", help="see --list")
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a file, a name of `dfqs-nb models`, or hf://owner/repo/file (not downloaded)",
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="default: deploy-TARGET under outputs/")
    parser.add_argument("--n-ctx", type=int, help="tokens of context (default: what this machine holds)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--gpu-layers", type=int, help="default: what this machine's GPU holds")
    parser.add_argument("--hub", metavar="ADDRESS", help="fetch this; MODEL only says what fits")
    parser.add_argument("--port", type=int, help="of the server on 127.0.0.1 (default: the target's own)")
    parser.add_argument(
        "--key-variable",
        default="",
        metavar="NAME",
        help="the environment variable that holds the server's key",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier recipe")
    parser.add_argument("--list", action="store_true", help="the targets, and what ran here")
    parser.add_argument("--table", action="store_true", help="all that is known of them, as Markdown")
    parser.set_defaults(function=deploy)


def deploy(arguments: argparse.Namespace) -> int:
    from dfqs_nb.core.paths import run_dir, tilde
    from dfqs_nb.serve import recipes as deploying

    if arguments.table or arguments.list:
        print(deploying.table_text() if arguments.table else deploying.list_text(), end="")
        return 0
    if not (arguments.target and arguments.model):
        raise DfqsError("a target and a model are needed", hint="see `dfqs-nb deploy --list`")
    deploying.target_of(arguments.target)
    recipe = deploying.write_recipe(
        arguments.target,
        arguments.model,
        arguments.output or run_dir(f"deploy-{arguments.target}"),
        n_ctx=arguments.n_ctx,
        n_threads=arguments.threads,
        n_gpu_layers=arguments.gpu_layers,
        hub=arguments.hub,
        port=arguments.port,
        key_variable=arguments.key_variable,
        overwrite=arguments.overwrite,
    )
    print("\n".join([*(f"- {note}" for note in recipe.notes), "", *recipe.commands]))
    print(f"\nwrote {', '.join(tilde(path) for path in recipe.files)}")
    return 0


# One line for each subcommand; `add_<name>` makes its parser and sets `function`. Imports of other
# modules stay inside the functions, so that a fast command starts fast.
COMMANDS = (
    add_run,
    add_stamp,
    add_refresh,
    add_models,
    add_inspect,
    add_merge,
    add_repair,
    add_split,
    add_verify,
    add_routing,
    add_score,
    add_quantize,
    add_report,
    add_compare,
    add_leaderboard,
    add_sweep,
    add_deploy,
)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="dfqs-nb", description="Merge, inspect, run and score GGUF models.")
    top.add_argument("--version", action="version", version=f"dfqs-nb {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; a DfqsError is one line on stderr and exit code 1."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.function(arguments) or 0
    except DfqsError as error:
        print(f"dfqs-nb: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dfqs-nb: interrupted; what was written stays", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
