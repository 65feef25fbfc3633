"""What the project promises of its own source."""

import ast
import builtins
import dis
import inspect
import pathlib
import re
import sys
import types

import pytest

import fvd
import vdm_ssm

ROOT = pathlib.Path(__file__).parent.parent
FILES = ["vdm_ssm.py", "fvd.py", "train.py"]
TEXT = {file: (ROOT / file).read_text() for file in FILES}
IMPORTED = "import math, torch\nfrom torch import nn\nimport torch.nn.functional as F\n" \
           "from einops import rearrange, repeat\nfrom functools import cache, partial"  # fmt: skip
FREE = {*"math torch nn F rearrange repeat cache cycle partial __name__".split(), *dir(builtins)}
METHOD = TEXT["vdm_ssm.py"].split("# python vdm_ssm.py\n")[0]  # without the demonstration at the end
PIECES = {node.name: ast.get_source_segment(METHOD, node) for node in ast.parse(METHOD).body
          if isinstance(node, (ast.ClassDef, ast.FunctionDef))}  # fmt: skip
BIG = {"temporal_layer", "UNet3D", "DiM"}  # they are the sum of their parts


def globals_of(code):
    instructions = list(dis.get_instructions(code))
    names = {i.argval for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    stored = {i.argval for i in instructions if i.opname in ("STORE_NAME", "STORE_GLOBAL")}
    inner = (globals_of(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return names.union(*inner) - stored


@pytest.mark.parametrize("module, name", [(vdm_ssm, name) for name in PIECES if name not in BIG] + [
    (fvd, name) for name in ("same_pad", "Unit3D", "I3D", "resize_tf1", "preprocess", "video_features",
                             "frechet_distance", "kernel_distance")])  # fmt: skip
def test_a_piece_pasted_alone_needs_only_what_its_docstring_names(module, name):
    code = compile(inspect.getsource(getattr(module, name)), name, "exec")
    used = globals_of(code) - FREE - {name, "__module__", "__qualname__"}
    needs = re.findall(r"Needs: ([^.]*)\.", getattr(module, name).__doc__)
    assert used == set(re.findall(r"\w+", " ".join(needs))) and len(used) <= 2


def test_pasted_pieces_run():
    space, names = {}, "selective_scan_loop SelectiveScan selective_scan S6 CausalConv MambaBlock".split()
    for text in (IMPORTED, *map(PIECES.get, names)):
        exec(text, space)
    x = vdm_ssm.torch.randn(2, 5, 8)
    assert space["MambaBlock"](space["S6"], 8)(x).shape == x.shape


@pytest.mark.parametrize("file", FILES)
def test_source_is_ascii_in_short_lines_and_short_functions(file):
    lines = TEXT[file].splitlines()
    assert TEXT[file].isascii() and not re.search(r"TODO|FIXME|except:", TEXT[file])
    budget = {"vdm_ssm.py": 1150, "fvd.py": 650, "train.py": 850}[file]
    assert [line for line in lines if len(line) > 110] == [] and len(lines) <= budget
    functions = [node for node in ast.walk(ast.parse(TEXT[file])) if isinstance(node, ast.FunctionDef)]
    longest = lambda f: 120 if (file, f.name) == ("train.py", "train") else 60
    assert [f.name for f in functions if f.end_lineno - f.lineno >= longest(f)] == []


@pytest.mark.parametrize("file", FILES)
def test_imports_run_one_way_and_are_few(file):
    allowed = {"vdm_ssm.py": set(), "fvd.py": {"numpy", "imageio", "tqdm"}}
    allowed["train.py"] = allowed["fvd.py"] | {"vdm_ssm", "fvd"}
    nodes = list(ast.walk(ast.parse(TEXT[file])))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert outside <= allowed[file] | {"torch", "einops"}
