from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Step(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_UNSPECIFIED: _ClassVar[Step]
    STEP_ADVERTISE: _ClassVar[Step]
    STEP_SHARE: _ClassVar[Step]
    STEP_MASK: _ClassVar[Step]
    STEP_CONFIRM: _ClassVar[Step]
    STEP_UNMASK: _ClassVar[Step]
STEP_UNSPECIFIED: Step
STEP_ADVERTISE: Step
STEP_SHARE: Step
STEP_MASK: Step
STEP_CONFIRM: Step
STEP_UNMASK: Step

class JoinRequest(_message.Message):
    __slots__ = ("client", "protocol", "declared_examples")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    DECLARED_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    client: str
    protocol: int
    declared_examples: int
    def __init__(self, client: _Optional[str] = ..., protocol: _Optional[int] = ..., declared_examples: _Optional[int] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("run", "epoch", "spec", "schema", "schema_digest")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    spec: str
    schema: str
    schema_digest: str
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., spec: _Optional[str] = ..., schema: _Optional[str] = ..., schema_digest: _Optional[str] = ...) -> None: ...

class WorkRequest(_message.Message):
    __slots__ = ("run", "epoch", "client", "held")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    client: str
    held: str
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., client: _Optional[str] = ..., held: _Optional[str] = ...) -> None: ...

