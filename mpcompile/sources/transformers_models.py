"""Models of the transformers library: a folder written by ``save_pretrained``, or a repository in the same layout."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mpcompile.data.images import data_config
from mpcompile.errors import ArtifactError, ConfigError, InputError, first_line, printable
from mpcompile.io.checkpoints import read_checkpoint
from mpcompile.sources.loaded import DEFAULT_SIZE, LoadedModel
from mpcompile.sources.processors import data_of

_NAMED = 3  # tensors in a message
# Buffers that older versions of the library stored and newer ones compute.
_COMPUTED = re.compile(r"(^|\.)(position_ids|relative_position_index|num_batches_tracked)$")


def load_transformers(
    name: str,
    place: str,
    config: Mapping[str, Any],
    weights: Any,
    *,
    revision: str | None = None,
    checkpoint: Path | None = None,
    architecture: str | None = None,
) -> LoadedModel:
    """Return a model of transformers. Nothing in the folder or repository is executed.

    Args:
        name: the model's name, for messages.
        place: path of the folder, or identifier of the repository.
        config: the content of its config.json.
        weights: origin of the weights, for the provenance.
        revision: of the repository.
        checkpoint: load the weights from this file instead.
        architecture: class to load; None: the first one that the configuration names.

    Raises:
        ConfigError: transformers is not installed or does not know the architecture, or it takes no images.
        InputError: the model needs its own code, or cannot be made.
        ArtifactError: weights are missing, damaged, or do not fit.
    """
    _check_config(name, config)
    library = _library(name)
    kind = _class(library, name, architecture or config["architectures"][0])
    with _silent(library):
        model: Any = _loaded(kind, name, place, revision, checkpoint)
        processor, note = _processor(library, name, place, revision)
    taken = getattr(model, "main_input_name", "pixel_values")
    if taken != "pixel_values":
        hint = "a function source can return one of its parts, or the module with example inputs"
        vision = [part for part in (f"{kind.__name__.removesuffix('Model')}VisionModel",) if hasattr(library, part)]
        if vision:
            hint = f"its image tower: --model-args architecture={vision[0]}"
        raise ConfigError(
            f"{name} is not a model of images alone", expected="an input called pixel_values", found=taken, hint=hint
        )
    data, notes = _data(model, processor)
    if _is_classifier(model):
        model.num_classes = model.config.num_labels
    return LoadedModel(
        model,
        name,
        "transformers",
        f"{kind.__name__} (transformers {library.__version__})",
        weights,
        data,
        class_names=_class_names(model),
        input_name=taken,
        notes=[*([note] if note else []), *notes],
    )


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    """Check that a model can be made from a config.json without its own code or another library's quantization.

    Raises:
        InputError: it cannot.
    """
    if config.get("auto_map"):
        code = config["auto_map"]
        named = ", ".join(map(str, code.values())) if isinstance(code, Mapping) else str(code)
        raise InputError(
            f"{name} needs code of its own (trust_remote_code), which is not run",
            expected="an architecture of the transformers library",
            found=f"auto_map: {printable(named, 100)}",
            hint="if you trust the code, load the model in a function of yours and name that: file.py:function",
        )
    if config.get("quantization_config"):
        raise InputError(f"{name} has quantized weights", expected="weights in floating point")
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"config.json of {name} names no architecture", expected='"architectures": ["..."]')


def _library(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"transformers is not installed, so {name} cannot be loaded", hint="run pip install 'mpcompile[hub]'"
        ) from error
    return transformers


def _class(library: Any, name: str, architecture: str) -> Any:
    """Return the class of an architecture.

    Raises:
        ConfigError: the installed transformers does not have it, or it is not the class of a model.
    """
    kind = getattr(library, architecture, None)
    if kind is None:
        raise ConfigError(
            f"transformers {library.__version__} does not know the architecture of {name}",
            expected="an architecture of the installed version",
            found=printable(architecture, 100),
            hint="run pip install --upgrade transformers",
        )
    if not (isinstance(kind, type) and issubclass(kind, library.PreTrainedModel)):
        raise ConfigError(
            f"the architecture of {name} is not a model of transformers", found=printable(architecture, 100)
        )
    return kind


@contextlib.contextmanager
def _silent(library: Any) -> Iterator[None]:
    """Keep the library's progress bars and warnings off the terminal: what they say is in errors and notes."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _loaded(kind: Any, name: str, place: str, revision: str | None, checkpoint: Path | None) -> nn.Module:
    """Return the model with the weights of its folder or repository, or of a checkpoint.

    Either goes through ``from_pretrained``, which knows the names that tensors have had in earlier versions.

    Raises:
        ArtifactError: weights are missing, damaged, or do not fit.
        InputError: the model cannot be made.
    """
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "weights_only": True}
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    where = {"revision": revision or "main", "trust_remote_code": False}
    try:
        if state is None:
            model, report = kind.from_pretrained(place, **where, **options)
        else:
            config = kind.config_class.from_pretrained(place, **where)
            model, report = kind.from_pretrained(None, config=config, state_dict=state, **options)
    except Exception as error:
        if "safetensor" in f"{type(error).__name__}{error}".lower() or "Unpickling" in type(error).__name__:
            raise ArtifactError(
                f"the weights of {name} cannot be read",
                expected="a complete safetensors file, or a torch file that holds only tensors",
                found=first_line(error),
                hint="fetch the file again",
            ) from error
        raise InputError(f"{kind.__name__} cannot be made from {name}: {first_line(error)}") from error
    origin = f"the file of weights of {name}" if checkpoint is None else str(checkpoint)
    wrong = [(str(key), f"{tuple(own)}", f"{tuple(found)}") for key, found, own in report["mismatched_keys"]]
    if wrong:
        key, own, found = min(wrong)
        more = f" (and {len(wrong) - 1} more such tensors)" if len(wrong) > 1 else ""
        raise ArtifactError(
            f"{origin} does not fit {kind.__name__}", expected=f"{key} of shape {own}", found=found + more
        )
    missing = sorted(report["missing_keys"])
    unknown = sorted(key for key in report["unexpected_keys"] if not _COMPUTED.search(key))
    if missing or unknown:
        expected = f"its {len(model.state_dict())} tensors" + _named(", also ", missing)
        found = "others: " + _named("", unknown) if unknown else "none of that name"
        raise ArtifactError(f"{origin} does not fit {kind.__name__}", expected=expected, found=found)
    loaded: nn.Module = model
    return loaded


