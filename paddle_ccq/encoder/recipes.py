# SPDX-License-Identifier: Apache-2.0
"""The search's constants and presets, with the measurement each comes from.

All were chosen on Gaussian matrices (and checked on Student-t ones); none was fitted on a model.
benchmarks/encoder_constants.py repeats the measurements.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

# 121 is the best integer code scale: with 8 bits a code word moves 15-bit codes by 121, and the
# 256 vectors then tile the cube almost like the D4 lattice. rel-MSE at one nominal scale a group,
# each with its best zero point: 0.1070 for 121, 0.1071 for 120, 0.1096 for 123, 0.1104 for 118,
# 0.1118 for 119, 0.1132 for 122. The best real-valued one, 120.95, gains 0.4 %, and would give up
# that integer pairs decode alike in every kernel and two bytes at a time.
CODE_SCALE = 121

# Code zero-points for CODE_SCALE in greedy order: each adds most to "best of the list for each
# channel", on 640 Gaussian channels of 2048 weights at nominal scales, from all of 560..1799.
# 121 * 255 + 1912 = 32767, so all stay inside 15 bits.
# fmt: off
CODE_ZERO_POINTS = (
    1251, 1174, 1217, 776, 1186, 1224, 789, 720, 1241, 1167, 1194, 797, 1114, 1256, 1189, 1182,
    1231, 1263, 1089, 1169, 1199, 1244, 1268, 769, 1238, 795, 736, 1178, 1258, 1233, 1192, 1129,
    1105, 1163, 730, 704, 718, 1272, 662, 1684, 665, 670, 1650, 1183, 1180, 1190, 1221, 722,
    833, 1159, 1654, 728, 1126, 813, 1242, 744, 733, 1066, 739, 1023, 657, 1198, 1622, 771,
)
# fmt: on


@dataclass(frozen=True)
class CoreRecipe:
    """Fields that the compiled core takes as a dictionary."""

    def as_dict(self) -> dict[str, object]:
        """Field -> value, with `window` as window_low and window_high."""
        values = asdict(self)
        values["window_low"], values["window_high"] = values.pop("window")
        return values


@dataclass(frozen=True)
class Recipe(CoreRecipe):
    """What the search tries for every channel.

    Attributes:
        nominal: best scale of a group as a multiple of its rms (the codec's states are integers).
        kappas: local scale that a group of average rms gets; one super scale is tried for each.
            A large one gives finer steps, a small one leaves room for groups far above average.
        window: local scales tried around a group's nominal one (4-bit scales).
        ratios: scales tried as multiples of the nominal one (13-bit scales), at most 8.
        refits: rounds of equation (4) followed by a new search (13-bit scales).
        code_pairs: code zero-points tried per channel (WINT2), from CODE_ZERO_POINTS.
        keep_pairs: how many of them survive a screening on nominal scales.
    """

    nominal: float
    kappas: tuple[float, ...]
    window: tuple[int, int] = (0, 0)
    ratios: tuple[float, ...] = field(default=())
    refits: int = 0
    code_pairs: int = 1
    keep_pairs: int = 1

    def as_dict(self) -> dict[str, object]:
        """Without code_pairs, which decides the code books that the core is given."""
        values = super().as_dict()
        values.pop("code_pairs")
        return values


# Spread of the scales tried for 13-bit scales: the optimum of single groups of 64 Gaussian weights
# lies within 0.78..1.22 of the average one.
_RATIOS = (0.78, 0.84, 0.90, 0.95, 1.0, 1.06, 1.13, 1.22)

# The super scale of fine local scales only has to leave room above the largest group:
# 4096 of 8191 for it, so ratios up to 2 still fit.
_FINE_KAPPA = (4096.0,)

RECIPES: dict[str, dict[str, Recipe]] = {
    "wint2": {
        "fast": Recipe(0.0615, (11.0, 8.0), window=(-2, 3)),
        "default": Recipe(0.0615, (9.0, 11.0, 7.0), window=(-2, 3), code_pairs=16, keep_pairs=2),
        "best": Recipe(
            0.0615, (11.0, 9.0, 7.5, 13.0, 6.0), window=(-3, 4), code_pairs=64, keep_pairs=4
        ),
    },
    "ccq-2.75": {
        "fast": Recipe(0.25, (10.0,), window=(-2, 3)),
        "default": Recipe(0.25, (9.0, 11.0, 7.0), window=(-3, 4)),
        "best": Recipe(0.25, (13.0, 11.0, 9.0, 7.5, 6.0), window=(-4, 5)),
    },
    "ccq-2.5": {
        "fast": Recipe(0.52, _FINE_KAPPA, ratios=_RATIOS[1::2]),
        "default": Recipe(0.52, _FINE_KAPPA, ratios=_RATIOS, refits=2),
        "best": Recipe(0.52, _FINE_KAPPA, ratios=_RATIOS, refits=4),
    },
}


@dataclass(frozen=True)
class TrellisRecipe(CoreRecipe):
    """What the search of ccq-2t tries for every channel.

    Attributes:
        nominal: best scale of a group as a multiple of its rms: 1 over the rms of the values.
        kappas: local scale of a group of average rms; one super scale is tried for each.
        window: local scales tried around a group's nominal one.
        beam: sequences are dropped whose cost is this far above the cheapest one's, in squares of
            the code's values; an average position costs about 3100.
    """

    nominal: float
    kappas: tuple[float, ...]
    window: tuple[int, int]
    beam: int


# Measured on 24 columns of 4096 Gaussian weights. Window (-1, 2): rel-MSE 0.0716 with beam 7000,
# 0.0714 with 8000, 0.0712 with 9000, at 0.67, 0.54 and 0.44 million weights a second and core.
# Kappa 8, 9.5, 11: 0.0715, 0.0714, 0.0713; on Student-t weights (5 degrees of freedom), whose
# groups differ more, 0.0927, 0.0939, 0.0960. Three kappas and more scales gain 0.6 % and 4 %.
TRELLIS_RECIPES: dict[str, TrellisRecipe] = {
    "fast": TrellisRecipe(1 / 104.5, (9.5,), window=(0, 1), beam=7500),
    "default": TrellisRecipe(1 / 104.5, (9.5,), window=(-1, 2), beam=8000),
    "best": TrellisRecipe(1 / 104.5, (11.0, 8.5, 6.0), window=(-2, 3), beam=12000),
}
