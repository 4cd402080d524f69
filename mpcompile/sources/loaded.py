"""A model and what its source knows about it: inputs, preprocessing, class names, origin of the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpcompile.data.images import Images, data_config, images_at
from mpcompile.errors import InputError, first_line, printable

DEFAULT_SIZE = (3, 224, 224)


@dataclasses.dataclass
class LoadedModel:
    """A dense model in eval mode, and what its source knows about it.

    Attributes:
        model: the model, fp32 on the CPU.
        name: the name it was loaded by.
        kind: kind of source: "timm", "function", "transformers", "timm folder" or "program".
        what: class or architecture, and the library's version, for people.
        weights: origin of the weights, as a JSON value.
        data: size, mean, standard deviation and crop of its images (see :func:`mpcompile.data.images.data_config`).
        class_names: names of the classes in the order of the logits; empty if unknown.
        input_name: keyword that takes the images; None if they are the first positional input.
        example: inputs that the source gave: a tensor, a tuple or a dict; None if it gave none.
        random: the weights are known to be random, so that accuracy means nothing.
        fixed_batch: the only batch size that the model takes; None if it takes any.
        notes: remarks on what was assumed or converted.

    Example:
        >>> loaded = mpcompile.load_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=3)
        >>> loaded.kind, loaded.num_classes, loaded.data["input_size"]
        ('timm', 3, [3, 32, 32])
        >>> loaded.model(loaded.example_inputs(4)).shape
        torch.Size([4, 3])
    """

    model: nn.Module
    name: str
    kind: str
    what: str
    weights: Any
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    class_names: Sequence[str] = ()
    input_name: str | None = None
    example: Any = None
    random: bool = False
    fixed_batch: int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if the model is not known to be a classifier."""
        own = getattr(self.model, "num_classes", None)
        return own if isinstance(own, int) and own > 0 else len(self.class_names)

    def example_inputs(self, batch: int = 2, *, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Any:
        """Return inputs of random noise, in the form that the model takes: a tensor, or a dict with its keyword.

        A source that has several inputs, or others than images, gives its own example instead, whatever the batch.

        Args:
            batch: number of images.
            dtype: dtype of images.
            device: device of the inputs.
        """
        if self.example is not None and not self.takes_images:
            floating = lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype)  # noqa: E731
            return pytree.tree_map_only(Tensor, floating, self.example)
        size = self.data.get("input_size", DEFAULT_SIZE)
        return self.inputs(torch.randn(self.fixed_batch or batch, *size, dtype=dtype, device=device))

    @property
    def takes_images(self) -> bool:
        """True if images are the model's only input."""
        return self.example is None or len(pytree.tree_leaves(self.example)) == 1

    def inputs(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """Return images (batch, C, H, W), with labels (batch,) if given, as a batch in the form that the model takes.

        Raises:
            InputError: the model has inputs besides images.
        """
        self.check_takes_images()
        return batch_of(images, labels, self.input_name)

    def images(self, path: Path | str, samples: int | None = None, batch: int = 32, seed: int = 0) -> Batches:
        """Return the images of a folder or an .npz file, preprocessed for the model, as batches that it takes.

        Labels are included if the folder has one subfolder per class (see :func:`mpcompile.data.images.folder`).

        Args:
            path: the folder or file.
            samples: number of images to draw; None takes all.
            batch: images per batch.
            seed: seed of the draw.

        Raises:
            InputError: there are no images, or labels do not fit.
        """
        self.check_takes_images()
        how: dict[str, Any] = {"samples": samples, "batch": self.fixed_batch or batch, "seed": seed}
        names = list(self.class_names)
        return self.batches(images_at(Path(path), self.data, classes=self.num_classes, names=names, **how))

    def batches(self, images: Images) -> Batches:
        """Return batches of image files in the form that the model takes.

        Raises:
            InputError: the model has inputs besides images.
        """
        return Batches(self.whole_batches(images), self.input_name)

    def whole_batches(self, images: Images) -> Images:
        """Return the images without those of a last, smaller batch that the model would not take.

        Raises:
            InputError: the model has inputs besides images, or there are fewer images than make a batch.
        """
        self.check_takes_images()
        rest = 0 if self.fixed_batch is None else images.count % self.fixed_batch
        if not rest:
            return images
        if rest == images.count:
            hint = "export the model with a batch size that is left free"
            raise InputError(
                f"{self.name} takes batches of {self.fixed_batch} images alone", found=f"{rest} images", hint=hint
            )
        note = f"{rest} images left out: the model takes batches of {self.fixed_batch} alone"
        return dataclasses.replace(images.first(images.count - rest), notes=(*images.notes, note))

    def check_takes_images(self) -> None:
        """Check that images are the model's only input.

        Raises:
            InputError: they are not.
        """
        if not self.takes_images:
            raise InputError(
                f"{self.name} takes more than images, so its batches cannot be made from image files",
                hint="wrap it in a function that returns a module of images alone, or use the Python API",
            )

    def summary(self) -> str:
        """Return one line: source, weights, images, classes and notes."""
        data = self.data
        parts = [f"{self.kind}, {self.what}", f"weights: {_weights_text(self.weights)}"]
        if self.takes_images and data:
            size = "x".join(map(str, data.get("input_size", DEFAULT_SIZE)))
            scale = ", ".join(f"{key} {_numbers(data[key])}" for key in ("mean", "std") if key in data)
            crop = " ".join(str(data[key]) for key in ("interpolation", "crop_mode", "crop_pct") if key in data)
            named = f" as {self.input_name}" if self.input_name else ""
            parts.append(f"images {size}{named}, {scale}, {crop}")
        if self.num_classes:
            shown = ", ".join(self.class_names[:3]) + (", ..." if len(self.class_names) > 3 else "")
            parts.append(f"{self.num_classes} classes" + (f" ({shown})" if shown else ""))
        return printable("; ".join([f"{self.name}: {parts[0]}", *parts[1:], *self.notes]))

    def provenance(self) -> dict[str, Any]:
        """Return what an artifact keeps about its dense model, as JSON values."""
        known = {
            "model": self.name,
            "source": self.kind,
            "architecture": self.what,
            "weights": self.weights,
            "num_classes": self.num_classes or None,
            "data": self.data,
        }
        named = {"class_names": list(self.class_names)} if self.class_names else {}
        return {**known, **named, **({"input": self.input_name} if self.input_name else {})}


class Batches:
    """Batches of images under the keyword of a model; the files are read on every iteration.

    Args:
        images: the images.
        input_name: the keyword; None leaves tensors, or pairs with labels, as they are.
    """

    def __init__(self, images: Images, input_name: str | None) -> None:
        self.source, self.input_name = images, input_name
        self.count, self.notes = images.count, images.notes

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.source)

    def __iter__(self) -> Any:
        """Yield batches, with labels if the images have them."""
        for item in self.source:
            images, labels = item if isinstance(item, tuple) else (item, None)
            yield batch_of(images, labels, self.input_name)


