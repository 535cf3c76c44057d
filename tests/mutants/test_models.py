"""The rules of certification, broken one by one: its tests notice each."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from instep.core.typing import I64
from instep.models.certify import Probes, sequence_distance
from tests.models import test_certify
from tests.support.broken_rules import BrokenRule, check_is_found


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def beside_themselves(original: Any, probes: Probes, bucket: int) -> I64:
    starts = np.arange(0, probes.count, bucket)[:, None]
    batches: I64 = (np.concatenate([starts, starts + 1]) + np.arange(bucket)) % probes.count
    return batches


def always_in_the_same_place(original: Any, probes: Probes, bucket: int) -> I64:
    count, half = probes.count, bucket // 2
    starts = np.arange(0, count, half)[:, None]
    return np.concatenate([(starts + np.arange(half)) % count, np.full((len(starts), bucket - half), count)], axis=1)


RULES = (
    BrokenRule(
        "batch sizes with other bits are certified",
        Probes.through,
        lambda original, probes, bucket, step: (np.zeros((1, 1), np.uint8), 0),
        [partial(test_certify.test_a_bucket_with_other_bits_throughout_is_dropped_in_favour_of_the_rest, 24)],
    ),
    BrokenRule(
        "a whole sequence with other bits is certified",
        sequence_distance,
        lambda original, model, steps: 0,
        [partial(test_certify.test_a_whole_sequence_with_other_bits_is_noticed, "output")],
    ),
    BrokenRule(
        "rows are only tried beside harmless ones",
        Probes.batches,
        beside_themselves,
        [partial(test_certify.test_a_network_whose_rows_feel_each_other_is_not_exact, test_certify.leak_of_nan)],
    ),
    BrokenRule(
        "rows are only tried in the first half of a batch",
        Probes.batches,
        always_in_the_same_place,
        [test_certify.test_bits_that_depend_on_the_position_in_every_bucket_are_not_exact],
    ),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_a_broken_rule_is_noticed(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    check_is_found(rule, request)
