#!/usr/bin/env python3
"""Makes the demo's corpus: demo_corpus.py DIR [COUNT]

Real text that is on this machine anyway: the README files and the documentation comments of the crates that Flotilla is
built from, as the package registry ships them. One text file for each, crate by crate, spread evenly if there are more
than COUNT (default 2400). Prints how many it wrote.
"""
import hashlib, json, os, re, shutil, subprocess, sys

SHORTEST, LONGEST = 400, 6000


def crates():
    out = subprocess.run(["cargo", "metadata", "--format-version", "1", "--locked"], check=True, capture_output=True).stdout
    for package in json.loads(out)["packages"]:
        if package["source"]:
            yield f"{package['name']}-{package['version']}", os.path.dirname(package["manifest_path"])


def doc_comments(text):
    """The text of a source file's documentation comments."""
    return "\n".join(m.group(1) for m in re.finditer(r"^\s*//[!/](?!/) ?(.*)$", text, re.M))


def documents():
    for crate, root in sorted(crates()):
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in ("target", ".git", "tests", "benches"))
            for name in sorted(files):
                path = os.path.join(folder, name)
                if not name.endswith((".md", ".rs")):
                    continue
                with open(path, encoding="utf-8", errors="ignore") as file:
                    text = file.read()
                if name.endswith(".rs"):
                    text = doc_comments(text)
                text = text.replace("\0", "").strip()
                if SHORTEST <= len(text) <= LONGEST:
                    yield f"{crate}/{os.path.relpath(path, root)}.txt", text


def main(target, count=2400):
    chosen, seen = [], set()
    for key, text in documents():
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:  # licences and notices repeat
            seen.add(digest)
            chosen.append((digest, key, text))
    chosen.sort()  # by digest: an even spread that is the same every time
    chosen = chosen[:count]
    shutil.rmtree(target, ignore_errors=True)
    for _, key, text in chosen:
        path = os.path.join(target, key)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    print(len(chosen))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], *(int(arg) for arg in sys.argv[2:3]))
