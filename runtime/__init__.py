"""How a run lives: command lines, processes and devices, run directory and log, weights in and out, fast products."""
