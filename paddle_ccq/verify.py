# SPDX-License-Identifier: Apache-2.0
"""Check a quantized checkpoint: is it whole, and how far is it from the float weights."""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from . import reporting
from .arguments import Arguments
from .checkpoint.manifest import check_manifest, read_manifest
from .checkpoint.planned import KEPT, PlannedTensor
from .checkpoint.reader import PROVENANCE_KEY, Checkpoint, open_checkpoint
from .checkpoint.safetensors_format import DTYPES, FLOAT_DTYPES
from .checkpoint.source import resolve_model
from .checkpoint.tensor_parallel import join
from .checkpoint.values import difference_energy, energy, finite, is_approximation, product
from .codec import formats
from .codec.row_order import FASTDEPLOY_2_1
from .command import run_command, to_stderr
from .errors import CcqError, visible
from .families.registry import ASKED
from .families.tensor import Role
from .targets.inspect import inspect
from .targets.inspection import Inspection, other_order

# Relative squared error above which a tuned tensor is no approximation of the reference's (1 is
# what all zeros would give); of quantized matrices the format knows it.
LARGEST_TUNED_ERROR = 0.5
# What tuning changes beside scales and dense layers.
TUNED_ROLES = frozenset({Role.NORM, Role.ROUTER})
SHOWN_WORST = 5
# What stands before the projection in the table of errors.
_PLACES = {Role.EXPERT: "experts ", Role.SHARED_EXPERT: "shared experts "}


@dataclass
class VerifyResult:
    """What was found; `matrices` holds the error of each matrix if there was a reference."""

    folder: str
    problems: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    matrices: list[dict[str, Any]] = field(default_factory=list)
    unquantized_equal: int = 0
    tensors: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong; messages don't count."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """What --json writes: all fields, and whether it is sound."""
        return {"sound": self.sound, **asdict(self)}


def verify(
    folder: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    *,
    hashes: bool = True,
    source: str | None = None,
    quiet: bool = True,
) -> VerifyResult:
    """Check structure, hashes and values; with a float `reference` also every matrix's error.

    Raises:
        CcqError: if `folder` is no quantized checkpoint at all, or the reference can't be used.
    """
    inspection = inspect(Path(folder))
    original = _reference(reference, inspection, source) if reference is not None else None
    inspection.check_config()
    inspection.check_structure()
    manifest = check_manifest(inspection.folder, hashes)
    if read_manifest(inspection.folder) is None:
        inspection.messages += inspection.without_manifest()
    # A missing or short file shows up in the structure too; one line for each is enough.
    named = {problem.split(":", 1)[0] for problem in inspection.problems}
    inspection.problems += [p for p in manifest.problems if p.split(":", 1)[0] not in named]
    inspection.messages += manifest.notes
    inspection.check_values()
    result = VerifyResult(str(folder), inspection.problems, inspection.messages)
    result.tensors = len(inspection.sound)
    if original is not None:
        _compare(inspection, original, result, quiet)
    return result


def _reference(
    reference: str | os.PathLike[str], inspection: Inspection, source: str | None
) -> Checkpoint:
    name = inspection.config.family.name
    asked = name if name in ASKED else None
    config = inspection.config
    # The checkpoint may have been written without layers for multi-token prediction.
    drop = not config.num_nextn_predict_layers
    drop = drop and not any(map(config.is_prediction, config.tensors.values()))
    original = resolve_model(reference, source, log=to_stderr)
    checkpoint = open_checkpoint(original, family=asked, drop_mtp=drop)
    inspection.messages += [f"reference: {message}" for message in checkpoint.messages]
    if checkpoint.is_quantized:
        raise CcqError(f"--reference {reference}: quantized itself; give the float checkpoint")
    wanted, given = config.tensors.shapes, checkpoint.config.tensors.shapes
    loose = {*config.unnamed(), *checkpoint.config.unnamed()}
    for name in {**wanted, **given}:
        if wanted.get(name) == given.get(name):
            continue
        if name not in loose:
            raise CcqError(f"--reference {reference}: another model; the two differ in {name}")
        if name not in given:
            inspection.problems.append(f"{name}: the reference has no such tensor")
        elif name not in wanted:
            inspection.problems.append(f"{name}: missing, the reference has it")
        else:
            inspection.problems.append(
                f"{name}: shape {list(wanted[name])}, the reference's is {list(given[name])}"
            )
    return checkpoint


