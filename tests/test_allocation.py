# SPDX-License-Identifier: Apache-2.0
"""An allocation that is not the best, that breaks its budget, or that nothing can load."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.synthetic import tiny_config
from paddle_ccq.allocation.costs import Sensitivities, load_sensitivities, model_shape
from paddle_ccq.allocation.knapsack import (
    Option,
    allocate,
    allocate_prefix,
    total_cost,
    total_size,
)
from paddle_ccq.allocation.resolve import allocate_layers
from paddle_ccq.allocation.target import parse_target
from paddle_ccq.checkpoint.plan import rule_forced_layers
from paddle_ccq.checkpoint.rules import Rule
from paddle_ccq.errors import CcqError
from paddle_ccq.families.ernie45 import ErnieConfig
from paddle_ccq.families.registry import read_config
from paddle_ccq.quantize import main
from paddle_ccq.targets.fastdeploy.layout import build_plan, needs_plugin

CONFIG = tiny_config(num_hidden_layers=6, moe_num_experts=2, moe_k=1)
LARGE = Path(__file__).parent.parent / "examples" / "configs" / "ernie-4.5-300b-a47b"
# Layers 1 to 5; the first ones matter least.
COSTS = {1: 1.0, 2: 2.0, 3: 5.0, 4: 3.0, 5: 4.0}

option = st.builds(Option, st.just("f"), st.integers(0, 30), st.floats(0, 10))
items = st.lists(st.lists(option, min_size=1, max_size=3), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(items, st.integers(0, 120))
def test_no_choice_is_better(found, budget):
    fitting = [c for c in itertools.product(*found) if total_size(c) <= budget]
    chosen = allocate(found, budget)
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert total_size(chosen) <= budget
        assert all(o in options for o, options in zip(chosen, found, strict=True))
        assert total_cost(chosen) == pytest.approx(min(map(total_cost, fitting)), abs=1e-9)


def test_a_prefix_is_a_prefix():
    low = [Option("wint2", 1, cost) for cost in (1.0, 5.0, 2.0)]
    high = [Option("wint4", 2, 0.0) for _ in low]
    found = [list(pair) for pair in zip(low, high, strict=True)]
    assert [o.format for o in allocate_prefix(found, 4, "wint4")] == ["wint4", "wint2", "wint2"]
    assert [o.format for o in allocate(found, 4)] == ["wint2", "wint4", "wint2"]
    assert allocate_prefix([[low[0]], [high[1]]], 9, "wint4") is None
    assert allocate_prefix(found, 2, "wint4") is None


@pytest.mark.parametrize(
    ("text", "bits", "size"),
    [
        ("2.3bpw", 2.3, None),
        (" 2.3 BPW ", 2.3, None),
        ("100GB", None, 10**11),
        ("4GiB", None, 2**32),
    ],
)
def test_targets(text, bits, size):
    target = parse_target(text)
    assert (target.bits, target.bytes) == (bits, size)


@pytest.mark.parametrize("text", ["2.3", "3", "bpw", "-1bpw", "2.3bits", "0GB", ""])
def test_targets_that_are_none(text):
    with pytest.raises(CcqError, match="--allocate"):
        parse_target(text)


def costs(config: ErnieConfig, by_layer=None, formats=("wint2", "wint4")) -> Sensitivities:
    """Half of a layer's cost in each projection; wint4 costs a tenth."""
    table = {
        layer: {
            projection: {f: cost / 2 / (10 if f == "wint4" else 1) for f in formats}
            for projection in ("up_gate_proj", "down_proj")
        }
        for layer, cost in (by_layer or COSTS).items()
    }
    return Sensitivities("kl", {}, {}, "tiny", model_shape(config), "0" * 64, table)


def resolve(target, rules=(), plugin=True, config=None, by_layer=None):
    config = config or read_config(CONFIG)
    return allocate_layers(
        parse_target(target),
        "wint2",
        config.moe_layers(),
        rule_forced_layers(config, "wint2", rules),
        costs(config, by_layer),
        build_plan(config, rules=rules, plugin_layout=True),
        plugin,
    )


def four(allocation) -> list[int]:
    return allocation.rows[-1].plan.wint4_layers


def test_the_layers_that_matter_most_get_the_bits():
    # Two of five layers: 2.0625 + 0.4 * 1.9375 = 2.8375, which must not miss by rounding.
    found = resolve("2.8375bpw")
    assert four(found) == [3, 5]
    assert [(row.name, row.plan.wint4_layers) for row in found.rows[:-1]] == [
        ("uniform wint2", []),
        ("wint4 prefix of the same size", [1, 2]),
    ]
    assert [row.loss for row in found.rows] == pytest.approx([15, 12.3, 6.9])
    assert four(resolve("2.837bpw")) == [3]
    assert four(resolve("2.8375bpw", plugin=False)) == [1, 2]
    assert not needs_plugin(resolve("2.8375bpw", plugin=False).rows[-1].plan)
    assert four(resolve("9bpw")) == [1, 2, 3, 4, 5]


def test_bytes_are_those_of_the_whole_checkpoint():
    sizes = {n: resolve(f"{2.0626 + n * 0.3875}bpw").rows[-1].plan.output_bytes for n in (0, 2)}
    assert four(resolve(sizes[2])) == [3, 5]
    assert four(resolve(sizes[2] - 1)) == [3]
    assert four(resolve(sizes[0])) == []
    with pytest.raises(CcqError, match="the smallest this model can be is"):
        resolve(sizes[0] - 1)
    with pytest.raises(CcqError, match=r"--allocate 2bpw: the smallest .* is 2.0625bpw"):
        resolve("2bpw")


