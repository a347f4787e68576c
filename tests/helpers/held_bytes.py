# SPDX-License-Identifier: Apache-2.0
"""What `quantize` and `dequantize` write, by sha256; the script stores the hashes.

    python tests/helpers/held_bytes.py            # what differs from the stored hashes
    python tests/helpers/held_bytes.py --write    # store the hashes of the present code

tests/held/weights.json holds every weight file and index: they change only where a change of the
numbers is meant. tests/held/others.json holds the small files and what a dry run prints; a commit
that changes a model card or an entry of config.json stores them anew.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[place]) for place in (1, 2)]

from helpers.runs import contents
from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.allocation.costs import PROJECTIONS, Sensitivities, model_shape, weights_sha256
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.dequantize import dequantize
from paddle_ccq.quantize import quantize

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "ernie-45-moe-3m"
SAMPLE = ROOT / "examples" / "data" / "public-domain-sample.txt"
LARGE = ROOT / "examples" / "configs" / "ernie-4.5-300b-a47b"
FOLDER = Path(__file__).resolve().parents[1] / "held"
WEIGHTS, OTHERS = FOLDER / "weights.json", FOLDER / "others.json"
# Of the sample: a few hundred tokens for each expert.
SAMPLE_CHARACTERS = 6000

Hashes = dict[str, str]


@dataclass(frozen=True)
class Case:
    """One run of `quantize`.

    Attributes:
        options: its arguments; "RULES" and "SENSITIVITY" stand for files made of the next two.
        rules: text of a rules file.
        costs: layers in the order of what they cost, for a sensitivity file.
        source: a name in SOURCES.
        calibrated: token weights, where codes depend on the model's activations.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    rules: str = ""
    costs: tuple[int, ...] = ()
    source: str = "example"
    calibrated: str = ""


def _case(source: str = "example", **options: Any) -> Case:
    return Case({"preset": "fast", **options}, source=source)


_BF16_DENSE = '- {match: "*.layers.[01].self_attn.*", format: bf16}\n'
_LAYER_3_WINT4 = '- {match: "*.layers.3.mlp.experts.*", format: wint4}\n'
_LAYER_1_WINT4 = '- {match: "*.layers.1.mlp.experts.*", format: wint4}\n'
_COSTS = (1, 3, 4, 2)

