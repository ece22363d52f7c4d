"""The rows of Parquet files and of folders that Hugging Face's `datasets` saved, read with pyarrow alone."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedloom.client.data.files import Note, Row, check_columns, readable
from fedloom.client.data.layout import Layout
from fedloom.core.errors import DataError

__all__ = ["class_names", "parquet_rows", "saved_rows", "schema_class_names", "with_names"]

_BATCH = 1024


def parquet_rows(path: Path, layout: Layout) -> Iterator[Row]:
    """The rows of a .parquet file; only the columns that are needed are read.

    Raises:
        DataError: It cannot be read, lacks a column, or pyarrow is not installed.
    """
    arrow = _arrow(path)
    from pyarrow import parquet

    try:
        with readable(path), parquet.ParquetFile(path) as table:
            check_columns(path, table.schema_arrow.names, layout)
            wanted = layout.wanted(table.schema_arrow.names)
            batches = table.iter_batches(batch_size=_BATCH, columns=wanted)
            count = 0
            for row in _rows(path, batches, schema_class_names(table.schema_arrow), wanted):
                count += 1
                yield row
            # pyarrow gives what the pages hold, whatever the file says that they do.
            parts = [table.metadata.row_group(part).num_rows for part in range(table.num_row_groups)]
            if not count == sum(parts) == table.metadata.num_rows:
                raise DataError(f"{path} is damaged: {count} rows are found and not as many as it says; write it again")
    except arrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet; write it again ({_short(error)})") from error


def saved_rows(folder: Path, layout: Layout) -> Iterator[Row]:
    """The rows of a folder that `Dataset.save_to_disk` wrote: its Arrow files in the order of state.json.

    Raises:
        DataError: It cannot be read, lacks a column, or pyarrow is not installed.
    """
    arrow = _arrow(folder)
    files = _saved_files(folder)
    with readable(folder):
        beside = sorted(path for path in folder.glob("*.arrow") if path not in files)
    yield from ((str(path), Note("an Arrow file that state.json does not name, passed over")) for path in beside)
    for path in files:
        _check_whole(path)
        try:
            with readable(path), arrow.OSFile(str(path)) as file, arrow.ipc.open_stream(file) as stream:
                check_columns(path, stream.schema.names, layout)
                yield from _rows(path, stream, schema_class_names(stream.schema), layout.wanted(stream.schema.names))
        except arrow.ArrowException as error:
            raise DataError(f"{path} cannot be read as Arrow; save the data set again ({_short(error)})") from error


def _check_whole(path: Path) -> None:
    """Refuse a stream without the mark that ends it: pyarrow takes one that was cut between two batches as whole.

    Raises:
        DataError: The mark is not there, or the file cannot be read.
    """
    with readable(path), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4))
        if file.read() != bytes(4):
            raise DataError(f"{path} cannot be read as Arrow: its end is missing; copy it or save the data set again")


def _saved_files(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(each["filename"]) for each in state["_data_files"]]
        selected = state.get("_indices_data_files") or state.get("_indices_files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / 'state.json'} is not what save_to_disk writes; save the data set again") from error
    if selected:
        raise DataError(f"{folder} keeps a selection of its rows; call flatten_indices() before save_to_disk")
    if not names or any(Path(name).name != name for name in names):
        raise DataError(f"{folder / 'state.json'} names no data file in that folder; save the data set again")
    return [folder / name for name in names]


def _rows(path: Path, batches: Any, names: dict[str, list[str]], wanted: list[str]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.select(wanted).to_pylist():
            number += 1
            yield (
                f"{path} row {number}",
                {column: with_names(value, names.get(column)) for column, value in row.items()},
            )


def schema_class_names(schema: Any) -> dict[str, list[str]]:
    """Class names of the columns that hold classes by number, as `datasets` notes them in the file's metadata."""
    try:
        return class_names(json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Class names by column, of the columns that hold classes by number.

    Args:
        features: What `Features.to_dict` of Hugging Face's `datasets` gives.
    """
    return {column: names for column, feature in features.items() if (names := _class_names(feature))}


def _class_names(feature: Any) -> list[str]:
    while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    found = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return [str(name) for name in found] if found else []


def with_names(value: Any, names: list[str] | None) -> Any:
    """The class's name in place of its number, which counts in the data set's order and not in the run's."""
    if names is None:
        return value
    if isinstance(value, list):
        return [with_names(each, names) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path} needs pyarrow, which is not installed; pip install 'fedloom[arrow]', or write .csv or .jsonl"
        ) from error
    return pyarrow


def _short(error: Exception) -> str:
    """The kind of an error alone: what Arrow says may quote the data."""
    return type(error).__name__
