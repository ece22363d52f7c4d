import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.loading import load_exported, predict
from fedloom.client.models.exports.merged_model import save_merged
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.models.exports.result import save_final
from fedloom.client.models.load import load_model
from fedloom.core.config.run import AdapterSection, ModelSection, Spec
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.accounting import Spend, epsilon

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
    np.testing.assert_array_equal(predict(loaded, model.task, encoded, pad), ours.argmax(1).numpy())
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
    card = (folder / "README.md").read_text()
    assert "num_labels=2" in card, "the model has two outputs, whatever facts say"
    assert "\n# demo\n" in card
    assert (folder / "adapter_model.safetensors").is_file()
    assert not list(folder.glob("*.bin"))


def test_a_correction_of_the_base_is_exported_at_a_higher_rank(
    tiny_model: AdapterModel, tiny_base: Path, rows: Rows, tmp_path: Path
) -> None:
    draw = np.random.default_rng(5)
    whole = tiny_model.schema.with_base(3)
    result = {spec.name: draw.normal(0, 0.2, spec.shape).astype(np.float32) for spec in whole.tensors}
    tiny_model.show(result)
    batch = collate(encode(rows, tiny_model.tokenizer, 16), np.arange(8), tiny_model.tokenizer.pad_token_id)
    with torch.no_grad():
        ours = tiny_model.logits(batch)
    save_adapter(tiny_model, tmp_path / "peft", {})
    tiny_model.show({name: result[name] for name in tiny_model.schema.zeros()})
    with torch.no_grad():
        without = tiny_model.logits(batch)
    tiny_model.show(result)
    save_merged(tiny_model, tmp_path / "merged", {})

    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    for model in (load_exported(tiny_base, tmp_path / "peft", 2), merged):
        with torch.no_grad():
            theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (ours - without).abs().max() > 1e-2
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4 + 3, 2.0 * (4 + 3))
    assert settings["target_modules"] == sorted(settings["target_modules"])


class Killed(BaseException):
    """The process is gone: nothing that tidies up may run."""


STEPS: list[tuple[object, str]] = [
    (PeftModel, "save_pretrained"),
    (Path, "mkdir"),
    (Path, "write_text"),
    (os, "fsync"),
    (os, "rename"),
    (shutil, "rmtree"),
]


def dying(monkeypatch: pytest.MonkeyPatch, at: int, *, after: bool) -> Callable[[], int]:
    """Kill at the n-th of the calls that change the disk, before or after it; returns how many there were."""
    made = 0

    def mark(call: Callable[..., object]) -> Callable[..., object]:
        def marked(*args: object, **kwargs: object) -> object:
            nonlocal made
            made += 1
            due = made == at
            if due and not after:
                raise Killed
            result = call(*args, **kwargs)
            if due:
                raise Killed
            return result

        return marked

    for owner, name in STEPS:
        monkeypatch.setattr(owner, name, mark(getattr(owner, name)))
    return lambda: made


def saved(folder: Path) -> tuple[str, float] | None:
    """The run's name in a whole adapter and a value that tells whose weights they are; None if there is no folder."""
    if not folder.exists():
        return None
    assert {each.name for each in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "fedloom.json",
    }
    run = json.loads((folder / "fedloom.json").read_text())["run"]
    assert f"\n# {run}\n" in (folder / "README.md").read_text()
    json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    return run, float(max(np.abs(each).max() for each in weights.values()))