CASES: dict[str, Case] = {
    "wint2-fast": _case(),
    "wint2-default": Case(),
    "wint2-best": _case(preset="best"),
    "wint2-layout-2.0": _case(fastdeploy_layout="2.0"),
    "wint2-small-shards": _case(max_shard_size="400KB"),
    "wint2-paper": _case(encoder="paper-literal"),
    "wint2-prefix": _case(wint4_end_layer=2),
    "wint4-everywhere": _case(wint4_end_layer=4),
    "ccq-2t-fast": _case(format="ccq-2t"),
    "ccq-2t-prefix": _case(format="ccq-2t", wint4_end_layer=1),
    "ccq-2.5-fast": _case(format="ccq-2.5"),
    "ccq-2.5-default": Case({"format": "ccq-2.5"}),
    "ccq-2.5-layout-2.0": _case(format="ccq-2.5", fastdeploy_layout="2.0"),
    "ccq-2.5-paper": _case(format="ccq-2.5", encoder="paper"),
    "ccq-2.75-default": Case({"format": "ccq-2.75"}),
    "ccq-2.75-best": _case(format="ccq-2.75", preset="best"),
    "ccq-2.75-prefix": _case(format="ccq-2.75", wint4_end_layer=1),
    "huggingface": _case(target="huggingface"),
    "huggingface-prefix": _case(target="huggingface", format="ccq-2.75", wint4_end_layer=1),
    "rules-dense": Case({"preset": "fast", "rules": "RULES"}, _BF16_DENSE),
    "rules-prefix": Case({"preset": "fast", "rules": "RULES"}, _LAYER_1_WINT4 + _BF16_DENSE),
    "rules-plugin": Case(
        {"preset": "fast", "rules": "RULES", "allow_plugin_layout": True}, _LAYER_3_WINT4
    ),
    "allocated-prefix": Case(
        {"preset": "fast", "allocate": "3bpw", "sensitivity": "SENSITIVITY"}, costs=_COSTS
    ),
    "allocated-plugin": Case(
        {
            "preset": "fast",
            "allocate": "2.6bpw",
            "sensitivity": "SENSITIVITY",
            "allow_plugin_layout": True,
        },
        costs=_COSTS,
    ),
    "allocated-rules": Case(
        {
            "preset": "fast",
            "format": "ccq-2.5",
            "allocate": "3.2MB",
            "sensitivity": "SENSITIVITY",
            "rules": "RULES",
            "allow_plugin_layout": True,
        },
        _LAYER_3_WINT4,
        costs=_COSTS,
    ),
    "tensor-parallel": _case("cut", tensor_parallel_size=2),
    "tensor-parallel-prefix": _case(
        "cut", tensor_parallel_size=2, wint4_end_layer=1, max_shard_size="60KB"
    ),
    "tensor-parallel-ccq-2t": _case("cut", tensor_parallel_size=2, format="ccq-2t"),
    "tensor-parallel-ccq-2.75": _case("cut", tensor_parallel_size=2, format="ccq-2.75"),
    "source-paddle": _case("paddle"),
    "source-float32-with-head": _case("head"),
    "source-float32-with-head-without-mtp": _case("head", drop_mtp=True),
    "source-dense": _case("dense"),
    "calibrated-router": Case(
        {"preset": "fast", "calibration": "TEXT", "calibration_tokens": "1k"}, calibrated="router"
    ),
    "calibrated-equal": Case(
        {
            "preset": "fast",
            "calibration": "TEXT",
            "calibration_tokens": "1k",
            "calibration_weights": "equal",
            "wint4_end_layer": 2,
        },
        calibrated="equal",
    ),
    "calibrated-gradient": Case(
        {
            "preset": "fast",
            "calibration": "TEXT",
            "calibration_tokens": "1k",
            "calibration_weights": "gradient",
            "wint4_end_layer": 2,
        },
        calibrated="gradient",
    ),
    "calibrated-ccq-2t": Case(
        {
            "preset": "fast",
            "format": "ccq-2t",
            "calibration": "TEXT",
            "calibration_tokens": "1k",
            "wint4_end_layer": 2,
        },
        calibrated="router",
    ),
    "calibrated-prefix-layout-2.0": Case(
        {
            "preset": "fast",
            "calibration": "TEXT",
            "calibration_tokens": "1k",
            "wint4_end_layer": 3,
            "fastdeploy_layout": "2.0",
        },
        calibrated="router",
    ),
    "calibrated-allocated": Case(
        {
            "preset": "fast",
            "calibration": "TEXT",
            "calibration_tokens": "1k",
            "allocate": "2.6bpw",
            "allow_plugin_layout": True,
        },
        calibrated="router",
    ),
    "calibrated-tensor-parallel": Case(
        {
            "preset": "fast",
            "calibration": "TEXT",
            "calibration_tokens": "1k",
            "tensor_parallel_size": 2,
        },
        source="cut",
        calibrated="router",
    ),
}
# Outputs that are turned back, and the naming they are turned into.
DEQUANTIZED = {
    "wint2-fast": ("paddle", "pt"),
    "ccq-2t-fast": ("paddle",),
    "ccq-2.5-fast": ("paddle",),
    "wint2-prefix": ("paddle",),
    "rules-dense": ("pt",),
}
# What a dry run prints, by the flags; the 300B's config and nothing else.
DRY_RUNS: dict[str, dict[str, Any]] = {
    "plan-300b": {},
    "plan-300b-tensor-parallel": {"tensor_parallel_size": 4, "format": "wint2"},
    "plan-300b-ccq-2.75": {"format": "ccq-2.75", "wint4_end_layer": -1},
}


