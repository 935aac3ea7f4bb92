//! Where documents come from: a folder's files or a file's lines, read one by one.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::glob::Glob;

/// Extensions of files that are taken unless --ext says otherwise.
const TEXTS: [&str; 20] = [
    "txt", "text", "md", "markdown", "mdx", "rst", "adoc", "asciidoc", "org", "tex", "html", "htm", "xml",
    "csv", "tsv", "json", "yaml", "yml", "toml", "log",
];
/// Extensions of files whose lines are payloads.
const LINES: [&str; 2] = ["jsonl", "ndjson"];

/// What to import.
#[derive(Debug, Clone)]
pub struct Selection {
    pub path: PathBuf,
    pub ext: Vec<String>,
    pub glob: Option<String>,
    pub prefix: String,
    pub limit: usize,
    /// Larger files are not even read.
    pub max_bytes: u64,
}

/// One document: its name and its ingest payload, or why it can't be read.
#[derive(Debug)]
pub struct Item {
    pub document: String,
    pub payload: anyhow::Result<Value>,
    size: usize,
}

impl Item {
    /// About how much memory it takes.
    pub fn bytes(&self) -> usize {
        self.size
    }
}

/// Yields the documents. Files are found when it is opened and read when they are asked for.
#[derive(Debug)]
pub enum Source {
    Folder {
        root: PathBuf,
        files: std::vec::IntoIter<PathBuf>,
        prefix: String,
        max_bytes: u64,
        skipped: usize,
    },
    Lines {
        reader: BufReader<File>,
        at: usize,
        total: usize,
        given: usize,
        prefix: String,
        max_bytes: u64,
    },
}

impl Source {
    /// Finds what is to be imported. Blocking.
    pub fn open(selection: &Selection) -> anyhow::Result<Self> {
        let path = &selection.path;
        let kind = std::fs::metadata(path).with_context(|| format!("can't read {}", path.display()))?;
        if kind.is_dir() {
            return Self::folder(selection);
        }
        if !extension(path).is_some_and(|ext| LINES.contains(&ext.as_str())) {
            bail!("{} is neither a folder nor a .jsonl file", path.display());
        }
        let open = || File::open(path).with_context(|| format!("can't read {}", path.display()));
        let total = count_lines(BufReader::new(open()?))?.min(selection.limit);
        Ok(Self::Lines {
            reader: BufReader::new(open()?),
            at: 0,
            total,
            given: 0,
            prefix: selection.prefix.clone(),
            max_bytes: selection.max_bytes,
        })
    }

    fn folder(selection: &Selection) -> anyhow::Result<Self> {
        let wanted: Vec<String> =
            selection.ext.iter().map(|ext| ext.trim_start_matches('.').to_lowercase()).collect();
        let glob = selection.glob.as_deref().map(Glob::new);
        let takes = |file: &Path, name: &str| {
            if glob.as_ref().is_some_and(|glob| !glob.matches(name)) {
                return false;
            }
            let ext = extension(file).unwrap_or_default();
            if wanted.is_empty() {
                // A pattern says enough; without any, only what looks like text.
                glob.is_some() || TEXTS.contains(&ext.as_str())
            } else {
                wanted.iter().any(|one| one == "*" || *one == ext)
            }
        };
        let mut found = vec![];
        walk(&selection.path, &mut found)?;
        found.sort();
        let all = found.len();
        found.retain(|file| takes(file, &name_of(&selection.path, file)));
        let skipped = all - found.len();
        found.truncate(selection.limit);
        Ok(Self::Folder {
            root: selection.path.clone(),
            files: found.into_iter(),
            prefix: selection.prefix.clone(),
            max_bytes: selection.max_bytes,
            skipped,
        })
    }

    /// How many documents there will be.
    pub fn len(&self) -> usize {
        match self {
            Self::Folder { files, .. } => files.len(),
            Self::Lines { total, .. } => *total,
        }
    }

    /// Files that were left out for their name.
    pub fn skipped(&self) -> usize {
        match self {
            Self::Folder { skipped, .. } => *skipped,
            Self::Lines { .. } => 0,
        }
    }
}

impl Iterator for Source {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        match self {
            Self::Folder { root, files, prefix, max_bytes, .. } => {
                let file = files.next()?;
                let document = format!("{prefix}{}", name_of(root, &file));
                let (payload, size) = match read(&file, *max_bytes) {
                    Ok(bytes) => {
                        let size = bytes.len();
                        (Ok(payload(&document, bytes)), size)
                    }
                    Err(error) => (Err(error), 0),
                };
                Some(Item { document, payload, size })
            }
            Self::Lines { reader, at, total, given, prefix, max_bytes } => {
                while *given < *total {
                    *at += 1;
                    let mut line = vec![];
                    match reader.read_until(b'\n', &mut line) {
                        Ok(0) => return None,
                        Ok(_) if line.trim_ascii().is_empty() => {}
                        Ok(_) => {
                            *given += 1;
                            return Some(from_line(&line, *at, prefix, *max_bytes));
                        }
                        Err(error) => {
                            *given = *total;
                            let document = format!("line {at}");
                            return Some(Item { document, payload: Err(error.into()), size: 0 });
                        }
                    }
                }
                None
            }
        }
    }
}

/// The ingest payload of a file. Bytes that are no UTF-8, and NUL characters, which the ledger can't hold, go as they are
/// in base64: then the job's dead letter says what is wrong with the document.
fn payload(document: &str, bytes: Vec<u8>) -> Value {
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => json!({ "document": document, "text": text }),
        Ok(text) => json!({ "document": document, "text_base64": STANDARD.encode(text) }),
        Err(error) => json!({ "document": document, "text_base64": STANDARD.encode(error.into_bytes()) }),
    }
}

