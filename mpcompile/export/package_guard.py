"""Guards of an AOTInductor package: each call checks that its inputs are those that the code was compiled for.

Inductor compiles sizes, strides and dtypes into native code that trusts its caller: it reads a smaller batch out of
bounds, a larger one only in part, and the bits of another dtype as if they were of the expected one. A package may be
loaded where only torch is installed, so the checks are compiled into it. Inputs of other sizes, dtypes or devices are
refused; inputs of other strides (channels_last, slices, expanded batches) are copied into the layout that the code
reads.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpcompile.errors import GraphError

_HOOK = "generate_input_output_runtime_checks"  # Inductor's method that writes the checks that run_impl calls first
_CALLED = "#define __check_inputs_outputs(inputs, outputs) mpcompile_guard(inputs, outputs, this->device_idx_)"
_CALL = "__check_inputs_outputs(input_handles"
_ALIGNMENT = 16  # bytes that Triton kernels assume; CPU code assumes none

# Inserted inside a namespace of the generated source: it cannot include headers, and uses only names declared there.
_HELPERS = """
// A refused call still owns its inputs: run_impl has not taken them yet. Delete them and leave nulls, as run_impl does.
[[noreturn]] static void mpcompile_refuse(AtenTensorHandle* handles, int64_t count, const std::string& why) {
    for (int64_t i = 0; i < count; ++i) {
        aoti_torch_delete_tensor_object(handles[i]);
        handles[i] = nullptr;
    }
    throw std::runtime_error(why);
}

static std::string mpcompile_text(const int64_t* sizes, int64_t rank) {
    std::string text = "(";
    for (int64_t i = 0; i < rank; ++i) {
        text += (i ? ", " : "") + std::to_string(sizes[i]);
    }
    return text + ")";
}

static std::string mpcompile_dtype(int32_t dtype) {
#define MPCOMPILE_DTYPE(name) if (dtype == aoti_torch_dtype_##name()) return #name;
    MPCOMPILE_DTYPE(float16) MPCOMPILE_DTYPE(bfloat16) MPCOMPILE_DTYPE(float32) MPCOMPILE_DTYPE(float64)
    MPCOMPILE_DTYPE(uint8) MPCOMPILE_DTYPE(int8) MPCOMPILE_DTYPE(int16) MPCOMPILE_DTYPE(int32) MPCOMPILE_DTYPE(int64)
    MPCOMPILE_DTYPE(bool)
    return "another dtype";
#undef MPCOMPILE_DTYPE
}

// Returns the sizes of input i, each between low and high.
static const int64_t* mpcompile_check(
    AtenTensorHandle* handles, int64_t count, int64_t i, const char* expected, int32_t dtype, int32_t device,
    int32_t index, int64_t rank, const int64_t* low, const int64_t* high) {
    int32_t found_dtype = -1, found_device = -1, found_index = -1, layout = -1;
    int64_t found_rank = -1;
    int64_t* sizes = nullptr;
    const std::string wanted = "input " + std::to_string(i) + ": expected " + expected + ", found ";
    if (aoti_torch_get_layout(handles[i], &layout) || layout != aoti_torch_layout_strided()) {
        mpcompile_refuse(handles, count, wanted + "a tensor that is not strided");
    }
    if (aoti_torch_get_dtype(handles[i], &found_dtype) || aoti_torch_get_device_type(handles[i], &found_device) ||
        aoti_torch_get_device_index(handles[i], &found_index) || aoti_torch_get_dim(handles[i], &found_rank) ||
        aoti_torch_get_sizes(handles[i], &sizes)) {
        mpcompile_refuse(handles, count, wanted + "a tensor without readable properties");
    }
    if (found_dtype != dtype) {
        mpcompile_refuse(handles, count, wanted + mpcompile_dtype(found_dtype));
    }
    if (found_device != device || (device != aoti_torch_device_type_cpu() && found_index != index)) {
        mpcompile_refuse(handles, count, wanted + "another device");
    }
    bool fits = found_rank == rank;
    for (int64_t d = 0; fits && d < rank; ++d) {
        fits = sizes[d] >= low[d] && sizes[d] <= high[d];
    }
    if (!fits) {
        mpcompile_refuse(handles, count, wanted + mpcompile_text(sizes, found_rank));
    }
    return sizes;
}

