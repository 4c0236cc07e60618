"""Classes that the object tests send, and a codec that knows them."""

import dataclasses
import enum

from fastvideo_comm.object_channel.codec import ObjectCodec


class Color(enum.Enum):
    RED = 1
    BLUE = object()


class Level(enum.IntEnum):
    LOW = 1


class Access(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    tags: tuple[str, ...] = ()

    def __post_init__(self):
        if self.x == 13:
            raise RuntimeError("__post_init__ must not run for a received object")


@dataclasses.dataclass
class Late:
    made: int = dataclasses.field(default=0, init=False)


class Opaque:
    def __init__(self, value):
        self.value = value


def new_codec():
    codec = ObjectCodec()
    for cls in (Color, Level, Access, Point, Late):
        codec.register_type(cls)
    return codec
