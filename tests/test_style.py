"""What the project promises of its own source."""

import dis
import pathlib
import re
import types

import pytest

import vdm_ssm

ROOT = pathlib.Path(__file__).parent.parent
FREE = {"math", "torch", "nn", "F", "rearrange", "repeat", "einsum", "partial"}
SOURCE = (ROOT / "vdm_ssm.py").read_text()


def pieces():
    """Top-level classes and functions of the method, without the demonstration at the end."""
    method = SOURCE[: SOURCE.index("# python vdm_ssm.py\n")]
    return re.findall(r"^(?:class|def) (\w+)", method, flags=re.M)


def source_of(name):
    found = re.search(rf"^(?:@[^\n]*\n)*(?:class|def) {name}\b.*?(?=^\S|\Z)", SOURCE + "\n", flags=re.M | re.S)
    return found.group(0)


def globals_of(code):
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    stored = {i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_NAME", "STORE_GLOBAL")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= globals_of(constant)
    return names - stored


def needs(name):
    found = re.search(r"Needs: ([^.]*)\.", getattr(vdm_ssm, name).__doc__ or "")
    return set(re.split(r",\s*", found.group(1))) if found else set()


BIG = {"temporal_layer", "UNet3D", "DiM"}  # they are the sum of their parts


@pytest.mark.parametrize("name", [name for name in pieces() if name not in BIG])
def test_a_piece_pasted_alone_needs_only_what_its_docstring_names(name):
    builtins = set(dir(__builtins__)) | set(__builtins__) | {"__name__", "__module__", "__qualname__", "super"}
    used = globals_of(compile(source_of(name), name, "exec")) - builtins - {name} - FREE
    assert used <= needs(name), f"{name} uses {used - needs(name)}"
    assert len(needs(name)) <= 2
    assert needs(name) <= used, f"{name} does not use {needs(name) - used}"


def test_pasted_pieces_run():
    space = {}
    exec("import math, torch\nfrom torch import nn\nimport torch.nn.functional as F\nfrom einops import rearrange, repeat", space)
    for name in ("rows_in", "SelectiveScan", "selective_scan", "S6", "recomputed", "causal_conv", "CausalConv",
                 "MambaBlock"):
        exec(source_of(name), space)
    x = space["torch"].randn(2, 5, 8)
    assert space["MambaBlock"](space["S6"], 8)(x).shape == x.shape


@pytest.mark.parametrize("file", ["vdm_ssm.py", "fvd.py", "train.py"])
def test_source_is_ascii_and_every_public_piece_is_explained(file):
    text = (ROOT / file).read_text()
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 120
    assert not re.search(r"TODO|FIXME|except:", text)


@pytest.mark.parametrize("name", pieces())
def test_docstrings_begin_with_a_shape_map_or_a_sentence(name):
    assert (getattr(vdm_ssm, name).__doc__ or "").strip(), name


def test_imports_run_one_way():
    imports = lambda file: set(re.findall(r"^(?:from|import) (\w+)", (ROOT / file).read_text(), flags=re.M))
    own = {"vdm_ssm", "fvd", "train"}
    assert imports("vdm_ssm.py") & own == set() == imports("fvd.py") & own
    assert imports("vdm_ssm.py") <= {"math", "time", "weakref", "functools", "torch", "einops"}
