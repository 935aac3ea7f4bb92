//! Documents, their versions, chunks and texts, and the points of what readers see.

use std::collections::HashMap;

use uuid::Uuid;

use super::{AuditError, Finding, FindingKind as Kind, Run, Suspect, confirmed, keys, repair::Mend};
use crate::stores::{
    point_id,
    postgres::audit::{DocumentRow, VersionRow},
    vectors::{StoredPoint, vectors_hash},
};

/// Points with vectors that are held at once, unless one version alone has more.
const POINTS_AT_ONCE: usize = 1024;
/// Chunk numbers that a finding names.
const NAMED: usize = 10;

impl Run<'_> {
    pub(super) async fn documents(&mut self) -> Result<(), AuditError> {
        let mut after = Uuid::nil();
        loop {
            let ids = self.stores.postgres.audit_document_ids(after, self.page()).await?;
            let Some(last) = ids.last() else { return Ok(()) };
            after = *last;
            self.paced(ids.len()).await;
            let first = self.check_documents(&ids, true).await?;
            if first.is_empty() {
                continue;
            }
            self.pause().await;
            let second = self.check_documents(&keys(&first), false).await?;
            self.settle(confirmed(&first, second)).await?;
        }
    }

    async fn check_documents(&mut self, ids: &[Uuid], count: bool) -> Result<Vec<Suspect>, AuditError> {
        let (documents, versions) = self.stores.postgres.audit_documents(ids).await?;
        if count {
            self.counts.documents += documents.len() as u64;
            self.counts.versions += versions.len() as u64;
            self.counts.chunks += versions.iter().map(|v| v.chunk_rows.unsigned_abs()).sum::<u64>();
        }
        let mut of_document: HashMap<Uuid, Vec<&VersionRow>> = HashMap::new();
        for version in &versions {
            of_document.entry(version.document_id).or_default().push(version);
        }
        let mut suspects = vec![];
        let mut published = vec![];
        for document in &documents {
            let versions = of_document.remove(&document.id).unwrap_or_default();
            check_document(document, &versions, &mut suspects);
            for version in versions {
                let overdue = self.stores.settings.sweep_bound.as_secs_f64();
                check_version(document, version, overdue, &mut suspects);
                self.check_long_text(document, version, &mut suspects).await?;
                if version.state == "published" {
                    published.push((document, version));
                }
            }
        }
        self.check_published_points(&published, &mut suspects).await?;
        Ok(suspects)
    }

    /// Looks for the chunks in a text that is too long to be searched in the server.
    async fn check_long_text(
        &self,
        document: &DocumentRow,
        version: &VersionRow,
        suspects: &mut Vec<Suspect>,
    ) -> Result<(), AuditError> {
        if !version.has_body || version.chunks_strange.is_some() {
            return Ok(());
        }
        let postgres = &self.stores.postgres;
        let (Some(body), chunks) = (postgres.body(version.id).await?, postgres.chunks(version.id).await?)
        else {
            return Ok(());
        };
        let strange = chunks.iter().filter(|chunk| !body.contains(chunk.as_str())).count();
        if strange > 0 {
            suspects.push(strange_chunks(document, version, strange as i64));
        }
        Ok(())
    }

    async fn check_published_points(
        &mut self,
        published: &[(&DocumentRow, &VersionRow)],
        suspects: &mut Vec<Suspect>,
    ) -> Result<(), AuditError> {
        let mut by_collection: HashMap<&str, Vec<(&DocumentRow, &VersionRow)>> = HashMap::new();
        for (document, version) in published {
            by_collection.entry(&version.collection).or_default().push((document, version));
        }
        for (collection, versions) in by_collection {
            let mut rest = versions.as_slice();
            while !rest.is_empty() {
                let mut points = 0;
                let fit = rest.iter().take_while(|(_, v)| {
                    points += v.chunk_count as usize;
                    points <= POINTS_AT_ONCE
                });
                let (batch, left) = rest.split_at(fit.count().max(1));
                rest = left;
                let ids: Vec<Uuid> = batch.iter().flat_map(|(_, version)| point_ids(version)).collect();
                self.paced(ids.len()).await;
                let stored = self.stores.vectors.points_by_id(collection, &ids, true).await?;
                let stored: HashMap<Uuid, StoredPoint> =
                    stored.into_iter().map(|point| (point.id, point)).collect();
                for (document, version) in batch {
                    check_points(document, version, &stored, suspects);
                }
            }
        }
        Ok(())
    }
}

