"""Few labels for each client (McMahan et al. 2017, arXiv:1602.05629)."""

import numpy as np
from pydantic import Field

from fedloom.client.data.partitioners.api import without_empty
from fedloom.client.data.rows import Indices, Rows
from fedloom.core.config.parsing import Section
from fedloom.core.errors import ConfigError

__all__ = ["Pathological"]


class Pathological(Section):
    """Rows of few labels only for each client; for tasks with one label a row.

    By whole labels rather than by the paper's shards, which straddle them. Each label is shared out evenly among those
    that have it.
    """

    classes_per_client: int = Field(default=2, ge=1)
    """Labels of each client; together the clients must be able to hold all labels."""

    def split(self, rows: Rows, clients: int, draw: np.random.Generator) -> list[Indices]:
        """Deal the labels out in a random order, again from the first when they are used up.

        So no client gets one twice and no label has many more owners than another.

        Raises:
            ConfigError: Rows have no label of their own, or the clients cannot have so many.
        """
        classes = self.classes_per_client
        if rows.tags or not rows.label_names:
            raise ConfigError(f'data.partition = "pathological" goes by the label of a row, and {rows.task} has none')
        kinds = rows.kinds
        labels = np.unique(kinds)
        if classes > len(labels):
            raise ConfigError(
                f"data.classes_per_client = {classes}; the data have {len(labels)} labels, so 1 to that many"
            )
        if clients * classes < len(labels):
            raise ConfigError(
                f"{clients} clients with data.classes_per_client = {classes} cannot hold {len(labels)} labels; "
                "raise one"
            )
        order = draw.permutation(labels)
        owners: dict[int, list[int]] = {int(label): [] for label in labels}
        for place in range(clients * classes):
            owners[int(order[place % len(order)])].append(place // classes)
        shares: list[list[Indices]] = [[] for _ in range(clients)]
        for label, mine in owners.items():
            members = draw.permutation(np.flatnonzero(kinds == label))
            for client, piece in zip(mine, np.array_split(members, len(mine)), strict=True):
                shares[client].append(piece)
        return without_empty([np.concatenate(share) for share in shares])
