"""The activations of student and twin, and the weights of errors, against runs of the whole graphs."""

import pytest
import torch

import mpcompile
from mpcompile import Config, Reconstruction
from mpcompile.errors import GraphError
from mpcompile.passes.reconstruct.sides import sides
from mpcompile.reconstruction.activations.rows import Rows, Shelf
from mpcompile.reconstruction.activations.samples import Samples
from mpcompile.reconstruction.activations.walk import Walk
from mpcompile.reconstruction.importance import Weigher
from mpcompile.reconstruction.regions import find
from tests.support.helpers import images, tiny_vit


def walked(r, memory):
    """A walk through a ViT whose tokens merge, with dense weights on both sides."""
    dense = tiny_vit()
    gm = mpcompile.transform(dense, images(2), Config(score="magnitude", tome_r=r, skip_dead_tokens=False))
    student, twin = sides(gm, {name: tensor.detach() for name, tensor in dense.named_parameters()})
    regions = find(student)
    samples = Samples([[images(7, seed=3)]], Reconstruction(batch=3), None)
    return dense, Walk(student, twin, regions, samples, samples.count, 3, None, Shelf(memory)), samples


@pytest.mark.parametrize(("r", "memory"), [(0, 1 << 20), (2, 0)])
def test_regions_pass_on_what_the_whole_graphs_compute(r, memory):
    dense, walk, samples = walked(r, memory)
    x = torch.cat([batch for (batch,) in samples])
    held = len(walk.steps[-1].spent)
    for step in walk.steps:
        walk.enter(step)
        last = walk.targets[step.region.output].take(slice(0, samples.count))
        own = walk.steps[-1].region.output
        if step is not walk.steps[-1]:
            walk.leave(step)
            assert len(walk.values) <= held + 4  # what nothing reads any more is gone
    walk._run(walk.student, step.region, walk.values)
    student = walk.values[own].take(slice(0, samples.count))
    with torch.no_grad():
        logits = walk.student(x)
        torch.testing.assert_close(dense.head(dense.norm(student)[:, 0]), logits, atol=1e-4, rtol=1e-4)
        assert last.shape == student.shape == (7, 17 - 2 * r, 32) and not torch.equal(last, student)
        if not r:  # merged tokens change the outputs
            torch.testing.assert_close(dense.head(dense.norm(last)[:, 0]), dense(x), atol=1e-4, rtol=1e-4)
    assert (walk.shelf.used == 0) == (memory == 0)


def test_behind_the_last_attention_only_the_class_token_counts():
    _, walk, samples = walked(2, 1 << 20)
    weigher, start = Weigher(walk, [step.region for step in walk.steps], 0.75, 0), 0
    for batch in samples:
        weigher.add(start, batch)
        start += len(batch[0])
    first, *_, last = weigher.result()
    weights = last.of(torch.arange(samples.count), torch.device("cpu"))
    assert weights.shape == (7, 13, 32)
    tokens = (weights / last.channels).mean(-1)
    torch.testing.assert_close(tokens[:, 0], torch.full((7,), 0.75 * 13 + 0.25))
    torch.testing.assert_close(tokens[:, 1:], torch.full((7, 12), 0.25))
    early = first.of(slice(0, 7), torch.device("cpu"))
    assert early.shape == (7, 17, 32) and (early > 0).all()
    torch.testing.assert_close((early / first.channels).mean((1, 2)), torch.ones(7))


def test_samples_are_found_on_any_axis_and_in_sizes():
    shelf = Shelf(1 << 20)
    value = torch.arange(24.0).reshape(2, 4, 3)  # tokens, samples, channels
    rows = Rows(shelf, 4, {"x": value, "n": 8, "k": 5}, {"x": value[:, :3], "n": 6, "k": 5}, 4, 3)
    rows.write(0, {"x": value, "n": 8, "k": 5})
    taken = rows.take(torch.tensor([2, 0, 2]))
    assert torch.equal(taken["x"], value[:, [2, 0, 2]]) and (taken["n"], taken["k"]) == (6, 5)
    windows = torch.arange(12.0).reshape(6, 2)  # two windows of each of three samples
    rows = Rows(shelf, 3, windows, windows[:4], 3, 2)
    rows.write(0, windows)
    assert torch.equal(rows.take(torch.tensor([2])), windows[4:])
    with pytest.raises(GraphError, match="mixes the samples"):
        Rows(shelf, 3, torch.ones(3, 3), torch.ones(2, 2), 3, 2)
