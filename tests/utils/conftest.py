"""Fixtures of the tests of ``utils/``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from utils import loss_kernels


@pytest.fixture(params=["cpu", "formulas on the cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param.startswith("formulas"):
        with loss_kernels.used_on():
            yield torch.device("cpu")
    else:
        yield torch.device(request.param)
