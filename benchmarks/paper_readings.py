# SPDX-License-Identifier: Apache-2.0
"""Table of docs/notes/encoder.md: what each reading of the paper's encoder costs.

    python benchmarks/paper_readings.py [--channels 128] [--write]

The first row of each format is `make_encoder(..., encoder="paper")`; the others change one thing.
"""

from __future__ import annotations

import argparse

import numpy as np
from common import markdown, put_into_doc, save_result

from paddle_ccq.codec import wint2
from paddle_ccq.codec.spare_scale import CCQ_2_5, CCQ_2_75, SpareScaleFormat
from paddle_ccq.encoder import paper
from paddle_ccq.encoder.factory import make_encoder

GROUP = paper.GROUP
K, SEEDS = 4096, (0, 1)


def finish(w: np.ndarray, states: np.ndarray, scales: np.ndarray, top: int | None) -> float:
    """Squared error with the scales compressed to 0..top (None: kept as they are)."""
    if top is not None:
        local, supers = paper.compress_scales(scales, top)
        scales = local.astype(np.float32) * supers.astype(np.float32)[:, None]
    return float(((w - states * scales[..., None]) ** 2).sum(dtype=np.float64))


def wint2_error(
    w: np.ndarray,
    end: float = 31.5,
    rounds: int = paper.ROUNDS,
    cluster: str = "nearest",
    refit: bool = True,
    compress: bool = True,
    per: str = "channel",
    again: bool = False,
) -> float:
    """Squared error of one way to run Algorithm 1, equations (1) and (4) on [N, K/64, 64].

    end: the state that the group's largest weight is put at. cluster: "nearest" searches again
    among the 256 vectors, "floor" and "round" take equation (1)'s byte, "none" keeps 15 bits.
    per: what one code scale and zero-point are for. again: one more search with the stored scales.
    """
    n, groups, _ = w.shape
    code = wint2.CODE
    vectors = (n, groups * GROUP // code.N, code.N)
    scales = np.abs(w).max(axis=-1) / np.float32(end)
    words = paper.nearest_walk(paper.scaled(w, scales).reshape(vectors), code)
    top = wint2.SCALE_MAX if compress else None
    if cluster == "none":
        states = (code.decode(words) - code.zero_point).reshape(w.shape)
        return finish(w, states, paper.refit_scale(w, states) if refit else scales, top)

    low, high = words.min(axis=1), words.max(axis=1)
    if per == "matrix":
        low, high = np.full_like(low, low.min()), np.full_like(high, high.max())
    code_scale = (np.maximum(high - low, 1) / 255).astype(np.float32)
    code_zp = low.astype(np.float32)
    all_bytes = np.repeat(np.arange(256, dtype=np.uint8)[:, None], n, axis=1)
    books = code.decode(wint2.decode_codes(all_bytes, code_scale, code_zp).T) - code.zero_point

    def states_of(q: np.ndarray) -> np.ndarray:
        return np.take_along_axis(books, q[..., None], axis=1).reshape(w.shape)

    if cluster == "nearest":
        for _ in range(rounds):
            q = paper.nearest_entry(paper.scaled(w, scales).reshape(vectors), books)
            scales = paper.refit_scale(w, states_of(q))
        if again:
            local, supers = paper.compress_scales(scales, wint2.SCALE_MAX)
            scales = local.astype(np.float32) * supers.astype(np.float32)[:, None]
            q = paper.nearest_entry(paper.scaled(w, scales).reshape(vectors), books)
            return finish(w, states_of(q), scales, None)
        return finish(w, states_of(q), scales, top)
    half = 0.5 if cluster == "round" else 0.0
    q = np.floor((words - code_zp[:, None]) / code_scale[:, None] + half)
    states = states_of(np.clip(q, 0, 255).astype(np.int64))
    return finish(w, states, paper.refit_scale(w, states) if refit else scales, top)


def spare_error(
    f: SpareScaleFormat,
    w: np.ndarray,
    end: float | None = None,
    refit: bool = True,
    compress: bool = True,
    padded: bool = False,
) -> float:
    """Squared error of Algorithm 1, equation (4) and the compressed scale; see wint2_error.

    padded: the last row is searched together with the zeros that fill up its word.
    """
    n, groups, _ = w.shape
    scales = np.abs(w).max(axis=-1) / np.float32(end or f.zero_point - 0.5)
    x = paper.scaled(w, scales)
    full = x[..., :-1].reshape(n, groups, f.words_per_group - 1, f.rows_per_word)
    found, row = np.empty(full.shape, np.int32), 0
    for code in f.codes:
        part = paper.nearest_walk(full[..., row : row + code.N], code)
        found[..., row : row + code.N] = code.decode(part) - f.zero_point
        row += code.N
    if padded:
        tail = np.zeros((n, groups, f.codes[0].N), np.float32)
        tail[..., 0] = x[..., -1]
        last = f.codes[0].decode(paper.nearest_walk(tail, f.codes[0]))[..., 0] - f.zero_point
    else:
        last = np.clip(np.rint(x[..., -1]), -f.zero_point, f.mask - f.zero_point)
    states = np.concatenate([found.reshape(n, groups, -1), last[..., None]], axis=-1)
    scales = paper.refit_scale(w, states) if refit else scales
    return finish(w, states, scales, f.scale_max if compress else None)


WINT2_ROWS = [
    ("as built: largest weight at 31.5, 3 rounds of nearest of 256 and eq. (4)", {}),
    ("largest weight at 28", {"end": 28}),
    ("largest weight at 31", {"end": 31}),
    ("largest weight at 32", {"end": 32}),
    ("largest weight at 42, beyond the range (clipped)", {"end": 42}),
    ("1 round", {"rounds": 1}),
    ("2 rounds", {"rounds": 2}),
    ("10 rounds", {"rounds": 10}),
    ("one code scale and zero-point for the whole matrix", {"per": "matrix"}),
    ("group scales kept in float (not storable)", {"compress": False}),
    ("one more search after the scales are compressed", {"again": True}),
    ("eq. (1) literally, floor, then eq. (4) (`paper-literal`)", {"cluster": "floor"}),
    ("eq. (1) with rounding, then eq. (4)", {"cluster": "round"}),
    ("eq. (1) literally, floor, without eq. (4)", {"cluster": "floor", "refit": False}),
    ("no code cluster: 15-bit codes, 3.81 bits (not this format)", {"cluster": "none"}),
]


def spare_rows(f: SpareScaleFormat) -> list[tuple[str, dict]]:
    z = f.zero_point
    return [
        (f"as built: largest weight at {z - 0.5}, then eq. (4)", {}),
        (f"largest weight at {z - 1}", {"end": z - 1}),
        (f"largest weight at {z}", {"end": z}),
        (f"largest weight at {z / 0.7:.1f}, beyond the range (clipped)", {"end": z / 0.7}),
        ("without eq. (4)", {"refit": False}),
        ("group scales kept in float (not storable)", {"compress": False}),
        ("last row searched together with the padding zeros", {"padded": True}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=128, help="of each of two matrices")
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/notes/encoder.md"
    )
    args = parser.parse_args()

    matrices = [
        np.random.default_rng(seed).standard_normal((args.channels, K)).astype(np.float32)
        for seed in SEEDS
    ]
    energy = sum(float((m.astype(np.float64) ** 2).sum()) for m in matrices)

    def pooled(error, options: dict) -> float:
        total = 0.0
        for m in matrices:
            for first in range(0, args.channels, paper.CHUNK):
                rows = m[first : first + paper.CHUNK]
                total += error(rows.reshape(len(rows), -1, GROUP), **options)
        return total / energy

    jobs = [("wint2", WINT2_ROWS, wint2_error)]
    for f in (CCQ_2_75, CCQ_2_5):
        jobs.append((f.name, spare_rows(f), lambda w, f=f, **o: spare_error(f, w, **o)))
    table, numbers = [], []
    for format, rows, error in jobs:
        built = [make_encoder(format, encoder="paper").encode(m).stats for m in matrices]
        expected = sum(s.squared_error for s in built) / energy
        for label, options in rows:
            value = pooled(error, options)
            if not options and abs(value - expected) > 1e-4 * expected:
                raise SystemExit(f"error: {format}: {value} is not the encoder's {expected}")
            numbers.append({"format": format, "reading": label, "rel_mse": value})
            table.append([f"{format}: {label}", f"{value:.4f}"])
            print(f"{format:9s} {value:.4f}  {label}", flush=True)
        search = [make_encoder(format).encode(m).stats for m in matrices]
        value = sum(s.squared_error for s in search) / energy
        numbers.append({"format": format, "reading": "search, default", "rel_mse": value})
        table.append(
            [f"{format}: *this package's default encoder, for comparison*", f"{value:.4f}"]
        )
        print(f"{format:9s} {value:.4f}  search, default", flush=True)
    if args.write:
        note = (
            f"\n\nrel-MSE, {len(SEEDS)} Gaussian matrices of {K} x {args.channels}. "
            "`python benchmarks/paper_readings.py --write`."
        )
        save_result("paper_readings", {"channels": args.channels, "rows": numbers})
        text = markdown(["reading", "rel-MSE"], table)
        put_into_doc("docs/notes/encoder.md", "paper readings", text + note)


if __name__ == "__main__":
    main()
