# SPDX-License-Identifier: Apache-2.0
"""The stages of a quantization: resolve, check, plan, allocate, calibrate, encode, finish.

A dry run is the first of them: it resolves a folder without a download, plans, allocates where
costs are given, and reports.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .. import reporting
from ..allocation.costs import Sensitivities
from ..allocation.probing import Execution
from ..allocation.session import comparison_table
from ..calibration.session import coverage
from ..checkpoint import source_tensors
from ..checkpoint.companions import check_regular, read_companions
from ..checkpoint.plan import LayerFormats, Plan, make_plan
from ..checkpoint.reader import Checkpoint, open_checkpoint
from ..checkpoint.source import hub_id, model_name, resolve_model, snapshot_folder
from ..checkpoint.source_card import read_source_card
from ..checkpoint.sources.scheme import SourceScheme
from ..checkpoint.unexpected import config_of_folder
from ..checkpoint.writer import Workplace, partial_folder
from ..command import messages, output_path, refuse_inside, shows_progress
from ..errors import CcqError
from ..families.config import CCQ, CONFIG_FILE
from ..host import thread_count
from ..models.support import require_computed
from ..targets.recipe import Recipe
from . import report
from .job import Job
from .options import PathLike, QuantizeOptions
from .run import QuantizeResult, QuantizeRun, check_devices, encoders_for


def quantize(
    model: PathLike,
    output: PathLike | None = None,
    *,
    dry_run: bool = False,
    **options: object,
) -> QuantizeResult:
    """Write a quantized checkpoint of `model` into the new folder `output`.

    `options` are the fields of QuantizeOptions. With `calibration`, a file of text or a data set's
    hub id, wint2 experts are encoded for the least error of their outputs on that text
    (docs/guide/calibrate.md); without it no data is used. With `allocate`, a size such as "2.3bpw"
    or "100GB", the formats of MoE layers are chosen by measured costs (docs/guide/calibrate.md): a
    wint4 prefix, or any layers with `allow_plugin_layout`. The same call after an interruption
    goes on where it stopped and ends with the same bytes. With `dry_run` only the plan is printed;
    a folder with nothing but config.json will do.

    Raises:
        CcqError: for anything in the input, the options or the environment that is not right.
        TypeError: for a keyword that is no option.
    """
    job = start(model, QuantizeOptions(**options), dry_run)
    if dry_run:
        resolve_locally(job)
        return report.dry_run(job, planned(job))
    target, log_path = check_targets(job, output)
    resolve(job)
    plan = planned(job)
    check(job, plan, target, log_path)
    with Workplace(target) as workplace:
        checkpoint = opened(job, plan)
        plan = allocated(job, plan, checkpoint, workplace)
        result = encoded(job, plan, checkpoint, workplace, log_path)
    finish(job, result)
    return result


def start(model: PathLike, options: QuantizeOptions, dry_run: bool) -> Job:
    """The job as the options ask for it, with the files of options read."""
    calibration = options.calibration_request(fetch=not dry_run)
    say = messages(options.quiet)
    return Job(model, options, say, calibration, options.allocation_request())


def check_targets(job: Job, output: PathLike | None) -> tuple[Path, Path]:
    """Check what can be refused before a download: paths of output and log, and the text."""
    if output is None:
        raise CcqError("--output is missing: name the new folder to write")
    target = output_path(output)
    log = job.options.log
    if log is not None:
        reporting.check_can_write(log, True, "--log")
    if job.calibration is not None:
        _ = job.calibration.texts
    return target, Path(log) if log is not None else target.with_name(target.name + ".log.jsonl")


def resolve(job: Job) -> None:
    """The model's folder, downloaded where it is not on this machine, and its config."""
    job.source = resolve_model(job.model, job.options.source, job.options.revision, log=job.say)
    check_regular(job.source)
    options = job.options
    # What else was found, opening the checkpoint says again.
    job.config, said = config_of_folder(job.source, options.family, drop_mtp=options.drop_mtp)
    if options.drop_mtp:
        job.say(said[0])


def resolve_locally(job: Job) -> None:
    """Like resolve(), but without a download: config.json is enough.

    Raises:
        CcqError: if the folder is not there, or the model is quantized already.
    """
    folder = Path(job.model).expanduser()
    if not folder.exists():
        raise CcqError(
            f"{job.model}: a dry run downloads nothing; put the model's {CONFIG_FILE} into a folder"
            " and pass that"
        )
    if folder.is_dir():
        folder = snapshot_folder(folder)
        check_regular(folder)
    job.source = folder
    options = job.options
    job.config, assumed = config_of_folder(folder, options.family, drop_mtp=options.drop_mtp)
    job.notes = (*job.config.notes, *assumed)
    where = folder / CONFIG_FILE if folder.is_dir() else folder
    SourceScheme.read(job.config.raw, where)
    quantization = job.config.raw.get("quantization_config") or {}
    # FastDeploy's is_quantized false asks for a quantization of float weights at loading.
    ours = quantization.get("quant_method") in (None, CCQ)
    if quantization and ours and quantization.get("is_quantized", True):
        raise CcqError(
            f"{where}: has a quantization_config, so the model is quantized already; quantize the"
            " original checkpoint instead"
        )


