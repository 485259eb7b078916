"""One request for a message and all its objects (hop 7), instead of one for every object.

Flower moves a message as a tree of objects, each by a request of its own, and a request costs both ends
milliseconds however small the object is. Sites, server and runner therefore send the small objects along
with the message; the pieces of a large tensor still go one by one, through Flower's own requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fedward_common.transfer_pb2 import Object

MAX_BUNDLE = 16 * 2**20  # bytes of objects that travel with one message
FLEET_PULL = "/v1/fleet/bundled/pull-messages"
FLEET_PUSH = "/v1/fleet/bundled/push-messages"
RUNTIME_PULL = "/v1/runtime/bundled/pull-messages"
RUNTIME_PUSH = "/v1/runtime/bundled/push-messages"


def bundled(object_ids: Iterable[str], content_of: Callable[[str], bytes | None]) -> list[Object]:
    """Objects to send along, in the order of `object_ids`, each once, as many as fit.

    Args:
        object_ids: ids, repeats allowed.
        content_of: an object's bytes; None or empty when it is not there (yet).
    """
    left = MAX_BUNDLE
    objects = []
    for object_id in dict.fromkeys(object_ids):
        content = content_of(object_id)
        if content and len(content) <= left:
            left -= len(content)
            objects.append(Object(object_id=object_id, content=content))
    return objects
