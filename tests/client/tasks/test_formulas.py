"""Losses, labels and figures of the tasks against what transformers, scikit-learn and the papers' formulas say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, f1_score
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from fedloom.client.data.layout import Layout
from fedloom.client.data.load import assembled, identified
from fedloom.client.data.rows import IGNORED, Rows
from fedloom.client.data.tokens import Encoded, collate, encode
from fedloom.client.eval.figures import entity_figures
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import load_model
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.probe import probe
from fedloom.client.tasks.api import Task, task_named
from fedloom.client.training.gradients import batch_loss
from fedloom.core.config.file_format import Form
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import DataError, ModelError
from tests.families import save_family

PAIRS = [
    {"prompt": "the film:", "chosen": " very good", "rejected": " bad plot"},
    {"prompt": "an actor:", "chosen": " great", "rejected": " sad"},
    {"prompt": "", "chosen": "good plot, very good film", "rejected": "bad"},
]
TAUGHT = [
    {"text": text, "vector": np.random.default_rng(number).normal(0, 0.5, 32).tolist()}
    for number, text in enumerate(("good film", "sad", "very good film, very good plot"))
]
"""Vectors as long as those of the model."""
TARGETS = {"llama": ("q_proj", "v_proj"), "bert": ("query", "value"), "t5": ("q", "v")}
Make = Callable[..., AdapterModel]


def rows_of(task: str, made: list[dict[str, Any]], labels: tuple[str, ...] = ()) -> Rows:
    layout = Layout(task)
    records = [identified(layout.read(row, f"row {number}")) for number, row in enumerate(made, 1)]
    return assembled(records, labels, task, "made-up data", Form())


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A model of a family for a task, with random factors where asked."""
    folder = tmp_path_factory.mktemp("bases")

    def made(family: str, task: str, *, moved: bool = True, **section: object) -> AdapterModel:
        base = folder / family
        if not base.is_dir():
            save_family(family, base)
        values = {"base": str(base), "task": task, "max_length": 48, **section}
        model = load_model(
            ModelSection.model_validate(values), AdapterSection(rank=2, alpha=4, targets=TARGETS[family])
        )
        rng = np.random.default_rng(1)
        if moved:
            model.load({s.name: rng.normal(0, 0.1, s.shape).astype(np.float32) for s in model.schema.tensors})
        return model

    return made


def encoded_for(model: AdapterModel, rows: Rows) -> Encoded:
    return model.prepared(encode(rows, model.tokenizer, 48))


def batch_of(model: AdapterModel, encoded: Encoded) -> dict[str, torch.Tensor]:
    return collate(encoded, np.arange(len(encoded)), model.tokenizer.pad_token_id)


def base_of(model: AdapterModel) -> Path:
    return Path(model.model.get_base_model().name_or_path)


