# SPDX-License-Identifier: Apache-2.0
"""The documents rot: golden vectors that no longer hold, dead links, files that are gone."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from paddle_ccq import api
from paddle_ccq.codec import formats, row_order, spare_scale, trellis, weight_only, wint2
from paddle_ccq.codec.convolution import ConvolutionalCode

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "paddle_ccq"
READMES = ("README.md", "README.zh.md")
PAGES = sorted(ROOT.glob("docs/**/*.md"))
DOCS = [*PAGES, *sorted(ROOT.glob("*.md")), ROOT / "serving/README.md", ROOT / "examples/README.md"]
SPECIFICATION = ROOT / "docs" / "reference" / "formats.md"
BF16 = np.dtype(ml_dtypes.bfloat16)
CODE = (".py", ".cu", ".cuh", ".h", ".cpp", ".inc", ".md", ".sh", ".yaml")

GOLDEN = json.loads(
    re.search(r"^```json golden\n(.*?)^```", SPECIFICATION.read_text("utf-8"), re.S | re.M)[1]
)


def sequence(rows: int, columns: int, rule: list[int]) -> np.ndarray:
    """[a, b, c, m] of the document: (a * row + b * column + c) mod m."""
    a, b, c, m = rule
    return (a * np.arange(rows)[:, None] + b * np.arange(columns) + c) % m


def sha256(values: np.ndarray) -> str:
    if values.dtype == np.float32:
        values = values + np.float32(0)  # -0.0 becomes 0.0
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def column(value: object, n: int) -> np.ndarray:
    return np.broadcast_to(np.array(value, np.float64), (n,)).astype(np.float32)


@pytest.mark.parametrize("entry", GOLDEN["convolution"], ids=lambda e: str(e["code"]))
def test_golden_code_words(entry: dict) -> None:
    code = ConvolutionalCode(*entry["code"])
    assert code.decode(np.array(entry["word"])).tolist() == entry["states"]
    assert code.encode(np.array(entry["states"])) == entry["word"]


@pytest.mark.parametrize("entry", GOLDEN["wint2_bytes"], ids=lambda e: str(list(e.values())[:3]))
def test_golden_wint2_bytes(entry: dict) -> None:
    q = np.array([[entry["q"]]], np.uint8)
    pair = column(entry["code_scale"], 1), column(entry["code_zp"], 1)
    assert wint2.decode_codes(q, *pair)[0, 0] == entry["code"]
    assert wint2.decode_states(q, *pair)[:, 0].tolist() == entry["states"]


def check_values(format: str, tensors: dict[str, np.ndarray], golden: dict) -> np.ndarray:
    for runtime in ("float32", "bfloat16"):
        decoded = formats.decode(format, tensors, runtime)
        assert sha256(decoded) == golden[f"sha256_{runtime}"]
        if runtime in golden:
            assert [float(decoded[k, n]) for k, n in golden["at"]] == golden[runtime]
    return formats.decode(format, tensors, "float32")


def test_golden_wint2_tensor() -> None:
    g = GOLDEN["wint2_tensor"]
    k, n = g["K"], g["N"]
    tensors = {
        "quant_weight": sequence(k // 4, n, g["quant_weight"]).astype(np.uint8),
        "weight_scale": sequence(k // 128, n, g["weight_scale"]).astype(np.uint8),
        "super_scales": column(g["super_scales"], n).astype(BF16),
        "code_scale": column(g["code_scale"], n),
        "code_zp": column(g["code_zp"], n),
    }
    decoded = check_values("wint2", tensors, g)
    assert sha256(row_order.unpermute_rows(decoded)) == g["sha256_float32_input_order"]


def test_golden_trellis() -> None:
    g = GOLDEN["ccq-2t"]
    for entry in g["words"]:
        q = np.array([[entry["before"]], [entry["byte"]]], np.uint8)
        assert trellis.decode_values(q)[4:, 0].tolist() == entry["values"]
    k, n = g["K"], g["N"]
    tensors = {
        "quant_weight": sequence(k // 4, n, g["quant_weight"]).astype(np.uint8),
        "weight_scale": sequence(k // 128, n, g["weight_scale"]).astype(np.uint8),
        "super_scales": column(g["super_scales"], n).astype(BF16),
    }
    check_values("ccq-2t", tensors, g)


@pytest.mark.parametrize("f", [spare_scale.CCQ_2_5, spare_scale.CCQ_2_75], ids=lambda f: f.name)
def test_golden_spare_scale(f: spare_scale.SpareScaleFormat) -> None:
    g = GOLDEN[f.name]
    unsigned = np.dtype(f"uint{f.word_bits}")
    words = np.array([[g["word"]]] * (f.words_per_group - 1) + [[g["last_word"]]], unsigned)
    one = spare_scale.SpareScaleTensors(f, words.view(f.storage), np.ones(1, BF16))
    states, scales = spare_scale.unpack(one)
    assert states[: f.rows_per_word, 0].tolist() == g["states"]
    assert (states[63, 0], scales[0, 0]) == (g["last_state"], g["local_scale"])
    rows = g["K"] // 64 * f.words_per_group
    tensors = {
        "quant_weight": sequence(rows, g["N"], g["quant_weight"]).astype(unsigned).view(f.storage),
        "super_scales": column(g["super_scales"], g["N"]).astype(BF16),
    }
    check_values(f.name, tensors, g)


@pytest.mark.parametrize("bits", [8, 4])
def test_golden_weight_only(bits: int) -> None:
    g = GOLDEN[f"wint{bits}"]
    weight = (sequence(g["K"], g["N"], g["weight"]) - g["minus"]) / g["over"]
    weight[:, g["zero_column"]] = 0
    quantize = {8: weight_only.quantize_wint8, 4: weight_only.quantize_wint4}[bits]
    q, scale = quantize(weight.astype(BF16))
    assert sorted(set(scale.view(np.uint16).tolist())) == g["scale_bits"]
    assert q.view(np.uint8).ravel()[: len(g["first_bytes"])].tolist() == g["first_bytes"]
    assert sha256(q) == g["sha256_quant_weight"]
    assert sha256(scale) == g["sha256_weight_scale"]


@pytest.mark.parametrize("bits,c", [(8, 2), (4, 4)])
def test_the_documents_interleaving_formula(bits: int, c: int) -> None:
    big_k, big_n = 128, 32
    top = 1 << (bits - 1)
    states = np.random.default_rng(0).integers(-top, top, (big_k, big_n)).astype(np.int8)
    stored = weight_only.interleave(states, bits).view(np.uint8).ravel()
    k, n = np.arange(big_k)[:, None], np.arange(big_n)
    r, b = k % 64, 8 * c
    position = 64 * c * (n // c * (big_k // 64) + k // 64) + 64 * (n % c)
    position = position + b * (r // b) + c * (r % 8) + r % b // 8
    nibbles = np.stack([stored & 15, stored >> 4], axis=1).ravel()
    found = (stored if bits == 8 else nibbles)[position]
    np.testing.assert_array_equal(found.astype(int) - top, states)


def test_the_documents_bits_per_weight() -> None:
    text = SPECIFICATION.read_text("utf-8")
    for name in ("wint2", "ccq-2t", "ccq-2.5", "ccq-2.75", "wint4", "wint8"):
        row = re.search(rf"^\| `{name}` \| 16 [+ 0-9]*bits \|.*", text, re.M)[0]
        found = [cell.strip() for cell in row.split("|")[3:-1]]
        exact = [formats.stored_bits_per_weight(name, k, 128) for k in (1536, 2560, 3584, 8192)]
        assert [float(cell) for cell in found] == pytest.approx(exact, abs=5.1e-5)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_blocks(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.S | re.M)


def links_of(path: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of every link to a file of the repository; the anchor may be empty."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_blocks(path))
    local = [t.partition("#") for t in targets if not re.match(r"[a-z]+:", t)]
    return [((path.parent / file) if file else path, anchor) for file, _, anchor in local]


def anchors_of(path: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ +(.*)$", without_blocks(path), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_relative_links_resolve(path: Path) -> None:
    links = links_of(path)
    assert [str(file) for file, _ in links if not file.exists()] == []
    marked = [(file, anchor) for file, anchor in links if anchor and file.suffix == ".md"]
    assert [(str(f), a) for f, a in marked if a not in anchors_of(f)] == []


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {file.resolve() for file, _ in links_of(index)} | {index}
    assert [name_of(page) for page in PAGES if page.resolve() not in listed] == []


def test_the_api_page_has_every_function_with_its_first_arguments() -> None:
    text = (ROOT / "docs" / "reference" / "api.md").read_text("utf-8")
    calls = dict(re.findall(r"^\| `[\w-]+` \| `(\w+)\(([^)]*)\)`", text, re.M))
    assert sorted(calls) == sorted(api.__all__)
    for name, arguments in calls.items():
        parameters = list(inspect.signature(getattr(api, name)).parameters.values())
        given = [a for a in arguments.split(", ") if not a.startswith("**")]
        assert given == [p.name for p in parameters[: len(given)]], name
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[: len(given)]), name


def test_no_page_is_looked_for_where_none_is() -> None:
    """Paths of documents in the code, in comments and in what benchmarks write."""
    folders = ("paddle_ccq", "benchmarks", "custom_ops", "tests", "examples", "serving")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.suffix in CODE]
    found = {
        (name_of(file), page)
        for file in files
        for page in re.findall(r"\bdocs/[\w/-]+\.(?:md|svg)", file.read_text("utf-8"))
    }
    assert len(found) > 20
    assert sorted(pair for pair in found if not (ROOT / pair[1]).exists()) == []


def test_benchmarks_write_tables_that_exist() -> None:
    call = re.compile(r"put_into_doc\(\s*\"([^\"]+)\",\s*\"([^\"]+)\"")
    scripts = (ROOT / "benchmarks").rglob("*.py")
    pairs = {pair for script in scripts for pair in call.findall(script.read_text("utf-8"))}
    assert len(pairs) > 8
    for page, table in pairs:
        assert f"<!-- table: {table} -->" in (ROOT / page).read_text("utf-8"), (page, table)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_are_to_be_edited_exist(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text)
    own = [path for path in named if not re.search(r"[A-Z]{4,}", path.removesuffix("README.md"))]
    assert len(own) > 8
    missing = [p for p in own if not any((base / p).exists() for base in (ROOT, PACKAGE))]
    assert missing == []


def test_both_readmes_have_the_same_commands_links_and_tables() -> None:
    def facts(path: Path) -> dict[str, list[str]]:
        text = path.read_text("utf-8")
        blocks = "".join(re.findall(r"^```.*?^```", text, re.S | re.M))
        table = re.search(r"<!-- table: summary -->.*?<!-- end -->", text, re.S)[0]
        return {
            "commands": [re.sub(r"\s+#.*", "", line) for line in blocks.splitlines()],
            "links": sorted(set(re.findall(r"\]\(([^)\s]+)\)", text)) - set(READMES)),
            "cells": re.findall(r"(?<=\| )[0-9.]+%?(?= \|)", table),
            "headings": [line[: line.index(" ")] for line in re.findall(r"^#+ .*", text, re.M)],
        }

    english, chinese = (facts(ROOT / name) for name in READMES)
    assert len(english["links"]) > 10 and len(english["cells"]) > 30
    assert english == chinese


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_table_markers_come_in_pairs(path: Path) -> None:
    markers = re.findall(r"^<!-- (table|end)\b.*-->$", path.read_text("utf-8"), re.M)
    assert markers == ["table", "end"] * (len(markers) // 2)
