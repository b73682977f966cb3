"""Write the pages: every method file beside the equations of its paper, with what one real step computes.

    python -m reporting.pages --out site

A page needs no server, no network and no JavaScript.
"""

import argparse

from reporting.pages.site import build
from runtime import process


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reporting.pages", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="site", metavar="DIR", help="where to write them [site]")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="its runs METHOD-shapes give pictures [runs]")
    args = parser.parse_args()
    build(args.out, args.runs)


if __name__ == "__main__":
    process.command(main)
