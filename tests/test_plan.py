"""Plan and Pipeline: JSON round trips, tables, and passes that a user adds or drops."""

import json

import pytest
import torch

from mpcompile import Config, MPCompileError, Pipeline, Plan, transform
from mpcompile.errors import GraphError
from mpcompile.passes.base import Pass
from mpcompile.passes.mask import Mask
from tests.support.helpers import images, mlp, tiny_vit


def test_plan_round_trips_and_prints_every_layer():
    plan = transform(tiny_vit(), images(), Config(tome_r=2)).plan
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json(indent=1)) == plan.to_dict()
    text = str(plan)
    assert all(name in text for name in plan.layers)
    assert "permute: off" in text and "fell back to magnitude" in text
    entry = plan.layers["blocks.0.mlp.fc1"]
    assert entry.shape == (128, 32) and entry.notes["analyze"]["verdict"] in ("mp", "not_mp", "low_confidence")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": 3}', '{"layers": {}, "passes": [], "macs": {}, "x": 1}'])
def test_not_a_plan(text):
    with pytest.raises(MPCompileError, match="not the JSON of a plan"):
        Plan.from_json(text)


class RemoveActivation(Pass):
    name = "remove_activation"

    def plan(self, gm, ctx):
        return {"nodes": [n.name for n in gm.graph.nodes if str(n.target) == "1"]}

    def apply(self, gm, decision, ctx):
        for node in list(gm.graph.nodes):
            if node.name in decision["nodes"]:
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
        return bool(decision["nodes"])


def test_users_add_and_drop_passes():
    x = torch.randn(2, 32)
    gm = transform(mlp(), x, pipeline=Pipeline([RemoveActivation(), Mask()]))
    assert [record.name for record in gm.plan.passes] == ["remove_activation", "mask"]
    assert not any(n.target == "1" for n in gm.graph.nodes)
    with pytest.raises(MPCompileError, match="not a pass"):
        Pipeline([Mask])


def test_a_pass_that_breaks_the_graph_is_named():
    class Break(RemoveActivation):
        name = "break"

        def apply(self, gm, decision, ctx):
            output = next(n for n in gm.graph.nodes if n.op == "output")
            output.args = (next(n for n in gm.graph.nodes if n.target == "0"),)
            return True

    with pytest.raises(GraphError, match=r"pass 'break' changed the output; expected \(2, 5\), found \(2, 48\)"):
        transform(mlp(), torch.randn(2, 32), pipeline=Pipeline([Break()]))


def test_a_pass_runs_only_in_a_pipeline():
    with pytest.raises(RuntimeError, match="Pipeline"):
        Mask()(transform(mlp(), torch.randn(2, 32)))
