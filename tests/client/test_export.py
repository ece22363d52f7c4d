import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.export import load_exported, predict, save_adapter, save_final
from fedloom.client.model import AdapterModel, load_model
from fedloom.proto.accounting import Spend, epsilon
from fedloom.proto.errors import ConfigError, ModelError
from fedloom.proto.run import AdapterSection, ModelSection, Spec
from fedloom.proto.schema import Role

Build = Callable[[AdapterSection], AdapterModel]
KINDS = {
    "lora": AdapterSection(rank=4, alpha=8),
    "bias": AdapterSection(kind="bias"),
    "head": AdapterSection(kind="head"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_peft_model_gives_the_same_scores(
    kind: str, build_model: Build, tiny_base: Path, rows: Rows, tmp_path: Path
) -> None:
    model = build_model(KINDS[kind])
    encoded, pad = encode(rows, model.tokenizer, 16), model.tokenizer.pad_token_id
    batch = collate(encoded, np.arange(40), pad)

    save_adapter(model, tmp_path, {"run": "demo", "labels": ["negative", "positive"]})
    loaded = load_exported(tiny_base, tmp_path, labels=2)

    with torch.no_grad():
        ours = model.logits(batch)
        theirs = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(predict(loaded, encoded, pad), ours.argmax(1).numpy())
    assert ours.std(0).min() > 1e-2


def test_the_adapter_makes_a_difference(
    model_section: ModelSection, tiny_base: Path, tiny_model: AdapterModel, rows: Rows, tmp_path: Path
) -> None:
    untrained = load_model(model_section, KINDS["lora"])
    save_adapter(tiny_model, tmp_path / "trained", {})
    save_adapter(untrained, tmp_path / "untrained", {})
    batch = collate(encode(rows, tiny_model.tokenizer, 16), np.arange(8), tiny_model.tokenizer.pad_token_id)

    with torch.no_grad():
        scores = [
            load_exported(tiny_base, tmp_path / name, 2)(batch["input_ids"], batch["attention_mask"]).logits
            for name in ("trained", "untrained")
        ]

    assert (scores[0] - scores[1]).abs().max() > 1e-2


def test_facts_and_card_lie_beside_the_weights(tiny_model: AdapterModel, tmp_path: Path) -> None:
    facts = {"run": "demo", "labels": ["a", "b", "c"], "epsilon": 5.98}

    save_adapter(tiny_model, tmp_path / "new" / "folder", facts)

    folder = tmp_path / "new" / "folder"
    assert json.loads((folder / "fedloom.json").read_text()) == facts
    assert "num_labels=3" in (folder / "README.md").read_text()
    assert (folder / "README.md").read_text().startswith("# demo\n")
    assert (folder / "adapter_model.safetensors").is_file()
    assert not list(folder.glob("*.bin"))


def test_an_adapter_that_corrects_the_base_is_not_exported(tiny_model: AdapterModel, tmp_path: Path) -> None:
    tiny_model.load(tiny_model.schema.with_base(1).select([Role.BASE_A, Role.BASE_B]).zeros())

    with pytest.raises(ModelError, match="export it as a merged model"):
        save_adapter(tiny_model, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_clients_that_share_a_folder_leave_one_whole_adapter(
    tiny_model: AdapterModel, spec: Spec, tmp_path: Path
) -> None:
    """In the place of what was there before, with the guarantee of a client that missed no round."""
    folder = tmp_path / "out" / "adapter"
    folder.mkdir(parents=True)
    (folder / "stale.txt").write_text("of another run")
    values = [{name: value + step for name, value in tiny_model.read(tiny_model.schema).items()} for step in (1, 2)]

    for each in values:
        save_final(tiny_model, spec, each, folder)

    saved = load_file(folder / "adapter_model.safetensors")
    assert all(np.array_equal(saved[name], values[1][name]) for name in values[1])
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    known = json.loads((folder / "fedloom.json").read_text())
    assert known["strategy"] is None
    spent = epsilon([Spend(0.3, 1.0, spec.train.steps)] * spec.run.rounds, spec.privacy.delta)
    assert known["privacy"]["epsilon"] == pytest.approx(spent)


def test_a_folder_that_is_moved_away_meanwhile_is_no_obstacle(
    tiny_model: AdapterModel, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "adapter", Path.rename
    folder.mkdir()
    (folder / "of-another").write_text("")
    tried: list[Path] = []

    def rename(source: Path, target: Path) -> Path:
        if source == folder and not tried:
            tried.append(source)
            real(folder, tmp_path / "elsewhere")  # another client was first
        return real(source, target)

    monkeypatch.setattr(Path, "rename", rename)
    save_final(tiny_model, spec, tiny_model.read(tiny_model.schema), folder)

    assert tried
    assert (folder / "adapter_model.safetensors").exists()


def test_an_adapter_that_cannot_be_written_is_one_clear_error(
    tiny_model: AdapterModel, spec: Spec, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file")

    with pytest.raises(ConfigError, match=r"out/adapter: .*let this user write there"):
        save_final(tiny_model, spec, tiny_model.read(tiny_model.schema), tmp_path / "out" / "adapter")