def _compare(
    inspection: Inspection, reference: Checkpoint, result: VerifyResult, quiet: bool
) -> None:
    order = inspection.row_order or FASTDEPLOY_2_1
    if inspection.row_order is None and formats.get(inspection.plan.format).row_ordered:
        result.messages.append(f"the row order is not recorded; taking {order}")
    order_checked = False
    shapes = reference.config.tensors.shapes
    tuned = (
        TUNED_ROLES
        if (inspection.config.raw.get(PROVENANCE_KEY) or {}).get("tuning")
        else frozenset()
    )
    tensors = tqdm(inspection.plan.tensors, unit="matrix", disable=True if quiet else None)
    for planned in tensors:
        parts = [inspection.tensors(planned, rank) for rank in range(len(inspection.ranks))]
        if any(part is None for part in parts):
            continue
        whole = [part for part in parts if part is not None]
        if shapes.get(planned.name) != planned.tensor.shape:
            continue  # opening the reference has said it
        if planned.format == KEPT:
            if _kept_equal(planned, whole[0], reference):
                result.unquantized_equal += 1
            else:
                result.problems.append(f"{planned.name}: not the reference's bytes")
            continue
        if not planned.quantized:
            ((_, stored_as, _),) = planned.specs
            weight = _finite(planned, reference.read_stored(planned.name), stored_as, result)
            if _equal(planned, whole, weight):
                result.unquantized_equal += 1
            elif not (planned.tensor.role in tuned and _near(planned, whole, weight)):
                result.problems.append(f"{planned.name}: not the reference's values")
            continue
        weight = _finite(planned, reference.read(planned.name), "BF16", result)
        error = _error(planned, whole, weight, order)
        if formats.get(planned.format).row_ordered and not order_checked:
            order_checked = True
            other = _error(planned, whole, weight, other_order(order))
            if other["rel_mse"] < 0.5 * error["rel_mse"]:
                result.problems.append(
                    f"{planned.name}: the rows are in {other_order(order)} order, not {order};"
                    " FastDeploy would compute nonsense without complaint"
                )
        limit = formats.get(planned.format).largest_error
        if not is_approximation(error["rel_mse"], weight, limit):
            result.problems.append(
                f"{planned.name}: rel-MSE {error['rel_mse']:.3g} to the reference; these are other"
                " weights"
            )
        place = _PLACES.get(planned.tensor.role, "")
        found = {
            "name": planned.name,
            "kind": place + planned.tensor.projection,
            "format": planned.format,
        }
        result.matrices.append({**found, **error})


def _finite(
    planned: PlannedTensor, weight: np.ndarray, stored_as: str, result: VerifyResult
) -> np.ndarray:
    """The reference's values as quantize takes them: 0 for what cannot be stored, with a note."""
    clean, bad = finite(weight, stored_as)
    if bad:
        result.messages.append(
            f"{planned.name}: {bad} values of the reference are NaN, infinite or beyond bfloat16's"
            " range; compared as 0, which quantize --allow-nonfinite stores"
        )
    return clean


def _equal(planned: PlannedTensor, parts: list[dict[str, np.ndarray]], weight: np.ndarray) -> bool:
    ((_, dtype, _),) = planned.specs
    whole = join([next(iter(part.values())) for part in parts], planned.cut)
    expected = weight.astype(DTYPES[dtype], copy=False)
    return expected.reshape(whole.shape).tobytes() == whole.tobytes()


def _kept_equal(
    planned: PlannedTensor, found: dict[str, np.ndarray], reference: Checkpoint
) -> bool:
    """Whether a tensor holds the reference's bytes; 0 stands for what is NaN or infinite there."""
    wanted = reference.read_kept(planned.name, planned.specs)
    for part in reference.parts(planned.name):
        name = part.values.name
        if not part.is_float and name in wanted:
            wrong = part.nonfinite()
            if wrong is not None and wrong.shape == wanted[name].shape:
                wanted[name] = np.where(wrong, np.zeros((), wanted[name].dtype), wanted[name])
    for name, dtype, _ in planned.specs:
        expected = finite(wanted[name], dtype)[0] if dtype in FLOAT_DTYPES else wanted[name]
        if expected.tobytes() != found[name].tobytes():
            return False
    return True


