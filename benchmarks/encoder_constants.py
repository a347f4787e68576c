# SPDX-License-Identifier: Apache-2.0
"""Where the constants of paddle_ccq/encoder/recipes.py come from; prints, and checks the pair list.

python benchmarks/encoder_constants.py
"""

from __future__ import annotations

import argparse

import numpy as np
from common import save_result

from paddle_ccq import _core
from paddle_ccq.codec import wint2
from paddle_ccq.encoder.layouts import LAYOUTS
from paddle_ccq.encoder.recipes import CODE_SCALE, CODE_ZERO_POINTS, RECIPES, Recipe
from paddle_ccq.encoder.search import pair_books
from paddle_ccq.host import default_threads

# One nominal scale a group: what is compared are code books, not scale searches.
NOMINAL_ONLY = Recipe(0.0615, (11.0,))


def channel_errors(
    weight: np.ndarray, recipe: Recipe, format: str = "wint2", books: list | None = None
) -> np.ndarray:
    """rel-MSE of every channel."""
    layout = LAYOUTS[format]
    found = _core.encode(
        weight,
        books or pair_books(format, recipe),
        list(layout.index_bits),
        layout.as_dict(),
        recipe.as_dict(),
        default_threads(),
        "auto",
    )
    energy, dot, encoded = found["sums"].T
    return (energy - 2 * dot + encoded) / energy


def pair_errors(weight: np.ndarray, code_scale: int, code_zp: int) -> np.ndarray:
    return channel_errors(weight, NOMINAL_ONLY, books=[[wint2.codebook(code_scale, code_zp)]])


def code_scales(result: dict) -> None:
    weight = np.random.default_rng(123).standard_normal((192, 2048)).astype(np.float32)
    print("best zero point of each integer code scale, one nominal scale a group:")
    for scale in range(117, 126):
        errors = {
            zp: float(pair_errors(weight, scale, zp).mean())
            for zp in range(400, 32768 - 255 * scale, 2)
        }
        best = min(errors, key=errors.get)
        result.setdefault("code_scales", {})[scale] = [best, errors[best]]
        print(f"  {scale}: code_zp {best}, rel-MSE {errors[best]:.5f}")


def zero_points(result: dict) -> None:
    weight = np.random.default_rng(20260101).standard_normal((640, 2048)).astype(np.float32)
    candidates = range(560, 1800)
    table = np.array([pair_errors(weight, CODE_SCALE, zp) for zp in candidates])
    best = np.full(len(weight), np.inf)
    chosen = []
    print("greedy list of zero points, mean rel-MSE of the best for each channel:")
    for _ in range(len(CODE_ZERO_POINTS)):
        i = int(np.minimum(table, best).mean(axis=1).argmin())
        chosen.append(candidates[i])
        best = np.minimum(best, table[i])
        if len(chosen) in (1, 2, 4, 8, 16, 32, 64):
            print(f"  {len(chosen):2d}: {best.mean():.5f}")
            result.setdefault("zero_points", {})[len(chosen)] = float(best.mean())
    same = tuple(chosen) == CODE_ZERO_POINTS
    print(f"  the list is {'the same as' if same else 'NOT the same as'} recipes.CODE_ZERO_POINTS")
    result["list_is_the_same"] = same


def scales(result: dict) -> None:
    rng = np.random.default_rng(0)
    data = {
        "gauss": rng.standard_normal((256, 4096)),
        "t5": rng.standard_t(5, (256, 4096)),
        # Gaussian groups whose own scales vary, as the rows of trained matrices do.
        "uneven": rng.standard_normal((256, 4096))
        * np.repeat(rng.lognormal(0, 0.25, (256, 64)), 64, axis=1),
    }
    data = {k: np.ascontiguousarray(v, np.float32) for k, v in data.items()}

    def line(label: str, format: str, recipe: Recipe) -> None:
        errors = {k: float(channel_errors(v, recipe, format).mean()) for k, v in data.items()}
        result.setdefault("scales", []).append([format, label, errors])
        print(f"  {format:8s} {label:34s} " + "  ".join(f"{k} {v:.5f}" for k, v in errors.items()))

    print("nominal scale as a multiple of the rms:")
    for nominal in (0.057, 0.0595, 0.0615, 0.0635, 0.066):
        line(f"nominal {nominal}", "wint2", Recipe(nominal, (9.0, 11.0, 7.0), (-2, 3)))
    for nominal in (0.20, 0.22, 0.25, 0.28):
        line(f"nominal {nominal}", "ccq-2.75", Recipe(nominal, (10.0,), (-3, 4)))
    for nominal in (0.44, 0.48, 0.52, 0.56):
        base = RECIPES["ccq-2.5"]["default"]
        line(f"nominal {nominal}", "ccq-2.5", Recipe(nominal, base.kappas, ratios=base.ratios))
    print("local scale of an average group (one super scale for each):")
    for kappas in ((11.0,), (9.0,), (7.0,), (11.0, 8.0), (9.0, 11.0, 7.0)):
        line(f"kappas {kappas}", "wint2", Recipe(0.0615, kappas, (-3, 4)))
    print("window around the nominal local scale:")
    for window in ((-1, 2), (-2, 3), (-3, 4), (-4, 6)):
        line(f"window {window}", "wint2", Recipe(0.0615, (9.0,), window))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    result: dict = {}
    code_scales(result)
    zero_points(result)
    scales(result)
    save_result("encoder_constants", result)


if __name__ == "__main__":
    main()
