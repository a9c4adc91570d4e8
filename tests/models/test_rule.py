from __future__ import annotations

import pytest
import torch

from bigmodel_kernels.models.rule import FEW, CheckFailed, assert_as_near, eager_of
from bigmodel_kernels.models.tiny import seq2seq


def test_a_few_numbers_may_be_some_ulps_off_where_eager_happens_to_be_right() -> None:
    ulp = 2**-21
    loss = torch.tensor([4.5], dtype=torch.float64)
    assert_as_near((loss + 4 * ulp).float(), loss.float(), loss, None, "loss")
    with pytest.raises(CheckFailed, match="loss: max"):
        assert_as_near((loss + 16 * ulp).float(), loss.float(), loss, None, "loss")
    many = loss.expand(FEW)
    with pytest.raises(CheckFailed, match="mean"):
        assert_as_near((many + ulp).float(), many.float(), many, None, "logits")


def test_eager_is_eager_in_every_part() -> None:
    eager = eager_of(seq2seq("T5"))
    parts = (eager, eager.encoder, eager.decoder)
    assert {part.config._attn_implementation for part in parts} == {"eager"}
