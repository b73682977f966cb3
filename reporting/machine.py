"""Which machine and which code a number is of."""

import platform
import re
from pathlib import Path

HERE = Path(__file__).parent.parent


def processor() -> str:
    """The model of the CPU without marks and clock: "AMD EPYC 7B13", "Intel Xeon Platinum 8481C"."""
    file = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", file.read_text()) if file.exists() else None
    name = model[1] if model else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\(\w+\)|@.*|\bCPU\b|(\d+-Core )?\bProcessor\b", " ", name).split())


def folder(facts: dict) -> str:
    """Where `bench.py --json` keeps this machine's results: "amd-epyc-torch2", of the device and torch's version."""
    words = re.findall(r"[a-z0-9]+", facts["device"].lower())
    return "-".join([*words, "torch" + facts["versions"]["torch"].split(".")[0]])
