"""The adapter of one round, while a run goes on."""

from pathlib import Path

from fedloom.client.models.exports.facts import facts, privacy_facts
from fedloom.client.models.exports.result import save_result, writable
from fedloom.core.model_card import held_out_facts
from fedloom.core.schema import Tensors
from fedloom.server.monitoring.recorders.api import RoundRecord
from fedloom.simulation.federation import Federation

__all__ = ["save_round"]


def save_round(federation: Federation, result: Tensors, record: RoundRecord, folder: Path) -> None:
    """Write the model of one round as a PEFT adapter, with the guarantee that holds for it.

    Args:
        federation: Its config and model.
        result: What the strategy gives for the state after the round.
        record: Of the round.
        folder: Where to; an adapter that is there is replaced.

    Raises:
        ConfigError: The folder holds other files, or cannot be written.
    """
    scores = held_out_facts(record.accuracy, record.loss, record.metrics)
    known = {**facts(federation.config, None), "rounds": record.round, **scores}
    if record.privacy is not None:
        known["privacy"] = privacy_facts(federation.config, record.privacy)
    model = writable(federation.model, federation.config)
    model.show(result)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_result(model, folder, known)