def _named(before: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return before + ", ".join(printable(name, 60) for name in names[:_NAMED]) + more


def _processor(library: Any, name: str, place: str, revision: str | None) -> tuple[dict[str, Any] | None, str | None]:
    """Return the image processor's configuration, None if there is none, and a note on why."""
    try:
        options = {"revision": revision or "main", "trust_remote_code": False}
        processor = library.AutoImageProcessor.from_pretrained(place, **options)
        return processor.to_dict(), None
    except Exception as error:
        folder = Path(place)
        if folder.is_dir() and not any(
            (folder / file).exists() for file in ("preprocessor_config.json", "processor_config.json")
        ):
            return None, "it has no preprocessor_config.json: the normalisation of ImageNet is assumed"
        return None, f"its image processor cannot be read ({first_line(error)}): that of ImageNet is assumed"


def _data(model: Any, processor: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """Return the data configuration, and notes on what was assumed."""
    data = {**data_config(model), **({} if processor is None else data_of(processor))}
    size, notes = _config_size(model.config), []
    if processor is None:
        data |= {"input_size": size or list(DEFAULT_SIZE), "crop_pct": 1.0}
    elif size is not None and size != data["input_size"] and not _accepts(model, data["input_size"]):
        made = "x".join(map(str, size))
        notes.append(f"the image processor makes {'x'.join(map(str, data['input_size']))}, but the model takes {made}")
        data["input_size"] = size
    return data, notes


def _config_size(config: Any) -> list[int] | None:
    """Return the image size (channels, height, width) in a model's configuration."""
    part = config if hasattr(config, "image_size") else getattr(config, "vision_config", None)
    size, channels = getattr(part, "image_size", None), getattr(part, "num_channels", 3)
    if isinstance(size, int):
        size = (size, size)
    return [int(channels), *map(int, size)] if isinstance(size, (list, tuple)) and len(size) == 2 else None


def _accepts(model: nn.Module, size: Sequence[int]) -> bool:
    import torch

    try:
        with torch.no_grad():
            model.eval()(pixel_values=torch.zeros(1, *size))
    except Exception:
        return False
    return True


def _is_classifier(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("ImageClassification", "ImageClassificationWithTeacher"))


def _class_names(model: Any) -> list[str]:
    """Return the names of a classifier's classes in the order of its logits; [] if they have none of their own."""
    if not _is_classifier(model):
        return []
    labels: Mapping[Any, Any] = getattr(model.config, "id2label", None) or {}
    try:
        names = [str(labels[number]) for number in range(len(labels))]
    except KeyError:
        return []
    return [] if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names
