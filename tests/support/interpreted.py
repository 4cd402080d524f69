"""Plain Triton kernels in Triton's interpreter: prints their errors against the reference, as JSON.

Run in a separate process, started with TRITON_INTERPRET=1 by test_triton_kernels.py. In ``tl.dot`` the interpreter
multiplies the bit patterns of bf16, so only fp32 and fp16 are checked here; for bf16, kernels are only compiled.
"""

import json
import sys
from typing import Any

import torch

from mpcompile.kernels.nm_format import pack
from mpcompile.kernels.nm_linear.gpu import expand
from mpcompile.kernels.nm_linear.reference import nm_linear
from mpcompile.kernels.token_merge import fused, reference
from mpcompile.passes.mask import top_n
from tests.support.helpers import an_ulp_off, relative, tied_keys

PATTERNS = [(2, 4), (8, 16), (12, 16), (6, 12), (1, 4), (3, 5), (1, 2), (16, 32), (31, 32), (7, 7)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def plain(kernel: Any) -> Any:
    """Return the kernel itself, in place of wrap_triton: no compiler has to see it."""
    return kernel


def expanded() -> dict[str, float]:
    found = {}
    for number, (n, m) in enumerate(PATTERNS):
        for name, dtype in DTYPES.items():
            torch.manual_seed(number)
            tokens, out, k = (1, 20, 5, 33)[number % 4], 37, m * (1 + 150 // m)
            x, weight = torch.randn(tokens, k).to(dtype), torch.randn(out, k).to(dtype)
            mask = top_n(torch.randn(out, k // m, m), n).flatten(-2)
            values, words = pack(weight, mask, n, m)
            bias = torch.randn(out).to(dtype) if number % 2 else None
            if number % 3 == 0:
                x = torch.cat([x, x], 1)[:, :k]  # rows with gaps between them
            y = expand.launch(x, values, words, bias, n, m, plain)
            exact = nm_linear(x.double(), values.double(), words, None if bias is None else bias.double(), n, m, k)
            found[f"{n}:{m} {name}"] = relative(y, exact)
    return found


def merged() -> dict[str, dict[str, float]]:
    found = {}
    for tokens, r, prefix, heads, dtype in (
        (17, 3, 1, 2, torch.float32),
        (17, 8, 0, 3, torch.float32),
        (81, 11, 1, 3, torch.float32),
        (40, 40, 2, 1, torch.float32),
        (70, 13, 5, 2, torch.float16),
        (31, 6, 1, 2, torch.float32),
        (9, 0, 1, 1, torch.float32),
        (37, 5, 1, 1, torch.float32),
        (33, 7, 2, 3, torch.float32),
    ):
        torch.manual_seed(tokens + r)
        x = torch.randn(2, tokens, 24).to(dtype)
        keys = torch.randn(2, tokens, heads, 20).to(dtype).transpose(1, 2)
        size = torch.randint(1, 4, (2, tokens, 1)).to(dtype)
        keys = {8: tied_keys(2, heads, tokens, 20, 1), 11: tied_keys(2, heads, tokens, 20, 3)}.get(r, keys)
        if r == 6:
            keys[0, 1, 4, 5], keys[1, 0, 7, 3] = torch.nan, torch.inf
        pairs: tuple[Any, ...] = (None, 0.0, 0.0, False)
        if r in (5, 7):
            saliency = torch.rand(2, tokens) * 3
            saliency[0, 8], saliency[1, 6] = torch.nan, torch.inf
            pairs = (saliency, 0.2, 0.05, True)
            size[0, 9:12] = 0.0  # hidden tokens
            keys = x.unsqueeze(1) if r == 5 else keys
        y, new, place = fused.launch(x, an_ulp_off(keys) if r in (8, 11) else keys, size, r, prefix, plain, *pairs)
        want, sizes, places = reference.token_merge(x.float(), keys, size, r, prefix, 0, *pairs)
        same = y.shape == want.shape and new.shape == sizes.shape and torch.equal(place, places)
        found[f"{tokens} {r} {prefix}"] = {
            "shape": float(not same),
            "values": relative(y, want) if same else 9.0,
            "sizes": relative(new, sizes) if same else 9.0,
        }
    return found


if __name__ == "__main__":
    print(json.dumps({"expanded": expanded(), "merged": merged()}))
    sys.exit(0)
