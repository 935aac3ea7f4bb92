//! What an audit can mend. Each repair is checked against the hash that was recorded when the content was published, so
//! that none makes a store agree with something wrong; each is written to the audit log.

use std::collections::{BTreeMap, HashSet};

use queue::{JobId, Queue, QueueName};
use serde_json::json;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{AuditError, Finding, Suspect, documents::point_ids, embed};
use crate::{
    chunking,
    error::StepError,
    kinds::Stores,
    stores::{
        point_id,
        postgres::audit::VersionRow,
        vectors::{Point, StoredPoint, vectors_hash},
    },
};

/// How a disagreement can be mended.
#[derive(Debug, Clone)]
pub(super) enum Mend {
    /// Not by the auditor.
    None,
    /// Take the version's text from the cache, if the cache has the right one.
    Body(Uuid),
    /// Split the version's text again, if that gives the chunks that were published.
    Chunks(VersionRow),
    /// Remove chunk rows that nobody can see.
    ExtraChunks(Uuid),
    /// Withdraw the staged version.
    Orphan(Uuid),
    /// Store the points that were published, if they are there or the provider gives them again.
    Points(VersionRow),
    /// Remove a point of a collection.
    RemovePoint(String, Uuid),
    /// Remove a cache entry; the next reader fills it.
    RemoveEntry(Uuid),
    /// Put the job into Redis.
    Push(JobId),
    /// Put jobs with expired leases back.
    Reap(QueueName),
    /// Take a job with an expired lease out of Redis.
    Drop(QueueName, JobId),
    /// Write the dead letter.
    Letter(JobId),
    /// Complete the saga.
    Finishing(Uuid),
}

impl Mend {
    /// Texts come before chunks and chunks before points, because the later ones are made from the earlier ones.
    fn rank(&self) -> u8 {
        match self {
            Self::Body(_) => 0,
            Self::Chunks(_) => 1,
            Self::Points(_) => 2,
            _ => 3,
        }
    }

    /// Repairs with the same name are one.
    fn name(&self) -> String {
        match self {
            Self::Chunks(version) => format!("chunks of {}", version.id),
            Self::Points(version) => format!("points of {}", version.id),
            other => format!("{other:?}"),
        }
    }
}

/// `Err`: what keeps it from being mended.
type Mended = Result<Result<(), String>, AuditError>;

/// Mends what can be mended and notes it in the findings. The audit log has it before it is done, as `audit.repair.KIND`; what
/// then can't be mended gets `audit.not_repaired.KIND`, too.
pub(super) async fn repair(
    stores: &Stores,
    queue: Option<&Queue>,
    actor: &str,
    suspects: &mut [Suspect],
) -> Result<(), AuditError> {
    suspects.sort_by_key(|suspect| suspect.mend.rank());
    let mut done: BTreeMap<String, Result<(), String>> = BTreeMap::new();
    for suspect in suspects {
        if matches!(suspect.mend, Mend::None) {
            continue;
        }
        let name = suspect.mend.name();
        let tried = done.get(&name).cloned();
        let finding = &mut suspect.finding;
        let record = async |what: &str, finding: &Finding| {
            let action = format!("audit.{what}.{}", finding.kind.name());
            stores.postgres.record_action(actor, &action, &finding.subject, &json!(finding)).await
        };
        // First: if the process or the answer is lost in between, the next audit finds nothing more that it could tell of.
        let recorded = !matches!(tried, Some(Err(_)));
        if recorded {
            finding.repaired = true;
            record("repair", finding).await?;
        }
        let outcome = match tried {
            Some(outcome) => outcome,
            None => mend(stores, queue, &suspect.mend).await?,
        };
        done.insert(name, outcome.clone());
        if let Err(why) = outcome {
            finding.repaired = false;
            finding.repairable = false;
            finding.detail = format!("{}; not mended: {why}", finding.detail);
            if recorded {
                record("not_repaired", finding).await?;
            }
        }
    }
    Ok(())
}

async fn mend(stores: &Stores, queue: Option<&Queue>, mend: &Mend) -> Mended {
    let (postgres, vectors, cache) = (&stores.postgres, &stores.vectors, &stores.cache);
    let changed = |done: bool| Ok(if done { Ok(()) } else { Err("it has changed meanwhile".to_owned()) });
    match mend {
        Mend::None => Ok(Err("there is no way to".to_owned())),
        Mend::Body(version) => body(stores, *version).await,
        Mend::Chunks(version) => chunks(stores, version).await,
        Mend::ExtraChunks(version) => changed(postgres.mend_extra_chunks(*version).await?),
        Mend::Orphan(version) => changed(postgres.mend_orphan(*version, stores.settings.sweep_bound).await?),
        Mend::Points(version) => points(stores, version).await,
        Mend::RemovePoint(collection, point) => Ok(Ok(vectors.remove_ids(collection, &[*point]).await?)),
        Mend::RemoveEntry(version) => Ok(Ok(cache.remove(&[*version], "repaired").await?)),
        Mend::Push(job) => push(stores, queue, *job).await,
        Mend::Reap(name) => {
            let Some(queue) = queue else { return Ok(Err("the queue is not part of this audit".to_owned())) };
            queue.reap(name).await?;
            Ok(Ok(()))
        }
        Mend::Drop(name, job) => {
            let Some(queue) = queue else { return Ok(Err("the queue is not part of this audit".to_owned())) };
            queue.reap(name).await?;
            queue.forget(&[(name.clone(), *job)]).await?;
            Ok(Ok(()))
        }
        Mend::Letter(job) => changed(postgres.mend_letter(*job).await?),
        Mend::Finishing(saga) => changed(postgres.mend_finishing(*saga).await?),
    }
}

