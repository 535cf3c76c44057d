"""Whether this machine repeats bits, which tests that compare them need."""

from __future__ import annotations

import pytest
import torch

from instep.models.folder import make_model
from instep.models.recurrent.description import DenseLayer, GruDescription, GruLayers
from instep.models.recurrent.network import RecurrentNetwork
from tests.support.recordings import certify_once


def skip_unless_exact() -> None:
    """Skip where this machine does not certify that bits repeat: then no test can require them to."""
    dense = (DenseLayer(size=6, activation="tanh"),)
    for before, buckets in (((), (8, 16)), (dense, (32, 64))):
        description = GruDescription(features=3, before=before, gru=GruLayers(hidden_size=8, num_layers=2))
        network = RecurrentNetwork(make_model(description, "random", name="probe"), torch.device("cpu"))
        certification = certify_once(network, buckets)
        if certification.exactness != "exact" or not certification.whole_sequence:
            pytest.skip(f"this machine certifies {certification}")
