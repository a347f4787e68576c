# SPDX-License-Identifier: Apache-2.0
"""A plan that knows an engine, or an engine whose answers a plan does not follow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import paddle_ccq
from helpers.synthetic import tiny_config
from paddle_ccq.checkpoint.plan import LayerFormats, PlanOptions, make_plan
from paddle_ccq.errors import CcqError
from paddle_ccq.families.registry import read_config
from paddle_ccq.targets.fastdeploy.layout import FastDeploy, build_plan

PACKAGE = Path(paddle_ccq.__file__).parent


class Plain:
    """A target unlike FastDeploy: own names, all kept tensors in float32, no wint4 at all."""

    name = "plain"
    shard_metadata = {"format": "pt"}  # noqa: RUF012
    dense_formats = ("wint8",)

    def with_any_layers(self):
        return self

    def row_order(self, format):
        return "plain"

    def unquantized_format(self, tensor):
        return "f32"

    def stored(self, tensor, format, shape):
        return ((f"own.{tensor.name}.{format}", "F32", shape),)

    def shape_problem(self, format, shape):
        return f"{format}: three rows are not enough" if shape[0] == 3 else None

    def check_layers(self, formats):
        if "wint4" in formats.values():
            raise CcqError("this engine has no wint4")

    def model_notes(self, config):
        return ["about the model"]

    def plan_notes(self, plan):
        return [f"about a plan of {len(plan.tensors)} tensors"]

    def facts(self, plan):
        return []

    def choices(self, plan):
        return {}


def imported(path: Path) -> set[str]:
    """Packages below paddle_ccq that a module imports, by their first name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            depth = len(path.relative_to(PACKAGE).parts) - node.level
            parts = [*path.relative_to(PACKAGE).parts[:depth], *(node.module or "").split(".")]
            names = [alias.name for alias in node.names] if not node.module else []
            found |= {parts[0]} if parts[0] else set(names)
    return found


def test_imports_are_seen():
    layout = PACKAGE / "targets" / "fastdeploy" / "layout.py"
    assert {"checkpoint", "codec", "errors"} <= imported(layout)
    assert "targets" in imported(PACKAGE / "verify.py")


@pytest.mark.parametrize("below", ["codec", "encoder", "families", "checkpoint"])
def test_what_lies_below_knows_no_engine(below):
    for path in sorted((PACKAGE / below).rglob("*.py")):
        known = imported(path) & {"targets", "fastdeploy", "vllm", "quantization"}
        assert not known, f"{path.relative_to(PACKAGE)} imports {known}"


def test_a_plan_follows_its_target():
    config = read_config(tiny_config())
    plan = make_plan(config, PlanOptions(Plain()))
    assert plan.messages == ("about the model", f"about a plan of {len(plan.tensors)} tensors")
    assert plan.row_order == "plain"
    by_name = {planned.name: planned for planned in plan.tensors}
    assert by_name["ernie.norm.weight"].format == "f32"
    (spec,) = by_name["ernie.layers.1.mlp.experts.0.down_proj.weight"].specs
    assert spec[0] == "own.ernie.layers.1.mlp.experts.0.down_proj.weight.wint2"
    with pytest.raises(CcqError, match="no wint4"):
        make_plan(config, PlanOptions(Plain(), wint4_end_layer=1))


def test_other_layer_formats_of_a_plan_may_have_wint4_anywhere():
    config = read_config(tiny_config())
    plan = build_plan(config)
    formats = {1: "wint2", 2: "wint4"}
    assert plan.with_layer_formats(LayerFormats(formats, "test")).layer_formats == formats
    with pytest.raises(CcqError, match="wint4 layers must be the first"):
        build_plan(config, layer_formats=LayerFormats(formats, "test"))


def test_fastdeploy_layouts_that_are_none():
    with pytest.raises(CcqError, match=r"--fastdeploy-layout 3: not one of 2\.1, 2\.0"):
        FastDeploy("3")