async fn push(stores: &Stores, queue: Option<&Queue>, job: JobId) -> Mended {
    let Some(queue) = queue else { return Ok(Err("the queue is not part of this audit".to_owned())) };
    // Idempotent: a job that came back meanwhile stays as it is, and one that has ended is dropped at the take.
    let Some(envelope) = stores.postgres.envelope(job).await? else { return Ok(Ok(())) };
    Ok(match queue.push_accepted(&[envelope]).await?.first() {
        Some(queue::Pushed::Full) => Err("the queue's window is full".to_owned()),
        _ => Ok(()),
    })
}

async fn body(stores: &Stores, version: Uuid) -> Mended {
    let Some(entry) = stores.cache.peek(version).await? else {
        return Ok(Err("the cache has no copy of the text: ingest the document again".to_owned()));
    };
    Ok(if stores.postgres.mend_body(version, &entry.body).await? {
        Ok(())
    } else {
        Err("the cache's copy of the text does not have the recorded hash either: ingest the document again"
            .to_owned())
    })
}

async fn chunks(stores: &Stores, version: &VersionRow) -> Mended {
    let Some(body) = stores.postgres.body(version.id).await? else {
        return Ok(Err("the text is not there".to_owned()));
    };
    if Sha256::digest(body.as_bytes())[..] != version.content_hash[..] {
        return Ok(Err("the text itself is wrong".to_owned()));
    }
    let chunks = chunking::split(&body, stores.settings.chunking);
    let vectors = if chunks.len() == version.chunk_count as usize {
        vectors_of(stores, version, &chunks).await?
    } else {
        None
    };
    if !vectors.is_some_and(|vectors| is_published(&vectors, version)) {
        return Ok(Err("splitting the text again does not give the chunks that were published: ingest the document again".to_owned()));
    }
    Ok(if stores.postgres.mend_chunks(version.id, &chunks).await? {
        Ok(())
    } else {
        Err("it has changed meanwhile".to_owned())
    })
}

/// Stores the vectors that were published: those that stand, as far as their hash is right, else those that the provider
/// gives again. A hash is never changed.
async fn points(stores: &Stores, version: &VersionRow) -> Mended {
    let ids: Vec<Uuid> = point_ids(version).collect();
    let mut stored: Vec<Option<StoredPoint>> = vec![None; ids.len()];
    for point in stores.vectors.points_by_id(&version.collection, &ids, true).await? {
        if let Some(no) = ids.iter().position(|id| *id == point.id) {
            stored[no] = Some(point);
        }
    }
    let standing: Vec<Option<&Vec<f32>>> =
        stored.iter().map(|point| point.as_ref().and_then(|point| point.vector.as_ref())).collect();
    let whole: Option<Vec<Vec<f32>>> = standing.iter().map(|vector| vector.cloned()).collect();
    let right = if let Some(vectors) = whole.filter(|vectors| is_published(vectors, version)) {
        vectors
    } else {
        let chunks = stores.postgres.chunks(version.id).await?;
        let Some(fresh) = vectors_of(stores, version, &chunks).await? else {
            return Ok(Err(format!(
                "model {} is not served here, or the chunk rows are not complete",
                version.model
            )));
        };
        let mixed: Vec<Vec<f32>> =
            standing.iter().zip(&fresh).map(|(old, new)| (*old).unwrap_or(new).clone()).collect();
        let Some(right) = [mixed, fresh].into_iter().find(|vectors| is_published(vectors, version)) else {
            let why = "the provider gives other vectors than those published: enqueue an embed job for the document";
            return Ok(Err(why.to_owned()));
        };
        right
    };
    let wrong: HashSet<usize> = (0..ids.len())
        .filter(|no| {
            stored[*no].as_ref().is_none_or(|point| {
                point.vector.as_ref() != Some(&right[*no])
                    || point.tenant.as_deref() != Some(version.tenant.as_str())
                    || point.document != Some(version.document_id)
                    || (point.version, point.chunk) != (Some(version.id), Some(*no as i32))
            })
        })
        .collect();
    let ledger = stores.ledger().await?;
    let points: Vec<Point> = right
        .into_iter()
        .enumerate()
        .filter(|(no, _)| wrong.contains(no))
        .map(|(no, vector)| Point {
            version: version.id,
            chunk: no as i32,
            document_id: version.document_id,
            tenant: version.tenant.clone(),
            ledger,
            vector,
        })
        .collect();
    debug_assert!(points.iter().all(|point| ids.contains(&point_id(point.version, point.chunk))));
    stores.vectors.overwrite(&version.collection, version.dimensions as usize, &points).await?;
    Ok(Ok(()))
}

/// Whether these are the vectors whose hash was recorded at publish.
fn is_published(vectors: &[Vec<f32>], version: &VersionRow) -> bool {
    version.vectors_hash.as_ref().is_some_and(|hash| *hash == vectors_hash(vectors.iter().map(Vec::as_slice)))
}

/// The vectors that the version's model gives for these chunks now. `None`: not so many chunks, or no such model here.
async fn vectors_of(
    stores: &Stores,
    version: &VersionRow,
    chunks: &[String],
) -> Result<Option<Vec<Vec<f32>>>, AuditError> {
    if chunks.len() != version.chunk_count as usize {
        return Ok(None);
    }
    match stores.embedder(Some(&version.model)) {
        Ok(embedder) => Ok(Some(embed(embedder.as_ref(), chunks).await?)),
        Err(StepError::Store(error)) => Err(error.into()),
        Err(_) => Ok(None),
    }
}
