# SPDX-License-Identifier: Apache-2.0
"""Codes and tuned values of trellis.py in two small files, and a checkpoint made of them.

    python benchmarks/gpu/trellis_store.py FOLDER --template CHECKPOINT --calibrated OUT --tuned OUT

`trellis.py --store FOLDER` writes codes.npz and tuned.npz. The template is a ccq-2t checkpoint of
the same model; all that the files do not hold is taken from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

CODES, TUNED = "codes.npz", "tuned.npz"
# Parts of a tensor's name in the files: of stacked experts, and of a dense layer in wint8.
WORDS, LOCAL, SUPERS, VALUES, SCALE = "words", "scales", "supers", "q", "scale"


def save(folder: Path, lab: Any, codes: Mapping[str, Any], tuned: Mapping[str, Any]) -> None:
    """Write the codes of a trellis_run.TrellisLab, and the model that they were tuned to."""
    import torch

    def supers(weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Super scales as bits of bfloat16: the columns' factor over what was decoded."""
        found = {}
        for name, of in codes.items():
            old, new = of.decoded().double(), weights[name].double()
            factor = (new * old).sum(1) / old.square().sum(1).clamp_min(1e-300)
            stored = (of.supers.double() * factor).bfloat16()
            found[f"{name}|{SUPERS}"] = stored.view(torch.int16).cpu().numpy()
        return found

    arrays = supers(lab.with_codes(codes))
    for name, of in codes.items():
        arrays[f"{name}|{WORDS}"] = of.words.cpu().numpy()
        arrays[f"{name}|{LOCAL}"] = of.scales.to(torch.uint8).cpu().numpy()
    _write(folder / CODES, arrays)

    arrays = supers(tuned)
    dense = set(lab.net.dense_names(tuned))
    for name, value in tuned.items():
        value = value.detach()
        if name in dense:
            scale = value.abs().amax(0) / 127
            whole = (value / scale.clamp_min(1e-30)).round().to(torch.int8)
            arrays[f"{name}|{VALUES}"] = whole.cpu().numpy()
            arrays[f"{name}|{SCALE}"] = scale.cpu().numpy()
        elif name not in codes and name != "ernie.embed_tokens.weight":
            arrays[name] = value.float().cpu().numpy()
    _write(folder / TUNED, arrays)


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Whole, or as it was."""
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, **arrays)
    part.replace(path)


def stored(checkpoint: Any, data: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Stored name and array of every tensor that a file holds."""
    from paddle_ccq.codec.weight_only import quantize_wint8
    from paddle_ccq.codec.wint2 import pack_scales

    def named(name: str, suffix: str) -> str:
        return next(s for s in checkpoint.stored_names(name) if s.endswith(f".{suffix}"))

    for key, array in data.items():
        name, _, part = key.partition("|")
        if part in (WORDS, LOCAL, SUPERS):
            before, projection = name.rsplit(".", 1)
            for expert, own in enumerate(array):
                matrix = f"{before}.{expert}.{projection}.weight"
                if part == WORDS:
                    yield named(matrix, "quant_weight"), np.ascontiguousarray(own.T)
                elif part == LOCAL:
                    yield named(matrix, "weight_scale"), pack_scales(np.ascontiguousarray(own.T))
                else:
                    yield named(matrix, "super_scales"), own.view(ml_dtypes.bfloat16)
        elif part == VALUES:
            weight = array.astype(np.float32) * data[f"{name}|{SCALE}"]
            both = zip(("quant_weight", "weight_scale"), quantize_wint8(weight), strict=True)
            yield from ((named(name, suffix), value) for suffix, value in both)
        elif not part:
            tensor = checkpoint.stored_names(name)[0]
            old = checkpoint.tensors.read(tensor)
            yield tensor, array.astype(old.dtype).reshape(old.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--template", type=Path, required=True)
    parser.add_argument("--calibrated", type=Path, required=True, help="new folder")
    parser.add_argument("--tuned", type=Path, required=True, help="new folder")
    args = parser.parse_args()
    from paddle_ccq.checkpoint.reader import open_checkpoint
    from paddle_ccq.tuning.output import write_tuned

    checkpoint = open_checkpoint(args.template)
    tensors: dict[str, np.ndarray] = {}
    # The card says of the result what is known of it: it was made by a benchmark.
    facts = {
        "text": "of benchmarks/gpu/trellis.py", "text_sha256": "unknown", "tokens_learned": 0,
        "passes": 0, "loss_before": 0.0, "loss_after": 0.0,
    }  # fmt: skip
    for file, out in ((CODES, args.calibrated), (TUNED, args.tuned)):
        with np.load(args.folder / file) as data:
            tensors |= dict(stored(checkpoint, dict(data)))
        for name, array in tensors.items():
            old = checkpoint.tensors.read(name)
            if old.dtype != array.dtype or old.shape != array.shape:
                raise SystemExit(f"{name}: the template has {old.dtype} {old.shape} for it")
        write_tuned(checkpoint, out, tensors, facts)
        print(f"{out}: {len(tensors)} of {len(checkpoint.tensors.names())} tensors")


if __name__ == "__main__":
    main()
