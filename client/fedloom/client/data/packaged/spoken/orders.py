"""What is ordered on the wards: how it is said, and how it is written."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from fedloom.client.data.packaged.api import Split
from fedloom.client.data.packaged.made_up import filled, side
from fedloom.client.data.packaged.spoken.voices import Speaker

__all__ = ["WARDS", "Ward", "order"]


@dataclass(frozen=True)
class Ward:
    """Who speaks on a ward, in which words, and beside what noise."""

    speakers: tuple[Speaker, ...]
    guest: Speaker
    """Speaks in half of what is held out, and nowhere else."""
    asks: tuple[str, ...]
    """Ways to say what is to be done; {what} is the order."""
    says: Mapping[str, tuple[str, ...]]
    """The ward's words for routes, intervals and devices, by what is written."""
    kinds: Mapping[str, int]
    """How often each kind of order is given."""
    noise: str
    """What is heard beside the voice, see `rooms`."""
    level: float
    """How loud that is, as a share of the voice."""


_DRUGS = """
metoprolol, mg, 25 50 100, PO; amlodipine, mg, 5 10, PO; ramipril, mg, 1.25 2.5 5, PO; furosemide, mg, 20 40 80, PO IV;
digoxin, mcg, 62.5 125 250, PO IV; atorvastatin, mg, 20 40 80, PO; apixaban, mg, 2.5 5, PO;
enoxaparin, mg, 20 40 60, SC; aspirin, mg, 75 150 300, PO; paracetamol, mg, 250 500 1000, PO IV;
ibuprofen, mg, 200 400, PO; morphine, mg, 2 5 10, PO IV SC; oxycodone, mg, 5 10 20, PO; ondansetron, mg, 4 8, PO IV;
omeprazole, mg, 10 20 40, PO; metformin, mg, 500 850 1000, PO; insulin glargine, units, 8 12 18, SC;
amoxicillin, mg, 250 500 750, PO; ceftriaxone, g, 1 2, IV; vancomycin, mg, 500 750 1000, IV;
gentamicin, mg, 80 120 240, IV; prednisolone, mg, 5 20 40, PO; dexamethasone, mg, 2 4 8, PO IV;
salbutamol, mg, 2.5 5, NEB; levothyroxine, mcg, 25 50 100, PO; lorazepam, mg, 0.5 1 2, PO IV
"""
_UNITS = {"mg": "milligrams", "mcg": "micrograms", "g": "grams", "units": "units"}
_OFTEN = ("daily", "BID", "TID", "QHS", "Q6H", "Q8H", "once")

_DOSES = [
    (name, unit, dose, routes.split())
    for drug in _DRUGS.split(";")
    for name, unit, doses, routes in [tuple(" ".join(part.split()) for part in drug.split(","))]
    for dose in doses.split()
]
_STOPS = sorted({name for name, *_ in _DOSES})
_OXYGEN = list(product(("1", "2", "3", "4", "5", "6", "8", "10", "15"), ("NC", "FM", "NRB")))
_FLUIDS = list(product(("NS", "RL", "D5W"), ("25", "40", "50", "60", "75", "80", "100", "125", "150", "200")))
_CHECKS = list(
    product(("BP", "HR", "temp", "SpO2", "glucose", "neuro obs", "urine output"), ("Q1H", "Q2H", "Q4H", "Q6H", "Q8H"))
)
_TESTS = list(
    product(("CBC", "K", "Cr", "INR", "lactate", "troponin", "CRP", "ABG", "LFTs"), ("now", "in 6 h", "AM", "daily"))
)

_WORDS = {
    "SC": ("under the skin", "subcutaneously"),
    "IV": ("intravenously", "by the vein"),
    "PO": ("by mouth", "orally"),
    "NEB": ("by nebuliser",),
    "daily": ("once a day", "every day"),
    "BID": ("twice a day",),
    "TID": ("three times a day",),
    "QHS": ("at bedtime", "every night"),
    "once": ("just once", "as a single dose"),
    "PRN": ("as needed", "if required"),
    "NC": ("by nasal cannula",),
    "FM": ("by face mask",),
    "NRB": ("by non-rebreather mask",),
    "NS": ("normal saline",),
    "RL": ("Ringer's lactate",),
    "D5W": ("five percent dextrose",),
    "BP": ("blood pressure",),
    "HR": ("heart rate",),
    "temp": ("temperature",),
    "SpO2": ("oxygen saturation",),
    "neuro obs": ("neurological observations",),
    "CBC": ("full blood count",),
    "K": ("potassium",),
    "Cr": ("creatinine",),
    "INR": ("clotting",),
    "CRP": ("C reactive protein",),
    "ABG": ("arterial blood gas",),
    "LFTs": ("liver function tests",),
    "now": ("right now", "straight away"),
    "in 6 h": ("in 6 hours",),
    "AM": ("tomorrow morning",),
}

