# SPDX-License-Identifier: Apache-2.0
"""Holding a quantized checkpoint against what its own config.json promises, for any target."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from ..checkpoint.companions import check_file
from ..checkpoint.manifest import MANIFEST_FILE, NO_MANIFEST, is_foreign
from ..checkpoint.plan import Plan
from ..checkpoint.planned import PlannedTensor
from ..checkpoint.reader import JOURNAL_FILE, PARTIAL_SUFFIX, PROVENANCE_KEY, stated_row_order
from ..checkpoint.safetensors_format import DTYPES, FLOAT_DTYPES, INDEX_FILE, SINGLE_FILE
from ..checkpoint.safetensors_io import SafetensorsFile, load_json
from ..checkpoint.source import snapshot_folder
from ..checkpoint.values import count_nonfinite
from ..checkpoint.writer import rank_folders
from ..codec.row_order import ROW_ORDERS
from ..codec.wint2 import CODE_MAX, code_range
from ..errors import CcqError
from ..families.config import CONFIG_FILE, ModelConfig
from ..families.registry import read_config


class Inspection:
    """An opened checkpoint, the plan it should follow, and the problems found so far.

    Attributes:
        engine: what loads the checkpoint, for messages.
    """

    engine = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder = snapshot_folder(folder)
        self.problems: list[str] = []
        self.messages: list[str] = []
        self.config = _config(folder, self.problems)
        self.messages += self.config.notes
        self.plan = self.expected_plan()
        self.row_order = _row_order(self.config)
        self.ranks = rank_folders(folder, self.plan.tensor_parallel_size)
        self.files: list[dict[str, SafetensorsFile]] = []  # tensor name -> file, of each rank
        self.sound: set[tuple[int, str]] = set()  # (rank, tensor) present as expected

    def expected_plan(self) -> Plan:
        """The plan that config.json, or the folder, says the checkpoint follows.

        Raises:
            CcqError: if it is no checkpoint of this target.
        """
        raise NotImplementedError

    def config_problems(self) -> list[str]:
        """What in config.json keeps the engine from reading the checkpoint."""
        raise NotImplementedError

    def accepted(self, planned: PlannedTensor, name: str, dtype: str) -> tuple[str, ...]:
        """The dtypes that the engine takes for a stored tensor."""
        return (dtype,)

    def reshaped(
        self, planned: PlannedTensor, found: tuple[int, ...], expected: tuple[int, ...]
    ) -> bool:
        """Whether the engine reshapes a stored tensor."""
        return False

    def check_config(self) -> None:
        """The target's rules for config.json."""
        self.problems += self.config_problems()
        own = self.config.raw.get(PROVENANCE_KEY)
        if not isinstance(own, dict):
            self.messages.append("not written by paddle-ccq: nothing is recorded in config.json")
            return
        recorded = own.get("tensor_parallel_size", 1)
        if recorded != self.plan.tensor_parallel_size:
            self.problems.append(
                f"config.json records {recorded} ranks, {self.plan.tensor_parallel_size} are there"
            )

    def check_structure(self) -> None:
        """Files, names, shapes and dtypes of every rank."""
        for folder in dict.fromkeys((self.folder, *self.ranks)):
            for path in sorted(folder.glob("*.pdparams")):
                self.problems.append(
                    f"{self._shown(path)}: {self.engine} would load this pickle file instead"
                )
        for rank, folder in enumerate(self.ranks):
            self.files.append(self._open(folder))
            self._compare(rank, folder)

    def _shown(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix() or "."

    def without_folder(self, problem: CcqError | str) -> str:
        """What is wrong with a file of the checkpoint, with its path inside the folder alone."""
        return str(problem).replace(f"{self.folder}{os.sep}", "")

    def _open(self, folder: Path) -> dict[str, SafetensorsFile]:
        """Every tensor that can be read, by name; what is wrong with the files is noted."""
        index, single = folder / INDEX_FILE, folder / SINGLE_FILE
        if not index.is_file():
            if not single.is_file():
                self.problems.append(f"{self._shown(index)}: missing")
                return {}
            self.messages.append(f"{self._shown(folder)}: one file and no index")
            self._refuse_strays(folder, {SINGLE_FILE}, SINGLE_FILE)
            opened = self._open_file(single)
            return dict.fromkeys(opened.tensors, opened) if opened else {}
        try:
            content = load_json(index)
        except CcqError as error:
            self.problems.append(self.without_folder(error))
            return {}
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not all(
            isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
        ):
            self.problems.append(f"{self._shown(index)}: no usable weight_map")
            return {}
        if single.is_file() and SINGLE_FILE not in weight_map.values():
            self.problems.append(
                f"{self._shown(single)}: {self.engine} would load this file instead of the shards"
            )
        self._refuse_strays(folder, {*weight_map.values(), SINGLE_FILE}, INDEX_FILE)
        found: dict[str, SafetensorsFile] = {}
        for shard in sorted(set(weight_map.values())):
            opened = self._open_file(folder / shard)
            if opened is None:
                continue
            for name in opened.tensors:
                if name in found:
                    self.problems.append(f"{self._shown(opened.path)}: {name} is stored twice")
                elif weight_map.get(name) != shard:
                    self.problems.append(
                        f"{self._shown(opened.path)}: {name} is here, {INDEX_FILE} says"
                        f" {weight_map.get(name, 'nothing')}"
                    )
                found[name] = opened
        for name, shard in weight_map.items():
            if name not in found and (folder / shard).is_file():
                self.problems.append(f"{self._shown(folder / shard)}: {name} is not in it")
        return found

    def _refuse_strays(self, folder: Path, known: set[str], where: str) -> None:
        """Engines that take every *.safetensors file of a folder would load these as well."""
        for path in sorted(folder.glob("*.safetensors")):
            if path.name not in known and not is_foreign(path.name):
                self.problems.append(
                    f"{self._shown(path)}: weights that {where} does not name; remove the file,"
                    " some engines load every .safetensors file"
                )

    def _open_file(self, path: Path) -> SafetensorsFile | None:
        if not path.is_file():
            what = "missing"
            if path.is_symlink():
                what = f"a link to {os.readlink(path)}, which is missing"
            self.problems.append(f"{self._shown(path)}: {what}")
            return None
        try:
            return SafetensorsFile(path)
        except CcqError as error:
            self.problems.append(self.without_folder(error))
            return None

    def _compare(self, rank: int, folder: Path) -> None:
        files = self.files[rank]
        prefix = "" if folder == self.folder else f"{folder.name}: "
        expected = set()
        missing = []
        for planned in self.plan.tensors:
            for name, dtype, shape in planned.specs:
                expected.add(name)
                if name not in files:
                    missing.append(name)
                    continue
                info = files[name].tensors[name]
                if info.shape != shape and not self.reshaped(planned, info.shape, shape):
                    self.problems.append(
                        f"{prefix}{name}: shape {list(info.shape)}, should be {list(shape)}"
                    )
                elif info.dtype not in self.accepted(planned, name, dtype):
                    self.problems.append(f"{prefix}{name}: dtype {info.dtype}, should be {dtype}")
                else:
                    self.sound.add((rank, name))
        if missing and files:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            self.problems.append(f"{prefix}{missing[0]}{more}: missing")
        extra = []
        for name in files:
            if name in expected:
                continue
            if self.config.family.is_mtp(name) and not self.config.num_nextn_predict_layers:
                extra.append(name)
            else:
                self.problems.append(f"{prefix}{name}: not a tensor of this model and format")
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            self.messages.append(
                f"{prefix}{min(extra)}{more}: for multi-token prediction, of which {CONFIG_FILE}"
                " counts no layer; not checked"
            )

    def without_manifest(self) -> list[str]:
        """What can't be told of a checkpoint whose files' hashes are not known."""
        unnamed = self.config.unnamed()
        if not unnamed:
            return [NO_MANIFEST]
        one = len(unnamed) == 1
        found = unnamed[0] if one else f"{unnamed[0]} and {len(unnamed) - 1} more"
        family = self.config.family.name
        return [
            NO_MANIFEST,
            f"{found}: not named by the family {family}; without {MANIFEST_FILE} only --reference"
            " tells whether the model has " + ("it" if one else "them"),
        ]

    def tensors(self, planned: PlannedTensor, rank: int) -> dict[str, np.ndarray] | None:
        """The stored tensors of a matrix by suffix, or of an unquantized one by name.

        None if one of them is not as expected.
        """
        if any((rank, name) not in self.sound for name, _, _ in planned.specs):
            return None
        result = {}
        for name, dtype, shape in planned.specs:
            values = self.files[rank][name].read(name).reshape(shape)
            key = name.rpartition(".")[2] if planned.quantized else name
            result[key] = values.astype(DTYPES[dtype], copy=False)
        return result

    def check_values(self) -> None:
        """Scales finite and not negative, codes in range, no NaN or infinity anywhere."""
        for rank, folder in enumerate(self.ranks):
            prefix = "" if folder == self.folder else f"{folder.name}: "
            for planned in self.plan.tensors:
                self.problems += [f"{prefix}{text}" for text in self.value_problems(planned, rank)]

    def value_problems(self, planned: PlannedTensor, rank: int) -> Iterator[str]:
        """What is wrong in the values of a tensor of one rank; nothing if it is not as expected.

        Values of floats that are NaN or infinite, scales below 0, and columns whose code scale and
        zero-point lead outside of the codes.
        """
        floats = {}
        for name, _, _ in planned.specs:
            if (rank, name) not in self.sound:
                return
            if self.files[rank][name].tensors[name].dtype in FLOAT_DTYPES:
                values = self.files[rank][name].read(name)
                bad = count_nonfinite(values)
                if bad:
                    yield f"{name}: {bad} of {values.size} values are NaN or infinite"
                    return
                floats[name.rpartition(".")[2]] = values
        if not planned.quantized:
            return  # what is kept may have such a name, and no scales
        stem = planned.tensor.stem
        for suffix in ("super_scales", "weight_scale"):
            if suffix in floats and np.any(floats[suffix].astype(np.float32) < 0):
                yield f"{stem}.{suffix}: negative scales"
        if "code_zp" in floats:
            low, high = code_range(floats["code_scale"], floats["code_zp"])
            outside = int(np.count_nonzero((low < 0) | (high > CODE_MAX)))
            if outside:
                yield (
                    f"{stem}.code_scale, .code_zp: {outside} of {low.size} columns decode to codes"
                    f" outside 0..{CODE_MAX} ({low.min()}..{high.max()}), where kernels disagree"
                )


def _config(folder: Path, problems: list[str]) -> ModelConfig:
    if not folder.is_dir():
        raise CcqError(f"{folder}: no such folder")
    if folder.resolve().name.endswith(PARTIAL_SUFFIX) or (folder / JOURNAL_FILE).exists():
        raise CcqError(f"{folder}: an unfinished output; run the command that writes it again")
    if os.path.lexists(folder / CONFIG_FILE):
        check_file(folder / CONFIG_FILE)
    names = _stored_names(folder)
    config = read_config(folder, problems).with_head_of(names)
    if config.family.keeps_others or any(map(config.family.is_mtp, names)):
        return config
    if names and isinstance(config.raw.get(PROVENANCE_KEY), dict):
        return config  # written here, where config.json calls for no layer that is not stored
    # config.json of some checkpoints calls for a layer that was never published.
    return config.without_mtp()


def _stored_names(folder: Path) -> Collection[str]:
    """Tensor names of a checkpoint, or of its first rank; what can't be read is reported later."""
    for place in (folder, folder / "rank0"):
        try:
            if (place / INDEX_FILE).is_file():
                content = load_json(place / INDEX_FILE)
                found = content.get("weight_map") if isinstance(content, dict) else None
                return found if isinstance(found, dict) else ()
            if (place / SINGLE_FILE).is_file():
                return SafetensorsFile(place / SINGLE_FILE).tensors
        except CcqError:
            return ()
    return ()


def _row_order(config: ModelConfig) -> str | None:
    """What config.json records; None if it records nothing."""
    own = config.raw.get(PROVENANCE_KEY)
    recorded = own.get("row_order") if isinstance(own, dict) else None
    recorded = stated_row_order(config.raw) or recorded
    return recorded if isinstance(recorded, str) else None


def other_order(order: str) -> str:
    """The row order that is not the given one."""
    return next(name for name in ROW_ORDERS if name != order)
