//! The board on which processes tell each other what their circuit breakers see. A hint: nothing is decided by it, it is lost
//! with Redis' data, and whoever can't reach it goes by what it sees itself.

use std::{convert::Infallible, time::Duration};

use futures::StreamExt;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    error::QueueError,
    ids::WorkerId,
    outage::Outage,
    queue::{Queue, text},
    reply::Reply,
    scripts,
};

/// A report that was not repeated for so long is forgotten. Longer than a turn and a probe together.
const SILENCE: Duration = Duration::from_secs(5);
/// How long one worker probes for all before it is the next one's turn: a worker that alone is cut off must not keep the
/// others waiting.
const TURN: Duration = Duration::from_secs(2);
/// How often an idle subscription is checked; a peer that vanished silently would never say anything again.
const CHECK_EVERY: Duration = Duration::from_secs(15);
/// Most reports that are listed for people.
const LISTED: usize = 1000;

/// What a process says about its breaker of one dependency.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerReport {
    /// It is open. To be repeated while it is.
    Open,
    /// It was open and has closed.
    Closed,
    /// Nothing: only asks.
    Look,
}

/// What is known about one dependency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BreakerBoard {
    /// How many processes report their breaker open.
    pub open: u64,
    /// Since when the first of them does, in unix ms of Redis' clock; 0 if none does.
    pub since_ms: i64,
    /// Whose turn it is to probe for all.
    pub turn: Option<WorkerId>,
    /// Until it is the next one's turn.
    pub next_turn: Duration,
    /// When one of them closed its breaker last, in unix ms of Redis' clock; 0: never.
    pub closed_ms: i64,
}

/// What another process told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BreakerNews {
    /// Its breaker of this dependency opened.
    Opened(String),
    /// Its breaker of this dependency closed.
    Closed(String),
    /// News may have been missed: there was no subscription until now.
    Listening,
}

impl Queue {
    fn breakers_key(&self) -> String {
        format!("{{{}:breakers}}", self.config().prefix)
    }

    /// Tells what a worker's breaker of a dependency sees, and asks what the others know. The name has no spaces.
    pub async fn report_breaker(
        &self,
        worker: &WorkerId,
        dependency: &str,
        report: BreakerReport,
    ) -> Result<BreakerBoard, QueueError> {
        let word = match report {
            BreakerReport::Open => "open",
            BreakerReport::Closed => "closed",
            BreakerReport::Look => "look",
        };
        let args = [
            self.now(),
            text(worker),
            text(dependency),
            text(word),
            text(SILENCE.as_millis()),
            text(TURN.as_millis()),
        ];
        let answer = self.shared.link.script(&scripts::BREAKER, &self.breakers_key(), &args).await?;
        let mut reply = Reply::new(answer.value)?;
        Ok(BreakerBoard {
            open: reply.integer()?.unsigned_abs(),
            since_ms: reply.integer()?,
            turn: reply.optional()?.map(WorkerId::new),
            next_turn: Duration::from_millis(reply.integer()?.unsigned_abs()),
            closed_ms: reply.integer()?,
        })
    }

    /// Who reports its breaker of a dependency open, and since when in unix ms of Redis' clock; the first first, at most
    /// 1,000. May still have some who fell silent seconds ago.
    pub async fn open_breakers(&self, dependency: &str) -> Result<Vec<(WorkerId, i64)>, QueueError> {
        let mut range = redis::cmd("ZRANGE");
        range.arg(format!("{}:s:{dependency}", self.breakers_key())).arg(0).arg(LISTED - 1).arg("WITHSCORES");
        let mut reply = Reply::new(self.shared.link.command(&range).await?.value)?;
        let mut open = Vec::with_capacity(reply.len() / 2);
        while !reply.is_empty() {
            open.push((WorkerId::new(reply.text()?), reply.integer()?));
        }
        Ok(open)
    }

    /// What other workers than `ours` tell, until `shutdown`; connects again by itself.
    pub fn breaker_news(&self, ours: WorkerId, shutdown: CancellationToken) -> mpsc::Receiver<BreakerNews> {
        let (news, receiver) = mpsc::channel(64);
        let queue = self.clone();
        tokio::spawn(async move {
            let mut outage = Outage::new("breaker news");
            loop {
                let heard = tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = news.closed() => return,
                    heard = queue.hear_breakers(&ours, &news, &mut outage) => heard,
                };
                let Err(error) = heard;
                let pause = outage.wait(&error);
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
            }
        });
        receiver
    }

    /// One subscription, until it breaks.
    async fn hear_breakers(
        &self,
        ours: &WorkerId,
        news: &mpsc::Sender<BreakerNews>,
        outage: &mut Outage,
    ) -> Result<Infallible, QueueError> {
        let limit = self.config().response_timeout;
        let late = |_| QueueError::Unavailable("no subscription in time".to_owned());
        let gone = |_| QueueError::Unavailable("nobody listens to the breakers' news".to_owned());
        let (mut sink, mut messages) = self.subscribe().await?.split();
        timeout(limit, sink.subscribe(format!("{}:news", self.breakers_key()))).await.map_err(late)??;
        outage.over();
        news.send(BreakerNews::Listening).await.map_err(gone)?;
        let mut next_check = Instant::now() + CHECK_EVERY;
        loop {
            match timeout_at(next_check, messages.next()).await {
                Ok(Some(message)) => {
                    let told: String = message.get_payload()?;
                    let mut words = told.splitn(3, ' ');
                    let what = (words.next(), words.next(), words.next());
                    let one = match what {
                        (_, _, Some(worker)) if worker == ours.as_str() => continue,
                        (Some("open"), Some(dependency), _) => BreakerNews::Opened(dependency.to_owned()),
                        (Some("closed"), Some(dependency), _) => BreakerNews::Closed(dependency.to_owned()),
                        _ => {
                            tracing::warn!(told, "not understood on the board of circuit breakers");
                            continue;
                        }
                    };
                    news.send(one).await.map_err(gone)?;
                }
                Ok(None) => return Err(QueueError::Unavailable("the subscription ended".to_owned())),
                Err(_) => {
                    let pong: redis::Value = timeout(limit, sink.ping()).await.map_err(late)??;
                    tracing::trace!(?pong, "the subscription stands");
                    next_check = Instant::now() + CHECK_EVERY;
                }
            }
        }
    }
}