pub(super) fn point_ids(version: &VersionRow) -> impl Iterator<Item = Uuid> {
    let id = version.id;
    (0..version.chunk_count).map(move |no| point_id(id, no))
}

fn about(document: &DocumentRow, version: Option<&VersionRow>, kind: Kind, detail: String) -> Finding {
    let subject = version.map_or(document.id, |version| version.id);
    Finding {
        tenant: Some(document.tenant.clone()),
        document: Some(document.key.clone()),
        version: version.map(|version| version.id),
        ..Finding::new(kind, subject, detail)
    }
}

fn check_document(document: &DocumentRow, versions: &[&VersionRow], suspects: &mut Vec<Suspect>) {
    let mut found = |version, kind, detail: String| {
        suspects.push(Suspect::new(document.id, about(document, version, kind, detail), Mend::None));
    };
    let shown = document.current_version;
    if document.current_order > document.last_order {
        let detail = format!(
            "the document stands at order {} and the last one given out is {}",
            document.current_order, document.last_order
        );
        found(None, Kind::OrderDisagrees, detail);
    }
    if let (Some(shown), Some(deleted)) = (shown, document.deleted_order)
        && deleted >= document.current_order
    {
        let detail = format!(
            "the document was deleted at order {deleted}, stands at {} and shows version {shown}",
            document.current_order
        );
        found(None, Kind::TombstoneWithVersion, detail);
    }
    if let Some(shown) = shown {
        match versions.iter().find(|version| version.id == shown) {
            None => {
                let detail = format!("the document shows version {shown}, which is another document's");
                found(None, Kind::CurrentNotPublished, detail);
            }
            Some(version) if version.state != "published" => {
                let detail = format!("the document shows a version that is {}", version.state);
                found(Some(version), Kind::CurrentNotPublished, detail);
            }
            Some(version) if version.doc_order != document.current_order => {
                let detail = format!(
                    "the document stands at order {} and shows a version of order {}",
                    document.current_order, version.doc_order
                );
                found(Some(version), Kind::OrderDisagrees, detail);
            }
            Some(_) => {}
        }
    }
    for version in versions {
        if version.state == "published" && shown != Some(version.id) {
            let detail = format!(
                "the version is published and its document shows {}",
                shown.map_or_else(|| "none".to_owned(), |shown| format!("version {shown}"))
            );
            found(Some(version), Kind::PublishedNotCurrent, detail);
        }
        if version.doc_order > document.last_order && shown != Some(version.id) {
            let detail = format!(
                "the version has order {} and the last one given out is {}",
                version.doc_order, document.last_order
            );
            found(Some(version), Kind::OrderDisagrees, detail);
        }
        if version.tenant != document.tenant {
            let detail = format!(
                "the version is of tenant {} and its document of {}",
                version.tenant, document.tenant
            );
            found(Some(version), Kind::RowWrongTenant, detail);
        }
    }
}

