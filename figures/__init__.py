"""The papers' analyses: what they measure, and how it is drawn."""
