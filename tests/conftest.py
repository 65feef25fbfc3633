import gc
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
# The kernels that tests compile are too few to pay for worker processes and precompiled headers.
os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}


def pytest_collection_finish():
    gc.freeze()  # imageio collects garbage after every film: without what was imported it takes no time