fn check_version(document: &DocumentRow, version: &VersionRow, overdue_s: f64, suspects: &mut Vec<Suspect>) {
    let published = version.state == "published";
    let mut found = |kind, detail: String, mend| {
        suspects.push(Suspect::new(document.id, about(document, Some(version), kind, detail), mend));
    };
    if !version.body_ok {
        let mend = if published { Mend::Body(version.id) } else { Mend::None };
        found(Kind::BodyChanged, "the text does not have the hash recorded with it".to_owned(), mend);
    }
    let expected = if version.has_body { i64::from(version.chunk_count) } else { 0 };
    let within = version.chunk_rows - version.chunks_beyond;
    if within < expected {
        let mend = if published { Mend::Chunks(version.clone()) } else { Mend::None };
        found(Kind::ChunkMissing, format!("{within} of {expected} chunk rows are there"), mend);
    }
    if version.chunks_beyond > 0 || (expected == 0 && version.chunk_rows > 0) {
        let detail = format!(
            "the version is {} with {expected} chunks expected and has {} chunk rows",
            version.state, version.chunk_rows
        );
        found(Kind::ChunkExtra, detail, Mend::ExtraChunks(version.id));
    }
    let open = matches!(version.saga_state.as_deref(), Some("running" | "compensating" | "parked"));
    if version.state == "staged" && !open {
        let detail = format!(
            "the version is staged and its saga is {}",
            version.saga_state.as_deref().unwrap_or("not in the log")
        );
        found(Kind::StagedOrphan, detail, Mend::Orphan(version.id));
    }
    if let Some(due) = version.sweep_due_s
        && due > overdue_s
    {
        let detail = format!(
            "the version is {} and its sweep {} has been due for {due:.0} s",
            version.state,
            version.sweeps + 1
        );
        found(Kind::JanitorOverdue, detail, Mend::None);
    }
    // A text that is wrong itself says nothing about its chunks; rows beyond the count are named above.
    if let Some(strange) = version.chunks_strange
        && strange > 0
        && version.body_ok
        && version.chunks_beyond == 0
    {
        suspects.push(strange_chunks(document, version, strange));
    }
}

fn strange_chunks(document: &DocumentRow, version: &VersionRow, strange: i64) -> Suspect {
    let detail = format!("{strange} of {} chunks are not part of the version's text", version.chunk_rows);
    let mend = if version.state == "published" { Mend::Chunks(version.clone()) } else { Mend::None };
    Suspect::new(document.id, about(document, Some(version), Kind::ChunkChanged, detail), mend)
}

fn check_points(
    document: &DocumentRow,
    version: &VersionRow,
    stored: &HashMap<Uuid, StoredPoint>,
    suspects: &mut Vec<Suspect>,
) {
    let mut found = |kind, what: &str, numbers: &[i32]| {
        let named: Vec<String> = numbers.iter().take(NAMED).map(ToString::to_string).collect();
        let more = if numbers.len() > NAMED { ", …" } else { "" };
        let detail = format!(
            "{} of {} points {what}: chunk {}{more}, collection {}",
            numbers.len(),
            version.chunk_count,
            named.join(", "),
            version.collection
        );
        let mut suspect = Suspect::new(
            document.id,
            about(document, Some(version), kind, detail),
            Mend::Points(version.clone()),
        );
        suspect.points = numbers.iter().map(|no| point_id(version.id, *no)).collect();
        suspects.push(suspect);
    };
    let (mut missing, mut tenants, mut documents, mut chunks) = (vec![], vec![], vec![], vec![]);
    let mut vectors: Vec<&[f32]> = Vec::with_capacity(version.chunk_count as usize);
    for no in 0..version.chunk_count {
        let Some(point) = stored.get(&point_id(version.id, no)) else {
            missing.push(no);
            continue;
        };
        if point.tenant.as_deref() != Some(version.tenant.as_str()) {
            tenants.push(no);
        }
        if point.document != Some(version.document_id) {
            documents.push(no);
        }
        if (point.version, point.chunk) != (Some(version.id), Some(no)) {
            chunks.push(no);
        }
        vectors.push(point.vector.as_deref().unwrap_or_default());
    }
    for (kind, what, numbers) in [
        (Kind::PointMissing, "are not there", &missing),
        (Kind::PointWrongTenant, "name another tenant", &tenants),
        (Kind::PointWrongDocument, "name another document", &documents),
        (Kind::PointWrongChunk, "name another version or chunk", &chunks),
    ] {
        if !numbers.is_empty() {
            found(kind, what, numbers);
        }
    }
    // The hash is over all vectors together: it can only be compared when all are there, and does not say which differs.
    if missing.is_empty() && Some(vectors_hash(vectors.into_iter())) != version.vectors_hash {
        let detail = format!(
            "the {} stored vectors do not have the hash recorded at publish, collection {}",
            version.chunk_count, version.collection
        );
        let finding = about(document, Some(version), Kind::VectorChanged, detail);
        suspects.push(Suspect::new(document.id, finding, Mend::Points(version.clone())));
    }
}
