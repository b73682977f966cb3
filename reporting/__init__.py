"""What the project says of itself: speed tables, claims with their evidence, and the documents made from them."""

from pathlib import Path

HERE = Path(__file__).parent.parent  # the folder of all of the code
