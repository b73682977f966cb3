"""The sources beside their papers' equations: a static site with what one real step computes at every line."""
