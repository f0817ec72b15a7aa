"""Which H.264 packets nothing else is predicted from, read off their headers.

A decoder can be told to skip such frames, but then it no longer complains about packets
that hold no picture at all. So they are told apart here and simply not fed.
"""

from __future__ import annotations

_SLICES = (1, 2, 5)  # nal_unit_type of coded slices (Rec. ITU-T H.264, table 7-1)


def length_bytes(extradata: bytes | None) -> int:
    """Bytes of the length before every NAL unit; 0 where start codes stand instead.

    Args:
        extradata: The stream's; starts with 1 if it is an AVCDecoderConfigurationRecord
            (ISO/IEC 14496-15, 5.3.3.1).
    """
    if not extradata or len(extradata) < 7 or extradata[0] != 1:
        return 0
    return (extradata[4] & 3) + 1


def is_disposable(packet: bytes, length: int) -> bool:
    """Whether a packet is whole, holds slices, and all of them say that nothing refers to them.

    Args:
        packet: One access unit.
        length: As `length_bytes` says.
    """
    headers = _after_lengths(packet, length) if length else _after_start_codes(packet)
    slices = [header for header in headers if header & 31 in _SLICES]
    return bool(slices) and not any(header >> 5 & 3 for header in slices)  # nal_ref_idc


def _after_lengths(packet: bytes, length: int) -> list[int]:
    """First byte of every NAL unit; none if the lengths do not add up."""
    headers: list[int] = []
    at = 0
    while at < len(packet):
        size = int.from_bytes(packet[at : at + length], "big")
        at += length
        if not 0 < size <= len(packet) - at:
            return []
        headers.append(packet[at])
        at += size
    return headers


def _after_start_codes(packet: bytes) -> list[int]:
    """First byte of every NAL unit."""
    headers: list[int] = []
    at = packet.find(b"\0\0\1")
    while 0 <= at < len(packet) - 3:
        headers.append(packet[at + 3])
        at = packet.find(b"\0\0\1", at + 3)
    return headers
