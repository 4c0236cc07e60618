"""What `StatelessProcessGroup` is made of: codec, seal, store and the transports over a store.

From the object to the wire: `codec` (with `encoder`, `decoder`, `format`, `array_codec` and
`type_registry`) turns objects into bytes, `message_seal` authenticates them, `transport` and
`torch_transport` move them through a store, and `store` is the library's own, the `store_*` modules
its two ends. `messenger`, with `settings`, `call` and `outbox`, is one group's way to all that.
"""

from fastvideo_comm.object_channel.codec import ObjectCodec

__all__ = ["ObjectCodec"]
