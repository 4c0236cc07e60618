"""The store that `StatelessProcessGroup.create` makes: authenticated, bounded in time, own sockets.

torch's TCPStore keeps no deadline while its server is stopped, does not notice a dead rank, and
listens on every interface. So rank 0 runs `StoreServer`, and every rank holds an `ObjectStore`. An
`ObjectStore` has the basic methods of `torch.distributed.Store` as well.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import util as process_exit
from typing import NamedTuple, TypeVar

from fastvideo_comm.errors import CommunicationTimeoutError, JoinError
from fastvideo_comm.object_channel.call import GroupCall
from fastvideo_comm.object_channel.message_seal import (
    EVERYONE,
    TAG_BYTES,
    Address,
    MessageSeal,
    Op,
    SealKind,
)
from fastvideo_comm.object_channel.settings import DESCRIPTION_BYTES, GroupSettings
from fastvideo_comm.object_channel.store_client import StoreClient
from fastvideo_comm.object_channel.store_link import Kind
from fastvideo_comm.object_channel.store_messages import (
    TOKEN_BYTES,
    JoinRequest,
    pack_number,
    unpack_decimal,
    unpack_number,
    unpack_origin,
)
from fastvideo_comm.object_channel.store_server import ServerSettings, StoreServer
from fastvideo_comm.object_channel.store_sockets import Heartbeat, is_wildcard, listen, seconds_left

_MAX_KEY_BYTES = 8 * 1024
_REFUSAL_SECONDS = 0.5
_LATEST_SECONDS = 0.9  # after the deadline

_T = TypeVar("_T")


class StoreOptions(NamedTuple):
    """How a store is joined; `settings`, `world_size` and `secret` must be equal on every rank.

    Attributes:
        world_size: How many ranks join.
        settings: `key=value` words.
        secret: Shared by all ranks, or None.
        max_message_bytes: The largest encoded message or value.
        heartbeat: The heartbeat of the lifelines.
        timeout: Seconds for the join, and for a method that is given no timeout.
        encryption: For values, and for groups that name none; "auto", "required" or "off".
    """

    world_size: int
    settings: str
    secret: bytes | None
    max_message_bytes: int
    heartbeat: Heartbeat
    timeout: float
    encryption: str


class ObjectStore:
    """A rank's access to the store: values by key through its methods, messages through a group.

    The methods are those of `torch.distributed.Store`: `set`, `get`, `wait`, `add`, `check`,
    `delete_key`, `num_keys`. The store acknowledges a `set`. With a secret, values are sealed like
    messages, each with its key and a number of its own. An answer of the store says which rank set
    the value, and the number of the value. So nobody on the path can put an earlier value in the
    place of a later one. The sums of `add` travel in the answers themselves.
    """

    def __init__(
        self,
        host: str,
        port: int,
        rank: int,
        options: StoreOptions,
        listen_socket: socket.socket | None = None,
    ) -> None:
        """Join the store; rank 0 also serves it.

        Args:
            host: The address of rank 0, which listens on this address only.
            port: The port of rank 0.
            rank: The rank of this process.
            options: The other settings.
            listen_socket: For rank 0, a socket that listens already, instead of a new one; the
                store owns it from now on.

        Raises:
            ValueError: The address is a wildcard and there is no secret.
            AuthenticationError: The secrets differ.
            JoinError: The store refuses this rank, or another program uses the port.
            JoinTimeoutError: Not every rank came within the timeout.
        """
        self.rank = rank
        self.world_size = options.world_size
        self.max_message_bytes = options.max_message_bytes
        self._timeout = options.timeout
        self._names: set[str] = set()
        self._names_lock = threading.Lock()
        self._server: StoreServer | None = None
        deadline = time.monotonic() + options.timeout
        max_body_bytes = options.max_message_bytes + DESCRIPTION_BYTES + TAG_BYTES
        if rank == 0:
            listener = listen_socket or listen(host, port)
            if options.secret is None and is_wildcard(listener):
                listener.close()
                raise ValueError(
                    f"host must be one address while there is no secret, got {host!r}: "
                    "everybody who reaches this machine could join"
                )
            host, port = listener.getsockname()[:2]
            self._server = StoreServer(
                listener,
                ServerSettings(
                    options.world_size,
                    options.secret,
                    options.settings,
                    max_body_bytes,
                    options.heartbeat,
                ),
            )
        join = JoinRequest(False, rank, bytes(TOKEN_BYTES), options.settings)
        try:
            self.client = StoreClient(
                host, port, join, options.secret, max_body_bytes, options.heartbeat, deadline
            )
        except BaseException as error:
            if self._server is not None:
                # Ranks that come now are told why the join failed.
                linger = min(_REFUSAL_SECONDS, seconds_left(deadline + _LATEST_SECONDS))
                self._server.stop(linger if isinstance(error, JoinError) else 0.0)
            raise
        self.host, self.port = host, port
        self._secret = options.secret
        self._value_seal = self._make_seal("", options.encryption)
        self._value_numbers = itertools.count()
        # This also leaves when the object is dropped without `close`, and when the process ends.
        self._leave = process_exit.Finalize(self, self.client.leave, exitpriority=0)

    @classmethod
    def join(
        cls,
        host: str,
        port: int,
        settings: GroupSettings,
        heartbeat: Heartbeat,
        listen_socket: socket.socket | None,
        seconds: float,
    ) -> ObjectStore:
        """Join a store that is made for one group, as one of its ranks, within these seconds.

        Raises:
            ValueError: No such port, `listen_socket` on another rank than 0, or see `__init__`.
            CommunicationError: See `__init__`.
        """
        world_size, rank = settings.world_size, settings.rank
        if not 0 <= port <= 65535 or (port == 0 and world_size > 1 and listen_socket is None):
            raise ValueError(f"port must be from 1 to 65535, got {port}")
        if listen_socket is not None and rank != 0:
            raise ValueError(f"listen_socket must be given to rank 0 only, got rank {rank}")
        options = StoreOptions(
            world_size,
            settings.words,
            settings.secret,
            settings.max_message_bytes,
            heartbeat,
            seconds,
            settings.encryption,
        )
        with GroupCall("create", settings, (), seconds):
            return cls(host, port, rank, options, listen_socket)

    def seal(self, group: str, encryption: str) -> MessageSeal:
        """Return the seal of a group on this store, for one thread at a time."""
        return self._make_seal(group, encryption, keeps_buffer=True)

    def _make_seal(self, group: str, encryption: str, *, keeps_buffer: bool = False) -> MessageSeal:
        kind = SealKind.choose(encryption, has_secret=self._secret is not None)
        session = self.client.session
        return MessageSeal(self._secret, group, session, kind, keeps_buffer=keeps_buffer)

    def claim(self, name: str) -> None:
        """Reserve a group's name for this rank; JoinError if it is in use here."""
        with self._names_lock:
            if name in self._names:
                raise JoinError(f"group {name!r} exists on this store; give each its own name")
            self._names.add(name)

    def close(self, linger: float | None = None) -> None:
        """Leave; rank 0 serves on until all ranks have left, at most `linger` seconds."""
        seconds = self._timeout if linger is None else linger
        self._leave.cancel()
        # If the goodbye comes after a signal handler's end, so does the end of the server.
        if self.client.leave(seconds) and self._server is not None:
            self._server.stop(seconds)

    @property
    def timeout(self) -> timedelta:
        """How long a method waits that is given no timeout."""
        return timedelta(seconds=self._timeout)

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long a method waits that is given no timeout."""
        self._timeout = timeout.total_seconds()

    def set(self, key: str, value: str | bytes) -> None:
        """Set a value; returns when the store has it."""
        data = value.encode() if isinstance(value, str) else value
        if len(data) > self.max_message_bytes:
            raise ValueError(
                f"value must have at most {self.max_message_bytes} bytes, got {len(data)}"
            )
        about = _key(key)
        address = Address(Op.VALUE, self.rank, EVERYONE, next(self._value_numbers))
        sealed = self._value_seal.seal(address, [data], about)
        self._call(Kind.SET, pack_number(address.number, about), sealed)

    def get(self, key: str) -> bytes:
        """Return a value, waiting for it if need be."""
        about = _key(key)
        (src, number, total), sealed = self._call(Kind.GET, about, parse=unpack_origin)
        if src == EVERYONE:  # of `add`
            return total
        return bytes(self._value_seal.open(Address(Op.VALUE, src, EVERYONE, number), sealed, about))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all these keys have values."""
        seconds = self._timeout if timeout is None else timeout.total_seconds()
        deadline = time.monotonic() + seconds
        for key in keys:
            self._call(Kind.WAIT, _key(key), deadline=deadline, seconds=seconds)

    def add(self, key: str, amount: int) -> int:
        """Add to the number under a key, 0 at first, and return the sum."""
        return self._call(Kind.ADD, pack_number(amount, _key(key)), parse=unpack_decimal)[0]

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all these keys have values."""
        return all(self._call(Kind.CHECK, _key(key), parse=unpack_number)[0][0] for key in keys)

    def delete_key(self, key: str) -> bool:
        """Remove a value; False where there was none."""
        return bool(self._call(Kind.DELETE, _key(key), parse=unpack_number)[0][0])

    def num_keys(self) -> int:
        """Return how many values and unread messages the store holds, of all groups."""
        return self._call(Kind.COUNT, b"", parse=unpack_number)[0][0]

    def _call(
        self,
        kind: Kind,
        meta: bytes,
        parts: Sequence[bytes | memoryview] = (),
        *,
        seconds: float | None = None,
        deadline: float | None = None,
        parse: Callable[[bytes], _T] = bytes,  # type: ignore[assignment] # the default of _T
    ) -> tuple[_T, memoryview]:
        if seconds is None:
            seconds = self._timeout
        if deadline is None:
            deadline = time.monotonic() + seconds
        with self.client.turn(deadline):
            waits = kind in (Kind.GET, Kind.WAIT)
            while True:
                num_requests = self.client.num_requests
                ident = (
                    self.client.ask_once(kind, meta)
                    if waits
                    else self.client.ask(kind, meta, parts)
                )
                if self.client.wait([ident], deadline):
                    if not waits:
                        self.client.forget(ident)
                    raise CommunicationTimeoutError(
                        f"store.{kind.name.lower()} timed out after {seconds:g} s"
                    )
                answer = self.client.read(
                    ident, lambda frame: (parse(frame.meta), memoryview(frame.body))
                )
                # An earlier call, which gave up, may have asked: its answer can be out of date.
                if self.client.num_requests != num_requests:
                    return answer


def _key(key: str) -> bytes:
    data = key.encode()
    if len(data) > _MAX_KEY_BYTES:
        raise ValueError(f"key must have at most {_MAX_KEY_BYTES} bytes, got {len(data)}")
    return data
