"""What stands behind an equation: the claims measured on it, and the loss to expect."""

from html import escape

from reporting import HERE
from reporting.documents import spell, verdict
from reporting.result_files import runs_of, values

RESULTS = HERE / "results"
COLOURS = ("var(--accent)", "var(--stop)", "var(--link)", "var(--keyword)", "var(--number)")


def measured(claim: dict) -> dict[str, str]:
    """A claim of reporting/claims.json with its verdict and its numbers, from lower to higher."""
    found = [values(RESULTS, side) for side in claim["sides"]]
    numbers = " → ".join(spell(x) for x in found) if all(found) else ""
    return dict(
        verdict=verdict(found[0], found[-1]), statement=claim["statement"], numbers=numbers, paper=claim["reported"],
        where=f"{claim['paper']}, {claim['where']}",
    )  # fmt: skip


def curve(method: str) -> str:
    """The losses of a finished run, epoch by epoch, as an inline SVG; nothing where none has been recorded."""
    name = next((f"{folder}/{method}" for folder in ("demo", "cpu") if runs_of(RESULTS, f"{folder}/{method}")), None)
    if name is None:
        return ""
    rows = runs_of(RESULTS, name)[0]["loss"]
    parts = [part for part in rows[0] if part != "epoch"]
    top, last = max(row[part] for row in rows for part in parts), rows[-1]["epoch"] or 1
    lines = ""
    for part, colour in zip(parts, COLOURS, strict=False):
        points = " ".join(f"{8 + 200 * row['epoch'] / last:.1f},{86 - 78 * row[part] / top:.1f}" for row in rows)
        lines += f'<polyline points="{points}" style="stroke:{colour}"/>'
    ends = "".join(
        f'<li style="color:{colour}">{escape(part)} {rows[0][part]:.3g} → {rows[-1][part]:.3g}</li>'
        for part, colour in zip(parts, COLOURS, strict=False)
    )
    return (
        '<figure class="curve"><svg viewBox="0 0 216 92" role="img" aria-label="losses by epoch">'
        f'<path d="M8 4V86H208"/>{lines}</svg><ul>{ends}</ul>'
        f"<figcaption>{last} epochs, results/{name}.json</figcaption></figure>"
    )
