from pathlib import Path

import pytest
import torch

from kdhiera.devices import resolve_device, resolve_precision
from kdhiera.errors import UsageError

CPU = torch.device("cpu")


def test_auto_device_is_cuda_where_there_is_one() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == CPU


def test_a_name_that_is_no_device_is_refused() -> None:
    with pytest.raises(UsageError, match="auto, cpu, cuda or cuda:N, got 'gpu'"):
        resolve_device("gpu")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r"torch sees \d+ CUDA devices"):
        resolve_device("cuda:99")


def test_precision() -> None:
    assert resolve_precision("fp32", CPU) is torch.float32
    assert resolve_precision("bf16", CPU) is torch.bfloat16
    with pytest.raises(UsageError, match="auto, fp32 or bf16"):
        resolve_precision("fp16", CPU)


def test_auto_precision_follows_the_cpu() -> None:
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    wanted = torch.bfloat16 if "avx512_bf16" in flags else torch.float32
    assert resolve_precision("auto", CPU) is wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_precision_on_a_gpu() -> None:
    capable = torch.cuda.get_device_capability() >= (8, 0)
    wanted = torch.bfloat16 if capable else torch.float32
    assert resolve_precision("auto", torch.device("cuda")) is wanted
