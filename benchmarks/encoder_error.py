# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/notes/encoder.md: rel-MSE on Gaussian, Student-t and a model's expert matrices.

python benchmarks/encoder_error.py [--model DIR]
"""

from __future__ import annotations

import argparse

import numpy as np
from baselines import rtn_int2, symmetric_int2
from common import markdown, put_into_doc, save_result

from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.encoder.base import ErrorStats
from paddle_ccq.encoder.factory import make_encoder

K, N = 4096, 256
# Four matrices of each distribution: one alone is uncertain by 0.1 to 0.2 %.
SEEDS = range(4)
ROWS = [
    ("RTN int2, min/max", "2.28", "rtn"),
    ("plain int2, symmetric, searched scales", "2.06", "symmetric"),
    ("paper, equation (1) read literally", "2.06", ("wint2", "default", "paper-literal")),
    ("paper, charitable reading", "2.06", ("wint2", "default", "paper")),
    ("**search, fast**", "2.06", ("wint2", "fast", "search")),
    ("**search, default**", "2.06", ("wint2", "default", "search")),
    ("**search, best**", "2.06", ("wint2", "best", "search")),
    ("paper", "2.5", ("ccq-2.5", "default", "paper")),
    ("**search, fast**", "2.5", ("ccq-2.5", "fast", "search")),
    ("**search, default**", "2.5", ("ccq-2.5", "default", "search")),
    ("paper", "2.75", ("ccq-2.75", "default", "paper")),
    ("**search, fast**", "2.75", ("ccq-2.75", "fast", "search")),
    ("**search, default**", "2.75", ("ccq-2.75", "default", "search")),
    ("**search, best**", "2.75", ("ccq-2.75", "best", "search")),
]


def stats_of(method: object, weight: np.ndarray) -> ErrorStats:
    if method == "rtn":
        return ErrorStats.between(weight, rtn_int2(weight))
    if method == "symmetric":
        return ErrorStats.between(weight, symmetric_int2(weight))
    format, preset, encoder = method
    return make_encoder(format, preset, encoder=encoder).encode(weight).stats


def pooled(method: object, matrices: list[np.ndarray]) -> float:
    """rel-MSE over all weights of all matrices."""
    stats = [stats_of(method, w) for w in matrices]
    return sum(s.squared_error for s in stats) / sum(s.energy for s in stats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="examples/ernie-45-moe-3m", help="for its experts")
    args = parser.parse_args()

    def random(kind: str, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        w = rng.standard_normal((K, N)) if kind == "gauss" else rng.standard_t(5, (K, N))
        return np.ascontiguousarray(w.T.astype(np.float32))

    data = {kind: [random(kind, s) for s in SEEDS] for kind in ("gauss", "t5")}
    checkpoint = open_checkpoint(args.model)
    for part in ("up_gate_proj", "down_proj"):
        names = [n for n in checkpoint.names() if ".experts." in n and n.endswith(f"{part}.weight")]
        # An even sample of 24 matrices; all experts of a layer look alike.
        names = names[:: max(1, len(names) // 24)]
        data[part] = [checkpoint.read_out_in(n) for n in names]

    results = []
    for label, bits, method in ROWS:
        row = {key: pooled(method, matrices) for key, matrices in data.items()}
        results.append({"encoder": label.strip("*"), "bits": float(bits), **row})
        print(f"{bits:5s} {label:42s} " + "  ".join(f"{k} {v:.4f}" for k, v in row.items()))
    name = checkpoint.path.name
    save_result("encoder_error", {"model": name, "rows": results})
    text = markdown(
        ["encoder", "bits", "Gaussian", "Student-t, df 5", "experts, up_gate", "experts, down"],
        [
            [r[0], r[1], *(f"{results[i][k]:.4f}" for k in ("gauss", "t5", *list(data)[2:]))]
            for i, r in enumerate(ROWS)
        ],
    )
    note = (
        f"\n\nrel-MSE over {len(SEEDS)} matrices of {K} x {N} (seeds 0 to {SEEDS[-1]}) and over 24 "
        f"matrices of each kind of `{name}`. `python benchmarks/encoder_error.py --model DIR`."
    )
    put_into_doc("docs/notes/encoder.md", "encoder error", text + note)


if __name__ == "__main__":
    main()
