"""The rows of a table in memory: dicts, or a table of pandas, pyarrow or Hugging Face's `datasets`.

None of these packages is imported: a table is known by the methods it has.
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fedloom.client.data.arrow import class_names, schema_class_names, with_names
from fedloom.client.data.files import Row, check_columns
from fedloom.client.data.layout import Layout
from fedloom.client.data.load import read_rows
from fedloom.client.data.rows import Rows
from fedloom.core.config.file_format import Form
from fedloom.core.config.run import ModelSection
from fedloom.core.errors import DataError

__all__ = ["rows_of"]

_KINDS = "a list of dicts, or a table of pandas, pyarrow or Hugging Face datasets"


class _Table(NamedTuple):
    rows: Iterable[Any]
    columns: list[str] | None = None
    """None where every row says for itself which it has."""
    classes: Mapping[str, list[str]] = {}
    """Class names of the columns that hold classes by number."""


def rows_of(values: object, name: str, section: ModelSection, form: Form | None = None) -> Rows:
    """The rows of a table in memory, checked and accounted for as those of a file.

    Args:
        values: Dicts by column; a pandas DataFrame; a pyarrow Table or RecordBatch; or one split of Hugging Face's
            `datasets`, whose class numbers become its class names.
        name: Whose they are, for messages.
        section: The task and its labels.
        form: How the table is to be read.

    Raises:
        DataError: It is none of these, or lacks a column; or as for a file, with the number of the row from 1.
    """
    form = form or Form()
    layout = Layout(section.task, form.columns)
    return read_rows(_rows(values, name, layout), layout, section.labels, name, form)


def _rows(values: object, name: str, layout: Layout) -> Iterator[Row]:
    table = _table(values, name)
    if table.columns is not None:
        check_columns(name, table.columns, layout)
    for number, row in enumerate(table.rows, 1):
        where = f"{name} row {number}"
        if not isinstance(row, Mapping):
            yield where, DataError(f"{where} is a {type(row).__name__}; give a dict with {layout.columns}")
            continue
        wanted = layout.wanted(row.keys())
        yield where, {column: with_names(_plain(row[column]), table.classes.get(column)) for column in wanted}


def _table(values: Any, name: str) -> _Table:
    if hasattr(values, "to_dict") and hasattr(values, "notna"):  # pandas, which has several values for nothing
        columns = [str(column) for column in values.columns]
        found = values.astype(object).where(values.notna(), None)
        return _Table((dict(zip(columns, row, strict=True)) for row in found.itertuples(index=False)), columns)
    if hasattr(values, "to_pylist") and hasattr(values, "schema"):  # pyarrow
        return _Table(values.to_pylist(), list(values.schema.names), schema_class_names(values.schema))
    if hasattr(values, "with_format") and hasattr(values, "features"):  # datasets
        features = values.features.to_dict() if values.features else {}
        return _Table(values.with_format(None), values.column_names, class_names(features))
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise DataError(f"{name} has a {type(values).__name__} for its rows; give {_KINDS}, or the path of a file")
    return _Table(values)


def _plain(value: Any) -> Any:
    """Python's own values in place of numpy's and torch's, and the file of a picture in place of the picture."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "tobytes") and hasattr(value, "save"):  # of PIL
        file = io.BytesIO()
        value.save(file, "PNG")
        return file.getvalue()
    return value
