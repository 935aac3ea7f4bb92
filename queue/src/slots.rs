//! Which slot of a Redis Cluster a key belongs to.

/// How many slots every cluster has.
pub(crate) const SLOTS: usize = 16384;

/// The slot of a key: CRC16 (XMODEM) of its hash tag, or of the whole key if it has none; as Redis Cluster's
/// specification says.
pub(crate) fn slot_of(key: &[u8]) -> u16 {
    crc16(tag(key)) % SLOTS as u16
}

/// What stands between the first `{` and the next `}`, unless that is nothing.
fn tag(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|byte| *byte == b'{') else { return key };
    let rest = &key[open + 1..];
    match rest.iter().position(|byte| *byte == b'}') {
        Some(end) if end > 0 => &rest[..end],
        _ => key,
    }
}

/// CRC-16/XMODEM: polynomial 0x1021, begins with 0, nothing reflected.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc, _| {
            if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        // The check value in Redis Cluster's specification, and slots that redis-server 7.0 answered to CLUSTER KEYSLOT.
        assert_eq!(crc16(b"123456789"), 0x31c3);
        assert_eq!(slot_of(b"foo"), 12182);
        assert_eq!(slot_of(b"{foo}:j:1"), slot_of(b"foo"));
        assert_eq!(tag(b"a{}b{foo}"), b"a{}b{foo}", "an empty tag is none");
        assert_eq!(tag(b"a{b"), b"a{b");
        assert_eq!(tag(b"{flotilla:ingest:0}:j:x"), b"flotilla:ingest:0");
    }
}
