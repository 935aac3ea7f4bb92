//! The reader: reads documents all the time in every way that readers have, and complains about every half state.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use sagas::{kinds::Stores, search::Query, stores::postgres::documents::PublishedVersion};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    load::{DOCUMENTS, Log, TENANT, document},
    texts,
};

/// A look that takes longer meets a store that is away; then it is no look.
const LOOK_WITHIN: Duration = Duration::from_secs(10);
/// Between two looks, so that the reader leaves the machine to the fleet.
const EVERY: Duration = Duration::from_millis(10);

/// What one look has shown of a document.
#[derive(Debug, Clone, Copy)]
pub struct Sight<'a> {
    pub version: Uuid,
    pub order: i64,
    /// The hash that the ledger gives with it.
    pub hash: &'a str,
    pub text: &'a str,
}

/// What a reader remembers of a document.
#[derive(Debug, Default)]
struct Seen {
    current: Option<Uuid>,
    order: i64,
    revision: u64,
    replaced: HashSet<Uuid>,
}

/// All that a reader has seen, and what it makes of the next look.
#[derive(Debug, Default)]
pub struct Memory(HashMap<String, Seen>);

impl Memory {
    /// A document as a look has shown it; `None`: there is no such document. An error is a half state.
    pub fn see(
        &mut self,
        document: &str,
        sight: Option<Sight<'_>>,
        was_sent: impl Fn(u64) -> bool,
    ) -> Result<(), String> {
        let seen = self.0.entry(document.to_owned()).or_default();
        if seen.current != sight.map(|sight| sight.version) {
            seen.replaced.extend(seen.current.take());
        }
        let Some(sight) = sight else { return Ok(()) };
        let version = sight.version;
        if texts::hash(sight.text) != sight.hash {
            return Err(format!("version {version}: the text does not have the version's hash"));
        }
        let revision = match texts::told(sight.text)[..] {
            [(named, revision)] if named == document => revision,
            ref told => return Err(format!("version {version}: its text speaks of {told:?}")),
        };
        if texts::text(document, revision) != sight.text {
            return Err(format!("version {version}: not the whole text of revision {revision}"));
        }
        if !was_sent(revision) {
            return Err(format!("version {version}: nobody may see revision {revision}"));
        }
        if sight.order < seen.order || revision < seen.revision {
            return Err(format!(
                "version {version}: order {} (revision {revision}) was seen after order {} (revision {})",
                sight.order, seen.order, seen.revision
            ));
        }
        if seen.replaced.contains(&version) {
            return Err(format!("version {version}: it came back after it was gone"));
        }
        (seen.current, seen.order, seen.revision) = (Some(version), sight.order, revision);
        Ok(())
    }

    /// A piece of a document's text that a search has shown. An error is a half state.
    pub fn found(&self, document: &str, piece: &str, was_sent: impl Fn(u64) -> bool) -> Result<(), String> {
        let revision = match texts::told(piece)[..] {
            [(named, revision)] if named == document => revision,
            ref told => return Err(format!("a search shows a piece that speaks of {told:?}")),
        };
        if !was_sent(revision) {
            return Err(format!("a search shows a piece of revision {revision}, which nobody may see"));
        }
        let newest = self.0.get(document).map_or(0, |seen| seen.revision);
        if revision < newest {
            return Err(format!(
                "a search shows a piece of revision {revision} after revision {newest} was seen"
            ));
        }
        Ok(())
    }
}

/// What the reader has done.
#[derive(Debug, Default)]
pub struct Seeing {
    /// Looks that were completed, and those that met a store that was away.
    pub looks: AtomicU64,
    pub failed: AtomicU64,
    /// How often it has come round all documents with no look that failed.
    pub rounds: AtomicU64,
    /// Set when the faults are over and everything has ended: from then on no look may fail.
    pub calm: AtomicBool,
    complaints: Mutex<Vec<String>>,
}

