"""The images of a search: one part that fits may use, and one that they never see, on which builds are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpcompile.calibration.data import as_batches
from mpcompile.data import ranks
from mpcompile.data.batches import forward, read
from mpcompile.data.calls import call_form
from mpcompile.data.labels import Labels, check_range
from mpcompile.data.outputs import logits_of
from mpcompile.errors import InputError
from mpcompile.ir.numerics import training_flags
from mpcompile.optimization.accuracy.outcome import Outcome, compare, images_needed, outcome_of

FIT = 0.25  # share of the calibration images for fits, if there are no validation images
LEAST = 16  # images for fits


@dataclass
class Images:
    """Images in memory, in batches.

    Attributes:
        batches: inputs of the model: a tensor, or a dict of tensors, each with the samples on axis 0.
        labels: int64 labels per batch; None without labels.
        scores: class scores of the dense model per batch, once :meth:`judge` is to compare with them.
    """

    batches: list[Any]
    labels: list[Tensor] | None
    scores: list[Tensor] | None = None

    def __len__(self) -> int:
        return sum(_length(batch) for batch in self.batches)

    def __add__(self, other: Images) -> Images:
        """Return both, if both have labels, or neither has."""
        labels = None if self.labels is None or other.labels is None else [*self.labels, *other.labels]
        scores = None if self.scores is None or other.scores is None else [*self.scores, *other.scores]
        return Images([*self.batches, *other.batches], labels, scores)

    def first(self, size: int) -> Any:
        """Return one batch of ``size`` samples, which repeat if there are fewer."""

        def cut(position: int) -> Tensor:
            leaves = [pytree.tree_leaves(batch)[position] for batch in self.batches[:size]]
            whole = torch.cat(leaves)
            return whole.repeat(-(-size // len(whole)), *[1] * (whole.dim() - 1))[:size].contiguous()

        leaves, tree = pytree.tree_flatten(self.batches[0])
        return pytree.tree_unflatten([cut(position) for position in range(len(leaves))], tree)

    @torch.no_grad()
    def add_dense(self, model: nn.Module) -> None:
        """Keep the dense model's class scores, which processes compute together.

        Raises:
            InputError: the model returns no class scores, one class only, or has no class for a label.
        """
        with training_flags(model, False):
            own = [logits_of(run_batch(model, batch, "model")).float().cpu() for batch in self._mine(self.batches)]
        parts = ranks.gather(own)
        self.scores = [parts[i % len(parts)][i // len(parts)] for i in range(len(self.batches))]
        classes = self.scores[0].shape[1]
        if classes < 2:
            raise InputError("the model has a single class: its top-1 never changes", expected="two classes or more")
        for labels in self.labels or ():
            check_range(labels, classes)

    @staticmethod
    def _mine(items: list[Any]) -> list[Any]:
        """Return the share of this process: every n-th of n processes."""
        return items[ranks.rank() :: ranks.world()]

    @torch.no_grad()
    def judge(self, build: Callable[..., Any], *, size: int | None = None, alone: bool = False) -> Outcome:
        """Return how a build compares with the dense model on all images.

        Args:
            build: a graph, or a compiled build.
            size: samples per call, for a build that takes no other number; by default those of the batches. The last
                batch is filled up.
            alone: False shares the images among the processes, which then must all call this.
        """
        assert self.scores is not None  # add_dense() comes first
        labels: list[Tensor | None] = [None] * len(self.batches) if self.labels is None else list(self.labels)
        jobs = list(zip(self.batches, self.scores, labels, strict=True))
        sums = [0.0] * 7
        modules = nn.ModuleList([build] if isinstance(build, nn.Module) else [])
        with training_flags(modules, False):
            for batch, dense, known in jobs if alone else self._mine(jobs):
                scores = torch.cat(
                    [logits_of(run_batch(build, part, "build"), "build") for part in parts_of(batch, size)]
                )
                sums = [a + b for a, b in zip(sums, compare(dense, scores[: len(dense)].cpu(), known), strict=True)]
        total = sums if alone else ranks.total(*sums, device=torch.device("cpu"))
        return outcome_of(total, self.labels is not None)


def parts_of(batch: Any, size: int | None) -> Iterator[Any]:
    """Yield a batch in parts of exactly ``size`` samples, the last one filled up with its last sample; or as it is."""
    count = _length(batch)
    if size is None or size == count:
        yield batch
        return
    for start in range(0, count, size):
        yield select(batch, torch.arange(start, start + size).clamp(max=count - 1))


def run_batch(build: Any, batch: Any, who: str) -> Any:
    """Return the output of a model or build for one batch."""
    module = getattr(build, "_orig_mod", build)
    args, kwargs = call_form(module, batch)
    return build(*args, **kwargs) if build is not module else forward(build, kwargs or args, who)


def gather(model: nn.Module, data: Any, what: str, memory: int) -> tuple[Any, Tensor | None, int]:
    """Read batches into memory.

    Args:
        model: what they are for: its inputs are kept, other entries are not.
        data: batches, with labels or without.
        what: name of the data, for errors.
        memory: bytes that they may take.

    Returns:
        All inputs as one batch, their labels (int64) or None, and the length of the first batch.

    Raises:
        InputError: there are none, labels do not fit, or they take more memory.
    """
    known = Labels()
    parts: list[Any] = []
    labels: list[Tensor] = []
    size = 0
    for batch in read(as_batches(data, what), what):
        args, kwargs = call_form(model, batch)
        inputs = kwargs or (args[0] if len(args) == 1 else args)
        count = _length(inputs)
        if not count:
            continue
        numbers = known.of(batch, count)
        if numbers is not None:
            labels.append(numbers)
        parts.append(inputs)
        size += sum(leaf.nbytes for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
        if size > memory:
            raise InputError(
                f"{what} takes too much memory",
                expected=f"at most {memory / 2**30:.1f} GiB of images",
                found=f"more, after {sum(map(_length, parts))} images",
                hint="give fewer images, or a larger memory=",
            )
    if not parts:
        raise InputError(f"{what} is empty", expected="at least one batch of images", found="none")
    leaves = [pytree.tree_leaves(part) for part in parts]
    if not all(isinstance(leaf, Tensor) and leaf.dim() for part in leaves for leaf in part):
        raise InputError(f"{what} has inputs without an axis of samples", expected="tensors (batch, ...)")
    whole = [torch.cat(column) for column in zip(*leaves, strict=True)]
    tree = pytree.tree_structure(parts[0])
    return pytree.tree_unflatten(whole, tree), torch.cat(labels) if labels else None, _length(parts[0])


def split(
    whole: tuple[Any, Tensor | None, int], seed: int, max_drop: float, confidence: float, share: float = FIT
) -> tuple[Images, Images]:
    """Split images at random into a part for fits and one on which builds are judged.

    Raises:
        InputError: there are too few; the message says how many are needed.
    """
    inputs, labels, size = whole
    count = _length(inputs)
    fit = max(LEAST, round(share * count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    check_enough(count - fit, max_drop, confidence, count)
    parts = (order[:fit], order[fit:])
    first, second = (batched(select(inputs, p), None if labels is None else labels[p], size) for p in parts)
    return first, second


def check_enough(count: int, max_drop: float, confidence: float, given: int) -> None:
    """Check that a drop of ``max_drop`` can be shown on ``count`` images at all.

    Raises:
        InputError: there are too few; the message says how many are needed.
    """
    needed = images_needed(max_drop, confidence)
    if count < needed:
        raise InputError(
            f"there are too few images to show a drop of at most {max_drop:.2%} with {confidence:.0%} confidence",
            expected=f"{needed} images that no fit sees, even for a build that changes nothing "
            f"({images_needed(max_drop, confidence, 0.04)} for one that changes 4 % of the classes)",
            found=f"{max(0, count)} of the {given} given",
            hint="give more images, a larger max_drop, or a smaller confidence",
        )


def select(inputs: Any, index: Tensor) -> Any:
    """Return the samples with these numbers."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[index.to(tensor.device)], inputs)


def batched(inputs: Any, labels: Tensor | None, size: int) -> Images:
    """Return samples in batches of ``size``."""
    pieces = torch.arange(_length(inputs)).split(max(1, size))
    return Images([select(inputs, part) for part in pieces], None if labels is None else [labels[p] for p in pieces])


def _length(inputs: Any) -> int:
    leaf = next((leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), None)
    return 0 if leaf is None else len(leaf)