@pytest.mark.parametrize("after", [False, True])
def test_wherever_a_save_is_killed_there_is_a_whole_adapter_or_the_next_save_repairs(
    after: bool, tiny_model: AdapterModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ones(factor: float) -> None:
        tiny_model.load({s.name: np.full(s.shape, factor, np.float32) for s in tiny_model.schema.tensors})

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("the disk is full")

    ones(1.0)
    save_adapter(tiny_model, tmp_path / "first", {"run": "first"})
    found: set[tuple[str, float] | None] = set()
    for at in range(1, 100):
        folder = tmp_path / str(at) / "adapter"
        shutil.copytree(tmp_path / "first", folder)
        ones(2.0)
        with monkeypatch.context() as patch:
            calls = dying(patch, at, after=after)
            with suppress(Killed):
                save_adapter(tiny_model, folder, {"run": "second"})
        if calls() < at:
            break
        state = saved(folder)
        if state is None:
            assert saved(folder.with_name(".adapter.fedloom-old")) == ("first", 1.0)
            with monkeypatch.context() as patch:
                patch.setattr(PeftModel, "save_pretrained", fail)
                with pytest.raises(ConfigError, match="full"):
                    save_adapter(tiny_model, folder, {"run": "second"})
            assert saved(folder) == ("first", 1.0), "it is back before the next one begins"
        found.add(state)

        ones(3.0)
        save_adapter(tiny_model, folder, {"run": "third"})
        assert saved(folder) == ("third", 3.0)
        assert [each.name for each in folder.parent.iterdir()] == ["adapter"]

    assert 10 < at < 99
    assert found == {("first", 1.0), ("second", 2.0), None}


def test_all_of_an_adapter_is_on_disk_before_it_has_its_name(
    tiny_model: AdapterModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(handle: int) -> None:
        fsync(handle)
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    def renamed(old: Path, new: Path) -> None:
        rename(old, new)
        done.append(f"renamed to {new.name}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)

    save_adapter(tiny_model, tmp_path / "adapter", {})

    named = done.index("renamed to adapter")
    files = {each.name for each in (tmp_path / "adapter").iterdir()}
    assert len(files) == 4
    assert files | {".adapter.fedloom-new"} <= set(done[:named])
    assert done[named + 1 :] == [tmp_path.name]


def test_a_folder_that_holds_other_things_is_left_alone(
    tiny_model: AdapterModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter-1.tex").write_text("years of work")

    with pytest.raises(ConfigError, match="is no folder"):
        save_adapter(tiny_model, folder / "chapter-1.tex", {})
    with pytest.raises(ConfigError, match=r"thesis holds chapter-1\.tex, which is no part of an export"):
        save_adapter(tiny_model, folder, {})
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="is where this runs"):
        save_adapter(tiny_model, Path(), {})

    assert [each.name for each in tmp_path.iterdir()] == ["thesis"]
    assert [(each.name, each.read_text()) for each in folder.iterdir()] == [("chapter-1.tex", "years of work")]


def test_a_disk_that_refuses_leaves_the_adapter_that_was_there(
    tiny_model: AdapterModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "adapter", os.rename
    save_adapter(tiny_model, folder, {"run": "first"})

    def refuse(old: Path, new: Path) -> None:
        if old.name.endswith("-new"):
            raise OSError(28, "No space left on device")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(ConfigError, match=r"cannot export to .*No space left"):
        save_adapter(tiny_model, folder, {"run": "second"})

    state = saved(folder)
    assert state is not None
    assert state[0] == "first"
    assert [each.name for each in tmp_path.iterdir()] == ["adapter"]


def test_a_link_to_a_folder_stays_a_link(tiny_model: AdapterModel, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "adapter").symlink_to("there")

    save_adapter(tiny_model, tmp_path / "adapter", {"run": "demo"})

    assert (tmp_path / "adapter").is_symlink()
    assert saved(tmp_path / "there") is not None


def test_clients_that_share_a_folder_leave_one_whole_adapter(
    tiny_model: AdapterModel, spec: Spec, tmp_path: Path
) -> None:
    """In the place of what was there before, with the guarantee of a client that missed no round."""
    folder = tmp_path / "out" / "adapter"
    folder.mkdir(parents=True)
    (folder / "stale.txt").write_text("of another run")
    values = [{name: value + step for name, value in tiny_model.read(tiny_model.schema).items()} for step in (1, 2)]

    for each in values:
        save_final(tiny_model, spec, each, folder, 4)

    saved = load_file(folder / "adapter_model.safetensors")
    assert all(np.array_equal(saved[name], values[1][name]) for name in values[1])
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    known = json.loads((folder / "fedloom.json").read_text())
    spent = epsilon([Spend(0.3, 1.0, spec.train.steps)] * 4, spec.privacy.delta)
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
    save_final(tiny_model, spec, tiny_model.read(tiny_model.schema), folder, 1)

    assert tried
    assert (folder / "adapter_model.safetensors").exists()


def test_an_adapter_that_cannot_be_written_is_one_clear_error(
    tiny_model: AdapterModel, spec: Spec, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file")

    with pytest.raises(ConfigError, match=r"out/adapter: .*let this user write there"):
        save_final(tiny_model, spec, tiny_model.read(tiny_model.schema), tmp_path / "out" / "adapter", 1)
