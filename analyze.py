"""The papers' figures, by name, from a run directory: a PNG, and the numbers it shows as JSON beside it.

    python analyze.py --run runs/mae-shapes --figure all                      into runs/mae-shapes/figures/
    python analyze.py --run runs/mae runs/mae-45 --figure attention-distance  several runs on one axis
    python analyze.py --run runs/cae --figure attention-map --to map.png

`--figure all` draws every figure that the run can have: a reconstruction needs a decoder, token usage needs a codebook.
It names the others with the reason. Images come from the validation set of the first run: evenly spaced, central
squares, the same for every run. Only `views` shows training images, cropped as a training step crops them.
The JSON says which images and references were used. Needs matplotlib: pip install ".[plots]".

figures/measures.py defines what is measured, and says where the papers are unclear.
"""

import argparse
import importlib.util
import json
import re
from pathlib import Path

from figures import attention_plots, feature_plots, training_plots
from figures.drawing import STYLE
from figures.study import Absent, Study
from runtime import files, process
from runtime.command_line import Parser
from runtime.errors import InputError

FIGURES = {
    "reconstruction": training_plots.reconstruction,
    "curves": training_plots.curves,
    "views": training_plots.views,
    "attention-map": attention_plots.attention_map,
    "attention-distance": attention_plots.attention_distances,
    "decoder-similarity": attention_plots.decoder_similarities,
    "semantic-similarity": attention_plots.semantic_similarities,
    "decoder-attention": attention_plots.decoder_attention,
    "class-distances": feature_plots.class_distances,
    "features": feature_plots.feature_plots,
    "latent-reconstruction": training_plots.latent_reconstruction,
    "token-usage": training_plots.token_usage,
    "neighbours": feature_plots.neighbours,
}

# The options of some figures: the value when nothing is given, and the figures that have a use for one.
SOME = {
    "keep_visible": (True, {"reconstruction"}),
    "statistics": ("visible", {"reconstruction"}),
    "query": (None, {"attention-map"}),
    "mass": (0.5, {"attention-map"}),
    "reference": ([], {"attention-map", "attention-distance", "semantic-similarity", "class-distances", "features"}),
    "classes": (50, {"class-distances"}),
    "projection": ("pca", {"features"}),
    "of": ("images", {"features"}),
    "images": (None, set(FIGURES) - {"curves"}),
}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Draw the papers' figures of runs.", allow_abbrev=False)
    add = parser.add_argument
    add("--run", required=True, nargs="+", metavar="RUN",
        help="run directories; files of weights too, for figures of encoders alone, with --data")  # fmt: skip
    add("--figure", required=True, metavar="NAME", choices=[*FIGURES, "all"], help=f"all, or {', '.join(FIGURES)}")
    add("--to", metavar="FILE.png", help="the file to write [figures/NAME.png in the first run]")
    add("--images", type=int, metavar="N", help="how many images to use; each figure has its own default")
    add("--data", metavar="SET", help="show images of this set, named as for train.py, not of the first run's set")
    add("--data-root", metavar="DIR", help="the folder of the set")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add = parser.add_argument_group("of some figures").add_argument
    add("--keep-visible", action=argparse.BooleanOptionalAction,
        help="reconstruction: show visible patches as they are, not as the decoder predicts them [yes]")  # fmt: skip
    add("--statistics", choices=["visible", "true"],
        help="reconstruction: hidden patches get mean and variance of their visible neighbours, or their true ones, "
        "which no model knows [visible]")  # fmt: skip
    add("--query", metavar="ROW,COLUMN", help="attention-map: the patch that attends [the class token]")
    add("--mass", type=float, metavar="SHARE", help="attention-map: the share of attention inside the outline [0.5]")
    add("--reference", nargs="+", metavar="PATH", help="encoders to compare with: runs, or files of weights")
    add("--classes", type=int, metavar="K", help="class-distances: how many classes to use [50]")
    add("--projection", choices=["pca", "tsne"], help="features: principal components or t-SNE [pca]")
    add("--of", choices=["images", "patches"], help="features: one point an image, or one a patch [images]")
    args = parser.parse_args(argv)
    for name, (default, figures) in SOME.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.figure not in figures | {"all"}:
            raise InputError(f"--{name.replace('_', '-')}: does nothing to {args.figure}; "
                             f"leave it out, or draw {', '.join(sorted(figures))}")  # fmt: skip
    for name, least in (("images", 1), ("classes", 2)):
        if (given := getattr(args, name)) is not None and given < least:
            raise InputError(f"{name} {given}: must be at least {least}")
    if not 0 < args.mass <= 1:
        raise InputError(f"mass {args.mass:g}: must be above 0 and at most 1")
    if args.query is not None:
        if not re.fullmatch(r"\d+,\d+", args.query):
            raise InputError(f"query {args.query!r}: not a patch; give its row and column, as in 3,4")
        args.query = tuple(map(int, args.query.split(",")))
    if args.to and (args.figure == "all" or Path(args.to).suffix != ".png"):
        raise InputError(f"to {args.to}: must end in .png, and take one figure, not all")
    return args


def draw(name: str, study: Study, file: Path) -> None:
    """One figure to its PNG, and its numbers to the JSON beside it."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        study.shown.clear()
        figure, numbers = FIGURES[name](study)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{file.parent}: cannot be written ({error.strerror}); give another --to") from None
        files.write_whole(file, lambda out: figure.savefig(out, format="png"))
    about = {"figure": name, "runs": [str(run.path) for run in study.runs]}
    if study.shown:
        about |= {"data": study.data[0], "images": study.shown}
    if name in SOME["reference"][1]:
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
