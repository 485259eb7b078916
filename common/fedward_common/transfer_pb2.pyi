# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Object(_message.Message):
    __slots__ = ("object_id", "content")
    OBJECT_ID_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    object_id: str
    content: bytes
    def __init__(self, object_id: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("node_id", "request")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    node_id: int
    request: bytes
    def __init__(self, node_id: _Optional[int] = ..., request: _Optional[bytes] = ...) -> None: ...

class PullReply(_message.Message):
    __slots__ = ("reply", "objects")
    REPLY_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    reply: bytes
    objects: _containers.RepeatedCompositeFieldContainer[Object]
    def __init__(self, reply: _Optional[bytes] = ..., objects: _Optional[_Iterable[_Union[Object, _Mapping]]] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("node_id", "request", "objects")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    node_id: int
    request: bytes
    objects: _containers.RepeatedCompositeFieldContainer[Object]
    def __init__(self, node_id: _Optional[int] = ..., request: _Optional[bytes] = ..., objects: _Optional[_Iterable[_Union[Object, _Mapping]]] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("reply",)
    REPLY_FIELD_NUMBER: _ClassVar[int]
    reply: bytes
    def __init__(self, reply: _Optional[bytes] = ...) -> None: ...
