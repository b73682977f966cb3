"""The figures of bench.py in columns, as it prints them and as docs/speed.md shows them."""

# Heads of the table for the fields of a row; a field without one is for --json alone.
HEADS = dict(
    name="what", gpus="GPUs", batch="batch", images_per_gpu="batch", precision="type", images_per_second="images/s",
    torchvision_images_per_second="theirs", gflop="GFLOP", share="share", megabytes="MB", cost="cost", by_hf="x hf",
    by_lightly="x lightly", by_torchvision="x theirs", first_run_seconds="first s", first_step_seconds="to step s",
    second_epoch_seconds="epoch s", total_seconds="all s", resident_gib="GiB", checkpoint_seconds="save s",
    checkpoint_megabytes="MB", tflop_per_gpu="TFLOP", compute_ms="ms", all_reduce_megabytes="sum MB",
    all_reduce_ms="sum ms", gathered_keys_megabytes="keys MB", memory_gb="GB", first_limit="limit",
)  # fmt: skip


def columns(rows: list[dict]) -> str:
    """The rows in columns, at most 80 characters wide for every table of bench.py."""
    fields = [f for f in HEADS if any(f in row for row in rows)]

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return "" if value is None else str(value)

    cells = [[HEADS[f] for f in fields], *([cell(row.get(f)) for f in fields] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (" ".join(text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True)) for line in cells)
    return "\n".join(f"{line[0].ljust(widths[0])} {rest}" for line, rest in zip(cells, lines, strict=True))
