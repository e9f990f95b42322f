"""Calls a device plugin's socket the way Python's gRPC does: client.py SOCKET [AUTHORITY]."""

import sys

import grpc

socket, *authority = sys.argv[1:]
options = [("grpc.default_authority", authority[0])] if authority else []
with grpc.insecure_channel(f"unix://{socket}", options=options) as channel:
    # Messages as bytes: what is tested is the transport.
    def method(kind, name):
        return getattr(channel, kind)(f"/v1beta1.DevicePlugin/{name}", lambda raw: raw, lambda raw: raw)

    # More than once, so that the compressed headers refer to earlier ones; and with headers that differ.
    for turn in range(5):
        metadata = [("x-turn", "t" * turn * 100), ("x-same", "same")]
        answer = method("unary_unary", "GetDevicePluginOptions")(b"", timeout=10, metadata=metadata)
        assert answer == b"\x08\x01\x10\x01", answer
    devices = list(method("unary_stream", "ListAndWatch")(b"", timeout=10))
    assert len(devices) == 3, devices