def likelihood(plain: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, int]:
    """Sum of the log-probabilities of an answer's tokens, one text at a time, as a loop says it; and how many."""
    before, whole = tokenizer(prompt)["input_ids"], [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        scores = plain(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    places = range(max(1, len(before)), len(whole))
    return float(sum(scores[place - 1, whole[place]] for place in places)), len(places)


def test_dpo_is_the_papers_loss_beside_the_base_model(make: Make) -> None:
    model = make("llama", "dpo", head="frozen", beta=0.3)
    encoded = encoded_for(model, rows_of("dpo", PAIRS))
    plain = AutoModelForCausalLM.from_pretrained(base_of(model)).eval()
    with torch.no_grad():
        ours = model.task.loss(model.logits(batch_of(model, encoded)), batch_of(model, encoded)["labels"])

    for row, pair in enumerate(PAIRS):
        texts = [(pair["prompt"], pair[name]) for name in ("chosen", "rejected")]
        reference = [likelihood(plain, model.tokenizer, *text)[0] for text in texts]
        now = [likelihood(model.model, model.tokenizer, *text)[0] for text in texts]
        np.testing.assert_allclose(encoded.labels[row], reference, rtol=1e-4, atol=1e-4)
        margin = 0.3 * ((now[0] - reference[0]) - (now[1] - reference[1]))
        assert float(ours[row]) == pytest.approx(np.log1p(np.exp(-margin)), rel=1e-3, abs=1e-5)


def test_the_reference_is_the_base_model_whatever_the_adapter_holds(make: Make) -> None:
    rows = rows_of("dpo", PAIRS)
    moved, fresh = (make("llama", "dpo", head="frozen", moved=each) for each in (True, False))
    held = moved.read(moved.schema)

    np.testing.assert_array_equal(encoded_for(moved, rows).labels, encoded_for(fresh, rows).labels)

    after = moved.read(moved.schema)
    assert all(np.array_equal(held[name], after[name]) for name in held)


def test_what_is_found_for_a_row_depends_on_no_other_row(make: Make) -> None:
    model = make("llama", "dpo", head="frozen")
    whole = encoded_for(model, rows_of("dpo", PAIRS)).labels
    for row, pair in enumerate(PAIRS):
        np.testing.assert_array_equal(encoded_for(model, rows_of("dpo", [pair])).labels[0], whole[row])


def test_orpo_is_the_papers_loss(make: Make) -> None:
    model = make("llama", "orpo", head="frozen", weight=0.5)
    batch = batch_of(model, encoded_for(model, rows_of("orpo", PAIRS)))
    with torch.no_grad():
        ours = model.task.loss(model.logits(batch), batch["labels"])

    for row, pair in enumerate(PAIRS):
        means = []
        for name in ("chosen", "rejected"):
            total, count = likelihood(model.model, model.tokenizer, pair["prompt"], pair[name])
            means.append(total / count)
        odds = [np.exp(mean) / (1 - np.exp(mean)) for mean in means]
        wanted = -means[0] - 0.5 * np.log(1 / (1 + np.exp(-np.log(odds[0] / odds[1]))))
        assert float(ours[row]) == pytest.approx(wanted, rel=1e-3)


def test_kto_is_the_papers_loss_with_no_mean_over_the_batch(make: Make) -> None:
    made = [{"prompt": p["prompt"], "completion": p["chosen"], "label": n != 1} for n, p in enumerate(PAIRS)]
    model = make("llama", "kto", head="frozen", beta=0.2, good=1.5, bad=0.5)
    encoded = encoded_for(model, rows_of("kto", made))
    plain, batch = AutoModelForCausalLM.from_pretrained(base_of(model)).eval(), batch_of(model, encoded)
    with torch.no_grad():
        ours = model.task.loss(model.logits(batch), batch["labels"])

    for row, each in enumerate(made):
        text = (str(each["prompt"]), str(each["completion"]))
        gain = likelihood(model.model, model.tokenizer, *text)[0] - likelihood(plain, model.tokenizer, *text)[0]
        sign, weight = (1, 1.5) if each["label"] else (-1, 0.5)
        assert float(ours[row]) == pytest.approx(weight * (1 - 1 / (1 + np.exp(-sign * 0.2 * gain))), rel=1e-3)


def test_a_reward_model_is_bradley_and_terrys(make: Make) -> None:
    model = make("llama", "reward")
    batch = batch_of(model, encoded_for(model, rows_of("reward", PAIRS)))
    with torch.no_grad():
        ours = model.task.loss(model.logits(batch), batch["labels"])
        for row, pair in enumerate(PAIRS):
            rewards = [
                float(model.model(input_ids=torch.tensor([_ended(model, pair["prompt"] + pair[name])])).logits[0, 0])
                for name in ("chosen", "rejected")
            ]
            assert float(ours[row]) == pytest.approx(np.log1p(np.exp(rewards[1] - rewards[0])), rel=1e-3)


def _ended(model: AdapterModel, text: str) -> list[int]:
    return [*model.tokenizer(text)["input_ids"], model.tokenizer.eos_token_id]


@pytest.mark.parametrize("task", ["dpo", "orpo", "reward", "sentence-embedding", "embedding-regression"])
def test_a_row_has_one_gradient_that_a_loop_over_the_rows_gives_too(make: Make, task: str) -> None:
    made: dict[str, list[dict[str, Any]]] = {
        "sentence-embedding": [{"text": p["chosen"], "second": p["rejected"], "label": 0.5} for p in PAIRS],
        "embedding-regression": TAUGHT,
    }
    family, rows = ("bert", made[task]) if task in made else ("llama", PAIRS)
    model = make(family, task, head="train" if task == "reward" else "frozen")
    encoded = encoded_for(model, rows_of(task, rows))
    parameters = model.trainable(model.schema.roles)
    with recording(model.model, parameters) as tape:
        tape.begin(len(encoded), encoded.sequences)
        torch.autograd.backward(batch_loss(model, batch_of(model, encoded)))
        tape.finish()
        found = tape.flat.clone()

    assert len(found) == len(rows)
    for row in range(len(encoded)):
        loss = batch_loss(model, collate(encoded, np.array([row]), model.tokenizer.pad_token_id))
        alone = torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)])
        torch.testing.assert_close(found[row], alone, rtol=1e-3, atol=1e-5)


