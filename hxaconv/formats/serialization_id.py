"""The id torch writes into a `.pth`: a hash of its record names, then a hash of their CRC-32s.

torch mixes the names in the order in which libstdc++ walks a `std::unordered_set<std::string>`. To give
the same 40 digits that walk is repeated here: its string hash, its growth, its insertion rule.
"""

from __future__ import annotations

from collections.abc import Iterable

_64_BITS = (1 << 64) - 1
_BUCKET_COUNTS = (13, 29, 59, 127, 257, 541, 1109, 2357, 5087, 10273, 20753, 42043, 85229, 172933, 351061, 712697)
"""How the set grows: the first listed prime that is at least twice the one before."""


def serialization_id(names: Iterable[str], crcs: Iterable[int]) -> bytes:
    """40 ASCII digits; `names` without the archive's root folder, both in order of writing."""
    by_name = by_crc = 0
    for digest in _walk([string_hash(name.encode()) for name in names]):
        by_name = _combine(by_name, digest)
    for crc in crcs:
        by_crc = _combine(by_crc, crc)
    return f"{by_name:020d}{by_crc:020d}".encode()


def string_hash(data: bytes) -> int:
    """`std::hash<std::string>` of libstdc++ on 64-bit machines (MurmurHash64A)."""
    factor = 0xC6A4A7935BD1E995
    digest = 0xC70F6907 ^ (len(data) * factor & _64_BITS)
    whole = len(data) & ~7
    for start in range(0, whole, 8):
        word = int.from_bytes(data[start : start + 8], "little") * factor & _64_BITS
        word = (word ^ word >> 47) * factor & _64_BITS
        digest = (digest ^ word) * factor & _64_BITS
    if len(data) > whole:
        digest = (digest ^ int.from_bytes(data[whole:], "little")) * factor & _64_BITS
    digest = (digest ^ digest >> 47) * factor & _64_BITS
    return digest ^ digest >> 47


def _combine(seed: int, value: int) -> int:
    return seed ^ (value + 0x9E3779B9 + (seed << 6 & _64_BITS) + (seed >> 2) & _64_BITS)


def _walk(hashes: list[int]) -> list[int]:
    """The order in which the set is iterated after these insertions.

    The set is one linked list in which the elements of a bucket stand together: a new element goes to
    the front of its bucket, a new bucket to the front of the list. Growing inserts everything anew.
    """
    growth = iter(_BUCKET_COUNTS)
    num_buckets = next(growth)
    buckets: dict[int, list[int]] = {}
    for count, digest in enumerate(hashes):
        if count == num_buckets:
            walk, num_buckets, buckets = _flat(buckets), next(growth), {}
            for earlier in walk:
                buckets.setdefault(earlier % num_buckets, []).append(earlier)
        buckets.setdefault(digest % num_buckets, []).append(digest)
    return _flat(buckets)


def _flat(buckets: dict[int, list[int]]) -> list[int]:
    return [digest for bucket in reversed(buckets.values()) for digest in reversed(bucket)]