def _tiny(layout: str = "pt", dtype: str = "bf16", **overrides: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_checkpoint(folder, tiny_config(**overrides), layout, dtype)

    return write


SOURCES: dict[str, Callable[[Path], None]] = {
    "cut": _tiny(moe_intermediate_size=256, moe_num_experts=2),
    "paddle": _tiny("paddle", moe_num_shared_experts=2),
    "head": _tiny(dtype="f32", tie_word_embeddings=False, num_nextn_predict_layers=1),
    "dense": _tiny(moe_num_experts=0),
}


class Runs:
    """Runs cases below a folder, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._outputs: dict[str, Path] = {}
        self._statistics: dict[tuple[str, str], str] = {}

    def model(self, source: str) -> Path:
        if source == "example":
            return EXAMPLE
        path = self.folder / "sources" / source
        if not path.exists():
            SOURCES[source](path)
        return path

    @property
    def text(self) -> Path:
        """The first lines of the public-domain sample."""
        path = self.folder / "text.txt"
        if not path.exists():
            path.write_bytes(SAMPLE.read_bytes()[:SAMPLE_CHARACTERS])
        return path

    def output(self, name: str) -> Path:
        """The folder that the case's run wrote."""
        if name not in self._outputs:
            case, out = CASES[name], self.folder / name
            options = {key: self._value(name, value) for key, value in case.options.items()}
            quantize(self.model(case.source), out, quiet=True, threads=2, **options)
            self._outputs[name] = out
        return self._outputs[name]

    def _value(self, name: str, value: Any) -> Any:
        case = CASES[name]
        if value == "TEXT":
            return self.text
        if value == "RULES":
            path = self.folder / f"{name}.yaml"
            path.write_text(case.rules)
            return path
        if value == "SENSITIVITY":
            path = self.folder / f"{name}.json"
            path.write_text(json.dumps(_costs(self.model(case.source), case.costs)))
            return path
        return value

    def dequantized(self, name: str, naming: str) -> Path:
        out = self.folder / f"{name}-as-{naming}"
        if not out.exists():
            dequantize(self.output(name), out, naming, log=lambda _: None)
        return out

    def statistics(self, case: Case) -> str:
        """A hash of the last layer's statistics, which all that is computed before enters into."""
        key = case.source, case.calibrated
        if key not in self._statistics:
            self._statistics[key] = self._statistics_of(case)
        return self._statistics[key]

    def _statistics_of(self, case: Case) -> str:
        from paddle_ccq.calibration.settings import CalibrationSettings
        from paddle_ccq.calibration.statistics import Statistics
        from paddle_ccq.calibration.text import read_calibration_text

        checkpoint = open_checkpoint(self.model(case.source))
        settings = CalibrationSettings(tokens=1024, token_weights=case.calibrated)
        text = read_calibration_text(self.text, checkpoint, settings)
        statistics = Statistics(checkpoint, text, settings, 2)
        last = checkpoint.config.moe_layers()[-1]
        digest = hashlib.sha256()
        for part in PROJECTIONS:
            found = statistics.hessian(f"ernie.layers.{last}.mlp.experts.1.{part}.weight")
            digest.update(found.matrix.tobytes())
        statistics.close()
        return digest.hexdigest()


def _costs(model: Path, order: tuple[int, ...]) -> dict[str, Any]:
    checkpoint = open_checkpoint(model)
    cost = {layer: 2.0**-place for place, layer in enumerate(order)}
    costs = {
        layer: {
            part: {"wint2": cost[layer], "ccq-2.5": cost[layer] / 2, "wint4": cost[layer] / 16}
            for part in PROJECTIONS
        }
        for layer in sorted(order)
    }
    sha256 = weights_sha256(checkpoint)
    shape = model_shape(checkpoint.config)
    return Sensitivities("quadratic", {}, {}, "held", shape, sha256, costs).as_dict()


def is_weights(name: str) -> bool:
    """Weight files and their index, as opposed to what describes them."""
    return name.endswith((".safetensors", ".index.json"))


def hashes(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Hashes:
    """sha256 of the files below a folder, by relative name."""
    return {name: sha256 for name, sha256 in sorted(contents(folder).items()) if wanted(name)}


def dry_run_text(options: Mapping[str, Any]) -> str:
    """What a dry run prints, without the time that it measures."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        quantize(LARGE, dry_run=True, preset="fast", **options)
    return "".join(
        line for line in out.getvalue().splitlines(True) if not line.startswith("time (estimate)")
    )


def unquantized_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors but the routed experts', which a calibration may change."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        rank = path.parent.name if path.parent != folder else ""
        tensors = load_file(path).items()
        found |= {f"{rank}/{n}": a for n, a in tensors if ".mlp.experts." not in n}
    return found


def weights_of(runs: Runs, name: str) -> dict[str, Any]:
    """What weights.json says of a case."""
    case = CASES[name]
    found: dict[str, Any] = {"files": hashes(runs.output(name), is_weights)}
    if case.calibrated:
        found["statistics"] = runs.statistics(case)
    for naming in DEQUANTIZED.get(name, ()):
        found[f"dequantized-{naming}"] = hashes(runs.dequantized(name, naming), is_weights)
    return found


def others_of(runs: Runs, name: str) -> dict[str, Any]:
    """What others.json says of a case."""
    found = {"files": hashes(runs.output(name), lambda n: not is_weights(n))}
    for naming in DEQUANTIZED.get(name, ()):
        folder = runs.dequantized(name, naming)
        found[f"dequantized-{naming}"] = hashes(folder, lambda n: not is_weights(n))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="store the hashes of this code")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ccq-held-") as folder:
        runs = Runs(Path(folder))
        weights = {name: weights_of(runs, name) for name in CASES}
        others: dict[str, Any] = {name: others_of(runs, name) for name in CASES}
        others |= {
            name: hashlib.sha256(dry_run_text(options).encode()).hexdigest()
            for name, options in DRY_RUNS.items()
        }
    differ = 0
    for path, found in ((WEIGHTS, weights), (OTHERS, others)):
        known = json.loads(path.read_text()) if path.exists() else {}
        for name in sorted({*known, *found}):
            if known.get(name) != found.get(name):
                differ += 1
                print(f"{path.name}: {name} differs")
        if args.write:
            path.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if differ and not args.write else 0


if __name__ == "__main__":
    sys.exit(main())
