"""EWF's golden files: fused weights, values of the released code."""

from __future__ import annotations

import pytest
import torch
from golden_files import assert_close, cases, load

from utils.loss import fuse_weights


@pytest.mark.parametrize("name", cases("ewf_fuse_*"))
def test_fused_weights(name, device):
    z, meta = load(name, device)
    old, new = (
        {key: z[f"{side}_{i}"] for i, key in enumerate(meta["keys"]) if f"{side}_{i}" in z}
        for side in ("old", "new")
    )
    before = {key: value.clone() for key, value in (old | new).items()}
    words = {} if meta["share"] is None else {"share": meta["share"]}
    fused = fuse_weights(
        old_state=old,
        new_state=new,
        new_classes=meta["new_classes"],
        old_classes=meta["old_classes"],
        **words,
    )
    assert list(fused) == meta["keys"]
    assert len(old) < len(new), "no entry is new: the case is empty"
    for i, key in enumerate(meta["keys"]):
        assert_close(fused[key], z[f"fused_{i}"])
    assert all(torch.equal(value, (old | new)[key]) for key, value in before.items())


def test_counters_and_formats_are_the_new_network_s():
    old = {"w": torch.zeros(3, dtype=torch.bfloat16), "n": torch.tensor(7)}
    new = {"w": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(9)}
    fused = fuse_weights(old, new, new_classes=1, old_classes=3)
    assert fused["n"] == 9
    assert fused["w"].dtype == torch.bfloat16 and fused["w"].tolist() == [0.5, 0.5, 0.5]
