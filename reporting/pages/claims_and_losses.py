"""What stands behind an equation: the claims measured on it, and the loss to expect."""

from html import escape

from reporting import HERE
from reporting.documents import setting, spell, verdict
from reporting.experiments import CPU, VARIANTS
from reporting.pages.ablations import PAPER
from reporting.result_files import read, values

RESULTS = HERE / "results"
# What the numbers of a claim are, where its words do not say it.
MEASURES = {
    "finetune.top1": "top-1 % after fine-tuning", "linear.top1": "top-1 % of a quick linear probe",
    "linear-paper.top1": "top-1 % of linear probing", "attentive.top1": "top-1 % of attentive probing",
    "positions.later": "mean cosine of Eq. (7) in later layers", "positions.first": "in the first",
}  # fmt: skip
RUNS = {f"cpu/{method}": f"{method} {differs}" for method, differs in CPU.items()}  # others: "cpu/METHOD"
RUNS |= {f"claims/{name}": f"{v['method']} {v['differs']}" for name, v in VARIANTS.items()}
COLOURS = ("var(--accent)", "var(--stop)", "var(--link)", "var(--keyword)", "var(--number)")


def measured(claim: dict) -> dict:
    """A claim of reporting/claims.json with its verdict, each setting with its number, and how they were measured."""
    found = [values(RESULTS, side) for side in claim["sides"]]
    measures = dict.fromkeys(MEASURES.get(side.split()[1], "") for side in claim["sides"])
    numbers, how = [], ""
    if all(found):
        names = [side.split()[0] for side in claim["sides"]]
        numbers = [(RUNS.get(name, name[4:]), spell(x)) for name, x in zip(names, found, strict=True)]
        files = [read(RESULTS / f"{name}.json") for name in names]
        minutes = [round(run["seconds"] / 60) for file in files for run in file["runs"]]
        how = f"{' or '.join(dict.fromkeys(recipe(file['config']) for file in files))}; a run took {min(minutes)} to "
        how += f"{max(minutes)} minutes of a CPU with its evaluation; mean ± deviation of {len(found[0])} seeds each"
    return dict(
        verdict=verdict(found[0], found[-1]), statement=claim["statement"], numbers=numbers, paper=claim["reported"],
        where=f"{claim['paper']}, {claim['where']}", measure=" and ".join(filter(None, measures)), how=how,
    )  # fmt: skip


def recipe(config: dict) -> str:
    return f"{config['recipe']} recipe with {setting(config)}, crop_scale={config['crop_scale']}"


def curve(method: str) -> str:
    """The losses of a finished run, epoch by epoch, as an inline SVG; nothing where none has been recorded."""
    files = [file for folder in ("demo", "cpu") if (file := RESULTS / folder / f"{method}.json").exists()]
    if not files:
        return ""
    found = read(files[0])
    rows, config = found["runs"][0]["loss"], found["config"]
    where = f"results/{files[0].relative_to(RESULTS)}{', made by an earlier version of the code' * ('stale' in found)}"
    unlike = ", ".join(f"{key}={config[key]}" for key in ["batch_size", *PAPER.get(method, {})])
    caption = f"losses by epoch: {recipe(config)}; unlike the step, with {unlike}; {where}"
    parts = [part for part in rows[0] if part != "epoch"]
    top, last = max(row[part] for row in rows for part in parts), rows[-1]["epoch"] or 1
    lines = ends = ""
    for part, colour in zip(parts, COLOURS, strict=False):
        points = " ".join(f"{28 + 180 * row['epoch'] / last:.1f},{86 - 78 * row[part] / top:.1f}" for row in rows)
        lines += f'<polyline points="{points}" style="stroke:{colour}"/>'
        ends += f'<li style="color:{colour}">{escape(part)} {rows[0][part]:.3g} → {rows[-1][part]:.3g}</li>'
    ticks = "".join(
        f'<path d="M24 {86 - 78 * share}h4M{28 + 180 * share} 86v4"/>'
        f'<text x="12" y="{89 - 78 * share}">{share * top:.3g}</text>'
        f'<text x="{28 + 180 * share}" y="100">{share * last:g}</text>'
        for share in (0, 0.5, 1)
    )
    return (
        '<figure class="curve"><svg viewBox="0 0 218 104" role="img" aria-label="losses by epoch">'
        f'<path d="M28 4V86H208"/>{ticks}{lines}</svg><ul>{ends}</ul>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
