"""timm learns of kdhiera's students whichever is imported first, and kdhiera loads no timm."""

import subprocess
import sys

import pytest

FIRST = "import kdhiera, sys; assert not {'torch', 'timm', 'numpy'} & set(sys.modules); import timm"
LAST = "import timm, kdhiera"
LOOKED = "import kdhiera, importlib.util; assert importlib.util.find_spec('timm'); import timm"
INSIDE = "import kdhiera.student.hiera, timm"
NAMES = "print(len(timm.list_models('hiera_video_*')), len(timm.list_models('vit_video_*')))"


@pytest.mark.parametrize(
    "imports", [FIRST, *(pytest.param(i, marks=pytest.mark.long) for i in (LAST, LOOKED, INSIDE))]
)
def test_timm_knows_the_students(imports: str) -> None:
    code = f"{imports}; {NAMES}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "7 7\n", done.stderr
