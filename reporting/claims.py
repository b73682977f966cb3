"""The papers' claims that are tested here, as claims.json lists them, and the rule of the verdict."""

import json
from dataclasses import dataclass

from reporting import HERE


@dataclass(frozen=True)
class Claim:
    paper: str
    where: str
    statement: str
    reported: str  # by the paper, in the order of `sides`; of CMAE and ConMIM: ImageNet, fine-tuned
    sides: list[str]  # as `values` takes them, from what the paper finds lowest to what it finds highest


LISTED = json.loads((HERE / "reporting/claims.json").read_text())
CLAIMS = [Claim(**claim) for claim in LISTED["claims"]]
# Runs that claims need beyond the cpu table: the method, what differs from its row there, what is measured.
VARIANTS = LISTED["variants"]


def verdict(low: list[float], high: list[float]) -> str:
    """Of what the paper finds lower, and of what it finds higher: every seed of the one beyond every seed of the other.

    That takes no model of the noise. Chance alone does it once in (n + m choose n) times: once in 20 of 3 and 3.
    """
    if not low or not high:
        return "not run"
    if min(len(low), len(high)) < 3:
        return "not judged: fewer than three seeds"
    return "shown" if min(high) > max(low) else "contradicted" if max(high) < min(low) else "not shown at this scale"