impl Seeing {
    pub fn complaints(&self) -> Vec<String> {
        self.complaints.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn complain(&self, document: &str, complaint: &str) {
        let mut complaints = self.complaints.lock().unwrap_or_else(PoisonError::into_inner);
        // A half state that stays is seen again and again.
        let complaint = format!("{document}: {complaint}");
        if complaints.last() != Some(&complaint) && complaints.len() < 1000 {
            complaints.push(complaint);
        }
    }

    /// Counts a look; whether it was one.
    fn looked(&self, document: &str, look: Result<(), Away>) -> bool {
        let whole = look.is_ok();
        match look {
            Ok(()) => self.looks.fetch_add(1, Ordering::Relaxed),
            Err(Away(why)) => {
                if self.calm.load(Ordering::Relaxed) {
                    self.complain(document, &format!("it can't be read, and the faults are over: {why}"));
                }
                self.failed.fetch_add(1, Ordering::Relaxed)
            }
        };
        whole
    }
}

/// Why a look is none: a store was away.
struct Away(String);

impl<E: std::fmt::Debug> From<E> for Away
where
    E: std::error::Error,
{
    fn from(error: E) -> Self {
        Self(format!("{error:?}"))
    }
}

/// Reads until stopped.
pub async fn watch(stores: Stores, log: Arc<Log>, seeing: Arc<Seeing>, stop: CancellationToken) {
    let mut memory = Memory::default();
    'all: loop {
        let mut whole = true;
        for no in 0..DOCUMENTS {
            if stop.is_cancelled() {
                break 'all;
            }
            let name = document(no);
            let look = look(&stores, &log, &mut memory, &seeing, &name);
            let look = tokio::time::timeout(LOOK_WITHIN, look).await;
            whole &= seeing
                .looked(&name, look.unwrap_or_else(|_| Err(Away(format!("not within {LOOK_WITHIN:?}")))));
            tokio::time::sleep(EVERY).await;
        }
        seeing.rounds.fetch_add(u64::from(whole), Ordering::Relaxed);
    }
}

/// Complains at once: a call that fails after that takes nothing back.
async fn look(
    stores: &Stores,
    log: &Log,
    memory: &mut Memory,
    seeing: &Seeing,
    name: &str,
) -> Result<(), Away> {
    let complain = |complaint: String| seeing.complain(name, &complaint);
    let shown = stores.document(TENANT, name).await?;
    let sight = shown.as_ref().map(|shown| Sight {
        version: shown.version.version,
        order: shown.version.doc_order,
        hash: &shown.version.content_hash,
        text: &shown.text,
    });
    memory.see(name, sight, |revision| log.was_sent(name, revision)).unwrap_or_else(complain);
    let Some(shown) = shown else { return Ok(()) };

    let version = &shown.version;
    // An absent entry is never a disagreement; a wrong one is, whenever it is read.
    if let Some(entry) = stores.cache.peek(version.version).await?
        && entry.body != shown.text
    {
        complain(format!("version {}: the cache has another text", version.version));
    }
    let stored =
        stores.vectors.points(&version.collection, version.version, version.chunk_count).await?.len();
    let query = Query { tenant: TENANT, text: &shown.text, k: 10, model: None, collection: None };
    let hits = stores.search(&query).await?;
    for hit in &hits {
        memory
            .found(&hit.document, &hit.text, |revision| log.was_sent(&hit.document, revision))
            .unwrap_or_else(complain);
    }
    let found = hits.iter().any(|hit| hit.document == name);
    let whole = stored == version.chunk_count.unsigned_abs() as usize && found;
    // A version that was replaced meanwhile keeps its points for the grace period only, and is not found.
    if !whole && still_current(stores, version).await? {
        complain(format!(
            "version {}: {stored} of its {} points are there, found by a search: {found}",
            version.version, version.chunk_count
        ));
    }
    Ok(())
}

