//! The Lua scripts, each with what it shares with the others put in.

use std::sync::LazyLock;

/// The lines of a script that stand for other files. A file's own such lines come after it.
const INCLUDES: [(&str, &str); 3] = [
    ("--@ partition.lua\n", include_str!("../lua/partition.lua")),
    ("--@ policies.lua\n", include_str!("../lua/policies.lua")),
    ("--@ clock.lua\n", include_str!("../lua/clock.lua")),
];

/// A script's text and the hash under which Redis keeps it.
#[derive(Debug)]
pub(crate) struct Script {
    /// What to send when Redis doesn't know the hash.
    pub source: String,
    /// What to send otherwise.
    pub sha: String,
}

impl Script {
    fn new(text: &str) -> Self {
        let source = INCLUDES.iter().fold(text.to_owned(), |text, (line, file)| text.replace(line, file));
        let sha = redis::Script::new(&source).get_hash().to_owned();
        Self { source, sha }
    }
}

macro_rules! scripts {
    ($($name:ident = $file:literal;)*) => {
        $(pub(crate) static $name: LazyLock<Script> =
            LazyLock::new(|| Script::new(include_str!(concat!("../lua/", $file))));)*

        #[cfg(test)]
        const FILES: &[(&str, &str)] = &[$(($file, include_str!(concat!("../lua/", $file)))),*];
    };
}

scripts! {
    PUSH = "push.lua";
    CLAIM = "claim.lua";
    ACK = "ack.lua";
    RELEASE = "release.lua";
    ALONE = "alone.lua";
    HEARTBEAT = "heartbeat.lua";
    RESTORE = "restore.lua";
    REAP = "reap.lua";
    PROMOTE = "promote.lua";
    FORGET = "forget.lua";
    REPRIORITISE = "reprioritise.lua";
    STATS = "stats.lua";
    POLICY = "policy.lua";
    GRANT = "grant.lua";
    LEND = "lend.lua";
    LEAD = "lead.lua";
    LIST = "list.lua";
    REGISTER = "register.lua";
    TALLY = "tally.lua";
    BREAKER = "breaker.lua";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_21_every_script_is_bound_to_one_slot_and_says_what_it_takes() {
        for (file, text) in FILES {
            assert!(text.starts_with("#!lua"), "{file} must start with #!lua");
            for part in ["KEYS[1]", "ARGV", "Returns", "Complexity"] {
                assert!(text.contains(part), "{file} must say {part}");
            }
        }
    }

    #[test]
    fn rule_22_a_full_redis_can_be_drained_but_not_filled() {
        for (file, text) in FILES {
            let first = text.lines().next().unwrap_or_default();
            let grows = matches!(*file, "push.lua" | "reprioritise.lua");
            assert_eq!(first.contains("allow-oom"), !grows, "{file}: {first}");
        }
    }

    #[test]
    fn rule_23_no_script_searches_a_list_or_the_key_space() {
        for (file, text) in FILES.iter().chain(&INCLUDES) {
            for banned in ["LREM", "LPOS", "'KEYS'", "SCAN", "SMEMBERS", "HGETALL"] {
                assert!(!text.contains(banned), "{file} uses {banned}");
            }
        }
    }
}
