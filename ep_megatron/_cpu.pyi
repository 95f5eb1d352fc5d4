"""The compiled CPU side (csrc/bindings_cpu.cpp). Addresses are not checked."""

def row_kernel_names() -> list[str]:
    """Name the builds of the row kernels that this CPU runs, slowest first."""

def reduce_rows(
    isa: str,
    dtype: str,
    out_ptr: int,
    row_ptrs: list[int],
    group_ends: list[int],
    bias_ptrs: list[int],
    hidden: int,
    streaming: bool,
) -> None:
    """Sum groups of rows with one build of the kernels, for tests; see csrc/cpu/rows.h."""

def copy_row(isa: str, out_ptr: int, row_ptr: int, num_bytes: int, streaming: bool) -> None:
    """Copy a row with one build of the kernels, for tests; see csrc/cpu/rows.h."""
