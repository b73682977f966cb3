"""The generated parts of the documents: each lies between `<!-- name -->` and `<!-- /name -->`."""

from pathlib import Path

from reporting import tables
from reporting.citations import index_block
from reporting.result_files import changed, read
from runtime.errors import InputError

BLOCKS = {  # document: its generated parts, and the function of the results that writes each
    "docs/results.md": {
        "results": tables.results_block, "losses": tables.losses_block, "first": tables.first_block,
        "demo": tables.demo_block,
    },
    "docs/claims.md": {"claims": tables.claims_block},
    "docs/speed.md": {"speed": tables.speed_block},
    "docs/equations.md": {"index": index_block},
}  # fmt: skip


def split(name: str, text: str, part: str) -> tuple[str, str, str]:
    """A document up to the first line of a part, the part, and what follows."""
    begin, end = f"<!-- {part} -->", f"<!-- /{part} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise InputError(f"{name}: needs the lines {begin} and {end} in this order, once each")
    before, rest = text.split(begin)
    block, after = rest.split(end)
    return before + begin, block, end + after


def generated(root: Path, results: Path) -> dict[str, str]:
    """The documents with their generated parts made anew."""
    texts = {name: (root / name).read_text() for name in BLOCKS}
    for name, parts in BLOCKS.items():
        for part, block in parts.items():
            before, _, after = split(name, texts[name], part)
            texts[name] = f"{before}\n\n{block(results)}\n\n{after}"
    return texts


def problems(root: Path, results: Path) -> list[str]:
    """What no longer holds: generated parts, and results whose code has changed and that do not say so."""
    again = generated(root, results)
    found = [
        f"{name}: its part {part!r} is not what reproduce.py --readme writes"
        for name, parts in BLOCKS.items()
        for part in parts
        if split(name, (root / name).read_text(), part)[1] != split(name, again[name], part)[1]
    ]
    for file in sorted(set(results.rglob("*.json")) - set(results.glob("bench/**/*.json"))):
        result = read(file)
        old = sorted({name for run in result["runs"] for name in changed(run["sources"])})
        if old and not result.get("stale"):
            found.append(f"{file.name}: of other code than {', '.join(old)} now; run it again, or say in a field "
                         '"stale" why it may stay')  # fmt: skip
    return found
