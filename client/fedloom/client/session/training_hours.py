"""The hours of the day in which a site trains."""

import datetime as dt
import re

__all__ = ["HOURS", "check_hours", "until_open_s"]

HOURS = r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$"
"""HH:MM-HH:MM."""

_DAY_S = 86_400


def check_hours(hours: str) -> str:
    """`hours` as it is.

    Raises:
        ValueError: It is not HH:MM-HH:MM, or begins when it ends.
    """
    if not re.match(HOURS, hours):
        raise ValueError("hours look like 22:00-06:00; leave them out to train at any time")
    begin, end = hours.split("-")
    if begin == end:
        raise ValueError("hours that begin when they end are none at all; leave them out to train at any time")
    return hours


def until_open_s(hours: str | None, now: dt.datetime) -> float:
    """Seconds until a site may train; 0 within its hours.

    Args:
        hours: As `check_hours` takes them, by the clock of `now`; hours that end before they begin last over midnight.
            None is always.
        now: The time of day here.

    >>> until_open_s("22:00-06:00", dt.datetime(2026, 1, 1, 21, 59, 30))
    30.0
    >>> until_open_s("22:00-06:00", dt.datetime(2026, 1, 1, 5, 59))
    0.0
    """
    if hours is None:
        return 0.0
    begin, end = (60.0 * (60 * int(text[:2]) + int(text[3:])) for text in hours.split("-"))
    second = 3600 * now.hour + 60 * now.minute + now.second + now.microsecond / 1e6
    # Modulo a day, so that it makes no difference whether midnight lies between the two.
    within = (second - begin) % _DAY_S < (end - begin) % _DAY_S
    return 0.0 if within else (begin - second) % _DAY_S
