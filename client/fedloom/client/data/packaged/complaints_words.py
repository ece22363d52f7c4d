"""What the made-up complaints are made of: names of products, phrases of each issue, and customers of four banks.

Every phrase of an issue names the product, so that a tag is never a guess.
"""

from dataclasses import dataclass

__all__ = ["BANKS", "FILLERS", "ISSUES", "PRODUCTS", "Bank"]

PRODUCTS = {
    "account": ("current account", "checking account", "joint account", "business account", "bank account"),
    "card": ("credit card", "debit card", "Visa card", "card"),
    "mortgage": ("mortgage", "home loan", "mortgage on our house", "remortgage"),
    "savings": ("savings account", "fixed-term deposit", "ISA", "savings plan"),
    "transfer": ("bank transfer", "wire transfer", "standing order", "payment abroad"),
}
"""What each is called."""

ISSUES = {
    "fees": (
        "I was charged {sum} for my {product} without being told",
        "there is a fee of {sum} on the {product} that nobody can explain",
        "the interest on the {product} went up although I was promised a fixed rate",
        "the monthly cost of the {product} has doubled",
        "you took {sum} for the {product}, which was sold to me as free",
        "every month another charge for the {product} appears on my statement",
        "I will not pay {sum} for a {product} that I never use",
        "hidden costs of the {product} have eaten {sum}",
        "I want the {sum} back that the {product} has cost me without notice",
        "a penalty of {sum} was added to the {product}",
        "the price list says that the {product} costs nothing, my statement says {sum}",
        "the rate for the {product} is not what I signed",
    ),
    "fraud": (
        "somebody used my {product} to steal {sum}",
        "I did not authorise the {sum} that went through my {product}",
        "a stranger called, said he was from the bank, and emptied everything through my {product}",
        "criminals got hold of my {product} and {sum} is gone",
        "there are purchases with my {product} in a town where I have never been",
        "my {product} was hacked on {day} and you refuse to refund {sum}",
        "I fell for a false text message and lost {sum} by my {product}",
        "thieves took {sum} by means of my {product}",
        "I reported the theft with my {product} at once and was called careless",
        "an unknown person opened a {product} in my name",
        "the {product} was misused by a scammer who pretended to be my {kin}",
        "my signature on the papers of the {product} was forged",
    ),
    "delay": (
        "I have waited {few} weeks for my {product}",
        "the {product} should have been ready on {day} and still is not",
        "it takes far too long until the {product} is dealt with",
        "after {few} months there is no decision on the {product}",
        "the {product} has been pending since {day}",
        "because the {product} came too late I missed a deadline",
        "you promised the {product} within {few} days, that was a month ago",
        "the {product} is stuck and nobody can say until when",
        "everything about the {product} is postponed from week to week",
        "my {product} arrived {few} weeks after the date that was agreed",
        "weeks go by and the {product} does not move",
        "the {product} is overdue and my {kin} is waiting for the money",
    ),
    "service": (
        "the staff were rude when I asked about my {product}",
        "nobody answers the telephone when I call about the {product}",
        "I was passed from one desk to another with my question on the {product}",
        "your adviser did not know the first thing about the {product}",
        "I wrote {few} letters about my {product} and got no reply",
        "the man at the counter laughed at me because of my {product}",
        "{few} times I explained the problem with the {product}, each time to somebody else",
        "the branch sent me away when I came about the {product}",
        "the hotline hung up on me while I talked about the {product}",
        "I was treated like a beggar because of the {product}",
        "an employee shouted at my {kin} about the {product}",
        "no one called me back about the {product} as was promised",
    ),
    "app": (
        "since the update the app does not show my {product}",
        "I cannot log in to see my {product}",
        "the website crashes whenever I open the {product}",
        "the app asks for a code that never comes when I use the {product}",
        "online banking has locked me out of my {product}",
        "the new software shows a wrong amount for the {product}",
        "my password for the {product} is refused although it is right",
        "on my phone the page of the {product} stays blank",
        "the confirmation by text message does not work for the {product}",
        "the button to manage the {product} has vanished from the screen",
        "the fingerprint login fails as soon as I choose the {product}",
        "the web page of the {product} ends in an error every time",
    ),
    "closing": (
        "I want to cancel my {product} and you do not let me",
        "I asked {few} times to end the {product}",
        "you closed my {product} without any reason",
        "my {product} was terminated while I was abroad",
        "please close the {product} and confirm it in writing",
        "the {product} goes on although I gave notice on {day}",
        "I was told that the {product} is shut down from {day}",
        "my application to dissolve the {product} was ignored",
        "you blocked and then ended my {product} overnight",
        "I wish to leave your bank and take the {product} elsewhere",
        "I no longer need the {product} and cannot get rid of it",
        "the {product} was discontinued and I was not asked",
    ),
}
"""Phrases of each."""

FILLERS = {
    "sum": tuple(
        f"{number} {unit}" for number in (12, 18, 25, 40, 65, 90, 150, 320, 780, 1400) for unit in ("euros", "pounds")
    ),
    "few": tuple(str(number) for number in range(2, 10)),
    "day": ("Monday", "Tuesday", "Friday", "the 3rd", "the 12th", "the 25th", "1 March", "15 June", "last Thursday"),
    "kin": ("mother", "father", "sister", "brother", "son", "daughter", "landlord", "partner"),
}


@dataclass(frozen=True)
class Bank:
    """How customers write to one bank, and about what."""

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    mix: tuple[float, ...]
    """How often each product occurs."""


BANKS = {
    "northern": Bank(
        ("dear sir or madam", "I have been a customer for twenty years", "this is my second letter"),
        ("yours faithfully", "I expect an answer within 14 days", "I shall turn to the ombudsman"),
        (4, 2, 2, 2, 2),
    ),
    "direct": Bank(
        ("hi", "hello team", "me again", "ticket from last week"),
        ("pls fix", "thanks", "otherwise I am off", "one star"),
        (2, 4, 0.5, 1, 4),
    ),
    "building": Bank(
        ("we are first-time buyers", "my wife and I write to you together", "concerning our contract"),
        ("kindly put this right", "we have asked our solicitor", "with regret"),
        (1, 0.5, 6, 3, 1),
    ),
    "cooperative": Bank(
        ("as a member I am disappointed", "I run a small bakery", "our club banks with you"),
        ("I will raise this at the assembly", "please see to it", "we thought you were different"),
        (5, 2, 1, 2, 3),
    ),
}
"""By name."""
