//! Tells at once, on the cache Redis' pub/sub, that what readers see has changed. A hint for those who keep copies: nobody is
//! told who doesn't listen at that moment. What must not be missed is in [`events`](super::postgres::events).

use std::sync::{Arc, OnceLock};

use metrics::counter;
use serde::Serialize;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::cache_line::CacheLine;

/// Announcements that wait at most; what comes while so many wait is left out.
const BACKLOG: usize = 1024;
/// Sent in one round trip at most.
const PAGE: usize = 128;

/// What has changed.
#[derive(Debug, Clone, Serialize)]
pub struct Announcement {
    /// `document.published` or `document.deleted`.
    pub event: &'static str,
    /// Whose document.
    pub tenant: String,
    /// The caller's name for it.
    pub document: String,
    /// Its id.
    pub document_id: Uuid,
    /// The version that readers see from now on; none after a deletion.
    pub version: Option<Uuid>,
    /// The order number of the job that did it.
    pub order: i64,
}

/// Sends announcements in the background, in their order. Its task starts with the first and ends with the last clone.
#[derive(Clone)]
pub(super) struct Announcer {
    line: CacheLine,
    channel: String,
    queue: Arc<OnceLock<mpsc::Sender<Announcement>>>,
}

impl Announcer {
    pub(super) fn new(line: CacheLine, channel: String) -> Self {
        Self { line, channel, queue: Arc::default() }
    }

    /// Never waits, and never fails: the change is committed.
    pub(super) fn tell(&self, announcement: Announcement) {
        let queue = self.queue.get_or_init(|| {
            let (queue, announcements) = mpsc::channel(BACKLOG);
            tokio::spawn(send(self.line.clone(), self.channel.clone(), announcements));
            queue
        });
        if let Err(error) = queue.try_send(announcement) {
            tracing::debug!(%error, "a change was not announced");
        }
    }
}

async fn send(line: CacheLine, channel: String, mut announcements: mpsc::Receiver<Announcement>) {
    let mut page = Vec::with_capacity(PAGE);
    while announcements.recv_many(&mut page, PAGE).await > 0 {
        let mut pipeline = redis::pipe();
        for announcement in &page {
            match serde_json::to_string(announcement) {
                Ok(text) => drop(pipeline.cmd("PUBLISH").arg(&channel).arg(text).ignore()),
                Err(error) => tracing::error!(%error, "an announcement can't be written"),
            }
        }
        match line.pipeline::<()>(&pipeline).await {
            Ok(()) => {
                for announcement in &page {
                    counter!("redis_cache_invalidations_total", "event" => announcement.event).increment(1);
                }
            }
            Err(error) => tracing::debug!(%error, count = page.len(), "changes were not announced"),
        }
        page.clear();
    }
}
