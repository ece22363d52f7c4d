"""Sentences spoken by eSpeak NG, in a process of its own; run by path, with the standard library alone.

Its arguments are the library, its data and the samples in a second that are wanted. It reads the utterances as JSON,
[[voice, words a minute, pitch, range, text], ...], and writes for each the number of its samples and the samples.

A process speaks one list: the library carries the phase of its jitter from one utterance to the next and offers no way
to set it back. In a new process equal lists give equal samples.
"""

import ctypes
import json
import struct
import sys

__all__ = ["main"]

_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8 = 2, 0x8000, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
"""Values of speak_lib.h of eSpeak NG 1.52."""
_SEED = 1

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


def main() -> None:
    """Speak the list on standard input."""
    library = ctypes.CDLL(sys.argv[1])
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, sys.argv[2].encode(), _DO_NOT_EXIT)
    if rate != int(sys.argv[3]):
        sys.exit(f"it gives {rate} samples a second with the data in {sys.argv[2]}, {sys.argv[3]} are wanted")
    parts: list[bytes] = []

    def take(samples: int, count: int, _events: int) -> int:
        if samples and count > 0:
            parts.append(ctypes.string_at(samples, 2 * count))
        return 0

    taking = _Callback(take)  # has to be there for as long as it is called
    library.espeak_SetSynthCallback(taking)
    library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
    library.espeak_Synth.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *[ctypes.c_uint] * 4, *[ctypes.c_void_p] * 2]
    for voice, *values, text in json.load(sys.stdin):
        if library.espeak_SetVoiceByName(voice.encode()):
            sys.exit(f"it has no voice {voice}")
        for parameter, value in zip((_RATE, _PITCH, _RANGE), values, strict=True):
            library.espeak_SetParameter(parameter, value, 0)
        parts.clear()
        data = text.encode()
        if library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None) or library.espeak_Synchronize():
            sys.exit(f"it cannot say {text!r}")
        spoken = b"".join(parts)
        sys.stdout.buffer.write(struct.pack("<i", len(spoken) // 2) + spoken)


if __name__ == "__main__":
    main()