// Replaces input i by a copy where its strides are not those that the code reads.
static void mpcompile_arrange(
    AtenTensorHandle* handles, int64_t count, int64_t i, int64_t rank, const int64_t* sizes, const int64_t* wanted,
    int32_t dtype, int32_t device, uintptr_t alignment) {
    int64_t* strides = nullptr;
    void* data = nullptr;
    bool fits = !aoti_torch_get_strides(handles[i], &strides) && !aoti_torch_get_data_ptr(handles[i], &data) &&
        reinterpret_cast<uintptr_t>(data) % alignment == 0;
    for (int64_t d = 0; fits && d < rank; ++d) {
        fits = sizes[d] == 1 || strides[d] == wanted[d];
    }
    if (fits) {
        return;
    }
    int32_t index = 0;
    AtenTensorHandle copy = nullptr;
    bool done = !aoti_torch_get_device_index(handles[i], &index) &&
        !aoti_torch_empty_strided(rank, sizes, wanted, dtype, device, index, &copy);
    if (!done || aoti_torch_copy_(copy, handles[i], 0)) {
        if (done) {
            aoti_torch_delete_tensor_object(copy);
        }
        mpcompile_refuse(handles, count, "input " + std::to_string(i) + " cannot be copied into contiguous memory");
    }
    aoti_torch_delete_tensor_object(handles[i]);
    handles[i] = copy;
}
"""


@contextlib.contextmanager
def guarded(package: Path, low: int, high: int) -> Iterator[None]:
    """Make the package that is compiled in this block check its inputs at every call.

    Args:
        package: the file that the block writes.
        low: the smallest size of an axis that was left free.
        high: the largest size of such an axis.

    Raises:
        GraphError: this version of torch has no hook in AOTInductor for checks.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    original: Any = getattr(CppWrapperCpu, _HOOK, None)
    if original is None:
        raise _unguarded()

    def write(wrapper: Any) -> None:
        original(wrapper)
        splice = getattr(wrapper.prefix, "splice_aot", wrapper.prefix.splice)
        splice(_HELPERS)
        splice(_checks(low, high))

    setattr(CppWrapperCpu, _HOOK, write)
    try:
        yield
    finally:
        setattr(CppWrapperCpu, _HOOK, original)
    with zipfile.ZipFile(package) as file:
        sources = [file.read(name).decode() for name in file.namelist() if name.endswith(".cpp")]
    if sources and not any(_CALL in source.partition(_CALLED)[2] for source in sources):
        raise _unguarded()


def _unguarded() -> GraphError:
    return GraphError(
        "packages of this version of torch cannot check their inputs",
        expected="a version in which AOTInductor writes input checks",
        hint="export pt2 or onnx instead",
    )


def _checks(low: int, high: int) -> str:
    """Return C++ code that checks the inputs of the graph being compiled, under the name that run_impl calls."""
    from torch._inductor.virtualized import V

    inputs = list(V.graph.graph_inputs.values())
    known: set[str] = set()
    arguments = "AtenTensorHandle* handles, AtenTensorHandle* outputs, [[maybe_unused]] int32_t index"
    lines = [f"AOTI_NOINLINE static void mpcompile_guard({arguments}) {{"]
    for number, value in enumerate(inputs):
        if hasattr(value, "get_size") and hasattr(value, "get_stride"):
            lines += _check_of(number, len(inputs), value, low, high, known)
    lines += ["    __check_inputs_outputs(handles, outputs);", "}"]
    return "\n".join([*lines, _CALLED, ""])


def _check_of(number: int, count: int, value: Any, low: int, high: int, known: set[str]) -> list[str]:
    """Return statements that check one input; ``known`` holds the free sizes that earlier inputs have defined."""
    from torch._inductor.codegen.cpp_utils import cexpr

    sizes, strides, device = list(value.get_size()), list(value.get_stride()), value.get_device()
    name = str(value.get_dtype()).removeprefix("torch.")
    lower, upper, definitions = [], [], []
    for axis, size in enumerate(sizes):
        text = str(size)
        if text.isdigit() or text in known:
            lower.append(text)
            upper.append(text)
            continue
        lower.append(str(low))
        upper.append(str(high))
        if text.isidentifier():
            known.add(text)
            definitions.append(f"    const int64_t {text} = sizes_{number}[{axis}];")
    if not {str(symbol) for stride in strides for symbol in getattr(stride, "free_symbols", ())} <= known:
        raise GraphError(f"the strides of input {number} depend on sizes that no input has", found=tuple(strides))
    shape = ", ".join(
        small if small == large else f"{small} to {large}" for small, large in zip(lower, upper, strict=True)
    )
    subject = f"handles, {count}, {number}"
    kind = f"aoti_torch_dtype_{name}(), aoti_torch_device_type_{device.type}()"
    rank, alignment = len(sizes), 1 if device.type == "cpu" else _ALIGNMENT
    return [
        f"    const int64_t low_{number}[] = {_array(lower)}, high_{number}[] = {_array(upper)};",
        f'    const int64_t* sizes_{number} = mpcompile_check({subject}, "{name} ({shape}) on {device.type}", '
        f"{kind}, index, {rank}, low_{number}, high_{number});",
        *definitions,
        f"    const int64_t strides_{number}[] = {_array([cexpr(stride) for stride in strides])};",
        f"    mpcompile_arrange({subject}, {rank}, sizes_{number}, strides_{number}, {kind}, {alignment});",
    ]


def _array(elements: list[str]) -> str:
    return "{" + ", ".join(elements or ["0"]) + "}"  # C++ has no empty arrays
