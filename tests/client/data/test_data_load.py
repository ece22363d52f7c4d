import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.assets.fetch import fetch
from fedloom.client.data.load import load_rows
from fedloom.client.data.rows import Rows
from fedloom.core.errors import DataError

LABELS = ("negative", "positive")


@pytest.fixture(scope="module")
def sentiment() -> tuple[Rows, Rows]:
    return load_rows("sentiment", LABELS, "train"), load_rows("sentiment", LABELS, "test")


def ratings(file: str) -> list[tuple[str, float, str]]:
    """The rows of a domain file, read independently of the loader."""
    with (fetch("sentiment") / file).open(encoding="utf-8", newline="") as stream:
        rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(name, float(rating), text) for name, rating, text in rows]


def test_sentiment_has_every_sentence_with_a_sign(sentiment: tuple[Rows, Rows]) -> None:
    train, test = sentiment

    counts = Counter(train.groups) + Counter(test.groups)

    assert counts == {"movie": 10_568, "tweets": 4_196, "amazon": 3_610, "nyt": 4_946}


def test_sentiment_labels_are_the_sign_of_the_rating(sentiment: tuple[Rows, Rows]) -> None:
    expected = Counter((text, int(rating > 0)) for _, rating, text in ratings("tweets_GroundTruth.txt") if rating)

    found: Counter[tuple[str, int]] = Counter()
    for rows in sentiment:
        found.update(
            (text, int(label))
            for text, label, group in zip(rows.texts, rows.labels, rows.groups, strict=True)
            if group == "tweets"
        )

    assert found == expected


@pytest.mark.parametrize("domain", ["movie", "tweets", "amazon", "nyt"])
def test_sentiment_holds_out_a_stratified_15_percent(sentiment: tuple[Rows, Rows], domain: str) -> None:
    train, test = (rows.labels[np.array(rows.groups) == domain] for rows in sentiment)

    assert len(test) / (len(train) + len(test)) == pytest.approx(0.15, abs=0.005)
    assert test.mean() == pytest.approx(train.mean(), abs=0.05)


@pytest.mark.parametrize(
    ("domain", "file"),
    [("amazon", "amazonReviewSnippets_GroundTruth.txt"), ("nyt", "nytEditorialSnippets_GroundTruth.txt")],
)
def test_sentiment_never_splits_an_article(sentiment: tuple[Rows, Rows], domain: str, file: str) -> None:
    articles: dict[str, set[str]] = {}
    for name, rating, text in ratings(file):
        if rating:
            articles.setdefault(text, set()).add(name.partition("_")[0])
    # A sentence that occurs in two articles does not tell which one it came from.
    train, test = (
        {
            min(articles[t])
            for t, g in zip(rows.texts, rows.groups, strict=True)
            if g == domain and len(articles[t]) == 1
        }
        for rows in sentiment
    )

    assert not train & test
    assert len(train | test) > 250


def test_sentiment_keeps_equal_film_and_tweet_texts_together(sentiment: tuple[Rows, Rows]) -> None:
    train, test = (
        {t for t, g in zip(rows.texts, rows.groups, strict=True) if g in ("movie", "tweets")} for rows in sentiment
    )

    assert not train & test


def test_sentiment_follows_the_order_of_the_run_files_labels(sentiment: tuple[Rows, Rows]) -> None:
    swapped = load_rows("sentiment", ("positive", "negative"), "test")

    np.testing.assert_array_equal(swapped.labels, 1 - sentiment[1].labels)


def test_sentiment_with_other_label_names_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"GroundTruth\.txt line \d+: a label is not among those expected; use 'bad', 'good'"
    ):
        load_rows("sentiment", ("bad", "good"), "train")


@pytest.fixture
def newsgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose newsgroups files have the published layout and a few posts."""
    folder = tmp_path / "newsgroups"
    folder.mkdir()
    header = "Category\tText\nd\tstring\nclass\t\n\n"
    (folder / "20newsgroups-train.tab").write_text(header + "sci.med\tpills\nsci.space\torbit\x0bnode\n")
    (folder / "20newsgroups-test.tab").write_text(header + "sci.space\tmoon\n")
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path))
    return folder


def test_newsgroups_keeps_its_published_split(newsgroups: Path) -> None:
    labels = ("sci.space", "sci.med")

    train, test = load_rows("newsgroups", labels, "train"), load_rows("newsgroups", labels, "test")

    assert (train.texts, train.labels.tolist()) == (("pills", "orbit\x0bnode"), [1, 0])
    assert (test.texts, test.labels.tolist(), test.groups) == (("moon",), [0], ("",))


def test_newsgroups_damage_is_located(newsgroups: Path) -> None:
    with (newsgroups / "20newsgroups-test.tab").open("a") as stream:
        stream.write("sci.med\tone\ttwo\n")

    with pytest.raises(DataError, match=r"20newsgroups-test\.tab line 6 has 3 fields instead of 2"):
        load_rows("newsgroups", ("sci.space", "sci.med"), "test")


def test_csv_columns_may_come_in_any_order_and_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text(
        '\ufeffid,group,label,text\n1,ward, positive,"fine,\n""really"""\n2,,negative,poor\n', encoding="utf-8"
    )

    rows = load_rows(str(path), LABELS, "train")

    assert rows.texts == ('fine,\n"really"', "poor")
    assert rows.labels.tolist() == [1, 0]
    assert rows.labels.dtype == np.int64
    assert rows.groups == ("ward", "")