def _near(planned: PlannedTensor, parts: list[dict[str, np.ndarray]], weight: np.ndarray) -> bool:
    """Whether a tuned tensor is still an approximation of the reference's."""
    whole = join([next(iter(part.values())) for part in parts], planned.cut)
    expected = weight.reshape(whole.shape)
    return difference_energy(expected, whole) <= LARGEST_TUNED_ERROR * energy(expected)


def _error(
    planned: PlannedTensor, parts: list[dict[str, np.ndarray]], weight: np.ndarray, order: str
) -> dict[str, float]:
    """rel-MSE and cosine of a matrix, decoded exactly (float32), to the reference [K, N]."""
    # Damaged scales give NaN, which makes an error; NumPy's warning names no tensor.
    with np.errstate(invalid="ignore", over="ignore"):
        decoded = [formats.decode(planned.format, part, "float32", order) for part in parts]
        found = join(decoded, planned.cut)
        size, found_size = energy(weight), energy(found)
        difference = difference_energy(weight, found)
    scale = math.sqrt(size * found_size)
    return {
        "rel_mse": difference / size if size else (0.0 if not difference else math.inf),
        "cosine": product(weight, found) / scale if scale else float(size == found_size),
    }


def print_result(result: VerifyResult) -> None:
    """Problems one a line, then errors by kind of matrix, then the verdict."""
    out = reporting.console()

    def line(text: str) -> None:
        out.print(visible(text), soft_wrap=True)

    for message in result.messages:
        line(f"note: {message}")
    if result.matrices:
        rows = []
        for kind, members in _kinds(result.matrices).items():
            errors = [m["rel_mse"] for m in members]
            cosines = [m["cosine"] for m in members]
            rows.append(
                [
                    *kind,
                    f"{len(members):,}",
                    f"{sum(errors) / len(errors):.6f}",
                    f"{max(errors):.6f}",
                    f"{sum(cosines) / len(cosines):.6f}",
                ]
            )
        columns = ["matrices", "format", "count", "mean rel-MSE", "worst rel-MSE", "mean cosine"]
        out.print(reporting.table(columns, rows))
        worst = sorted(result.matrices, key=lambda m: -m["rel_mse"])[:SHOWN_WORST]
        rows = [[m["name"], m["format"], f"{m['rel_mse']:.6f}"] for m in worst]
        out.print(reporting.table(["worst", "format", "rel-MSE"], rows))
        line(f"unquantized tensors equal to the reference: {result.unquantized_equal}")
    for problem in result.problems:
        line(f"problem: {problem}")
    if result.sound:
        line(f"sound: {result.tensors} tensors in {result.folder}")
    else:
        line(f"NOT sound: {len(result.problems)} problems in {result.folder}")


def _kinds(matrices: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for matrix in matrices:
        kinds.setdefault((matrix["kind"], matrix["format"]), []).append(matrix)
    return kinds


def build_parser() -> Arguments:
    """Each argument is a parameter of verify() by its destination; --no-hash is `hashes` False."""
    parser = Arguments("verify", __doc__)
    parser.subject("folder", "quantized checkpoint", "DIR")
    add = parser.add_argument
    add("--reference", metavar="MODEL", help="float checkpoint to compare with")
    add("--no-hash", action="store_true", help="don't compare sha256 with the manifest")
    parser.json()
    parser.source()
    parser.quiet("no progress; results and errors only")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 for a sound checkpoint, 1 if there are problems, 2 for bad input."""

    def body(args: argparse.Namespace) -> int:
        write_json = reporting.json_writer(args)
        result = verify(
            args.folder,
            args.reference,
            hashes=not args.no_hash,
            source=args.source,
            quiet=args.quiet,
        )
        print_result(result)
        write_json(result.to_json())
        return 0 if result.sound else 1

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
