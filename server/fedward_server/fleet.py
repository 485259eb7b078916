"""Ask sites, and take their answers as they come (hops 6 to 8 seen from the server).

Works on Flower's `Grid` alone, so the same code speaks to hospitals over the network and to simulated
sites in this process. Flower's own `send_and_receive` is not used: it polls every three seconds, knows
no quorum, and ends with an exception when one site sends something odd.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedward_common import weights
from fedward_common.envelope import Action, Instruction, SplitName
from fedward_common.errors import PayloadError, RefusalCode
from fedward_common.plan import SignedPlan, canonical_bytes
from fedward_common.protocol import Down, down_content, read_up
from fedward_common.state_payload import state_bytes
from fedward_server.admission import Answer, admit

_MESSAGE_TYPES: dict[Action, str] = {
    "prepare": MessageType.QUERY,
    "train": MessageType.TRAIN,
    "evaluate": MessageType.EVALUATE,
    "baseline": MessageType.EVALUATE,
    "survey": MessageType.QUERY,
}
_PAUSE_S = 0.05


class RunStoppedError(Exception):
    """Somebody stopped the run; raised between two looks at the mailbox."""


@dataclass(frozen=True)
class Question:
    """One thing asked of several sites.

    Attributes:
        payload: packed weights to send along, shared by all sites.
        deadline_s: seconds after which unanswered sites count as late.
    """

    action: Action
    round_index: int
    payload: bytes | None
    deadline_s: float
    split: SplitName = "validation"


class Fleet:
    """The sites of one run."""

    def __init__(
        self,
        grid: Grid,
        signed: SignedPlan,
        run_id: str,
        signing_keys: Mapping[str, str],
        stop: threading.Event,
    ) -> None:
        """Wire the fleet.

        Args:
            grid: Flower's connection to the nodes.
            signed: the plan of the run; travels with every message.
            run_id: our own run id, which survives a restart of the server.
            signing_keys: roster: site name -> Ed25519 public key (hex).
            stop: set when the run is to end.
        """
        self._grid = grid
        self._signed = signed
        self._document = signed.to_bytes()
        self._run_id = run_id
        self._keys = signing_keys
        self._stop = stop

    @property
    def roster(self) -> list[str]:
        """Every site of the federation, sorted."""
        return sorted(self._keys)

    def stopping(self, seconds: float) -> bool:
        """Wait up to `seconds`; whether the run is to end."""
        return self._stop.wait(seconds)

    def online(self) -> dict[str, int]:
        """Connected sites of the roster and their Flower node ids."""
        nodes = {node.name: int(node.node_id) for node in self._grid.get_nodes()}
        return {name: nodes[name] for name in sorted(nodes) if name in self._keys}

    def ask(
        self, sites: Iterable[str], question: Question, online: Mapping[str, int] | None = None
    ) -> Iterator[Answer]:
        """Send `question` and yield every site's answer as it arrives; each site exactly once.

        Args:
            sites: names.
            question: what to ask.
            online: what `online` said a moment ago; asked for when absent.

        A site that is not connected, is lost meanwhile or does not answer in time is yielded too, with
        the code that says so.

        Raises:
            RunStoppedError: the run was stopped while waiting.
        """
        online = self.online() if online is None else online
        named = list(sites)
        instruction = self._instruction(question)
        yield from (Answer(site, RefusalCode.SITE_OFFLINE) for site in named if site not in online)
        reachable = [site for site in named if site in online]
        sent = self._send([online[site] for site in reachable], instruction, question)
        yield from (
            Answer(site, RefusalCode.SITE_LOST)
            for site, key in zip(reachable, sent, strict=True)
            if key is None
        )
        pending = {key: site for site, key in zip(reachable, sent, strict=True) if key is not None}
        yield from self._collect(pending, instruction, time.monotonic() + question.deadline_s)

    def _collect(self, pending: dict[str, str], instruction: Instruction, until: float) -> Iterator[Answer]:
        """Answers to the messages in `pending` (id -> site) as they come; late ones at the end."""
        while pending:
            if self._stop.is_set():
                raise RunStoppedError
            over = time.monotonic() >= until  # one more look: what came while others were read is in time
            replies = list(self._grid.pull_messages(list(pending)))
            for reply in replies:
                answered = pending.pop(reply.metadata.reply_to_message_id, None)
                if answered is not None:
                    yield self._read(reply, instruction, answered)
            if not replies and over:
                break
            if not replies:
                time.sleep(_PAUSE_S)
        for site in pending.values():
            yield Answer(site, RefusalCode.SITE_LATE)

    def _instruction(self, question: Question) -> Instruction:
        payload = question.payload
        return Instruction(
            run_id=self._run_id,
            plan_digest=self._signed.digest,
            action=question.action,
            round_index=question.round_index,
            base_digest=None if payload is None else weights.digest(payload),
            split=question.split,
        )

    def _send(self, nodes: list[int], instruction: Instruction, question: Question) -> list[str | None]:
        """Send to all nodes at once, the content a single time; ids in the nodes' order, None for none."""
        content = down_content(Down(canonical_bytes(instruction), self._document, question.payload))
        messages = [
            Message(
                content,
                node_id,
                _MESSAGE_TYPES[question.action],
                group_id=str(question.round_index),
                ttl=question.deadline_s + 60,
            )
            for node_id in nodes
        ]
        ids: list[str | None] = list(self._grid.push_messages(messages)) if messages else []
        return ids + [None] * (len(nodes) - len(ids))

    def _read(self, reply: Message, instruction: Instruction, site: str) -> Answer:
        if reply.has_error():
            return Answer(site, RefusalCode.SITE_LOST)
        try:
            up = read_up(reply, max_payload=self._largest_payload)
        except PayloadError:
            return Answer(site, RefusalCode.UPDATE_MALFORMED)
        return admit(up, instruction, self._signed, site, self._keys[site])

    @property
    def _largest_payload(self) -> int:
        return max(weights.num_bytes(self._signed.body.layout), state_bytes(self._signed.content))