def test_a_layer_that_sees_other_rows_than_those_of_the_examples_is_refused(make: Make) -> None:
    model = make("llama", "dpo", head="frozen")
    encoded, parameters = encoded_for(model, rows_of("dpo", PAIRS)), model.trainable(model.schema.roles)
    with recording(model.model, parameters) as tape:
        tape.begin(len(encoded))  # as if a pair were two examples' worth of rows
        with pytest.raises(ModelError, match="saw 6 rows for 3"):
            torch.autograd.backward(batch_loss(model, batch_of(model, encoded)))


def test_seq2seq_is_transformers_own_loss_of_each_text_alone(make: Make) -> None:
    made = [{"prompt": "good film, bad plot", "completion": "good"}, {"prompt": "sad", "completion": "sad actor, sad"}]
    model = make("t5", "seq2seq", head="frozen", moved=False)
    batch = batch_of(model, encoded_for(model, rows_of("seq2seq", made)))
    plain = AutoModelForSeq2SeqLM.from_pretrained(base_of(model)).eval()
    with torch.no_grad():
        ours = model.task.loss(model.logits(batch), batch["labels"])
        for row, each in enumerate(made):
            ids = torch.tensor([model.tokenizer(each["prompt"])["input_ids"]])
            labels = torch.tensor([model.tokenizer(text_target=each["completion"])["input_ids"]])
            assert float(ours[row]) == pytest.approx(float(plain(input_ids=ids, labels=labels).loss), rel=1e-4)


SPANS = [
    {"question": "who?", "text": "the actor was very good", "answer": "actor"},
    {"question": "what was sad?", "text": "a sad film with a sad plot", "answer": ""},
    {"question": "how long?", "text": "very " * 40 + "long", "answer": "long"},
]


def test_question_answering_is_transformers_own_loss_of_each_text_alone(make: Make) -> None:
    model = make("bert", "question-answering", moved=False)
    encoded = encoded_for(model, rows_of("question-answering", SPANS))
    plain = model.model.get_base_model()
    assert isinstance(plain, AutoModelForQuestionAnswering._model_mapping[type(plain.config)])
    begin, end = encoded.labels[0]
    assert model.tokenizer.decode(encoded.input_ids[0][begin : end + 1]).strip() == "actor"
    assert encoded.labels[1:].tolist() == [[0, 0], [0, 0]], "no answer, and one beyond the greatest length"
    batch = batch_of(model, encoded)
    with torch.no_grad():
        ours = model.task.loss(model.logits(batch), batch["labels"])
        for row in range(3):
            ids, ends = torch.tensor(encoded.input_ids[row])[None].long(), torch.tensor(encoded.labels[row])
            own = plain(input_ids=ids, start_positions=ends[:1], end_positions=ends[1:]).loss
            assert float(ours[row]) == pytest.approx(float(own), rel=1e-4)


def test_spans_are_scored_by_their_overlap() -> None:
    task = task_named("question-answering")
    ends = torch.tensor([[2, 5], [1, 1], [0, 0]])
    said = torch.tensor([[4, 7], [1, 1], [3, 2]])  # two of four tokens, all, and a span that ends before it begins
    scores = F.one_hot(said, 9).float().flatten(0, 1)

    figures = task.summary(task.metrics(scores, ends.flatten()))

    assert figures == pytest.approx({"exact_match": 1 / 3, "f1": (0.5 + 1 + 0) / 3})


