"""What the made-up triage notes are made of: complaints, signs of each grade, and how four departments write."""

from dataclasses import dataclass

__all__ = ["COMPLAINTS", "FILLERS", "HOSPITALS", "LEVELS", "SIGNS", "Hospital"]

LEVELS = ("non-urgent", "standard", "urgent", "very urgent", "immediate")
"""The grades of the Manchester triage system, from the lowest up."""

_COMPLAINTS = """
chest pain, ankle injury, headache, cough, abdominal pain, back pain, fall at home, rash, fever, vomiting, wrist injury,
shortness of breath, sore throat, dizziness, palpitations, burn to the hand, dog bite, eye pain, ear pain, nosebleed,
leg swelling, cut to the finger, allergic reaction, asthma, diarrhoea, blood in the urine, flank pain, knee injury,
head injury, tooth pain, shoulder injury, hip pain, overdose, high blood sugar, weakness of an arm, collapse,
groin pain, neck pain, facial swelling, bee sting, fish bone in the throat, road accident, wound that will not heal,
catheter problem, black stools, jaw pain, rib injury, pregnancy with bleeding, foot ulcer, blurred vision,
foreign body in the eye, animal scratch, bicycle accident, electric shock, smoke inhalation, sunburn, calf pain,
thigh bruise, hand numbness, swollen lymph node
"""

COMPLAINTS = tuple(" ".join(complaint.split()) for complaint in _COMPLAINTS.split(","))
"""What somebody comes with."""

SIGNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "pain": (
        ("no pain now", "pain 1/10", "pain free at rest", "hardly any pain", "a little sore"),
        ("pain 3/10", "mild pain", "pain eased by paracetamol", "some discomfort", "pain 2/10, bearable"),
        (
            "pain 5/10",
            "moderate pain",
            "pain 6/10 in spite of tablets",
            "cannot put weight on it",
            "pain wakes at night",
        ),
        ("pain 9/10", "severe pain", "crying with pain", "worst pain ever", "pain 8/10, rolling on the trolley"),
        (
            "tearing pain and collapsed",
            "groaning, no longer answers about pain",
            "severe pain, then lost consciousness",
        ),
    ),
    "breathing": (
        ("chatting easily", "breathing normal", "resp rate {rr0}", "sats {sats0} on air"),
        ("a bit breathless on stairs", "breathing comfortable, mild cough", "resp rate {rr1}", "slightly blocked nose"),
        ("wheeze heard, full sentences", "sats {sats2} on air", "resp rate {rr2}", "needs to stop when walking"),
        ("speaks in single words", "sats {sats3} on air", "resp rate {rr3}", "using accessory muscles"),
        ("gasping", "stridor at rest", "sats {sats4} on oxygen", "blue lips", "being bagged", "stopped breathing once"),
    ),
    "circulation": (
        ("walks about the waiting room", "BP {bp0}, pulse {hr0}", "pink and warm", "pulse {hr0} regular"),
        ("BP {bp0}, pulse {hr1}", "pulse {hr1}, warm hands", "drinking water", "slightly pale, walks unaided"),
        ("pulse {hr2}", "pale and clammy earlier", "dizzy on standing", "small bleed that stops with pressure"),
        ("pulse {hr3}, sweating", "cold and grey", "BP {bp3}", "bleeding through the dressing", "mottled legs"),
        ("no radial pulse", "BP {bp4} systolic", "pulse {hr4}, barely felt", "blood spurting", "CPR on arrival"),
    ),
    "mind": (
        ("reading a magazine", "alert, jokes with staff", "alert", "on the phone in the queue"),
        ("alert but tired", "anxious, alert", "slept badly, alert", "orientated, a little slow"),
        ("drowsy but answers", "fainted once, now alert", "vague about the day", "was confused for a minute"),
        ("responds to voice only", "newly confused", "cannot stay awake", "speech slurred since this morning"),
        ("unresponsive", "fitting now", "GCS {gcs4}", "responds to pain only", "no response to voice or touch"),
    ),
    "course": (
        ("for months", "wants a repeat prescription", "unchanged for {few} weeks", "asks for a sick note"),
        ("for {few} days, no worse", "came on slowly last week", "seen by the GP on Monday", "better than yesterday"),
        ("worse since yesterday", "third visit this week", "getting worse over {few} hours", "not settling at home"),
        (
            "sudden onset an hour ago",
            "rapidly worse in the ambulance",
            "began suddenly at rest",
            "much worse since noon",
        ),
        ("collapsed in front of the triage desk", "arrested in the ambulance", "found down, time unknown"),
    ),
}
"""By kind and grade, from the lowest."""


def _range(low: int, high: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(low, high))


FILLERS = {
    "few": _range(2, 8),
    "age": _range(18, 95),
    "hour": _range(1, 24),
    "kin": ("wife", "husband", "son", "daughter", "neighbour", "colleague", "carer"),
    **{"rr0": _range(12, 17), "rr1": _range(17, 20), "rr2": _range(21, 25), "rr3": _range(27, 36)},
    **{"sats0": _range(97, 101), "sats2": _range(92, 95), "sats3": _range(86, 91), "sats4": _range(68, 82)},
    **{"hr0": _range(62, 84), "hr1": _range(84, 98), "hr2": _range(102, 118), "hr3": _range(122, 142)},
    **{"hr4": (*_range(28, 38), *_range(158, 190)), "gcs4": _range(3, 9)},
    "bp0": ("118/76", "122/80", "126/78", "131/82", "115/70", "134/84"),
    **{"bp3": ("88/50", "92/54", "90/58", "86/48"), "bp4": _range(52, 72)},
}


@dataclass(frozen=True)
class Hospital:
    """How the notes of one department are written."""

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    joint: str
    """What stands between two parts."""
    capitals: bool
    """Parts begin with one."""
    mix: tuple[float, ...]
    """How often each grade occurs."""


HOSPITALS = {
    "city": Hospital(
        openings=("{complaint}", "pt c/o {complaint}", "m{age}, {complaint}", "f{age} p/w {complaint}"),
        closings=("nkda", "kin: {kin}", "bloods sent", "arr {hour}:00"),
        joint="; ",
        capitals=False,
        mix=(2, 4, 4, 2, 1),
    ),
    "county": Hospital(
        openings=("brought by the {kin} with {complaint}", "walked in with {complaint}", "aged {age}, {complaint}"),
        closings=("the {kin} is with the patient", "no known allergies", "last meal at {hour} o'clock"),
        joint=". ",
        capitals=True,
        mix=(4, 4, 3, 2, 1),
    ),
    "university": Hospital(
        openings=(
            "presenting complaint: {complaint}",
            "{age} years, referred for {complaint}",
            "transfer: {complaint}",
        ),
        closings=("trauma team informed", "registrar aware", "cannula placed", "ECG done"),
        joint=". ",
        capitals=True,
        mix=(1, 2, 4, 4, 3),
    ),
    "coast": Hospital(
        openings=("{complaint} after a day at the beach", "visitor, {age}, {complaint}", "{complaint}, came by taxi"),
        closings=("on holiday with the {kin}", "hotel will fetch", "no letter from the GP"),
        joint=" - ",
        capitals=False,
        mix=(4, 3, 3, 2, 2),
    ),
}
"""By name."""
