"""The Dockerfiles: pinned, in stages, without root, and with everything they copy in the build context."""

import fnmatch
import os
import re
import tomllib

from .site import pinned, rust_sources


def check_images(here):
    files = ["Dockerfile", "deploy/otel/Dockerfile"]
    for file in files:
        check_dockerfile(here, file)
    check_toolchain(here)
    check_context(here)
    return ", ".join(files)


def instructions(here, file):
    text = re.sub(r"^\s*#.*\n", "", here.text(file), flags=re.M)
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]


def check_dockerfile(here, file):
    stages, user, entrypoint = [], None, None
    for word, rest in instructions(here, file):
        if word == "FROM":
            image, _, name = re.match(r"(\S+)(\s+AS\s+(\S+))?$", rest, re.I).groups()
            if image not in stages and not pinned(image) and not re.search(r":\w+-slim$", image):
                here.bad(file, f"FROM {image} is not pinned to a version")
            stages.append(name or image)
            user = None
        elif word == "COPY":
            source = re.match(r"--from=(\S+)", rest)
            if source and source.group(1) not in stages:
                here.bad(file, f"COPY --from={source.group(1)} names no stage")
            if not source:
                for path in rest.split()[:-1]:
                    base = here.root if file == "Dockerfile" else (here.root / file).parent
                    if not (base / path).exists():
                        here.bad(file, f"copies {path}, which does not exist")
        elif word == "USER":
            user = rest
        elif word == "ENTRYPOINT":
            entrypoint = rest
    if len(stages) < 2:
        here.bad(file, "has one stage: the image would hold its build tools")
    if not re.match(r"[1-9]\d*(:|$)", user or ""):
        here.bad(file, f"ends with USER {user}: use a number other than 0")
    if not (entrypoint or "").startswith("["):
        here.bad(file, "ENTRYPOINT must be a list: a shell would swallow SIGTERM")


def check_toolchain(here):
    channel = tomllib.loads(here.text("rust-toolchain.toml"))["toolchain"]["channel"]
    wanted = ".".join(channel.split(".")[:2])
    if f"FROM rust:{wanted}-" not in here.text("Dockerfile"):
        here.bad("Dockerfile", f"does not build with rust:{wanted}, the channel of rust-toolchain.toml")


def check_context(here):
    """The build needs every member of the workspace and must not get build outputs."""
    lines = [line for line in here.text(".dockerignore").splitlines() if line and not line.startswith("#")]

    def enters(path):
        inside = True
        for line in lines:
            pattern = line.lstrip("!").removeprefix("**/")
            parts = path.split("/")
            heads = ["/".join(parts[: end + 1]) for end in range(len(parts))]
            names = parts if line.lstrip("!").startswith("**/") else heads
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                inside = line.startswith("!")
        return inside

    members = tomllib.loads(here.text("Cargo.toml"))["workspace"]["members"]
    for source, path in compiled_in(here):
        if not enters(path):
            here.bad(".dockerignore", f"keeps {path} out of the build, and {source} compiles it in")
    for path in ["Cargo.toml", "Cargo.lock", "migrations", "scripts/fetch_model.py", ".cargo", *members]:
        if not enters(path):
            here.bad(".dockerignore", f"keeps {path} out of the build")
    for path in ["target/release", "devstack/vector-server/target", ".git", "models", ".flotilla", "queue/target"]:
        if enters(path):
            here.bad(".dockerignore", f"lets {path} into the build")


def compiled_in(here):
    """Files that Rust sources read while they are built: (source, file), both from the root."""
    for source in rust_sources(here.root):
        name = str(source.relative_to(here.root))
        if name.startswith("devstack/vector-server/"):
            continue
        for macro, path in re.findall(r'(include_str|include_bytes|migrate)!\("([^"]+)"\)', source.read_text("utf-8")):
            start = source.parent
            if macro == "migrate":  # relative to the crate, not to the source
                while not (start / "Cargo.toml").is_file():
                    start = start.parent
            yield name, os.path.relpath(os.path.normpath(start / path), here.root)