fn from_line(line: &[u8], at: usize, prefix: &str, max_bytes: u64) -> Item {
    let size = line.len();
    let unnamed = format!("line {at}");
    if size as u64 > max_bytes {
        let payload = Err(anyhow::anyhow!("the line has {size} bytes; at most {max_bytes} are allowed"));
        return Item { document: unnamed, payload, size: 0 };
    }
    let parsed = serde_json::from_slice::<Value>(line).context("not JSON").and_then(|mut value| {
        let Some(name) = value.get("document").and_then(Value::as_str).map(|name| format!("{prefix}{name}"))
        else {
            bail!("not an ingest payload: it is no JSON object with a string `document`");
        };
        value["document"] = Value::String(name);
        Ok(value)
    });
    let document = match &parsed {
        Ok(value) => value["document"].as_str().unwrap_or_default().to_owned(),
        Err(_) => unnamed,
    };
    Item { document, payload: parsed, size }
}

fn read(file: &Path, max_bytes: u64) -> anyhow::Result<Vec<u8>> {
    let size = std::fs::metadata(file)?.len();
    if size > max_bytes {
        bail!("the file has {size} bytes; at most {max_bytes} are allowed (FLOTILLA_MAX_PAYLOAD): split it");
    }
    Ok(std::fs::read(file)?)
}

/// All regular files below a folder. Hidden ones are left out, and symbolic links are not followed: they could lead out of
/// the folder, or in a circle.
fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("can't read the folder {}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("can't read the folder {}", folder.display()))?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let kind = entry.file_type()?;
        if kind.is_dir() {
            walk(&entry.path(), found)?;
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    Ok(())
}

/// A document's name: the path within the folder, with `/` on every system.
fn name_of(root: &Path, file: &Path) -> String {
    let within = file.strip_prefix(root).unwrap_or(file);
    within.components().map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
}

fn extension(path: &Path) -> Option<String> {
    Some(path.extension()?.to_str()?.to_lowercase())
}

fn count_lines(mut reader: impl BufRead) -> anyhow::Result<usize> {
    let (mut count, mut line) = (0, vec![]);
    while reader.read_until(b'\n', &mut line)? > 0 {
        count += usize::from(!line.trim_ascii().is_empty());
        line.clear();
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn select(path: &Path) -> Selection {
        Selection {
            path: path.to_owned(),
            ext: vec![],
            glob: None,
            prefix: String::new(),
            limit: usize::MAX,
            max_bytes: 1000,
        }
    }

    fn names(selection: &Selection) -> Vec<String> {
        Source::open(selection).unwrap().map(|item| item.document).collect()
    }

    #[test]
    fn a_folder_gives_its_texts_by_path_and_says_what_it_left_out() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("b/.git")).unwrap();
        for (name, bytes) in [
            ("a.md", &b"one"[..]),
            ("b/c.txt", b"two"),
            ("b/.git/config.txt", b"hidden"),
            ("b/x.png", b"\x89PNG"),
            ("latin1.txt", b"M\xfcller"),
            ("nul.txt", b"a\0b"),
        ] {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let mut selection = select(dir.path());
        assert_eq!(names(&selection), ["a.md", "b/c.txt", "latin1.txt", "nul.txt"]);
        assert_eq!(Source::open(&selection).unwrap().skipped(), 1);
        let payloads: Vec<Value> =
            Source::open(&selection).unwrap().map(|item| item.payload.unwrap()).collect();
        assert_eq!(payloads[0], json!({"document": "a.md", "text": "one"}));
        assert_eq!(payloads[2], json!({"document": "latin1.txt", "text_base64": "TfxsbGVy"}));
        assert_eq!(payloads[3], json!({"document": "nul.txt", "text_base64": "YQBi"}));

        selection.prefix = "docs/".to_owned();
        selection.glob = Some("b/**".to_owned());
        assert_eq!(names(&selection), ["docs/b/c.txt", "docs/b/x.png"]);
        selection.ext = vec![".TXT".to_owned()];
        assert_eq!(names(&selection), ["docs/b/c.txt"]);
        selection.glob = None;
        selection.limit = 2;
        assert_eq!(names(&selection), ["docs/b/c.txt", "docs/latin1.txt"]);
    }

    #[test]
    fn a_file_that_is_too_large_is_named_and_not_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("big.txt"), vec![b'x'; 1001]).unwrap();
        let item = Source::open(&select(dir.path())).unwrap().next().unwrap();
        assert_eq!(item.document, "big.txt");
        assert!(item.payload.unwrap_err().to_string().contains("1001 bytes; at most 1000"));
    }

    #[test]
    fn lines_are_payloads_and_bad_ones_are_named_by_their_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in.jsonl");
        std::fs::write(
            &path,
            "{\"document\":\"a\",\"text\":\"x\"}\n\n{oops\n[1]\n{\"document\":\"b\",\"chunks\":[]}",
        )
        .unwrap();
        let selection = Selection { prefix: "p/".to_owned(), ..select(&path) };
        let source = Source::open(&selection).unwrap();
        assert_eq!(source.len(), 4);
        let items: Vec<Item> = source.collect();
        assert_eq!(
            items.iter().map(|item| item.document.as_str()).collect::<Vec<_>>(),
            ["p/a", "line 3", "line 4", "p/b"]
        );
        assert!(items[1].payload.as_ref().unwrap_err().to_string().contains("not JSON"));
        assert!(items[2].payload.as_ref().unwrap_err().to_string().contains("not an ingest payload"));
        let error = Source::open(&select(&dir.path().join("absent"))).unwrap_err();
        assert!(error.to_string().contains("can't read"), "{error}");
    }
}