def test_rules_force_and_the_allocation_fills_the_rest():
    rules = [Rule("*.layers.3.mlp.experts.*", "wint2"), Rule("*.layers.1.mlp.experts.*", "wint4")]
    found = resolve("2.8375bpw", rules)
    assert four(found) == [1, 5]
    reasons = found.rows[-1].plan.reasons
    assert reasons[3] == "rule *.layers.3.mlp.experts.*" and reasons[4] == "allocation"
    assert four(resolve("9bpw", rules, plugin=False)) == [1, 2]
    assert four(resolve("9bpw", [Rule("*.qkv_proj", "bf16")], plugin=False)) == [1, 2, 3, 4, 5]
    with pytest.raises(CcqError, match="no wint4 prefix within it agrees with --rules"):
        resolve("9bpw", [*rules, Rule("*.layers.5.mlp.experts.*", "wint4")], plugin=False)
    with pytest.raises(CcqError, match=r"2.4500bpw with these rules"):
        resolve("2.3bpw", rules)


def test_the_300b_within_a_size():
    config = read_config(LARGE)
    by_layer = {layer: 1.0 + layer % 7 for layer in config.moe_layers()}
    found = resolve("100GB", config=config, by_layer=by_layer)
    plan = found.rows[-1].plan
    assert 98e9 < plan.output_bytes <= 100e9
    assert needs_plugin(plan) and all(layer % 7 > 4 for layer in plan.wint4_layers)


# --- files and flags ----------------------------------------------------------------------------


@pytest.fixture
def costs_file(tmp_path) -> Path:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(costs(read_config(CONFIG)).as_dict()))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_the_file_holds_everything(costs_file):
    found = load_sensitivities(costs_file)
    assert found == costs(read_config(CONFIG))
    assert found.layer(3, "wint2") == 5.0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(kind="x"), "not a file of"),
        (lambda c: c.update(method="guess"), "damaged"),
        (lambda c: c["layers"]["2"]["up_gate_proj"].pop("wint4"), "damaged"),
        (lambda c: c["layers"]["2"]["up_gate_proj"].update(wint4=float("nan")), "damaged"),
        (lambda c: c["layers"]["2"].pop("down_proj"), "damaged"),
        (lambda c: c["layers"].clear(), "damaged"),
    ],
)
def test_damaged_files(costs_file, edit, message):
    content = json.loads(costs_file.read_text())
    edit(content)
    costs_file.write_text(json.dumps(content))
    with pytest.raises(CcqError, match=message):
        load_sensitivities(costs_file)


def test_costs_of_another_model_or_without_the_format(costs_file):
    found = load_sensitivities(costs_file)
    other = read_config(tiny_config(num_hidden_layers=5, moe_num_experts=2, moe_k=1))
    with pytest.raises(CcqError, match="another model"):
        found.check(other, ("wint2", "wint4"), "x")
    with pytest.raises(CcqError, match=r"no costs of ccq-2\.5"):
        found.check(read_config(CONFIG), ("ccq-2.5", "wint4"), "x")


def test_a_dry_run_shows_every_layer_and_why(folder, costs_file, tmp_path, capsys):
    rules = tmp_path / "rules.yaml"
    rules.write_text('- {match: "*.layers.1.mlp.experts.*", format: wint4}\n')
    flags = ["--model", str(folder), "--dry-run", "--allocate", "2.9bpw", "--rules", str(rules)]
    flags += ["--sensitivity", str(costs_file)]
    assert main([*flags, "--allow-plugin-layout"]) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "1 1 wint4 rule *.layers.1.mlp.experts.*" in lines
    assert "2,4-5 3 wint2 allocation" in lines and "3 1 wint4 allocation" in lines
    assert any(line.startswith("wint4 prefix of the same size 1, 2 2.8375") for line in lines)
    assert any(line.startswith("allocated 1, 3 2.8375") for line in lines)
    assert "without --calibration it loses more" in lines[-1]
    assert main(flags) == 0
    assert "allocated (prefix) 1, 2" in " ".join(capsys.readouterr().out.split())


def test_a_dry_run_without_costs_says_when_they_come(folder, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    flags = ["--model", str(folder), "--dry-run", "--allocate", "2.9bpw", "--preset", "fast"]
    assert main([*flags, "--calibration", str(text)]) == 0
    assert "allocation: chosen when the run starts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sensitivity", "COSTS"], "--sensitivity needs --allocate"),
        (["--allocate", "2.9bpw"], "--allocate needs costs, which are measured of ERNIE-4.5 alone"),
        (["--allocate", "2.9"], "write 2.9bpw"),
        (["--allocate", "2.9bpw", "--sensitivity", "none.json"], "no such file"),
        (["--allocate", "2.9bpw", "--sensitivity", "MODEL/config.json"], "not a file of"),
        (["--allocate", "1bpw", "--sensitivity", "COSTS"], "the smallest this model can be"),
        (
            ["--allocate", "3bpw", "--sensitivity", "COSTS", "--wint4-end-layer", "2"],
            "does not go with --allocate",
        ),
        (
            ["--allocate", "3bpw", "--sensitivity", "COSTS", "--format", "ccq-2.5"],
            "no costs of ccq-2.5",
        ),
    ],
)
def test_mistakes_end_in_one_line(folder, costs_file, tmp_path, capsys, flags, message):
    flags = [f.replace("COSTS", str(costs_file)).replace("MODEL", str(folder)) for f in flags]
    assert main(["--model", str(folder), "--output", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
    assert not (tmp_path / "out").exists()
