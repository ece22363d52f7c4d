"""A federated linear classifier on frozen features: what any adapter has to beat.

The features are the mean of the frozen base model's last hidden states over a text's tokens; of a picture, those of
its class token and the mean over its patches, which a new head of the model would read. They are brought to one
length, which needs no look at other rows. With privacy each client takes the run file's steps of DP-SGD, with its
noise multiplier, clip norm and rate of the head, by plain numpy, and the coordinator averages, weighted as the run
says. Without, it is scikit-learn's logistic regression on all clients' rows pooled, and a rate is the inverse
strength of its L2 penalty.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from runs import Outcome, Run, given

__all__ = ["federate_probe", "gradients"]

Floats = npt.NDArray[np.float64]
_SCALE = 10.0
"""Length of the features: cosines of sentence embeddings differ by little."""
_known: dict[tuple[str, bytes], Floats] = {}
"""Features by base model and what it read: the next run of this process need not compute them again."""


def federate_probe(run: Run) -> Outcome:
    """One run of the probe; epsilon is that of the run's own accounting."""
    import tempfile

    import torch

    from fedloom.client.data.tokens import encode
    from fedloom.core.config.run import load_run
    from fedloom.core.privacy.spends import run_statement
    from fedloom.simulation.federation import build, completed

    torch.set_num_threads(1)
    began, config = time.monotonic(), completed(load_run(Path(run.file), run.overrides))
    with tempfile.TemporaryDirectory(prefix="fedloom-benchmark-") as folder:
        federation = build(config, Path(folder), given(config))
    model, limit = federation.model, config.model.max_length
    parts = [encode(rows, model.tokenizer, limit) for rows in federation.clients.values()]
    base = str(config.model.digest)
    sites = [(embedded(model, part, base), part.labels) for part in parts]
    declared = [policy.data.declared_examples or 1 for policy in federation.policies.values()]
    held_out = embedded(model, federation.held_out, base)
    if config.privacy.enabled:
        weights = trained(sites, declared, config, np.random.default_rng([run.seed, 7]))
    else:
        weights = fitted(sites, run.rate)
    answers = held_out @ weights
    right = answers.argmax(1) == federation.held_out.labels
    spent = run_statement(config, config.run.rounds).epsilon if config.privacy.enabled else None
    return Outcome(
        *(run.setting, run.method, run.rate, run.seed, float(right[::2].mean()), float(right[1::2].mean()), spent),
        values=weights.size,
        commit_seconds=0.0,
        seconds=time.monotonic() - began,
    )


def trained(sites: list[tuple[Floats, Any]], declared: list[int], config: Any, rng: np.random.Generator) -> Floats:
    """The weights after all rounds, shape (features, classes)."""
    train, privacy = config.train, config.privacy
    weights = np.zeros((sites[0][0].shape[1], len(config.model.labels)))
    shares = np.array(declared) / sum(declared)
    for round in range(config.run.rounds):
        rate = train.head_learning_rate * (1 - round / config.run.rounds)
        total = np.zeros_like(weights)
        for (features, labels), count, share in zip(sites, declared, shares, strict=True):
            mine = weights.copy()
            for _ in range(train.steps):
                drawn = rng.random(len(labels)) < train.sampling_rate
                each = gradients(features[drawn], labels[drawn], mine)
                norms = np.sqrt((each**2).sum((1, 2)))
                clipped = (each * np.minimum(1, privacy.clip_norm / np.maximum(norms, 1e-12))[:, None, None]).sum(0)
                noise = rng.normal(0, privacy.noise_multiplier * privacy.clip_norm, mine.shape)
                mine -= rate * (clipped + noise) / (train.sampling_rate * count)
            total += share * (mine - weights)
        weights += total
    return weights


def fitted(sites: list[tuple[Floats, Any]], strength: float) -> Floats:
    """The weights of a logistic regression on all rows, shape (features, classes)."""
    from sklearn.linear_model import LogisticRegression

    features, labels = np.concatenate([each for each, _ in sites]), np.concatenate([each for _, each in sites])
    found: Floats = LogisticRegression(C=strength, max_iter=2000, fit_intercept=False).fit(features, labels).coef_.T
    return np.hstack([-found, found]) if found.shape[1] == 1 else found


def gradients(features: Floats, labels: Any, weights: Floats) -> Floats:
    """Of each example's cross-entropy, shape (examples, features, classes)."""
    scores = features @ weights
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    chances[np.arange(len(labels)), labels] -= 1
    each: Floats = features[:, :, None] * chances[:, None, :]
    return each


def embedded(model: Any, rows: Any, base: str) -> Floats:
    """Features of every row, shape (rows, features); `base` is the base model's digest."""
    keys = [(base, rows.digest(row)) for row in range(len(rows))]
    missing = np.array([row for row, key in enumerate(keys) if key not in _known], np.int64)
    for row, features in zip(missing, computed(model, rows, missing), strict=True):
        _known[keys[row]] = features
    found = np.stack([_known[key] for key in keys])
    scaled: Floats = _SCALE * found / np.linalg.norm(found, axis=1, keepdims=True)
    return scaled


def computed(model: Any, rows: Any, chosen: npt.NDArray[np.int64]) -> Floats:
    """What the frozen model gives for the chosen rows, in their order."""
    import torch

    from fedloom.client.data.tokens import collate, microbatches

    encoder = model.model.get_base_model().base_model
    found = np.zeros((len(rows), encoder.config.hidden_size * (1 if rows.input_ids else 2)))
    with torch.inference_mode():
        for part in microbatches(chosen, rows, 64):
            batch = collate(rows, part, model.tokenizer.pad_token_id if rows.input_ids else 0)
            hidden = encoder(**{name: value for name, value in batch.items() if name != "labels"})[0]
            if rows.input_ids:
                mask = batch["attention_mask"].unsqueeze(-1)
                features = (hidden * mask).sum(1) / mask.sum(1)
            else:
                features = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=1)
            found[part] = features.double().numpy()
    picked: Floats = found[chosen]
    return picked
