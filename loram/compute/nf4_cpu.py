"""A mend of bitsandbytes on CPUs with AVX-512, where it dequantises some widths wrongly."""

from ctypes import c_longlong
from typing import Any

from bitsandbytes.backends.cpu import ops

_KERNELS = ("cdequantize_blockwise_cpu_nf4_", "cdequantize_blockwise_cpu_fp4_")


class _Mended:
    """bitsandbytes' native library, with other rows for the kernels that dequantise 4 bits.

    Blocks go on through the rows of a matrix. With AVX-512 these kernels begin a block with every row, so what they
    give is wrong where the width is no multiple of the block. It is right with rows of one block each.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if not name.startswith(_KERNELS):
            return function

        def mended(packed: Any, absmax: Any, out: Any, block: c_longlong, rows: c_longlong, width: c_longlong) -> None:
            if width.value % block.value:
                rows, width = _rows_of_blocks(rows.value * width.value, block.value)
            function(packed, absmax, out, block, rows, width)

        return mended


def _rows_of_blocks(values: int, block: int) -> tuple[c_longlong, c_longlong]:
    """Return (rows, width) of as many values with one block per row, or of one row where the last block is short."""
    rows = 1 if values % block else values // block
    return c_longlong(rows), c_longlong(values // rows)


def mend_dequantisation_() -> None:
    """Let bitsandbytes dequantise matrices of every width on a CPU."""
    if not isinstance(ops.lib, _Mended):
        ops.lib = _Mended(ops.lib)
