"""What the made-up notes are made of: findings, and how four hospitals' writers say who has them, and whether.

In a phrase `{and}`, `{or}` and `{nor}` stand for findings, joined by that word; what else is in braces is drawn from
`FILLERS`. Cues before and after a finding, and such as only look like a denial ("no change in"), are those of NegEx
(Chapman et al., Journal of Biomedical Informatics 2001) and ConText (Harkema et al., ibid. 2009).
"""

from dataclasses import dataclass

__all__ = ["FILLERS", "FINDINGS", "STYLES", "Style"]

_FINDINGS = """
chest pain, shortness of breath, fever, chills, nausea, vomiting, abdominal pain, diarrhoea, headache, dizziness,
palpitations, syncope, cough, haemoptysis, wheezing, back pain, leg swelling, rash, jaundice, weight loss,
night sweats, fatigue, confusion, seizures, blurred vision, dysuria, haematuria, constipation, sore throat,
neck stiffness, joint pain, hypertension, diabetes, asthma, pneumonia, stroke, myocardial infarction,
atrial fibrillation, heart failure, renal failure, breast cancer, colon cancer, pulmonary embolism,
deep vein thrombosis, appendicitis, pancreatitis, cholecystitis, sepsis, meningitis, epilepsy, migraine, depression,
anaemia, gout, psoriasis, cirrhosis, hepatitis, tuberculosis, pleural effusion, pneumothorax, rib fracture,
hip fracture, aortic aneurysm, aortic stenosis, urinary tract infection, cellulitis, osteoporosis, glaucoma,
cataract, hypothyroidism, lung nodule, cardiomegaly, pulmonary oedema, atelectasis, bowel obstruction, gallstones,
kidney stones, inguinal hernia, gastric ulcer, gastrointestinal bleeding, hypotension, tachycardia, bradycardia,
dehydration, hypoglycaemia, delirium, dementia, anxiety, insomnia, tremor, numbness, facial droop, slurred speech,
loss of appetite, difficulty swallowing, hoarseness, ear pain, hearing loss, tinnitus, vertigo, bruising,
nosebleeds, swollen lymph nodes, muscle weakness, varicose veins, pressure ulcer, endocarditis, pericarditis,
emphysema, bronchitis, sinusitis, lymphoma, leukaemia, melanoma, prostate cancer, ovarian cyst, peritonitis,
diverticulitis, coeliac disease, multiple sclerosis, sleep apnoea
"""

FINDINGS = tuple(" ".join(finding.split()) for finding in _FINDINGS.split(","))
"""Symptoms, signs and diseases, of one to four words."""

FILLERS = {
    "kin": ("mother", "father", "brother", "sister", "son", "daughter", "aunt", "uncle", "grandmother", "cousin"),
    "when": ("yesterday", "Monday", "last week", "March", "this morning", "the last visit"),
    "few": tuple(str(number) for number in range(2, 10)),
    "age": tuple(str(number) for number in range(30, 90)),
    "year": tuple(str(number) for number in range(1985, 2025)),
}


@dataclass(frozen=True)
class Style:
    """How the notes of one hospital are written."""

    who: tuple[str, ...]
    """What a patient is called."""
    ends: tuple[str, ...]
    """What stands between two phrases: at the end of a word, or a word of its own."""
    capitals: bool
    """Sentences begin with one."""
    phrases: dict[str, tuple[str, ...]]
    """By label of the findings in them."""


