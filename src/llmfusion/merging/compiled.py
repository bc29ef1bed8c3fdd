"""How the arithmetic of merging is compiled: loops over one block of one tensor that release the interpreter's lock.

Sums are kept in float64 over ``LANES`` interleaved lanes, added up in lane order: the order of additions is that of the
code, not of a machine's vector width, so the same input gives the same bits everywhere. Nothing is re-associated by the
compiler.

Compiled code is kept in ``NUMBA_CACHE_DIR`` if that is set, else in ``$XDG_CACHE_HOME/llmfusion``
(``~/.cache/llmfusion``); where neither can be written, as for a read-only home, in a private folder for temporary
files. The first merge on a machine compiles, all later ones load.
"""

import hashlib
import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numba
import numpy as np

LANES = 64
SIZE = np.uint32(0x7FFFFFFF)  # of a float32's bits all but the sign
TILE = 1024  # values worked on at once: their intermediate results stay in the innermost cache


def cache_folder() -> str:
    """Where compiled code goes: the first of the places above that this user can write, made if it is not there."""
    if folder := os.environ.get("NUMBA_CACHE_DIR"):
        return folder
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for place in (Path(home) / "llmfusion", Path(tempfile.gettempdir()) / f"llmfusion-{os.getuid()}"):
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_ours = place.stat().st_uid == os.getuid()  # cached code is run
            if is_ours and os.access(place, os.W_OK | os.X_OK):
                return str(place)
        except OSError:
            continue
    return tempfile.mkdtemp(prefix="llmfusion-")


def _load_without_scipy() -> None:
    """Load numba's functions without the search for scipy's matrix products: half a second, for what is not used."""
    name = "scipy.linalg.cython_blas"
    if name not in sys.modules:
        sys.modules[name] = None  # type: ignore[assignment]
        importlib.import_module("numba.np.arraymath")
        del sys.modules[name]


def _sources() -> str:
    """A name for these sources: numba notices changes in a function's own file only, not in what it uses of others."""
    here = Path(__file__).parent
    names = ("compiled.py", "kernels.py", "ranking.py")
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in names)).hexdigest()[:16]


_load_without_scipy()
numba.config.CACHE_DIR = str(Path(cache_folder()) / _sources())  # type: ignore[attr-defined]


def compiled(function: Any) -> Any:
    """Compile at the first call, or load what was compiled before. A division by zero gives infinity, as in numpy."""
    return numba.njit(cache=True, nogil=True, error_model="numpy")(function)


@compiled
def total_of(lanes):
    total = 0.0
    for k in range(lanes.size):
        total += lanes[k]
    return total


@compiled
def squares(values):
    """The sum of squares in float64."""
    lanes = np.zeros(LANES)
    for start in range(0, values.size, LANES):
        part = values[start : start + LANES]
        for k in range(part.size):
            value = np.float64(part[k])
            lanes[k] += value * value
    return total_of(lanes)