def test_jsonl_labels_may_be_names_or_indices(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "fine", "label": "positive", "group": "ward"}\n\n{"text": "poor", "label": "negative"}\n')
    (tmp_path / "indices.jsonl").write_text('{"text": "fine", "label": 1}\n{"text": "poor", "label": "0"}\n')

    rows, indices = (load_rows(str(tmp_path / f"{name}.jsonl"), LABELS, "train") for name in ("notes", "indices"))

    assert (rows.texts, rows.labels.tolist(), rows.groups) == (("fine", "poor"), [1, 0], ("ward", ""))
    assert indices.labels.tolist() == [1, 0]


def test_a_folder_has_one_file_for_each_split(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\nfine,positive\n")
    (tmp_path / "test.jsonl").write_text('{"text": "poor", "label": "negative"}\n')

    assert load_rows(str(tmp_path), LABELS, "train").texts == ("fine",)
    assert load_rows(str(tmp_path), LABELS, "test").texts == ("poor",)

    (tmp_path / "test.csv").write_text("text,label\nfine,positive\n")
    with pytest.raises(DataError, match=r"has test\.csv and test\.jsonl; exactly one"):
        load_rows(str(tmp_path), LABELS, "test")
    (tmp_path / "train.csv").unlink()
    with pytest.raises(DataError, match=r"has none of train\.csv, train\.tsv, train\.jsonl, train\.parquet"):
        load_rows(str(tmp_path), LABELS, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"columns \(none\) but not text and label"),
        ("a.csv", b"text,label\n", "has no rows"),
        ("a.csv", b"text,tag\nfine,positive\n", "columns text, tag but not label"),
        (
            "a.csv",
            b"text,label\nfine,positive\npoor,bad\n",
            r"line 3: a label is not among those expected; use 'negative'",
        ),
        ("a.csv", b"text,label\nfine,2\n", "line 2: a label is not among those expected.* index from 0 to 1"),
        ("a.csv", b"text,label\n  ,positive\n", "line 2: the text is empty"),
        ("a.csv", b"text,label\nfine\n", "line 2: 2 fields are needed"),
        ("a.csv", b"text,label\nfine, really,positive\n", "line 2: 2 fields are needed"),
        ("a.csv", b'text,label\n"fine,positive\n', "line 2: the row that begins there is not valid CSV"),
        ("a.csv", b"text,label\ncaf\xe9,positive\n", "not UTF-8 .*0xe9"),
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b'{"text": "fine", "label": 1}\n{"text": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not valid JSON"),
        ("a.jsonl", b'["fine", 1]\n', "line 1 is not an object"),
        ("a.jsonl", b'{"text": "fine"}\n', "line 1 has no 'label'"),
        ("a.jsonl", b'{"text": 3, "label": 1}\n', "line 1: text must be a string; found a number"),
        (
            "a.jsonl",
            b'{"text": "fine", "label": true}\n',
            "a label must be a label's name or its index; found true or false",
        ),
        ("a.jsonl", b'{"text": "fine", "label": 0.5}\n', "a label must be a label's name or its index; found a number"),
        ("a.jsonl", b'{"text": "\\ud800", "label": 1}\n', "half of a surrogate pair"),
        ("a.jsonl", b'{"text": "caf\xe9", "label": 1}\n', "not UTF-8"),
        ("a.txt", b"fine", r"ends in '\.txt'; \.csv, \.tsv, \.jsonl or \.parquet is needed"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_the_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(DataError, match=message):
        load_rows(str(path), LABELS, "train")


def test_one_file_has_no_held_out_part(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nfine,positive\n")

    with pytest.raises(DataError, match="give a folder with train and test files"):
        load_rows(str(path), LABELS, "test")


def test_a_missing_source_is_refused() -> None:
    with pytest.raises(DataError, match="'sentimnet' does not exist; did you mean 'sentiment'"):
        load_rows("sentimnet", LABELS, "train")
    with pytest.raises(DataError, match="name a file, a folder or one of complaints, defects, dictation"):
        load_rows("records/2024.csv", LABELS, "train")
