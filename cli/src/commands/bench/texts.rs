//! Made-up texts: the same ones every time.

const WORDS: [&str; 64] = [
    "worker",
    "queue",
    "lease",
    "ledger",
    "saga",
    "vector",
    "cache",
    "document",
    "version",
    "tenant",
    "priority",
    "chunk",
    "commit",
    "retry",
    "backoff",
    "timeout",
    "fence",
    "token",
    "stream",
    "batch",
    "index",
    "search",
    "cluster",
    "replica",
    "shard",
    "schema",
    "metric",
    "trace",
    "span",
    "alert",
    "deploy",
    "rollback",
    "request",
    "response",
    "header",
    "payload",
    "socket",
    "buffer",
    "thread",
    "future",
    "channel",
    "signal",
    "process",
    "kernel",
    "memory",
    "storage",
    "network",
    "latency",
    "throughput",
    "window",
    "schedule",
    "policy",
    "account",
    "invoice",
    "customer",
    "order",
    "report",
    "summary",
    "river",
    "mountain",
    "harbour",
    "garden",
    "winter",
    "morning",
];

/// Text number `number` with so many words, in sentences.
pub fn text(number: u64, words: usize) -> String {
    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = String::with_capacity(words * 8);
    for i in 0..words {
        // xorshift64: good enough to pick words, and needs no crate.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.push_str(WORDS[(state >> 32) as usize % WORDS.len()]);
        out.push_str(if i % 12 == 11 { ". " } else { " " });
    }
    out
}
