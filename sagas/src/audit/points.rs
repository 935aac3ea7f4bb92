//! Every point of this ledger in every collection: does it belong to a version? What others keep there is none of the
//! auditor's business: a job may name any collection, and fleets may share one.

use std::collections::BTreeSet;

use uuid::Uuid;

use super::{AuditError, Finding, FindingKind as Kind, Run, Suspect, confirmed, keys, repair::Mend};
use crate::stores::{
    point_id,
    postgres::audit::VersionState,
    vectors::{ScrollPage, StoredPoint},
};

/// Collections that are Flotilla's by their names.
const PREFIX: &str = "flotilla-";

impl Run<'_> {
    pub(super) async fn points(&mut self) -> Result<(), AuditError> {
        let ledger = self.stores.ledger().await?;
        for collection in self.collections().await? {
            let mut offset = None;
            loop {
                let ScrollPage { points, next } =
                    self.stores.vectors.scroll(&collection, offset, self.settings.page).await?;
                self.counts.points += points.len() as u64;
                self.paced(points.len()).await;
                let mut suspects = vec![];
                let (first, unseen) = self.check_points(ledger, &collection, &points).await?;
                self.pending.unseen_points += unseen;
                if !first.is_empty() {
                    self.pause().await;
                    let again = self.stores.vectors.points_by_id(&collection, &keys(&first), false).await?;
                    let (second, _) = self.check_points(ledger, &collection, &again).await?;
                    suspects.extend(confirmed(&first, second));
                }
                self.settle(suspects).await?;
                offset = next;
                if offset.is_none() {
                    break;
                }
            }
        }
        Ok(())
    }

    async fn collections(&self) -> Result<BTreeSet<String>, AuditError> {
        let there = self.stores.vectors.collections().await?;
        let mut ours: BTreeSet<String> =
            self.stores.postgres.audit_collections().await?.into_iter().collect();
        ours.extend(self.settings.collections.iter().cloned());
        ours.extend(self.stores.embedders.keys().map(|model| self.stores.collection(model)));
        ours.extend(there.iter().filter(|name| name.starts_with(PREFIX)).cloned());
        ours.retain(|name| there.contains(name));
        Ok(ours)
    }

    /// What belongs to no version, and how many points belong to versions that readers can't see.
    async fn check_points(
        &self,
        ledger: Uuid,
        collection: &str,
        points: &[StoredPoint],
    ) -> Result<(Vec<Suspect>, u64), AuditError> {
        let mut ids: Vec<Uuid> = points.iter().filter_map(|point| point.version).collect();
        ids.sort_unstable();
        ids.dedup();
        let versions = self.stores.postgres.audit_versions(&ids).await?;
        let (mut suspects, mut unseen) = (vec![], 0);
        for point in points.iter().filter(|point| !self.findings.names_point(point.id)) {
            let version = point.version.and_then(|id| versions.get(&id));
            let Some(why) = why_extra(collection, point, version) else {
                unseen += u64::from(version.is_some_and(|version| version.state != "published"));
                continue;
            };
            if point.ledger != Some(ledger) {
                continue;
            }
            let finding = Finding {
                tenant: point.tenant.clone(),
                document: version.map(|version| version.document.clone()),
                version: point.version,
                ..Finding::new(Kind::PointExtra, point.id, format!("{why}, collection {collection}"))
            };
            let mend = Mend::RemovePoint(collection.to_owned(), point.id);
            suspects.push(Suspect::new(point.id, finding, mend));
        }
        Ok((suspects, unseen))
    }
}

/// Why a point belongs to no chunk of a version; `None`: it does. That of a published version has been compared in full by
/// the pass over the documents; that of a staged one is its saga's; that of any other the janitor will remove.
fn why_extra(collection: &str, point: &StoredPoint, version: Option<&VersionState>) -> Option<String> {
    let Some(id) = point.version else { return Some("the payload names no version".to_owned()) };
    let Some(version) = version else { return Some(format!("version {id} is not there")) };
    if version.collection != collection {
        return Some(format!("version {id} has its points in collection {}", version.collection));
    }
    match point.chunk {
        Some(no) if point_id(id, no) != point.id => {
            Some(format!("the id is not that of chunk {no} of version {id}"))
        }
        Some(no) if !(0..version.chunk_count).contains(&no) => {
            Some(format!("version {id} has {} chunks and this is chunk {no}", version.chunk_count))
        }
        Some(_) => None,
        None => Some("the payload names no chunk".to_owned()),
    }
}
