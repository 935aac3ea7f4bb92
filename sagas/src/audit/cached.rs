//! Every cache entry: does it say what its version says? An absent entry is never a disagreement (PROTOCOL.md 11).

use futures::{StreamExt, TryStreamExt, stream};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{AuditError, Finding, FindingKind as Kind, Run, Suspect, confirmed, keys, repair::Mend};
use crate::{error::StoreError, stores::postgres::audit::VersionState};

/// Entries read at once: each may hold a whole text.
const READS_AT_ONCE: usize = 16;

/// What is kept of an entry once its text is hashed.
struct Seen {
    version: Uuid,
    tenant: String,
    recorded: String,
    actual: String,
}

impl Run<'_> {
    pub(super) async fn cached(&mut self) -> Result<(), AuditError> {
        let mut cursor = 0;
        loop {
            let (names, next) = self.stores.cache.scan(cursor).await?;
            let (mut versions, mut suspects) = (vec![], vec![]);
            for name in names {
                match name {
                    Ok(version) => versions.push(version),
                    Err(key) => {
                        let finding = Finding::new(
                            Kind::CacheExtra,
                            &key,
                            "the key names no version; remove it by hand",
                        );
                        suspects.push(Suspect::new(Uuid::nil(), finding, Mend::None));
                    }
                }
            }
            versions.sort_unstable();
            versions.dedup();
            for page in versions.chunks(self.settings.page as usize) {
                self.paced(page.len()).await;
                let (first, unseen) = self.check_entries(page, true).await?;
                self.pending.unseen_cache_entries += unseen;
                if !first.is_empty() {
                    self.pause().await;
                    let (second, _) = self.check_entries(&keys(&first), false).await?;
                    suspects.extend(confirmed(&first, second));
                }
            }
            self.settle(suspects).await?;
            cursor = next;
            if cursor == 0 {
                return Ok(());
            }
        }
    }

    /// What is wrong with these versions' entries, and how many are of versions that readers can't see.
    async fn check_entries(&mut self, ids: &[Uuid], count: bool) -> Result<(Vec<Suspect>, u64), AuditError> {
        let cache = &self.stores.cache;
        // Entries before versions: one whose version is swept in between is gone at the second look.
        let entries: Vec<Option<Seen>> = stream::iter(ids.to_vec())
            .map(|id| async move {
                let entry = cache.peek(id).await?;
                Ok::<_, StoreError>(entry.map(|entry| Seen {
                    version: id,
                    actual: format!("{:x}", Sha256::digest(entry.body.as_bytes())),
                    recorded: entry.content_hash,
                    tenant: entry.tenant,
                }))
            })
            .buffered(READS_AT_ONCE)
            .try_collect()
            .await?;
        let versions = self.stores.postgres.audit_versions(ids).await?;
        let (mut suspects, mut unseen) = (vec![], 0);
        for entry in entries.into_iter().flatten() {
            self.counts.cache_entries += u64::from(count);
            let version = versions.get(&entry.version);
            unseen += u64::from(version.is_some_and(|version| version.state != "published"));
            let Some((kind, detail)) = what_is_wrong(&entry, version) else { continue };
            let finding = Finding {
                tenant: version.map(|version| version.tenant.clone()),
                document: version.map(|version| version.document.clone()),
                version: Some(entry.version),
                ..Finding::new(kind, entry.version, detail)
            };
            suspects.push(Suspect::new(entry.version, finding, Mend::RemoveEntry(entry.version)));
        }
        Ok((suspects, unseen))
    }
}

fn what_is_wrong(entry: &Seen, version: Option<&VersionState>) -> Option<(Kind, String)> {
    let Some(version) = version else {
        return Some((Kind::CacheExtra, "there is no such version".to_owned()));
    };
    if entry.recorded != version.content_hash {
        let detail =
            format!("the entry says hash {:?} and its version {}", entry.recorded, version.content_hash);
        return Some((Kind::CacheStale, detail));
    }
    if entry.actual != version.content_hash {
        let detail =
            format!("the entry's text has hash {} and its version {}", entry.actual, version.content_hash);
        return Some((Kind::CacheStale, detail));
    }
    if entry.tenant != version.tenant {
        let detail =
            format!("the entry is of tenant {:?} and its version of {:?}", entry.tenant, version.tenant);
        return Some((Kind::CacheWrongTenant, detail));
    }
    None
}
