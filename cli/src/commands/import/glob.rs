//! Patterns for paths: `*` stands for anything but `/`, `**` for anything, `?` for one character but `/`.

/// A pattern. One without a `/` is matched against file names in every folder.
pub struct Glob {
    pattern: Vec<char>,
    names_only: bool,
}

impl Glob {
    pub fn new(pattern: &str) -> Self {
        Self { pattern: pattern.chars().collect(), names_only: !pattern.contains('/') }
    }

    pub fn matches(&self, path: &str) -> bool {
        let subject = if self.names_only { path.rsplit('/').next().unwrap_or(path) } else { path };
        let subject: Vec<char> = subject.chars().collect();
        matches(&self.pattern, &subject)
    }
}

/// Row by row over the pattern, so that many stars take time in proportion to both lengths and no more.
fn matches(pattern: &[char], subject: &[char]) -> bool {
    // reached[i]: what was read of the pattern matches the first i characters.
    let mut reached = vec![false; subject.len() + 1];
    reached[0] = true;
    let mut at = 0;
    while at < pattern.len() {
        let deep = pattern[at..].starts_with(&['*', '*']);
        let mut next = vec![false; subject.len() + 1];
        if deep || pattern[at] == '*' {
            let mut open = false;
            for i in 0..=subject.len() {
                if !deep && i > 0 && subject[i - 1] == '/' {
                    open = false;
                }
                open |= reached[i];
                next[i] = open;
            }
            at += if deep { 2 } else { 1 };
            // `**/` also stands for no folder at all.
            if deep && pattern.get(at) == Some(&'/') {
                let mut with_slash = reached.clone();
                for i in 0..subject.len() {
                    with_slash[i + 1] |= next[i] && subject[i] == '/';
                }
                next = with_slash;
                at += 1;
            }
        } else {
            for i in 0..subject.len() {
                let same = if pattern[at] == '?' { subject[i] != '/' } else { subject[i] == pattern[at] };
                next[i + 1] = reached[i] && same;
            }
            at += 1;
        }
        reached = next;
    }
    reached[subject.len()]
}

#[cfg(test)]
mod tests {
    use super::Glob;

    #[test]
    fn stars_stay_within_a_folder_and_double_stars_do_not() {
        for (pattern, path, expected) in [
            ("*.md", "a.md", true),
            ("*.md", "deep/er/a.md", true),
            ("*.md", "a.mdx", false),
            ("docs/*.md", "docs/a.md", true),
            ("docs/*.md", "docs/b/a.md", false),
            ("docs/**", "docs/b/a.md", true),
            ("docs/**/*.md", "docs/a.md", true),
            ("docs/**/*.md", "docs/b/c/a.md", true),
            ("**/guide/*", "a/guide/x", true),
            ("**/guide/*", "guide/x", true),
            ("a?/b", "ax/b", true),
            ("a?b/c", "a/b/c", false),
            ("/é*", "/état", true),
        ] {
            assert_eq!(Glob::new(pattern).matches(path), expected, "{pattern} on {path}");
        }
        // Many stars don't take for ever.
        assert!(!Glob::new("*a*a*a*a*a*a*a*a*a*a*a*a*b").matches(&"a".repeat(5000)));
    }
}
