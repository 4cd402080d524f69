"""The installed Triton, and whether it can compile the sparse tensor-core kernels."""

from __future__ import annotations

import functools


@functools.cache
def old_triton() -> str | None:
    """Return why the installed Triton cannot compile the kernels, or None if it can."""
    try:
        import triton
        from triton.experimental.gluon import language
    except ImportError as error:
        return f"no Triton with Gluon ({error})"
    if not hasattr(language, "inline_asm"):
        return f"Triton {triton.__version__}: the kernels need gl.inline_asm, which came with 3.9"
    return None
