# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/notes/tuning.md: what tuning and made-up text gain on a real model.

    python benchmarks/tuning.py --model DIR --calibration FILE.jsonl --text FILE.jsonl \
        --tasks FILE.jsonl ... [--work FOLDER]

Every row is a checkpoint that the commands write. With --work they are kept there and reused, so
that a run that was interrupted goes on; without it they lie in a temporary folder. --format ccq-2t
makes the rows of that format. --measure LABEL=FOLDER measures checkpoints that are there already.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accuracy import Rows
from common import markdown, put_into_doc, save_result
from scoring import Scoring, add_arguments

from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.evaluation.metrics import paired_difference
from paddle_ccq.quantize import quantize
from paddle_ccq.sample import sample
from paddle_ccq.tune import tune

CALIBRATED = "calibrated"
CALIBRATED_ALL = "calibrated on all"
GRADIENTS = "calibrated by gradients on all"


@dataclass(frozen=True)
class Work:
    """The inputs, and the folder of everything that is made from them."""

    model: Path
    calibration: Path
    folder: Path
    tokens: str
    made_tokens: str
    tune_tokens: str
    format: str = "wint2"

    def made(self) -> Path:
        made = self.folder / "made.jsonl"
        if not made.exists():
            sample(self.model, made, tokens=self.made_tokens)
        return made

    def both(self) -> Path:
        """As much of the calibration text, in evenly spread documents, as the model makes up."""
        both = self.folder / "both.jsonl"
        if not both.exists():
            made = self.made().read_bytes()
            lines = self.calibration.read_bytes().splitlines(keepends=True)
            every = max(1, round(sum(map(len, lines)) / len(made)))
            both.write_bytes(b"".join(lines[::every]) + made)
        return both

    def all(self) -> Path:
        """The whole calibration text and what the model makes up."""
        joined = self.folder / "all.jsonl"
        if not joined.exists():
            joined.write_bytes(self.calibration.read_bytes() + self.made().read_bytes())
        return joined

    def calibrated(self, text: Path | None = None, weights: str = "router") -> Path:
        name = f"calibrated-{(text or self.calibration).stem}"
        out = self.folder / (name if weights == "router" else f"{name}-{weights}")
        if not out.exists():
            quantize(
                self.model,
                out,
                format=self.format,
                calibration=text or self.calibration,
                calibration_tokens=self.tokens,
                calibration_weights=weights,
                wint4_end_layer=-1,
                quiet=True,
            )
        return out

    def tuned(self, name: str, codes: Path, text: Path, **options: float) -> Path:
        out = self.folder / name
        if not out.exists():
            tune(codes, self.model, text, out, tokens=self.tune_tokens, quiet=False, **options)
        return out