def test_an_answer_that_is_not_in_its_text_is_refused_without_quoting_it() -> None:
    with pytest.raises(DataError, match="row 1 has an answer that is no part of its text") as raised:
        rows_of("question-answering", [{"question": "who?", "text": "the ward", "answer": "secret"}])
    assert "secret" not in str(raised.value)


def test_multi_label_is_transformers_own_loss_of_each_text_alone(make: Make) -> None:
    names = ("a", "b", "c")
    made: list[dict[str, Any]] = [
        {"text": "good film", "label": ["a", "c"]},
        {"text": "sad", "label": ""},
        {"text": "plot", "label": "b; a"},
    ]
    rows = rows_of("multi-label", made, names)
    assert rows.labels.tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
    model = make("bert", "multi-label", labels=names, moved=False)
    batch = batch_of(model, encoded_for(model, rows))
    plain = model.model.get_base_model()
    assert isinstance(plain, AutoModelForSequenceClassification._model_mapping[type(plain.config)])
    plain.config.problem_type = "multi_label_classification"
    with torch.no_grad():
        ours = model.task.loss(model.logits(batch), batch["labels"])
        for row in range(3):
            one = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            own = model.model(**one, labels=batch["labels"][row : row + 1].float()).loss
            assert float(ours[row]) == pytest.approx(float(own), rel=1e-4)


def test_multi_label_figures_are_scikit_learns() -> None:
    task, rng = task_named("multi-label", ("a", "b", "c")), np.random.default_rng(0)
    margins, wanted = rng.normal(size=(40, 3)).astype(np.float32), rng.integers(2, size=(40, 3))
    places, labels = task.places(torch.from_numpy(margins), torch.from_numpy(wanted))

    rows = np.repeat(np.arange(40), 3)
    figures = task.report(places.flatten(0, 1).numpy(), labels.flatten().numpy(), rows)

    assert figures["f1_macro"] == pytest.approx(f1_score(wanted, margins > 0, average="macro"))
    assert figures["f1_micro"] == pytest.approx(f1_score(wanted, margins > 0, average="micro"))
    pairs = [np.subtract.outer(m[w == 1], m[w == 0]) for m, w in zip(margins.T, wanted.T, strict=True)]
    assert figures["auroc"] == pytest.approx(np.mean([(each > 0).mean() for each in pairs]))


def test_ordinal_counts_steps() -> None:
    task: Task = task_named("ordinal", ("low", "middle", "high"))
    scores, labels = torch.tensor([[2.0, -1.0], [3.0, 1.0], [-2.0, -3.0]]), torch.tensor([1, 2, 2])

    loss = task.loss(scores, labels)

    steps = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    wanted = -(steps * scores.sigmoid().log() + (1 - steps) * (-scores).sigmoid().log()).mean(1)
    torch.testing.assert_close(loss, wanted)
    assert task.answer(scores).tolist() == [1, 2, 0]
    assert task.summary(task.metrics(scores, labels)) == pytest.approx({"mae": 2 / 3})
    kappa = cohen_kappa_score([1, 2, 2], [1, 2, 0], weights="quadratic")
    assert task.report(scores.numpy(), labels.numpy(), np.arange(3)) == pytest.approx({"kappa": kappa})


def test_completions_are_learned_beyond_their_prompt_alone(make: Make) -> None:
    model = make("llama", "dpo", head="frozen")
    encoded = encode(rows_of("dpo", PAIRS[:1]), model.tokenizer, 48)
    for ids, targets, answer in zip(encoded.input_ids, encoded.targets, (" very good", " bad plot"), strict=True):
        learned = targets[targets != IGNORED]
        assert model.tokenizer.decode(learned, skip_special_tokens=True) == answer
        assert learned[-1] == ids[-1] == model.tokenizer.eos_token_id


def test_a_row_that_a_task_would_read_a_part_of_is_refused() -> None:
    made = {"text": "good film", "second": "bad film", "label": 0.5}
    assert len(rows_of("sentence-embedding", [made])) == 1
    with pytest.raises(DataError, match="'second', which regression does not read"):
        rows_of("regression", [made])


