"""Published key streams of ChaCha20: RFC 8439, sections 2.3.2 and 2.4.2, and appendix A.1, vectors 1, 2, 4 and 5."""

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

__all__ = ["PUBLISHED", "known_stream"]

_COUNTING = bytes(range(32))
_ZEROS = bytes(32)

PUBLISHED = {
    "2.3.2": (
        _COUNTING,
        1,
        "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "2.4.2, two blocks": (
        _COUNTING,
        1,
        "000000000000004a00000000",
        "224f51f3401bd9e12fde276fb8631ded8c131f823d2c06e27e4fcaec9ef3cf78"
        "8a3b0aa372600a92b57974cded2b9334794cba40c63e34cdea212c4cf07d41b7"
        "69a6749f3f630f4122cafe28ec4dc47e26d4346d70b98c73f3e9c53ac40c5945"
        "398b6eda1a832c89c167eacd901d7e2bf363",
    ),
    "A.1, 1 and 2": (
        _ZEROS,
        0,
        "000000000000000000000000",
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    "A.1, 4": (
        b"\x00\xff" + bytes(30),
        2,
        "000000000000000000000000",
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    "A.1, 5": (
        _ZEROS,
        0,
        "000000000000000000000002",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
}
"""By section: key, first counter, the nonce of 96 bits, and the stream, both in hexadecimal digits."""


def known_stream(key: bytes, first: int, count: int) -> bytes:
    """Blocks `first` to `first + count - 1` under the nonce 0, by the cryptography package, each by itself.

    The package counts to 2^32 alone, and what is above it is a part of its nonce.
    """
    counters = [each.to_bytes(8, "little") for each in range(first, first + count)]
    return b"".join(Cipher(ChaCha20(key, each + bytes(8)), None).encryptor().update(bytes(64)) for each in counters)
