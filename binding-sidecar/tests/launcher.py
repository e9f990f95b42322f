"""Calls the sidecar as virt-launcher does: Info, OnDefineDomain, Shutdown, each over a new connection.

Messages are written by hand, so that nothing but the wire format is shared with the sidecar.
"""
import sys

import grpc

socket, domain, vmi = sys.argv[1:]
DEADLINE = 10


def field(number, value):
    length, head = len(value), bytes([number << 3 | 2])
    while length > 127:
        head, length = head + bytes([length & 127 | 128]), length >> 7
    return head + bytes([length]) + value


def call(method, request, authority):
    options = [("grpc.default_authority", authority)]
    with grpc.insecure_channel("unix:" + socket, options=options) as channel:
        grpc.channel_ready_future(channel).result(DEADLINE)
        return channel.unary_unary("/kubevirt.hooks." + method)(request, timeout=DEADLINE)


request = field(1, open(domain, "rb").read()) + field(2, open(vmi, "rb").read())
# Go's clients have used each of these, depending on their version.
for authority in ["localhost", socket, socket.replace("/", "%2F")]:
    info = call("info.Info/Info", b"", authority)
    assert b"v1alpha3" in info and b"OnDefineDomain" in info, info
    for version in ["v1alpha1", "v1alpha2", "v1alpha3"]:
        answer = call(version + ".Callbacks/OnDefineDomain", request, authority)
        assert b"<interface type='vhostuser'>" in answer, answer
assert call("v1alpha3.Callbacks/Shutdown", b"", "localhost") == b""