def test_embedding_regression_is_the_papers_loss_of_the_mean_of_a_texts_tokens(make: Make) -> None:
    model = make("bert", "embedding-regression", head="frozen")
    encoded = encoded_for(model, rows_of("embedding-regression", TAUGHT))
    batch = batch_of(model, encoded)
    with torch.no_grad():
        vectors = model.logits(batch)
        ours = model.task.loss(vectors, batch["labels"])

    cosines = []
    for row, each in enumerate(TAUGHT):
        with torch.no_grad():
            ids = torch.tensor([model.tokenizer(each["text"])["input_ids"]])
            mean = model.model(input_ids=ids).last_hidden_state[0].double().numpy().mean(0)
        teacher = np.array(each["vector"])
        assert float(ours[row]) == pytest.approx(np.mean((mean - teacher) ** 2), rel=1e-4)
        cosines.append(mean @ teacher / np.linalg.norm(mean) / np.linalg.norm(teacher))
    placed, wanted = model.task.places(vectors, batch["labels"])
    assert placed.flatten().tolist() == pytest.approx(cosines, abs=1e-5)
    found = model.task.report(placed.flatten(0, 1).numpy(), wanted.flatten().numpy(), np.arange(len(TAUGHT)))
    assert found == {"cosine": pytest.approx(np.mean(cosines), abs=1e-5)}
    assert model.task.right(torch.tensor([[[0.95]], [[0.85]]]), torch.ones(2, 1)).flatten().tolist() == [True, False]


def test_vectors_that_do_not_fit_each_other_or_the_model_are_refused(make: Make) -> None:
    with pytest.raises(DataError, match="row 2 has a vector of 2 numbers, and row 1 one of 3; give all rows"):
        rows_of("embedding-regression", [{"text": "a", "vector": [1, 2, 3]}, {"text": "b", "vector": [1, 2]}])

    short = rows_of("embedding-regression", [{"text": "a", "vector": [1, 2, 3]}])
    with pytest.raises(DataError, match="vectors of 3 numbers, and the base model gives vectors of 32; take a teacher"):
        encoded_for(make("bert", "embedding-regression", head="frozen"), short)


@pytest.mark.parametrize("task", ["sentence-embedding", "embedding-regression"])
def test_all_linear_leaves_out_the_pooler_which_no_mean_of_tokens_reads(make: Make, task: str) -> None:
    base = base_of(make("bert", task, head="frozen"))
    plain = AutoModel.from_pretrained(base)
    assert plain.pooler is not None
    section = ModelSection(base=str(base), task=task, head="frozen", max_length=48)
    model = load_model(section, AdapterSection(rank=2, alpha=4, targets="all-linear"))

    probe(model, lambda batch: batch_loss(model, batch), 48)

    modules = {pair.module for pair in model.schema.pairs}
    wanted = {name for name, each in plain.named_modules() if isinstance(each, torch.nn.Linear)}
    assert modules == wanted - {"pooler.dense"}


def test_entities_are_counted_as_conll_counts_them() -> None:
    names = ("O", "B-DRUG", "I-DRUG", "B-DOSE", "I-DOSE")
    said = {
        "O B-DRUG I-DRUG O B-DOSE": "O B-DRUG I-DRUG O B-DOSE",
        "B-DRUG I-DRUG B-DRUG": "B-DRUG I-DRUG I-DRUG",
        "O I-DOSE I-DOSE": "I-DRUG I-DOSE I-DOSE",
        "B-DRUG": "I-DRUG",
        "B-DOSE O": "O O",
    }
    wanted, told = ([names.index(tag) for tags in each for tag in tags.split()] for each in (said, said.values()))
    rows = np.repeat(np.arange(5), [5, 3, 3, 1, 2])

    found = entity_figures(np.array(told), np.array(wanted), rows, names)

    # What seqeval 1.2.2 says of these lines: 4 of 6 that were told and of 7 that there are.
    assert found == pytest.approx({"entity_precision": 4 / 6, "entity_recall": 4 / 7, "entity_f1": 8 / 13})
    assert entity_figures(np.array([0]), np.array([0]), np.array([0]), ("present", "absent")) == {}
