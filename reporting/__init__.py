"""What the project says of itself: speed tables, claims with their evidence, and the documents made from them."""
