"""A head and a payload as Flower's records: the payload as one array of bytes, which Flower sends in chunks."""

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedloom.core.errors import ProtocolError

__all__ = ["packed", "unpacked"]

_HEAD, _PAYLOAD, _STYPE = "fedloom.head", "fedloom.payload", "fedloom"


def packed(head: bytes, payload: bytes) -> RecordDict:
    """The records of a message."""
    records = RecordDict({_HEAD: ConfigRecord({"json": head})})
    if payload:
        # Never deserialised by Flower: the serialisation type is none that it knows.
        array = Array(dtype="uint8", shape=(len(payload),), stype=_STYPE, data=payload)
        records[_PAYLOAD] = ArrayRecord({"bytes": array})
    return records


def unpacked(records: RecordDict) -> tuple[bytes, bytes]:
    """The head and the payload of a message.

    Raises:
        ProtocolError: It is not a message of ours.
    """
    head = records.config_records.get(_HEAD, ConfigRecord()).get("json")
    if not isinstance(head, bytes):
        raise ProtocolError("a Flower message without our head; both sides must run apps that fedloom exported")
    array = records.array_records.get(_PAYLOAD, ArrayRecord()).get("bytes")
    return head, b"" if array is None else bytes(array.data)
