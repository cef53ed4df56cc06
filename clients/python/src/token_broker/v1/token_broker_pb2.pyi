import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetTokenRequest(_message.Message):
    __slots__ = ("account", "min_ttl", "newer_than_generation")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    MIN_TTL_FIELD_NUMBER: _ClassVar[int]
    NEWER_THAN_GENERATION_FIELD_NUMBER: _ClassVar[int]
    account: str
    min_ttl: _duration_pb2.Duration
    newer_than_generation: int
    def __init__(self, account: _Optional[str] = ..., min_ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., newer_than_generation: _Optional[int] = ...) -> None: ...

class GetTokenResponse(_message.Message):
    __slots__ = ("access_token", "expires_at", "generation", "issued_at", "reuse_for", "expires_in", "allowed_ip", "api_base_url")
    ACCESS_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    REUSE_FOR_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_IP_FIELD_NUMBER: _ClassVar[int]
    API_BASE_URL_FIELD_NUMBER: _ClassVar[int]
    access_token: str
    expires_at: _timestamp_pb2.Timestamp
    generation: int
    issued_at: _timestamp_pb2.Timestamp
    reuse_for: _duration_pb2.Duration
    expires_in: _duration_pb2.Duration
    allowed_ip: str
    api_base_url: str
    def __init__(self, access_token: _Optional[str] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., generation: _Optional[int] = ..., issued_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., reuse_for: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., expires_in: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., allowed_ip: _Optional[str] = ..., api_base_url: _Optional[str] = ...) -> None: ...

class WatchTokensRequest(_message.Message):
    __slots__ = ("accounts",)
    ACCOUNTS_FIELD_NUMBER: _ClassVar[int]
    accounts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, accounts: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchTokensResponse(_message.Message):
    __slots__ = ("account", "token", "ended")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    account: str
    token: GetTokenResponse
    ended: AccountEnded
    def __init__(self, account: _Optional[str] = ..., token: _Optional[_Union[GetTokenResponse, _Mapping]] = ..., ended: _Optional[_Union[AccountEnded, _Mapping]] = ...) -> None: ...

class AccountEnded(_message.Message):
    __slots__ = ("reason",)
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[AccountEnded.Reason]
        REASON_REMOVED: _ClassVar[AccountEnded.Reason]
        REASON_DISABLED: _ClassVar[AccountEnded.Reason]
        REASON_NOT_GRANTED: _ClassVar[AccountEnded.Reason]
    REASON_UNSPECIFIED: AccountEnded.Reason
    REASON_REMOVED: AccountEnded.Reason
    REASON_DISABLED: AccountEnded.Reason
    REASON_NOT_GRANTED: AccountEnded.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: AccountEnded.Reason
    def __init__(self, reason: _Optional[_Union[AccountEnded.Reason, str]] = ...) -> None: ...

class ReportRejectedTokenRequest(_message.Message):
    __slots__ = ("account", "generation", "upstream_code")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_CODE_FIELD_NUMBER: _ClassVar[int]
    account: str
    generation: int
    upstream_code: str
    def __init__(self, account: _Optional[str] = ..., generation: _Optional[int] = ..., upstream_code: _Optional[str] = ...) -> None: ...

class ReportRejectedTokenResponse(_message.Message):
    __slots__ = ("outcome", "retry_after")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[ReportRejectedTokenResponse.Outcome]
        OUTCOME_REISSUING: _ClassVar[ReportRejectedTokenResponse.Outcome]
        OUTCOME_ALREADY_REPLACED: _ClassVar[ReportRejectedTokenResponse.Outcome]
        OUTCOME_TOO_SOON: _ClassVar[ReportRejectedTokenResponse.Outcome]
        OUTCOME_NOT_A_TOKEN_FAULT: _ClassVar[ReportRejectedTokenResponse.Outcome]
    OUTCOME_UNSPECIFIED: ReportRejectedTokenResponse.Outcome
    OUTCOME_REISSUING: ReportRejectedTokenResponse.Outcome
    OUTCOME_ALREADY_REPLACED: ReportRejectedTokenResponse.Outcome
    OUTCOME_TOO_SOON: ReportRejectedTokenResponse.Outcome
    OUTCOME_NOT_A_TOKEN_FAULT: ReportRejectedTokenResponse.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    outcome: ReportRejectedTokenResponse.Outcome
    retry_after: _duration_pb2.Duration
    def __init__(self, outcome: _Optional[_Union[ReportRejectedTokenResponse.Outcome, str]] = ..., retry_after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ListAccountsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListAccountsResponse(_message.Message):
    __slots__ = ("accounts", "next_page_token")
    ACCOUNTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    accounts: _containers.RepeatedCompositeFieldContainer[Account]
    next_page_token: str
    def __init__(self, accounts: _Optional[_Iterable[_Union[Account, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Account(_message.Message):
    __slots__ = ("name", "state", "expires_at", "issued_at", "generation", "next_attempt_at")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Account.State]
        STATE_PENDING: _ClassVar[Account.State]
        STATE_FRESH: _ClassVar[Account.State]
        STATE_REFRESHING: _ClassVar[Account.State]
        STATE_EXPIRED: _ClassVar[Account.State]
        STATE_REJECTED: _ClassVar[Account.State]
        STATE_EGRESS_REJECTED: _ClassVar[Account.State]
        STATE_UNREACHABLE: _ClassVar[Account.State]
        STATE_DISABLED: _ClassVar[Account.State]
    STATE_UNSPECIFIED: Account.State
    STATE_PENDING: Account.State
    STATE_FRESH: Account.State
    STATE_REFRESHING: Account.State
    STATE_EXPIRED: Account.State
    STATE_REJECTED: Account.State
    STATE_EGRESS_REJECTED: Account.State
    STATE_UNREACHABLE: Account.State
    STATE_DISABLED: Account.State
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NEXT_ATTEMPT_AT_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: Account.State
    expires_at: _timestamp_pb2.Timestamp
    issued_at: _timestamp_pb2.Timestamp
    generation: int
    next_attempt_at: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[Account.State, str]] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., issued_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., generation: _Optional[int] = ..., next_attempt_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...