def rows(work: Work) -> dict[str, Callable[[], Path]]:
    """Label -> what writes the checkpoint, or finds it."""

    def tuned(name: str, text: Callable[[], Path], codes: bool = False, **options: float):
        return lambda: work.tuned(
            name, work.calibrated(text() if codes else None), text(), **options
        )

    plain = lambda: work.calibration  # noqa: E731
    return {
        CALIBRATED: work.calibrated,
        "tuned on the same text": tuned("tuned", plain),
        "the same, dense layers left alone": tuned("tuned-dense0", plain, dense_learning_rate=0),
        "tuned on made-up text": tuned("tuned-made", work.made),
        "tuned on both": tuned("tuned-both", work.both),
        "calibrated on both": lambda: work.calibrated(work.both()),
        "calibrated and tuned on both": tuned("tuned-both-both", work.both, True),
        "calibrated on all and made-up text, tuned on both": lambda: work.tuned(
            "tuned-all-both", work.calibrated(work.all()), work.both()
        ),
        # Everything there is: the calibration text and what the model makes up.
        CALIBRATED_ALL: lambda: work.calibrated(work.all()),
        GRADIENTS: lambda: work.calibrated(work.all(), "gradient"),
        "calibrated by gradients and tuned on all": lambda: work.tuned(
            "tuned-all-gradient", work.calibrated(work.all(), "gradient"), work.all()
        ),
        "calibrated and tuned on all": lambda: work.tuned(
            "tuned-all", work.calibrated(work.all()), work.all()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--tokens", default="256k", help="for codes and for tuning (256k)")
    parser.add_argument("--made-tokens", default="128k", help="that the model makes up (128k)")
    parser.add_argument("--tune-tokens", help="for tuning, if not as many as for codes")
    add_arguments(parser, max_tokens=61_440)
    parser.add_argument("--format", choices=("wint2", "ccq-2t"), default="wint2")
    parser.add_argument("--rows", nargs="+", metavar="N", type=int, help="only these, from 0 on")
    parser.add_argument(
        "--measure", nargs="+", metavar="LABEL=FOLDER", help="checkpoints in place of the rows"
    )
    parser.add_argument("--note", help="what to say of them")
    parser.add_argument("--work", type=Path, help="keep checkpoints here and reuse them")
    parser.add_argument("--marker", default="tuning", help="table of docs/notes/tuning.md to write")
    args = parser.parse_args()

    source = open_checkpoint(args.model)
    scoring = Scoring(source, args)
    folder = args.work or Path(tempfile.mkdtemp(prefix="ccq-tuning-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        work = Work(
            args.model, args.calibration, folder, args.tokens, args.made_tokens,
            args.tune_tokens or args.tokens, args.format,
        )  # fmt: skip
        chosen = rows(work)
        if args.rows is not None:
            labels = list(chosen)
            chosen = {labels[i]: chosen[labels[i]] for i in args.rows}
        if args.measure:
            given = dict(entry.split("=", 1) for entry in args.measure)
            chosen = {label: (lambda path=path: Path(path)) for label, path in given.items()}
        measured = Rows(source, folder)
        measured.add_source()
        for label, make in chosen.items():
            label = prefix(args.format) + label
            measured.add_written(label, open_checkpoint(make()))
        scores, summary = scoring(measured.models)
    finally:
        if args.work is None:
            shutil.rmtree(folder)
    for label, row in summary.items():
        # benchmarks/figure.py puts rows of all benchmarks together by these.
        row["nominal_bits"] = measured.nominal_bits[label]
        row["expert_bits"] = measured.expert_bits[label]
    report(args, source.path.name, scores, summary)


def prefix(format: str) -> str:
    """Of the labels of a format's rows, which stand beside those of others in figure.py."""
    return "" if format == "wint2" else f"{format.upper()}, "


def report(args: argparse.Namespace, name: str, scores: dict, summary: dict) -> None:
    """Print, save and put into the docs."""
    names = list(next(iter(summary.values()))["tasks"])
    table = []
    for label, row in summary.items():
        t = row["text"]
        compared = "kl_mean" in t
        table.append(
            [
                label,
                f"{t['nll_over_reference']:+.4f} ({t['nll_over_reference_error']:.4f})"
                if compared
                else "",
                f"{t['kl_mean']:.4f} ({t['kl_mean_error']:.4f})" if compared else "",
                f"{t['top1_agreement']:.1%}" if compared else "",
                *(f"{row['tasks'][task]['accuracy']:.3f}" for task in names),
            ]
        )
    pairs = []
    bases = [prefix(args.format) + label for label in (CALIBRATED, CALIBRATED_ALL, GRADIENTS)]
    if args.measure:
        bases = list(scores)[1:2]
    base = next((label for label in bases if label in scores), None)
    for label in scores:
        if label in ("bf16", base) or base is None:
            continue
        found = {q: paired_difference(scores[label], scores[base], q) for q in ("nll", "kl")}
        pairs.append([label, *(f"{d.mean:+.4f} ({d.error:.4f})" for d in found.values())])
        summary[label]["paired"] = {base: {q: [d.mean, d.error] for q, d in found.items()}}
    first = next(iter(summary.values()))
    made_how = args.note or (
        f"at most {args.tokens} tokens (k = 1024) for codes"
        f" and {args.tune_tokens or args.tokens} for tuning; {args.made_tokens} were made up, and"
        " *both* is as much of either, *all* the whole of them"
    )
    note = (
        f"`{name}`, all MoE layers {args.format}; {made_how};"
        f" {first['text']['predicted_tokens']:,} predicted tokens in"
        f" {first['text']['windows']} windows; {first['tasks'][names[0]]['items']} items a task."
        " Standard errors over windows in brackets; that of a task accuracy of 0.9 on 200 items is"
        " 0.021."
    )
    header = ["checkpoint", "nll - bf16", "KL", "top-1", *names]
    parts = [markdown(header, table), note]
    if pairs:
        parts.insert(1, markdown([f"same windows, less {base}", "nll", "KL"], pairs))
    save_result(f"{args.marker}_{name}", summary)
    put_into_doc("docs/notes/tuning.md", args.marker, "\n\n".join(parts))


if __name__ == "__main__":
    main()
