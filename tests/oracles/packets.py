#!/usr/bin/python3
"""Packets by scapy: packets.py SEED COUNT FILE.pcap writes COUNT packets, and a JSON line on each to standard output.

The first half is as scapy means it, and its line says what it is; the second half is such packets with fields that scapy
draws at random, or bytes that are changed, lost or repeated.
"""

import json
import random
import sys

from scapy.config import conf
from scapy.layers.inet import ICMP, IP, TCP, UDP, ICMPerror, IPerror, IPOption, TCPerror
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.packet import Raw, fuzz
from scapy.utils import PcapWriter

conf.verb = 0

CLIENTS = {4: "10.1.0.2", 6: "2001:db8:1::2"}
VIPS = {4: "203.0.113.10", 6: "2001:db8::10"}
SERVERS = {4: "10.0.0.11", 6: "fd00::11"}
PORTS = [443, 41001, 41002, 50000, 80, 1]
FLAGS = ["S", "SA", "A", "PA", "FA", "R", "RA", "SAU", "SEC", "", "FSRPAUECN"]


def redirect(draw):
    """The value of the redirect option: identifier, flags, hops, then what the flags say."""
    flags = draw.choice([0x01, 0x03, 0x02, draw.randrange(256)])
    port = draw.choice([b"", draw.choice(PORTS).to_bytes(2, "big")])
    if port:
        flags |= 0x04
    return b"RD" + bytes([flags, 0]) + port + draw.randbytes(draw.choice([0, 0, 2]))


def options(draw):
    known = [
        ("MSS", draw.randrange(65536)),
        ("WScale", draw.randrange(15)),
        ("SAckOK", b""),
        ("Timestamp", (draw.getrandbits(32), draw.getrandbits(32))),
        ("NOP", None),
        ("SAck", (draw.getrandbits(32), draw.getrandbits(32))),
        (253, redirect(draw)),
        (254, draw.randbytes(draw.randrange(9))),
        (30, draw.randbytes(10)),
        (34, draw.randbytes(draw.choice([0, 8]))),
        (19, draw.randbytes(16)),
    ]
    chosen, length = [], 0
    for option in draw.sample(known, draw.randrange(5)):
        size = len(bytes(TCP(options=[option]))) - 20
        if length + size <= 40:
            chosen.append(option)
            length += size
    return chosen


def headers(draw, family):
    client, other = CLIENTS[family], draw.choice([VIPS[family], VIPS[family], SERVERS[family]])
    source, destination = draw.choice([(client, VIPS[family]), (other, client)])
    hops = draw.choice([1, 2, 64, 255])
    if family == 4:
        extra = draw.choice([[], [], [IPOption(b"\x94\x04\x00\x00")], [IPOption(b"\x01")]])
        return IP(src=source, dst=destination, ttl=hops, id=draw.randrange(65536), tos=draw.randrange(256), options=extra)
    packet = IPv6(src=source, dst=destination, hlim=hops, tc=draw.randrange(256), fl=draw.getrandbits(20))
    for header in draw.sample([IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), IPv6ExtHdrRouting()], draw.choice([0, 0, 1, 2])):
        packet /= header
    return packet


def transport(draw, family):
    payload = draw.randbytes(draw.choice([0, 0, 1, 7, 100, 1200]))
    ports = {"sport": draw.choice(PORTS), "dport": draw.choice(PORTS)}
    kind = draw.choice(["tcp"] * 6 + ["udp", "echo", "too-big"])
    if kind == "tcp":
        layer = TCP(
            **ports,
            seq=draw.getrandbits(32),
            ack=draw.getrandbits(32),
            flags=draw.choice(FLAGS),
            window=draw.randrange(65536),
            urgptr=draw.randrange(65536),
            options=options(draw),
        )
        return kind, layer / Raw(payload) if payload else layer
    if kind == "udp":
        return kind, UDP(**ports) / Raw(payload)
    if kind == "echo":
        layer = ICMP(id=draw.randrange(65536)) if family == 4 else ICMPv6EchoRequest(id=draw.randrange(65536))
        return "icmp", layer / Raw(payload)
    quoted = {"src": VIPS[family], "dst": CLIENTS[family]}
    if family == 4:
        layer = ICMP(type=3, code=4, nexthopmtu=1280) / IPerror(**quoted, len=1500) / TCPerror(**ports)
    else:
        layer = ICMPv6PacketTooBig(mtu=1280) / IPv6(**quoted, plen=1460) / TCP(**ports)
    return "icmp", layer


def meant(draw):
    """A packet, and what it is."""
    family = draw.choice([4, 6])
    kind, layer = transport(draw, family)
    raw = bytes(headers(draw, family) / layer)
    again = (IP if family == 4 else IPv6)(raw)
    said = {"kind": kind, "source": again.src, "destination": again.dst, "length": len(raw)}
    if kind == "tcp":
        tcp = again[TCP]
        said["tcp"] = {
            "source_port": tcp.sport,
            "destination_port": tcp.dport,
            "seq": tcp.seq,
            "ack": tcp.ack,
            "flags": int(tcp.flags) & 0xFF,
            "window": tcp.window,
            "header": tcp.dataofs * 4,
            "payload": len(tcp.payload),
        }
    return again, raw, said


def mutated(draw):
    packet, raw, _ = meant(draw)
    how = draw.randrange(6)
    if how == 0:
        layer = draw.choice([layer for layer in packet.iterpayloads() if not isinstance(layer, Raw)])
        layer_again = fuzz(layer.__class__(bytes(layer)))
        head = raw[: len(raw) - len(bytes(layer))]
        return head + bytes(layer_again)
    if how == 1:
        # The total length, the header's length or the offset of the data says something else; checksums follow.
        if TCP in packet:
            packet[TCP].dataofs = draw.randrange(16)
            del packet[TCP].chksum
        if IP in packet:
            packet[IP].ihl = draw.choice([packet[IP].ihl, draw.randrange(16)])
            del packet[IP].chksum
        return bytes(packet)
    if how == 2:
        pieces = bytearray(raw)
        for _ in range(draw.randrange(1, 6)):
            pieces[draw.randrange(len(pieces))] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
        return bytes(pieces)
    if how == 3:
        return raw[: draw.randrange(1, len(raw))]
    if how == 4:
        # A fragment.
        if IP in packet:
            packet[IP].frag, packet[IP].flags = draw.choice([(0, 1), (1, 0), (8191, 1), (185, 0)])
            del packet[IP].chksum
            return bytes(packet)
        head, rest = raw[:40], raw[40:]
        fragment = IPv6ExtHdrFragment(nh=head[6], offset=draw.choice([0, 1, 8191]), m=draw.randrange(2), id=7)
        header = IPv6(head)
        header.nh, header.plen = 44, len(rest) + 8
        return bytes(header)[:40] + bytes(fragment)[:8] + rest
    at = draw.randrange(len(raw))
    return raw[:at] + raw[max(0, at - draw.randrange(40)) :]


def main():
    seed, count, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    draw = random.Random(seed)
    random.seed(seed)
    with PcapWriter(path, linktype=101) as out:
        out.write_header(None)
        for number in range(count):
            if number < count // 2:
                _, raw, said = meant(draw)
            else:
                raw, said = mutated(draw), {"kind": "mutated"}
            out.write_packet(raw, sec=1_700_000_000, usec=number)
            print(json.dumps(said))


main()
