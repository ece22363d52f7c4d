"""Secure sums of few bits, through the whole exchange."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.core.config.run import SecureAggregationSection
from fedloom.core.secagg.lattice import Lattice
from fedloom.server.storage.local import Store
from tests.simulation.end_to_end.test_secagg import NAMES, SCHEMA, Federation, config, coordinate, expected


@pytest.mark.parametrize("bits", [8, 16])
def test_sums_of_few_bits_give_the_mean_up_to_their_rounding(tmp_path: Path, bits: int) -> None:
    section = SecureAggregationSection(enabled=True, max_clients=4, bits=bits, max_norm=20.0)
    run = config().model_copy(update={"secure_aggregation": section})
    lengths: list[int] = []
    with Store(tmp_path / "state", durable=False) as store:
        federation = Federation(coordinate(store, run), tmp_path)
        line = federation.lines["ann"]
        original = line.submit

        def watched(header: Any, payload: bytes) -> bool:
            lengths.append(len(payload))
            return original(header, payload)

        line.submit = watched  # type: ignore[method-assign]

        adapter, wanted = federation.finish(), expected(NAMES, 2)

    integers = section.integers
    assert isinstance(integers, Lattice)
    assert lengths == [bits // 8 * integers.size(SCHEMA)] * 2
    error = np.concatenate([(adapter[name] - wanted[name]).ravel() for name in wanted])
    # The mean of four has a quarter of the variance of one rounding; two rounds; a value has six standard deviations.
    assert 0 < np.abs(error).max() <= 6 * integers.step(SCHEMA) * np.sqrt(2 / 4 / 12)
