"""The papers' figures, by name, from a run directory: a PNG, and the numbers it shows as JSON beside it.

    python analyze.py --run runs/mae-shapes --figure all                      into runs/mae-shapes/figures/
    python analyze.py --run runs/mae runs/mae-45 --figure attention-distance  several runs on one axis
    python analyze.py --run runs/cae --figure attention-map --to map.png

`--figure all` draws every figure that the run can have, and names the others with the reason: an encoder without a
decoder has no reconstruction. Images come from the validation set of the first run: evenly spaced, central squares, the
same for every run. Only `views` shows training images, cropped as a training step crops them. The JSON says which
images and references were used. figures/measures.py defines what is measured, and says where the papers are unclear.
Needs matplotlib: pip install ".[plots]".
"""

import argparse
import importlib.util
import json
from pathlib import Path

from figures import plots
from figures.encoders_and_images import Absent, Study
from inputs import augment
from runtime import files, process
from runtime.command_line import Parser, add_option, count
from runtime.errors import InputError

FIGURES = {function.__name__.replace("_", "-"): function for function in (
    plots.reconstruction, plots.curves, plots.fine_tuning, plots.views, plots.attention_map, plots.attention_distance,
    plots.decoder_similarity, plots.semantic_similarity, plots.decoder_attention, plots.class_distances, plots.features,
    plots.token_variance, plots.latent_reconstruction,
)}  # fmt: skip

WITH_REFERENCE = {"attention-map", "attention-distance", "semantic-similarity", "class-distances", "features"}
WITH_REFERENCE |= {"token-variance"}
# Options of some figures: name, the value if none is given, type or choices, metavar, the figures, help.
OPTIONS = [
    ("images", None, count, "N", set(FIGURES) - {"curves", "fine-tuning"},
     "how many images to use; each figure has its own default"),
    ("reference", [], str, "PATH...", WITH_REFERENCE, "encoders to compare with: runs, or files of weights"),
    ("classes", 50, count, "K", {"class-distances"}, "how many classes to use [50]"),
    ("projection", "pca", ["pca", "tsne"], None, {"features"}, "principal components or t-SNE [pca]"),
    ("pixels", None, str, "DIR", {"features"},
     "colour patches by the label maps of a folder in VOC's or ADE20K's format, as transfer.py reads them"),
]  # fmt: skip


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Draw the papers' figures of runs.", allow_abbrev=False)
    add = parser.add_argument
    add("--run", required=True, nargs="+", metavar="RUN", help="run directories, or with --data files of weights")
    add("--figure", required=True, metavar="NAME", choices=[*FIGURES, "all"], help=f"all, or {', '.join(FIGURES)}")
    add("--to", metavar="FILE.png", help="the file to write [figures/NAME.png in the first run]")
    add("--data", metavar="SET", help="show images of this set, named as for train.py, not of the first run's set")
    add("--data-root", metavar="DIR", help="the folder of the set")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    for name, _, kind, metavar, figures, text in OPTIONS:
        text = text if name == "images" else f"{', '.join(sorted(figures))}: {text}"
        add_option(parser, name, argparse.SUPPRESS, kind, metavar, text)
    args = parser.parse_args(argv)
    for name, default, _, _, figures, _ in OPTIONS:
        if name not in args:
            setattr(args, name, default)
        elif args.figure not in figures | {"all"}:
            good = ", ".join(sorted(figures))
            raise InputError(f"--{name}: does nothing to {args.figure}; leave it out, or draw {good}")
    if args.classes < 2:
        raise InputError(f"classes {args.classes}: must be at least 2")
    if args.to and (args.figure == "all" or Path(args.to).suffix != ".png"):
        raise InputError(f"to {args.to}: must end in .png, and take one figure, not all")
    return args


def draw(name: str, study: Study, file: Path) -> None:
    """One figure to its PNG, and its numbers to the JSON beside it."""
    import matplotlib

    with matplotlib.rc_context(fname=plots.STYLE), augment.views_for(study.runs[0].settings):
        study.shown.clear()
        figure, numbers = FIGURES[name](study)
        files.write_whole(file, lambda out: figure.savefig(out, format="png"), "; give another --to")
    about = {"figure": name, "runs": [str(run.path) for run in study.runs]}
    if study.shown:
        about |= {"data": study.data[0], "images": study.shown}
    if name in WITH_REFERENCE:
        about["reference"] = study.args.reference
    files.write_text(file.with_suffix(".json"), json.dumps(about | numbers) + "\n")


def main() -> None:
    args = options()
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('matplotlib: not installed, and figures need it; pip install ".[plots]"')
    study = Study(args, process.start(args.device))
    for name in FIGURES if args.figure == "all" else [args.figure]:
        file = Path(args.to or study.runs[0].directory / "figures" / f"{name}.png")
        try:
            draw(name, study, file)
            print(f"{name:22} {file}", flush=True)
        except Absent as reason:
            if args.figure != "all":
                raise InputError(f"{name}: {reason}") from None
            print(f"{name:22} skipped: {reason}", flush=True)
    process.stop()


if __name__ == "__main__":
    process.command(main)
