"""PTX executed in numpy, to check the code that Triton emits for a kernel without a GPU.

One thread block runs at a time. All threads of a *strand* (a run of neighbouring warps) run in lock-step. A branch
that warps take differently splits a strand, so that warp-specialised kernels run too. Strands switch where they wait,
at barriers and at mbarriers.

Asynchronous work (``cp.async``, TMA, ``wgmma``) completes at issue with ``lazy=False``, and only at the wait for it
with ``lazy=True``; hardware may complete it anywhere in between. A kernel that overwrites a buffer in use fails
with ``lazy=False``; one that reads before it has waited fails with ``lazy=True``. Strands of one warp (``warps=1``; 4
for ``wgmma``, which a warpgroup issues together), scheduled from the first or from the last (``reverse=True``), show
missing barriers.

Supported: integer and fp32 arithmetic, comparisons, selection, conversions to and from fp16 and bf16, ``ex2``, loads
and stores (global, shared, parameters), ``shfl.idx``, ``elect``, ``ldmatrix``, ``stmatrix``, ``cp.async`` with
groups, ``cp.async.bulk.tensor`` (2-d, 128-byte swizzle), mbarriers, ``bar.sync``, ``mma.sp`` m16n8k32 and
``wgmma.mma_async.sp`` m64nNk32 (fp16 and bf16 inputs, fp32 accumulation). Anything else raises NotImplementedError,
and so does a branch that splits the threads of one warp.

Not modelled: clusters, fences and memory order between proxies, races inside a warp, register pressure, time, and the
hardware's order of fp32 additions. ``mma.sp`` and ``wgmma`` follow the PTX ISA (9.x, matrix fragments and sparse
metadata); they have not been compared with a GPU.
"""

from tests.support.ptx.block import Block
from tests.support.ptx.memory import Fault, Memory, TensorMap
from tests.support.ptx.program import Program

__all__ = ["Block", "Fault", "Memory", "Program", "TensorMap"]