def batch_of(images: Tensor, labels: Tensor | None, input_name: str | None) -> Any:
    """Return a batch as models and DataLoaders of its kind have it.

    Args:
        images: (batch, C, H, W).
        labels: (batch,), or None.
        input_name: keyword of the images, or None.

    Example:
        >>> sorted(batch_of(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), "pixel_values"))
        ['labels', 'pixel_values']
    """
    if input_name is None:
        return images if labels is None else (images, labels)
    return {input_name: images} if labels is None else {input_name: images, "labels": labels}


def ready(loaded: LoadedModel) -> LoadedModel:
    """Bring a loaded model to eval mode, fp32 and the CPU, and complete what is known about its images.

    Preprocessing and number of classes are also set on the module where timm's models have them
    (``pretrained_cfg``, ``num_classes``), so that every part that reads these finds them.

    Raises:
        InputError: weights are on the meta device, where they have no values, or cannot be moved.
    """
    model = loaded.model
    tensors = [*model.parameters(), *model.buffers()]
    places = {str(t.device) for t in tensors}
    if any(t.is_meta for t in tensors):
        raise InputError(
            f"{loaded.name} has weights on the meta device, which have no values",
            expected="weights on the CPU or a GPU",
            hint="make the model without torch.device('meta') or init_empty_weights",
        )
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in model.parameters() if t.is_floating_point()})
    try:
        if places - {"cpu"}:
            model.cpu()
            loaded.notes.append(f"moved from {', '.join(sorted(places - {'cpu'}))} to the CPU")
        if kinds and kinds != ["float32"] and loaded.kind != "program":
            model.float()
            loaded.notes.append(f"weights converted from {' and '.join(kinds)} to float32")
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"{loaded.name} cannot be moved to the CPU: {first_line(error)}") from error
    if loaded.kind != "program":  # an exported program refuses to change its mode
        model.eval()
    if not loaded.data:
        loaded.data = data_config(model)
    if not getattr(model, "pretrained_cfg", None):
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in loaded.data.items()}
        model.pretrained_cfg = values  # type: ignore[assignment]
    classes = loaded.num_classes or _classes_seen(loaded)
    if classes and not isinstance(getattr(model, "num_classes", None), int):
        model.num_classes = classes  # type: ignore[assignment]
    return loaded


def _classes_seen(loaded: LoadedModel) -> int:
    """Return the number of logits that a function's model or a program returns for an image; 0 if it returns others."""
    if loaded.kind not in ("function", "program") or not loaded.takes_images:
        return 0
    inputs = loaded.example_inputs(1)
    try:
        with torch.no_grad():
            output = loaded.model(**inputs) if isinstance(inputs, dict) else loaded.model(inputs)
    except Exception:  # the command that needs the number says what is wrong with the model
        return 0
    output = getattr(output, "logits", output)
    return output.shape[1] if isinstance(output, Tensor) and output.dim() == 2 else 0


def _weights_text(weights: Any) -> str:
    if not isinstance(weights, Mapping):
        return str(weights)
    digest = weights.get("sha256") or weights.get("revision") or ""
    return f"{weights.get('file') or weights.get('repository')}" + (f" ({digest[:12]})" if digest else "")


def _numbers(values: Sequence[float]) -> str:
    return "/".join(f"{value:.3g}" for value in values)
