"""The requests of one rank to the store, and the answers. This module uses no sockets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastvideo_comm.errors import (
    JoinError,
    JoinTimeoutError,
    MessageExpiredError,
    PeerLostError,
)
from fastvideo_comm.object_channel.store_link import Frame, FrameError, Kind
from fastvideo_comm.object_channel.store_messages import unpack_text


class Answers:
    """The requests of one rank and their answers.

    An answer is kept until it is taken, however long that takes: no message is lost to a timeout.
    An answer that nobody waits for is dropped when it comes.

    >>> answers = Answers()
    >>> first, second = answers.begin(), answers.begin()
    >>> answers.put(Frame(Kind.OK, second, b"", b"body"))
    >>> answers.missing([first, second])
    [1]
    >>> answers.take([second])[0].body
    b'body'
    """

    def __init__(self) -> None:
        """Start without a request."""
        self._last = 0
        self._open: set[int] = set()  # requests without an answer that were not given up
        self._frames: dict[int, Frame] = {}
        self._asked: dict[tuple[Kind, bytes], int] = {}
        self._questions: dict[int, tuple[Kind, bytes]] = {}  # `_asked` with keys and values swapped

    def __len__(self) -> int:
        """How many answers wait to be taken."""
        return len(self._frames)

    def begin(self) -> int:
        """Return the id of a new request."""
        self._last = ident = self._last % 0xFFFFFFFF + 1
        self._open.add(ident)
        return ident

    def remember(self, ident: int, kind: Kind, meta: bytes) -> None:
        """Let `find` return this request until its answer is taken."""
        self._asked[kind, meta] = ident
        self._questions[ident] = kind, meta

    def find(self, kind: Kind, meta: bytes) -> int | None:
        """Return the id of an equal request whose answer was not taken yet."""
        return self._asked.get((kind, meta))

    def put(self, frame: Frame) -> None:
        """Keep an answer, if somebody waits for it."""
        if frame.ident in self._open:
            self._open.discard(frame.ident)
            self._frames[frame.ident] = frame

    def missing(self, idents: Iterable[int]) -> list[int]:
        """Return the ids that have no answer yet."""
        return [ident for ident in idents if ident not in self._frames]

    def raise_failure(self, idents: Iterable[int]) -> None:
        """Raise the error of the first refusal among the answers; the next request asks again.

        Raises:
            MessageExpiredError: The message was removed unread.
            PeerLostError: The rank that would have to act has left.
            JoinError: The store refuses, JoinTimeoutError if that is because ranks are missing.
            FrameError: The answer is malformed.
        """
        for ident in idents:
            frame = self._frames.get(ident)
            if frame is not None and frame.kind != Kind.OK:
                self.forget(ident)
                raise _failure(frame)

    def take(self, idents: Sequence[int]) -> list[Frame]:
        """Return the answers to these requests, once; all of them, or none and an error.

        Raises:
            CommunicationError: See `raise_failure`.
        """
        frames = self.all_of(idents)
        for ident in idents:
            self.forget(ident)
        return frames

    def all_of(self, idents: Iterable[int]) -> list[Frame]:
        """Return the answers to these requests, and keep them.

        Raises:
            CommunicationError: See `raise_failure`.
        """
        self.raise_failure(idents)
        return [self._frames[ident] for ident in idents]

    def forget(self, ident: int) -> None:
        """Give a request up: its answer is dropped, now or when it comes."""
        self._open.discard(ident)
        self._frames.pop(ident, None)
        question = self._questions.pop(ident, None)
        if question is not None:
            del self._asked[question]


def _failure(frame: Frame) -> MessageExpiredError | PeerLostError | JoinError:
    if frame.kind == Kind.EXPIRED:
        return MessageExpiredError("the message expired unread")
    peers, text = unpack_text(frame.meta)
    if frame.kind == Kind.LEFT:
        return PeerLostError(f"rank(s) {list(peers)} left the group", peers=peers)
    if frame.kind != Kind.REFUSED:
        raise FrameError(f"there is no answer {frame.kind}")
    return JoinTimeoutError(text, peers=peers) if peers else JoinError(text)
