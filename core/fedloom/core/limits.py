"""Hard limits that both sides check before they allocate anything."""

__all__ = [
    "CHUNK_BYTES",
    "HTTP2_FRAME_BYTES",
    "LONG_POLL_S",
    "MAX_CLIENTS",
    "MAX_LINKS",
    "MAX_MESSAGE_BYTES",
    "MAX_NAME_LENGTH",
    "MAX_PAYLOAD_BYTES",
    "MAX_RANK",
    "MAX_REQUEST_BYTES",
    "MAX_ROUNDS",
    "MAX_SCHEMA_BYTES",
    "MAX_SPEC_BYTES",
    "MAX_TENSORS",
    "MIN_BYTES_PER_S",
    "MIN_CHUNK_BYTES",
    "TRANSFER_GRACE_S",
    "TRANSFER_S",
]

CHUNK_BYTES = 1 << 20
"""Payload bytes in one streamed chunk. 256 KiB to 1 MiB is fastest in gRPC Python."""

HTTP2_FRAME_BYTES = (1 << 24) - 1
"""Largest HTTP/2 frame either side takes, the protocol's maximum. Its default of 16 KiB costs a tenth of a transfer."""

MAX_MESSAGE_BYTES = 4 << 20
"""Largest single gRPC message either side accepts (after decompression)."""

MAX_REQUEST_BYTES = CHUNK_BYTES + (64 << 10)
"""Largest message a coordinator accepts, after decompression: it holds that much for each call that stalls in one."""

MIN_CHUNK_BYTES = 16 << 10
"""Fewest bytes in a chunk that is not a payload's last, so that nobody can pay out an update byte by byte."""

TRANSFER_GRACE_S = 10.0
"""Seconds a payload may take, whatever its length; a call in which nothing moves for longer is ended."""

MIN_BYTES_PER_S = 16 << 10
"""Slowest mean rate of a payload after its grace. A call that is ended for it is not lost: the next one goes on."""

TRANSFER_S = 600.0
"""Longest call that carries a payload; the rest goes with the next."""

MAX_PAYLOAD_BYTES = 4 << 30
"""Largest encoded adapter; a schema that would need more is refused when it is made."""

MAX_SCHEMA_BYTES = 2 << 20
"""Largest schema document accepted."""

MAX_SPEC_BYTES = 64 << 10
"""Largest run specification a client accepts."""

MAX_LINKS = 16
"""Most changes of the adapter that a client is sent one after the other in place of the whole."""

MAX_TENSORS = 20_000
"""Most tensors in one schema."""

MAX_NAME_LENGTH = 256
"""Longest tensor, module or client name."""

LONG_POLL_S = 45.0
"""Longest `Work` poll, below the 60 s at which hospital proxies cut an idle request."""

MAX_CLIENTS = 10_000
"""Most client names one run admits."""

MAX_ROUNDS = 100_000
"""Longest run; no assignment is for a later round."""

MAX_RANK = 512
"""Highest rank of a low-rank pair."""
