"""The errors a user can meet. Each says where, what was expected, what was found, and what to do next."""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "ConfigError",
    "GraphError",
    "InputError",
    "MPCompileError",
    "NotEligibleError",
    "TraceError",
]


class MPCompileError(Exception):
    """Base of every error that mpcompile raises for something the user can change.

    Args:
        message: What went wrong, in one sentence.
        layer: Path of the layer concerned, e.g. ``"blocks.0.attn.qkv"``.
        expected: What was expected there.
        found: What was found instead.
        hint: The next step.

    Example:
        >>> print(MPCompileError("weight is not finite", layer="head", expected="finite values", found="3 NaN"))
        head: weight is not finite; expected finite values, found 3 NaN
    """

    def __init__(
        self,
        message: str,
        *,
        layer: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.layer, self.expected, self.found, self.hint = layer, expected, found, hint
        text = f"{layer}: {message}" if layer else message
        if expected is not None:
            text += f"; expected {expected}"
        if found is not None:
            text += f", found {found}" if expected is not None else f"; found {found}"
        if hint:
            text += f". {hint[0].upper()}{hint[1:]}"
        super().__init__(text)


class ConfigError(MPCompileError):
    """An option that doesn't exist, or a value it can't take."""


class InputError(MPCompileError):
    """Data of the wrong kind: example inputs, calibration batches, weights that are not finite."""


class TraceError(MPCompileError):
    """The module can't be brought into the IR."""


class GraphError(MPCompileError):
    """A pass can't do what was asked on this graph, or left it inconsistent."""


class NotEligibleError(MPCompileError):
    """Nothing can be masked, or a layer that the user named can't be."""


class ArtifactError(MPCompileError):
    """A file that can't be read, written, or trusted."""


def summary(error: BaseException, most: int = 200) -> str:
    """What an error of somebody else's says, in one printable line: its class, and its first line if it has one.

    Example:
        >>> summary(ValueError("no such size\nmore"))
        'ValueError: no such size'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = ": ".join([type(error).__name__, *lines[:1]])
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
