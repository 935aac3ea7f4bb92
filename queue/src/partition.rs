//! Which partition a job lives in, and how a partition's key is written.

use crate::{
    config::QueueConfig,
    ids::{JobId, QueueName},
};

/// The partition of a job: FNV-1a (64 bit) over its id, so that every process agrees and ids of any origin spread.
pub(crate) fn partition_of(id: JobId, partitions: u16) -> u16 {
    if partitions <= 1 {
        return 0;
    }
    let hash = id.0.as_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    // FNV's low bits are weak for few partitions; fold the high half in.
    ((hash ^ (hash >> 32)) % u64::from(partitions)) as u16
}

/// The partition's own key, which is also the hash tag of all its keys.
pub(crate) fn partition_key(config: &QueueConfig, queue: &QueueName, partition: u16) -> String {
    format!("{{{}:{queue}:{partition}}}", config.prefix)
}

/// The channel on which a partition tells that it is not empty any more.
pub(crate) fn wake_channel(config: &QueueConfig, queue: &QueueName, partition: u16) -> String {
    format!("{}:wake", partition_key(config, queue, partition))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_share_the_jobs_evenly() {
        let mut counts = [0_u32; 4];
        for _ in 0..4000 {
            counts[usize::from(partition_of(JobId::new(), 4))] += 1;
        }
        assert!(counts.iter().all(|count| (800..1200).contains(count)), "{counts:?}");
    }
}