WARDS = {
    "cardiology": Ward(
        speakers=(Speaker("en-us+m8", 155, 45), Speaker("en-gb-x-rp+f2", 160, 55), Speaker("en-us+quincy", 165, 50)),
        guest=Speaker("en-us+m2", 160, 45),
        asks=("give {what}", "start {what}", "please give {what}", "start the patient on {what}"),
        says={"BID": ("twice daily",), "TID": ("three times daily",), "daily": ("once daily", "every morning")},
        kinds={"drug": 12, "stop": 2, "oxygen": 2, "fluid": 1, "check": 3, "test": 3},
        noise="monitor",
        level=0.05,
    ),
    "emergency": Ward(
        speakers=(Speaker("en-us+f2", 165, 55), Speaker("en-029+m3", 165, 50), Speaker("en-us+david", 170, 50)),
        guest=Speaker("en-us+caleb", 165, 50),
        asks=("{what}", "{what} please", "let's give {what}", "I want {what}"),
        says={"IV": ("I V",), "now": ("stat",), "once": ("stat", "as one dose"), "NRB": ("by non-rebreather",)},
        kinds={"drug": 9, "stop": 1, "oxygen": 4, "fluid": 4, "check": 3, "test": 4},
        noise="crowd",
        level=0.08,
    ),
    "surgery": Ward(
        speakers=(
            Speaker("en-us+paul", 160, 45),
            Speaker("en-gb-x-gbclan+m3", 155, 40),
            Speaker("en-us+benjamin", 160, 50),
        ),
        guest=Speaker("en-gb-x-rp+m7", 155, 45),
        asks=("prescribe {what}", "we will have {what}", "{what} for this patient", "post op, {what}"),
        says={
            "PRN": ("when needed", "for pain as needed"),
            "QHS": ("at night",),
            "SC": ("by injection under the skin",),
        },
        kinds={"drug": 11, "stop": 3, "oxygen": 2, "fluid": 4, "check": 3, "test": 2},
        noise="hum",
        level=0.06,
    ),
    "geriatrics": Ward(
        speakers=(Speaker("en-us+m3", 150, 45), Speaker("en-029+f2", 155, 55), Speaker("en-us-nyc+f2", 155, 50)),
        guest=Speaker("en-us+robert", 150, 45),
        asks=("could we give {what}", "she should have {what}", "he should have {what}", "put in for {what}"),
        says={"BID": ("morning and evening",), "QHS": ("before sleep",), "daily": ("each day", "each morning")},
        kinds={"drug": 13, "stop": 4, "oxygen": 1, "fluid": 1, "check": 2, "test": 2},
        noise="hall",
        level=0.05,
    ),
}


def order(ward: Ward, split: Split, draw: random.Random) -> tuple[str, str]:
    """What is said, and what is to be written."""
    (kind,) = draw.choices(tuple(ward.kinds), tuple(ward.kinds.values()))

    def say(written: str) -> str:
        if written[0] == "Q" and written[1:-1].isdigit():
            return "every hour" if written == "Q1H" else f"every {written[1:-1]} hours"
        return draw.choice(ward.says.get(written) or _WORDS.get(written) or (written,))

    if kind == "drug":
        name, unit, dose, routes = draw.choice(side(_DOSES, split))
        route, often = draw.choice(routes), draw.choice(_OFTEN)
        needed = " PRN" if often in ("Q6H", "Q8H") and draw.random() < 0.5 else ""
        amount = f"{dose} {_UNITS[unit]}" if dose != "1" else f"1 {_UNITS[unit].removesuffix('s')}"
        said = f"{name} {amount} {say(route)} {say(often)}{' ' + say('PRN') if needed else ''}"
        return filled(draw.choice(ward.asks), {"what": (said,)}, draw), f"{name} {dose} {unit} {route} {often}{needed}"
    if kind == "stop":
        name = draw.choice(side(_STOPS, split))
        return f"{draw.choice(('stop', 'discontinue', 'please stop'))} the {name}", f"DC {name}"
    if kind == "oxygen":
        flow, device = draw.choice(side(_OXYGEN, split))
        said = f"oxygen at {flow} litre{'' if flow == '1' else 's'} {say(device)}"
        return filled(draw.choice(ward.asks), {"what": (said,)}, draw), f"O2 {flow} L {device}"
    if kind == "fluid":
        fluid, rate = draw.choice(side(_FLUIDS, split))
        said = f"{say(fluid)} at {rate} millilitres an hour"
        return filled(draw.choice(ward.asks), {"what": (said,)}, draw), f"{fluid} IV {rate} mL per h"
    what, when = draw.choice(side(_CHECKS if kind == "check" else _TESTS, split))
    verb = draw.choice(("check", "please check", "monitor") if kind == "check" else ("check", "send", "please send"))
    return f"{verb} the {say(what)} {say(when)}", f"{what} {when}"
