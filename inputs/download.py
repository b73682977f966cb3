"""Fetching an archive: resumable, verified by its checksum, unpacked where it belongs and nowhere else."""

import hashlib
import http.client
import os
import stat
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from runtime.errors import InputError


def fetch(url: str, path: Path, md5: str, tries: int = 5) -> None:
    """Download `url` to `path`, going on with what a broken transfer left in `path`.part, and verify the checksum."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = "the transfer breaks off"
    for _ in range(tries):
        try:
            if _fetch_rest(url, part):
                break
        except (OSError, http.client.HTTPException) as error:  # OSError covers urllib's and the disk's
            reason = error
    else:
        raise InputError(f"{url}: download failed ({reason}); the same command goes on where it stopped")
    with open(part, "rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != md5:
        part.unlink()
        raise InputError(f"{url}: md5 is {digest.hexdigest()}, should be {md5}; removed, try again later")
    os.replace(part, path)


def _fetch_rest(url: str, part: Path) -> bool:
    """Append to `part` what is missing; False if the transfer ended too early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send
            return True
        raise
    if response.status != 206:  # the server sends the whole file
        have = 0
    length = response.headers["Content-Length"]
    total = have + int(length) if length else None
    bar = tqdm(total=total, initial=have, desc="downloading", unit="B", unit_scale=True)
    with response, bar, open(part, "ab" if have else "wb") as file:
        while block := response.read(1 << 16):
            file.write(block)
            have += len(block)
            bar.update(len(block))
    return have == (total or have)


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip that holds the folder `target`.name next to it: into a temporary folder first, then renamed."""
    try:
        with zipfile.ZipFile(archive) as source, tempfile.TemporaryDirectory(dir=target.parent) as folder:
            for member in source.infolist():
                kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the packer gave no Unix mode
                inside = Path(folder, member.filename).resolve().is_relative_to(Path(folder).resolve())
                if not inside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise InputError(
                        f"{archive}: member {member.filename} is a link or lands outside; nothing unpacked"
                    )
            for member in tqdm(source.infolist(), desc="unpacking", unit=" files"):
                source.extract(member, folder)
            os.replace(Path(folder, target.name), target)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{archive}: cannot be unpacked ({error}); remove it and download again") from error
