import gc
import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
# Tests compute and compile too little to pay for threads, processes, precompiled headers and a probe of
# instruction sets.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1",
               "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage():
    gc.collect()
    gc.freeze()  # imageio collects garbage after every film: without what was imported it takes no time
