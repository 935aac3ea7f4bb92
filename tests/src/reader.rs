//! A reader that looks at documents all the time, and notices every half state.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use sagas::{kinds::Stores, search::Query};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::TENANT;

/// Between two rounds, unless a test says otherwise; short enough to fall into the gaps between the steps of a saga.
const EVERY: Duration = Duration::from_millis(5);

/// What was seen of a document at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sight {
    /// The published version; `None`: no such document.
    pub version: Option<Uuid>,
    /// Its whole text.
    pub text: Option<String>,
}

/// What a [`Reader`] has seen.
#[derive(Debug, Default)]
pub struct History {
    /// Per document, each change of what was seen, first to last.
    pub seen: HashMap<String, Vec<Sight>>,
    /// Looks that were completed.
    pub looks: u64,
    /// Half states: what no reader may see.
    pub violations: Vec<String>,
}

impl History {
    /// The different texts of a document in the order they were seen.
    pub fn texts(&self, document: &str) -> Vec<&str> {
        let mut texts: Vec<&str> = vec![];
        for text in self.seen.get(document).into_iter().flatten().filter_map(|sight| sight.text.as_deref()) {
            if texts.last() != Some(&text) {
                texts.push(text);
            }
        }
        texts
    }
}

/// A task that reads some documents through every way that readers have, until stopped.
pub struct Reader {
    history: Arc<Mutex<History>>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

struct Watch {
    stores: Stores,
    /// The texts that each document may have; it may not be absent once it was seen, nor be there again.
    allowed: HashMap<String, HashSet<String>>,
    /// They may go, once and for good.
    may_go: bool,
    every: Duration,
    history: Arc<Mutex<History>>,
}

impl Reader {
    /// Watches documents, each of which has one of its texts whenever it is seen, and stays once it was seen.
    pub(crate) fn start(stores: Stores, documents: impl IntoIterator<Item = (String, Vec<String>)>) -> Self {
        Self::start_with(stores, documents, false, EVERY)
    }

    /// The same for documents that may go for good, and with a pause between two rounds.
    pub(crate) fn start_with(
        stores: Stores,
        documents: impl IntoIterator<Item = (String, Vec<String>)>,
        may_go: bool,
        every: Duration,
    ) -> Self {
        let allowed = documents.into_iter().map(|(key, texts)| (key, texts.into_iter().collect())).collect();
        let (history, stop) = (Arc::<Mutex<History>>::default(), CancellationToken::new());
        let watch = Watch { stores, allowed, may_go, every, history: Arc::clone(&history) };
        let ends = stop.clone();
        let task = tokio::spawn(async move {
            while !ends.is_cancelled() {
                for document in watch.allowed.keys() {
                    watch.look(document).await;
                }
                tokio::time::sleep(watch.every).await;
            }
        });
        Self { history, stop, task }
    }

    /// How many looks are completed.
    pub fn looks(&self) -> u64 {
        self.history.lock().unwrap().looks
    }

    /// Stops reading; fails the test if a half state was seen, or nothing at all.
    pub async fn finish(self) -> History {
        self.stop.cancel();
        self.task.await.expect("the reader ended by itself");
        let history = std::mem::take(&mut *self.history.lock().unwrap());
        assert!(history.looks > 0, "the reader saw nothing");
        assert!(
            history.violations.is_empty(),
            "a reader saw {} half states in {} looks:\n{}",
            history.violations.len(),
            history.looks,
            history.violations.join("\n")
        );
        history
    }
}

impl Watch {
    async fn look(&self, document: &str) {
        let before = self.history.lock().unwrap().seen.get(document).and_then(|seen| seen.last().cloned());
        let complaint = match self.see(document).await {
            Ok(sight) => {
                let complaint = match before.as_ref().map(|before| before.version) {
                    Some(Some(_)) if sight.version.is_none() && !self.may_go => {
                        Some("it vanished".to_owned())
                    }
                    Some(None) if sight.version.is_some() && self.may_go => Some("it came back".to_owned()),
                    _ => None,
                };
                let mut history = self.history.lock().unwrap();
                history.looks += 1;
                if before.as_ref() != Some(&sight) {
                    history.seen.entry(document.to_owned()).or_default().push(sight);
                }
                complaint
            }
            Err(complaint) => Some(complaint),
        };
        if let Some(complaint) = complaint {
            self.history.lock().unwrap().violations.push(format!("{document}: {complaint}"));
        }
    }

    /// One look; an error is a half state.
    async fn see(&self, document: &str) -> Result<Sight, String> {
        let began = Instant::now();
        let shown =
            self.stores.document(TENANT, document).await.map_err(|e| format!("can't be read: {e}"))?;
        let Some(shown) = shown else { return Ok(Sight { version: None, text: None }) };
        let version = shown.version.version;
        if !self.allowed[document].contains(&shown.text) {
            return Err(format!("version {version} has a text that nobody gave it: {:?}", shown.text));
        }
        // A version that is replaced keeps its points and its entry for the grace period. A look that took longer than
        // that is no look at one state, and only counts if the version is still the current one.
        for complaint in [
            self.cached(version, &shown.text).await,
            self.stored(&shown.version).await,
            self.found(document, &shown.text).await,
        ] {
            let Err(complaint) = complaint else { continue };
            let now =
                self.stores.postgres.current_version(TENANT, document).await.map_err(|e| e.to_string())?;
            if now.is_some_and(|now| now.version == version) {
                return Err(format!("{complaint} (version {version}, {:?} into the look)", began.elapsed()));
            }
        }
        Ok(Sight { version: Some(version), text: Some(shown.text) })
    }

    async fn cached(&self, version: Uuid, text: &str) -> Result<(), String> {
        match self.stores.cache.peek(version).await.map_err(|e| e.to_string())? {
            // An absent entry is never a disagreement; a wrong one is.
            Some(entry) if entry.body != text => Err(format!("the cache has another text: {:?}", entry.body)),
            _ => Ok(()),
        }
    }

    async fn stored(
        &self,
        version: &sagas::stores::postgres::documents::PublishedVersion,
    ) -> Result<(), String> {
        let points = self
            .stores
            .vectors
            .points(&version.collection, version.version, version.chunk_count)
            .await
            .map_err(|e| e.to_string())?;
        if points.len() != version.chunk_count.unsigned_abs() as usize {
            return Err(format!("{} of its {} points are there", points.len(), version.chunk_count));
        }
        Ok(())
    }

    /// Searches for the document's own words: it must be found, with words that it has.
    async fn found(&self, document: &str, text: &str) -> Result<(), String> {
        let query = Query { tenant: TENANT, text, k: 10, model: None, collection: None };
        let hits = self.stores.search(&query).await.map_err(|e| format!("the search failed: {e}"))?;
        let mine: Vec<_> = hits.iter().filter(|hit| hit.document == document).collect();
        if let Some(odd) =
            mine.iter().find(|hit| !self.allowed[document].iter().any(|text| text.contains(&hit.text)))
        {
            return Err(format!("the search shows a text that nobody gave it: {:?}", odd.text));
        }
        if mine.is_empty() {
            let others: Vec<&str> = hits.iter().map(|hit| hit.document.as_str()).collect();
            return Err(format!("the search did not find it, only {others:?}"));
        }
        Ok(())
    }
}