STYLES = {
    "emergency": Style(
        who=("pt", "patient", "he", "she"),
        ends=(".", ";", ",", ",", "but", "and"),
        capitals=False,
        phrases={
            "none": ("seen in bay {few}", "BP 120/80", "ECG done", "{kin} present", "bloods sent", "no drug allergies"),
            "present": (
                *("{who} c/o {and} since {when}", "presents w {and}", "{and} x{few}d", "now w {and}"),
                *("{and} worse on exertion", "ongoing {and}", "brought in for {and}", "no change in {and}"),
                *("no relief of {and} from paracetamol", "does not cope w {and}"),
            ),
            "absent": (
                *("denies {or}", "no {or}", "{or} denied", "w/o {or}", "neg for {or}", "{or} neg", "never had {or}"),
                *("CT neg for {or}", "not c/o {or}"),
            ),
            "possible": (
                *("r/o {and}", "? {and}", "poss {and}", "{and} suspected", "cannot exclude {or}", "query {and}"),
                *("{and} on the differential", "looks like {and}"),
            ),
            "past": (
                *("h/o {and}", "PMH {and}", "{and} in {year}", "prev {and}", "treated for {and} in {year}"),
                "{and} as a child",
            ),
            "family": ("{kin} had {and}", "FH of {and}", "{kin} died of {and}", "{and} in {kin}", "{kin} w {and}"),
        },
    ),
    "clinic": Style(
        who=("she", "he", "the patient", "this lady", "this gentleman"),
        ends=(".", ".", ".", ", but", "and", "while"),
        capitals=True,
        phrases={
            "none": (
                *("it was a pleasure to see {who}", "I will see {who} again in {few} months", "no tablets are taken"),
                *("{who} lives with the {kin}", "blood pressure was normal"),
            ),
            "present": (
                *("{who} describes {and} for the past {few} weeks", "{who} is troubled by {and}"),
                *("{who} continues to suffer from {and}", "{and} has become worse since {when}"),
                *("on examination there is {and}", "{who} attends today because of {and}"),
                *("treatment has made no difference to {and}", "{and} has not improved"),
            ),
            "absent": (
                *("there is no {or}", "{who} has not noticed any {or}", "{who} has had neither {nor}"),
                *("{or} has been excluded", "{who} tells me that {or} is not a problem", "I found no sign of {or}"),
                *("{who} is free of {and}", "our tests spoke against {or}"),
            ),
            "possible": (
                *("I wonder whether this is {or}", "{or} remains a possibility", "I would like to exclude {or}"),
                *("this may well be {or}", "the picture is suspicious of {and}", "{and} seems likely to me"),
            ),
            "past": (
                *("{who} was treated for {and} in {year}", "{and} resolved in {year}"),
                *("{who} has a past history of {and}", "there was an episode of {and} {few} years ago"),
                "{who} recovered from {and} in {year}",
            ),
            "family": (
                *("the {kin} was diagnosed with {and} at the age of {age}", "there is a family history of {and}"),
                *("the {kin} suffers from {and}", "{and} runs in the family", "{kin} and {kin} had {and}"),
            ),
        },
    ),
    "radiology": Style(
        who=("the patient",),
        ends=(".", ".", ".", "and", ", but"),
        capitals=True,
        phrases={
            "none": (
                *("compared with {when}", "two views of the chest", "no contrast was given", "lungs well expanded"),
                "mediastinum of normal width",
            ),
            "present": (
                *("there is {and}", "findings are consistent with {and}", "interval increase in {and}"),
                *("{and} is again seen", "stable {and}", "{and} persists", "no change in {and} since {when}"),
                *("new {and} compared with {when}", "{and} is not improved"),
            ),
            "absent": (
                *("no evidence of {or}", "{or} is not seen", "without {or}", "no radiographic sign of {or}"),
                *("{or} has been ruled out", "negative for {or}", "there is no {or}", "no new {or}"),
            ),
            "possible": (
                *("{or} cannot be excluded", "appearances may represent {or}", "suspicious for {and}"),
                *("{or} is possible", "clinical question {or}", "differential includes {and}", "rule out {or}"),
            ),
            "past": (
                *("previous {and} in {year}", "sequelae of {and}", "known old {and}", "status after {and}"),
                "{and} on the study of {year} has resolved",
            ),
            "family": (
                *("indication family history of {and}", "screening because the {kin} has {and}"),
                *("{kin} of {who} with {and}", "{and} known in the {kin}"),
            ),
        },
    ),
    "discharge": Style(
        who=("Mr K", "Mrs B", "Ms T", "the patient"),
        ends=(".", ".", ".", ";", ", but", "and"),
        capitals=True,
        phrases={
            "none": (
                *(
                    "{who} lives with the {kin}",
                    "diet as tolerated",
                    "no change of medication",
                    "to return in {few} days",
                ),
                "{kin} informed by telephone",
            ),
            "present": (
                *("admitted with {and}", "diagnoses {and}", "{who} developed {and} on day {few}"),
                *("{and} was treated with tablets", "course complicated by {and}", "discharged with persistent {and}"),
                *("{and} did not respond to treatment", "not only {and} was found"),
            ),
            "absent": (
                *("{who} denied {or}", "{or} was excluded", "at discharge no {or}", "workup for {or} was negative"),
                *("there were no signs of {or}", "review of systems negative for {or}", "{or} absent"),
                "{who} remained free from {or}",
            ),
            "possible": (
                *("{or} could not be ruled out", "presumed {and}", "concern for {or}", "{or} versus artefact"),
                *("to be followed up for possible {or}", "probably {and}"),
            ),
            "past": (
                *("past medical history of {and}", "{who} had {and} in {year}", "history of {and}"),
                *("{and} {few} years ago", "{and} before this admission has resolved"),
            ),
            "family": (
                *("family history of {and}", "{kin} with {and}", "{kin} died of {and} at {age}"),
                "{who} reports {and} in the {kin}",
            ),
        },
    ),
}
"""By hospital department."""