async fn still_current(stores: &Stores, version: &PublishedVersion) -> Result<bool, Away> {
    let now = stores.postgres.current_version(TENANT, &version.document).await?;
    Ok(now.is_some_and(|now| now.version == version.version))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const A: Uuid = Uuid::from_u128(1);
    const B: Uuid = Uuid::from_u128(2);

    /// Each look in turn, as (version, order, revision); whether each was whole.
    fn looks(looks: &[Option<(Uuid, i64, u64)>]) -> Vec<bool> {
        let mut memory = Memory::default();
        looks
            .iter()
            .map(|look| {
                let Some((version, order, revision)) = *look else {
                    return memory.see("d", None, |_| true).is_ok();
                };
                let text = texts::text("d", revision);
                let sight = Sight { version, order, hash: &texts::hash(&text), text: &text };
                memory.see("d", Some(sight), |revision| revision < texts::DOOMED).is_ok()
            })
            .collect()
    }

    #[test]
    fn what_only_moves_forward_is_whole() {
        assert_eq!(looks(&[None, Some((A, 1, 1)), Some((A, 1, 1)), Some((B, 2, 2)), None]), [true; 5]);
        assert_eq!(looks(&[Some((A, 1, 1)), Some((B, 1, 1))]), [true; 2], "embedded anew");
    }

    #[test]
    fn what_goes_back_comes_back_or_must_not_be_seen_is_found() {
        assert_eq!(looks(&[Some((B, 2, 2)), Some((A, 1, 1))]), [true, false]);
        assert_eq!(looks(&[Some((A, 1, 1)), Some((B, 1, 1)), Some((A, 1, 1))]), [true, true, false]);
        assert_eq!(looks(&[Some((A, 1, 1)), None, Some((A, 1, 1))]), [true, true, false]);
        assert_eq!(looks(&[Some((A, 2, 2)), Some((B, 3, 1))]), [true, false], "older content, newer order");
        assert_eq!(looks(&[Some((A, 1, texts::DOOMED))]), [false]);
    }

    #[test]
    fn a_look_that_fails_is_a_fault_until_the_faults_are_over() {
        let seeing = Seeing::default();
        let away = || Err(Away("refused".to_owned()));
        assert!(seeing.looked("d", Ok(())));
        assert!(!seeing.looked("d", away()));
        assert!(seeing.complaints().is_empty());
        seeing.calm.store(true, Ordering::Relaxed);
        assert!(seeing.looked("d", Ok(())));
        assert!(!seeing.looked("d", away()));
        let complaints = seeing.complaints();
        assert!(complaints.len() == 1 && complaints[0].contains("refused"), "{complaints:?}");
        assert_eq!((seeing.looks.into_inner(), seeing.failed.into_inner()), (2, 2));
    }

    #[test]
    fn a_text_that_is_not_its_versions_is_found() {
        let (whole, other) = (texts::text("d", 1), texts::text("e", 1));
        let half = &whole[..whole.len() / 2];
        for (text, hash) in [
            (half, texts::hash(&whole)),
            (half, texts::hash(half)),
            (&*other, texts::hash(&other)),
            ("", texts::hash("")),
        ] {
            let sight = Sight { version: A, order: 1, hash: &hash, text };
            assert!(Memory::default().see("d", Some(sight), |_| true).is_err(), "{text}");
        }
    }

    #[test]
    fn a_search_shows_nothing_older_than_what_was_seen_and_nothing_of_others() {
        let mut memory = Memory::default();
        let text = texts::text("d", 2);
        let sight = Sight { version: A, order: 1, hash: &texts::hash(&text), text: &text };
        memory.see("d", Some(sight), |_| true).unwrap();
        let piece = |revision| texts::text("d", revision).split("\n\n").next().unwrap().to_owned();
        assert!(memory.found("d", &piece(2), |_| true).is_ok());
        assert!(memory.found("d", &piece(3), |_| true).is_ok(), "published since");
        assert!(memory.found("d", &piece(1), |_| true).is_err());
        assert!(memory.found("e", &piece(2), |_| true).is_err());
        assert!(memory.found("d", &piece(3), |_| false).is_err());
    }
}