def planned(job: Job) -> Plan:
    """The plan before costs are measured; everything that can be refused now is refused."""
    assert job.config is not None
    wanted, options = job.wanted, job.options.plan(job.config)
    for flag, asked in (("--calibration", job.calibration), ("--allocate", wanted)):
        if asked is not None:
            require_computed(job.config, flag)
    if not options.target.dense_formats and job.config.of_source is None:
        # What is not quantized keeps its dtype, which its files know, or config.json.
        job.config = source_tensors.complete(job.config, job.source)
    config = job.config
    if wanted is None:
        return make_plan(config, options)
    uniform = LayerFormats(dict.fromkeys(config.moe_layers(), wanted.format), "uniform")
    target = options.target.with_any_layers()
    plan = make_plan(config, replace(options, target=target, layer_formats=uniform))
    job.costs = wanted.check(plan)
    return plan


def check(job: Job, plan: Plan, target: Path, log_path: Path) -> None:
    """Refuse impossible requests before any work."""
    refuse_inside(target, job.source)
    # A run that continues rewrites its own log; any other file of that name belongs to the user.
    if job.options.log is not None and log_path.exists() and not partial_folder(target).exists():
        raise CcqError(f"--log {log_path}: exists already; name another file or remove it")
    check_devices(plan, job.options)
    if job.calibration is not None:
        job.calibration.check(plan, job.options.encoder)


def opened(job: Job, plan: Plan) -> Checkpoint:
    """Open the source's weights and report all files that are not carried over.

    Raises:
        CcqError: if weights are missing or wrong, or the model is quantized already.
    """
    options = job.options
    checkpoint = open_checkpoint(job.source, family=options.family, drop_mtp=options.drop_mtp)
    if checkpoint.is_quantized:
        raise CcqError(
            f"{job.source}: quantized already; quantize the original float checkpoint instead"
        )
    # Checked before the work, so that their problems are not found only after it.
    if plan.config.family.discover:
        job.say("found and quantized:\n" + report.as_text(reporting.plan_table(plan, True)))
    beside = (*read_companions(job.source).messages, *read_source_card(job.source)[1])
    for message in (*checkpoint.messages, *beside):
        job.say(message)
    return checkpoint


def allocated(job: Job, plan: Plan, checkpoint: Checkpoint, workplace: Workplace) -> Plan:
    """The plan with the formats that --allocate chooses, from given or measured costs."""
    wanted, options = job.wanted, job.options
    if wanted is not None:
        if job.costs is not None:
            job.costs.check_weights(checkpoint, f"--sensitivity {wanted.path}")
        else:
            job.costs = _measured(job, checkpoint, workplace)
        job.allocation = wanted.resolve(plan, job.costs)
        plan = make_plan(
            plan.config,
            replace(options.plan(plan.config), layer_formats=job.allocation.layer_formats),
        )
        job.say(report.as_text(comparison_table(job.allocation)))
        for note in wanted.notes:
            job.say(note)
    for message in plan.messages:
        job.say(message)
    return plan


def _measured(job: Job, checkpoint: Checkpoint, workplace: Workplace) -> Sensitivities:
    assert job.wanted is not None and job.calibration is not None
    options = job.options
    shown = shows_progress(options.quiet)
    with reporting.Progress("layers", checkpoint.config.num_hidden_layers, shown) as progress:
        threads = thread_count(options.threads)
        execution = Execution(threads, options.device, workplace.folder, progress)
        return job.wanted.measure(
            checkpoint, model_name(job.model), job.calibration, execution, restart=options.restart
        )


def encoded(
    job: Job, plan: Plan, checkpoint: Checkpoint, workplace: Workplace, log_path: Path
) -> QuantizeResult:
    """Encode all matrices, calibrated if asked for, write them, and rename the folder."""
    statistics = provenance = None
    if job.calibration is not None:
        statistics = job.calibration.open(checkpoint, job.options.threads, workplace.folder)
        provenance = statistics.text.as_dict(job.calibration.settings)
    try:
        recipe = Recipe(
            model_name(job.model),
            job.options.preset,
            job.options.encoder,
            provenance,
            job.allocation.as_dict() if job.allocation else None,
            hub_id(job.model),
            read_source_card(checkpoint.path)[0],
        )
        encoders = encoders_for(plan, job.options, statistics.hessian if statistics else None)
        run = QuantizeRun(plan, job.options, encoders, checkpoint, recipe, workplace, log_path)
        return run.run(job.say)
    finally:
        if statistics is not None:
            statistics.close()


def finish(job: Job, result: QuantizeResult) -> None:
    """Report how much of the text reached the experts."""
    found = coverage(result.plan, result.records)
    if found is None:
        return
    line, empty = found
    job.say(f"calibration: {line}")
    if empty:
        names = ", ".join(empty[:8]) + (" ..." if len(empty) > 8 else "")
        job.say(
            f"calibration: {len(empty)} experts saw no token and were encoded data-free: {names}"
        )