class WorkReply(_message.Message):
    __slots__ = ("assignment", "wait", "finished")
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    assignment: Assignment
    wait: Wait
    finished: Finished
    def __init__(self, assignment: _Optional[_Union[Assignment, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("round", "train", "personal", "rank", "base_rank", "local", "broadcast_roles", "broadcast_codec", "broadcast_digest", "broadcast_bytes", "upload_codec", "linear", "turns", "adapter", "links")
    class LocalEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    BASE_RANK_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    BROADCAST_ROLES_FIELD_NUMBER: _ClassVar[int]
    BROADCAST_CODEC_FIELD_NUMBER: _ClassVar[int]
    BROADCAST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BROADCAST_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_CODEC_FIELD_NUMBER: _ClassVar[int]
    LINEAR_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    round: int
    train: _containers.RepeatedScalarFieldContainer[str]
    personal: _containers.RepeatedScalarFieldContainer[str]
    rank: int
    base_rank: int
    local: _containers.ScalarMap[str, float]
    broadcast_roles: _containers.RepeatedScalarFieldContainer[str]
    broadcast_codec: str
    broadcast_digest: str
    broadcast_bytes: int
    upload_codec: str
    linear: _containers.RepeatedScalarFieldContainer[str]
    turns: _containers.RepeatedScalarFieldContainer[str]
    adapter: str
    links: _containers.RepeatedCompositeFieldContainer[Link]
    def __init__(self, round: _Optional[int] = ..., train: _Optional[_Iterable[str]] = ..., personal: _Optional[_Iterable[str]] = ..., rank: _Optional[int] = ..., base_rank: _Optional[int] = ..., local: _Optional[_Mapping[str, float]] = ..., broadcast_roles: _Optional[_Iterable[str]] = ..., broadcast_codec: _Optional[str] = ..., broadcast_digest: _Optional[str] = ..., broadcast_bytes: _Optional[int] = ..., upload_codec: _Optional[str] = ..., linear: _Optional[_Iterable[str]] = ..., turns: _Optional[_Iterable[str]] = ..., adapter: _Optional[str] = ..., links: _Optional[_Iterable[_Union[Link, _Mapping]]] = ...) -> None: ...

class Link(_message.Message):
    __slots__ = ("before", "after", "values", "changes", "codec", "digest", "bytes")
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    before: str
    after: str
    values: _containers.RepeatedScalarFieldContainer[str]
    changes: _containers.RepeatedScalarFieldContainer[str]
    codec: str
    digest: str
    bytes: int
    def __init__(self, before: _Optional[str] = ..., after: _Optional[str] = ..., values: _Optional[_Iterable[str]] = ..., changes: _Optional[_Iterable[str]] = ..., codec: _Optional[str] = ..., digest: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("retry_after_s",)
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    retry_after_s: float
    def __init__(self, retry_after_s: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("rounds", "codec", "digest", "bytes", "base_rank")
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BASE_RANK_FIELD_NUMBER: _ClassVar[int]
    rounds: int
    codec: str
    digest: str
    bytes: int
    base_rank: int
    def __init__(self, rounds: _Optional[int] = ..., codec: _Optional[str] = ..., digest: _Optional[str] = ..., bytes: _Optional[int] = ..., base_rank: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("run", "epoch", "client", "digest", "offset")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    client: str
    digest: str
    offset: int
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., client: _Optional[str] = ..., digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: UpdateHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[UpdateHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class UpdateHeader(_message.Message):
    __slots__ = ("run", "epoch", "client", "round", "schema_digest", "codec", "payload_bytes", "digest", "attempt", "offset", "score")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    client: str
    round: int
    schema_digest: str
    codec: str
    payload_bytes: int
    digest: str
    attempt: int
    offset: int
    score: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., client: _Optional[str] = ..., round: _Optional[int] = ..., schema_digest: _Optional[str] = ..., codec: _Optional[str] = ..., payload_bytes: _Optional[int] = ..., digest: _Optional[str] = ..., attempt: _Optional[int] = ..., offset: _Optional[int] = ..., score: _Optional[_Iterable[float]] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("duplicate", "missing_bytes")
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    MISSING_BYTES_FIELD_NUMBER: _ClassVar[int]
    duplicate: bool
    missing_bytes: int
    def __init__(self, duplicate: _Optional[bool] = ..., missing_bytes: _Optional[int] = ...) -> None: ...

class ExchangeRequest(_message.Message):
    __slots__ = ("run", "epoch", "client", "round", "attempt", "step", "parts")
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    client: str
    round: int
    attempt: int
    step: Step
    parts: _containers.ScalarMap[str, bytes]
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., client: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., step: _Optional[_Union[Step, str]] = ..., parts: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class ExchangeReply(_message.Message):
    __slots__ = ("waiting", "attempt", "parts")
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    WAITING_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    waiting: bool
    attempt: int
    parts: _containers.ScalarMap[str, bytes]
    def __init__(self, waiting: _Optional[bool] = ..., attempt: _Optional[int] = ..., parts: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("run", "epoch", "client")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    client: str
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., client: _Optional[str] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("round", "open", "oldest")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    OLDEST_FIELD_NUMBER: _ClassVar[int]
    round: int
    open: bool
    oldest: int
    def __init__(self, round: _Optional[int] = ..., open: _Optional[bool] = ..., oldest: _Optional[int] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("run", "epoch", "client", "reason", "score")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    client: str
    reason: str
    score: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., client: _Optional[str] = ..., reason: _Optional[str] = ..., score: _Optional[_Iterable[float]] = ...) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EnrollRequest(_message.Message):
    __slots__ = ("signing_request",)
    SIGNING_REQUEST_FIELD_NUMBER: _ClassVar[int]
    signing_request: bytes
    def __init__(self, signing_request: _Optional[bytes] = ...) -> None: ...

class EnrollReply(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    def __init__(self, certificate: _Optional[bytes] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("run", "epoch", "round", "rounds", "open", "elapsed_s", "needed", "short", "live", "cohort", "submitted", "lost", "waiting", "waiting_s", "refusing", "over")
    class LostEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    NEEDED_FIELD_NUMBER: _ClassVar[int]
    SHORT_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_S_FIELD_NUMBER: _ClassVar[int]
    REFUSING_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    round: int
    rounds: int
    open: bool
    elapsed_s: float
    needed: int
    short: bool
    live: _containers.RepeatedScalarFieldContainer[str]
    cohort: _containers.RepeatedScalarFieldContainer[str]
    submitted: _containers.RepeatedScalarFieldContainer[str]
    lost: _containers.ScalarMap[str, str]
    waiting: str
    waiting_s: float
    refusing: _containers.RepeatedScalarFieldContainer[str]
    over: bool
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., open: _Optional[bool] = ..., elapsed_s: _Optional[float] = ..., needed: _Optional[int] = ..., short: _Optional[bool] = ..., live: _Optional[_Iterable[str]] = ..., cohort: _Optional[_Iterable[str]] = ..., submitted: _Optional[_Iterable[str]] = ..., lost: _Optional[_Mapping[str, str]] = ..., waiting: _Optional[str] = ..., waiting_s: _Optional[float] = ..., refusing: _Optional[_Iterable[str]] = ..., over: _Optional[bool] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FinishRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FinishReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
