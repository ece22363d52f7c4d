"""Automatic clipping from the run file to the step; the step's own bound is in test_private_step.py."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.auditing import attacks
from fedloom.client.privacy.auditing.adversarial import adversarial
from fedloom.client.privacy.auditing.audit import audit
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.errors import ModelError
from tests.client.rounds import ALL, Everyone, assignment, changed, start

DELTA = 1e-3


def test_each_example_counts_by_its_direction(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    run = changed(spec, train={"steps": 1, "momentum": 0.0}, privacy={"clipping": "automatic", "clip_norm": 0.5})
    values = start(tiny_model)
    tiny_model.load(values)
    parameters = tiny_model.trainable(ALL)
    encoded = encode(rows, tiny_model.tokenizer, run.model.max_length)
    total: Any = 0.0
    for i in range(len(rows)):
        one = collate(encoded, np.array([i]), tiny_model.tokenizer.pad_token_id)
        loss = F.cross_entropy(tiny_model.logits(one), one["labels"])
        flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]).double().numpy()
        total = total + 0.5 * flat / (np.linalg.norm(flat) + 0.01)
    move = torch.from_numpy(total * run.train.learning_rate / (run.train.sampling_rate * 40)).float()
    with torch.no_grad():
        for p, part in zip(parameters, torch.split(move, [p.numel() for p in parameters]), strict=True):
            p.sub_(part.view_as(p))
    expected = {name: value - values[name] for name, value in tiny_model.read(tiny_model.schema).items()}

    trainer = Trainer(tiny_model, rows, run, policy, ledger, entropy_for=lambda number: Everyone())
    delta = trainer.train("run", assignment(), values).delta

    for name, value in expected.items():
        np.testing.assert_allclose(delta[name], value, rtol=0, atol=2e-5)


def test_an_audit_finds_no_more_than_the_account_says(tiny_model: AdapterModel, spec: Spec) -> None:
    run = changed(spec, privacy={"clipping": "automatic"})

    checks = audit(tiny_model, run, DELTA, trials=1000).checks

    assert {each.name: each.verdict for each in checks} == dict.fromkeys(
        ("one step", "sampled steps", "whole trainer"), "consistent"
    )


class Unbounded(PrivateOptimizer):
    """Wrong with automatic clipping alone."""

    def __init__(self, *arguments: Any, automatic: bool = False, **rest: Any) -> None:
        super().__init__(*arguments, automatic=automatic, **rest)
        self._longest *= 100 if automatic else 1


def test_a_client_tries_the_attacks_on_the_clipping_of_the_run(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacks, "PrivateOptimizer", Unbounded)
    attacks.rehearse.cache_clear()

    Trainer(tiny_model, rows, spec, policy, ledger)
    with pytest.raises(ModelError, match="does not withstand an attack by"):
        Trainer(tiny_model, rows, changed(spec, privacy={"clipping": "automatic"}), policy, ledger)

    attacks.rehearse.cache_clear()


def test_attacks_are_made_on_automatic_clipping(tiny_model: AdapterModel, spec: Spec) -> None:
    """A step that is wrong with automatic clipping alone is found in runs that use it, and in no others."""

    def verdicts(clipping: str, make: Any) -> set[str]:
        run = changed(spec, privacy={"clipping": clipping})
        return {each.verdict for each in adversarial(tiny_model, run, make=make)}

    assert verdicts("automatic", PrivateOptimizer) == verdicts("threshold", Unbounded) == {"consistent"}
    assert "VIOLATION" in verdicts("automatic", Unbounded)


def test_runs_with_a_threshold_are_told_as_before(spec: Spec) -> None:
    automatic = changed(spec, privacy={"clipping": "automatic"})

    assert "clipping" not in spec.model_dump_json()
    assert Spec.from_json(automatic.model_dump_json()).privacy.clipping == "automatic"
