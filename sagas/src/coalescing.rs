//! The coalescer: turns concurrent single calls into batches.
//!
//! A flush starts as soon as none is in flight and every task that was ready had its turn to join; calls that arrive meanwhile
//! wait and form the next batch, at most as many as the [batch size](crate::batch_size) allows, or after `max_wait`. So an idle
//! system pays no delay and a busy one shares its round trips and commits. A batch that is refused because of its data is split
//! until the guilty item alone fails, and one that lost to another transaction is flushed again (PROTOCOL.md 20).

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use metrics::{gauge, histogram};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::Instant,
};

use crate::{
    batch_size::{BatchSize, Sizes},
    error::{Class, Dependency, StoreError},
};

/// A store call that can serve many callers at once.
#[async_trait]
pub trait Batch: Send + Sync + 'static {
    /// One caller's part.
    type Item: Clone + Send + Sync + 'static;
    /// One caller's answer.
    type Reply: Send + 'static;
    /// The name in metrics.
    const OP: &'static str;
    /// Whose call it is.
    const DEPENDENCY: Dependency;
    /// Whether a flush that was given up may be made again at once, for the callers who have time left: if it is idempotent,
    /// and no reply of the second says that nothing was begun by the first.
    const AGAIN: bool = true;

    /// Does the items' work in one round trip; answers in the items' order. An error fails the whole batch.
    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<Self::Reply>, StoreError>;
}

/// Limits of a coalescer.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Items in one batch; within these bounds it follows the store's answers.
    pub items: Sizes,
    /// How long an item waits for company while another flush is in flight.
    pub max_wait: Duration,
    /// Flushes in flight at once.
    pub in_flight: usize,
    /// Callers that wait at most; the next one waits to enter, which is the back-pressure.
    pub backlog: usize,
}

impl Default for Limits {
    /// 8 to 512 items, 2 ms, 2 flushes, 1,024 callers.
    fn default() -> Self {
        Self { items: Sizes::default(), max_wait: Duration::from_millis(2), in_flight: 2, backlog: 1024 }
    }
}

/// After a flush that was given up, items are flushed again only for callers who have at least one in so many parts of the time
/// left that has passed. Those who called one after the other have deadlines as near to each other, and a store that hangs
/// would get a flush for each of them.
const WORTHWHILE: u32 = 4;

/// How often a batch is flushed again that lost to another transaction (a deadlock): that one has ended, and nothing of the
/// transaction that lost was done. What a flush has committed before that one, it finds done.
const LOST_AGAIN: u32 = 3;

struct Call<B: Batch> {
    item: B::Item,
    deadline: Instant,
    reply: oneshot::Sender<Result<B::Reply, StoreError>>,
}

/// A handle to one coalescer; its task ends when the last handle is dropped, after a last flush.
pub struct Coalescer<B: Batch> {
    calls: mpsc::Sender<Call<B>>,
}

impl<B: Batch> Clone for Coalescer<B> {
    fn clone(&self) -> Self {
        Self { calls: self.calls.clone() }
    }
}

impl<B: Batch> Coalescer<B> {
    /// Starts the coalescer's task on the current runtime.
    pub fn spawn(batch: B, limits: Limits) -> Self {
        let (calls, receiver) = mpsc::channel(limits.backlog);
        tokio::spawn(run(Arc::new(batch), limits, receiver));
        Self { calls }
    }

    /// Joins the next batch and waits for this item's answer. No flush that holds the item starts after `deadline`, and
    /// one under way is given up then; whether it took effect is then unknown. One that is given up because a neighbour's
    /// time is over is made again for the others ([`Batch::AGAIN`]). Dropping the future withdraws the item unless its
    /// flush has begun.
    pub async fn call(&self, item: B::Item, deadline: Instant) -> Result<B::Reply, StoreError> {
        let (reply, answer) = oneshot::channel();
        let call = Call { item, deadline, reply };
        tokio::time::timeout_at(deadline, async {
            self.calls.send(call).await.map_err(|_| closed::<B>())?;
            answer.await.map_err(|_| closed::<B>())?
        })
        .await
        .map_err(|_| late::<B>())?
    }
}

fn late<B: Batch>() -> StoreError {
    StoreError::new(B::DEPENDENCY, Class::Timeout, format!("{}: no answer in time", B::OP))
}

fn closed<B: Batch>() -> StoreError {
    StoreError::new(B::DEPENDENCY, Class::Unavailable, format!("{}: the coalescer has stopped", B::OP))
}

async fn run<B: Batch>(batch: Arc<B>, limits: Limits, mut calls: mpsc::Receiver<Call<B>>) {
    let slots = Arc::new(Semaphore::new(limits.in_flight));
    let size = Arc::new(Mutex::new(BatchSize::new(limits.items)));
    while let Some(first) = calls.recv().await {
        // Whatever woke this caller, a flush that answered or a claim, has woken others who are about to call.
        tokio::task::yield_now().await;
        let mut pending = vec![first];
        let most = size.lock().unwrap_or_else(PoisonError::into_inner).limit();
        let slot = fill::<B>(&mut calls, &mut pending, most, limits, &slots).await;
        let Some(slot) = slot else { return };
        let (batch, size) = (Arc::clone(&batch), Arc::clone(&size));
        tokio::spawn(async move {
            serve(batch.as_ref(), pending, &size).await;
            drop(slot);
        });
    }
}

/// Collects a batch. With an idle store it is what is there now; otherwise what comes until a slot is free and the
/// batch is full or `max_wait` has passed.
async fn fill<B: Batch>(
    calls: &mut mpsc::Receiver<Call<B>>,
    pending: &mut Vec<Call<B>>,
    most: usize,
    limits: Limits,
    slots: &Arc<Semaphore>,
) -> Option<OwnedSemaphorePermit> {
    let idle = slots.available_permits() == limits.in_flight;
    let until = Instant::now() + if idle { Duration::ZERO } else { limits.max_wait };
    let mut slot = None;
    loop {
        while pending.len() < most {
            match calls.try_recv() {
                Ok(call) => pending.push(call),
                Err(_) => break,
            }
        }
        if slot.is_some() && (pending.len() >= most || Instant::now() >= until) {
            return slot;
        }
        tokio::select! {
            biased;
            permit = Arc::clone(slots).acquire_owned(), if slot.is_none() => slot = Some(permit.ok()?),
            call = calls.recv(), if pending.len() < most => match call {
                Some(call) => pending.push(call),
                None => return match slot { Some(slot) => Some(slot), None => Arc::clone(slots).acquire_owned().await.ok() },
            },
            () = tokio::time::sleep_until(until), if slot.is_some() => {}
        }
    }
}

/// Flushes the calls that still wait, splitting a batch whose data is refused. A flush ends when the first caller's time is
/// over; the items of the others are then flushed again, if that is allowed.
async fn serve<B: Batch>(batch: &B, calls: Vec<Call<B>>, size: &Mutex<BatchSize>) {
    let since = Instant::now();
    let mut again = LOST_AGAIN;
    let mut work = vec![calls];
    while let Some(mut calls) = work.pop() {
        let now = Instant::now();
        calls.retain(|call| !call.reply.is_closed());
        answer_late(&mut calls, |call| call.deadline <= now);
        let Some(deadline) = calls.iter().map(|call| call.deadline).min() else { continue };
        histogram!("coalescer_batch_size", "op" => B::OP).record(calls.len() as f64);
        let items: Vec<B::Item> = calls.iter().map(|call| call.item.clone()).collect();
        let began = Instant::now();
        let flushed = tokio::time::timeout_at(deadline, batch.flush(&items)).await;
        {
            let mut size = size.lock().unwrap_or_else(PoisonError::into_inner);
            match &flushed {
                // Only answers tell how fast a store is, and giving up; a refused connection is quick.
                Ok(Err(error)) if error.class != Class::Timeout => {}
                Ok(_) => size.took(items.len(), began.elapsed()),
                Err(_) => size.gave_up(items.len(), began.elapsed()),
            }
            gauge!("coalescer_batch_limit", "op" => B::OP).set(size.limit() as f64);
        }
        let Ok(flushed) = flushed else {
            let (now, waited) = (Instant::now(), since.elapsed());
            answer_late(&mut calls, |call| {
                !B::AGAIN || call.deadline.saturating_duration_since(now) * WORTHWHILE < waited
            });
            work.push(calls);
            continue;
        };
        match flushed {
            Ok(replies) => {
                for (call, reply) in calls.into_iter().zip(replies) {
                    answer(call, Ok(reply));
                }
            }
            Err(error) if (error.class == Class::Data || error.trouble) && calls.len() > 1 => {
                let half = calls.split_off(calls.len() / 2);
                work.push(half);
                work.push(calls);
            }
            Err(error) if error.conflict && again > 0 => {
                again -= 1;
                tracing::debug!(op = B::OP, %error, "flushed again");
                work.push(calls);
            }
            Err(error) => {
                for call in calls {
                    answer(call, Err(error.clone()));
                }
            }
        }
    }
}

/// Tells those to whom it applies that their time is over.
fn answer_late<B: Batch>(calls: &mut Vec<Call<B>>, applies: impl Fn(&Call<B>) -> bool) {
    for call in calls.extract_if(.., |call| applies(call)) {
        answer(call, Err(late::<B>()));
    }
}

fn answer<B: Batch>(call: Call<B>, reply: Result<B::Reply, StoreError>) {
    // A caller that gave up reads its outcome back from the store.
    if call.reply.send(reply).is_err() {
        tracing::trace!(op = B::OP, "the caller of a coalesced item had gone");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Refuses odd numbers as data, gets into trouble with 13, and records the batches it saw.
    #[derive(Clone, Default)]
    struct Evens(Arc<Mutex<Vec<Vec<u32>>>>, Arc<tokio::sync::Notify>);

    #[async_trait]
    impl Batch for Evens {
        type Item = u32;
        type Reply = u32;
        const OP: &'static str = "evens";
        const DEPENDENCY: Dependency = Dependency::Postgres;
        async fn flush(&self, items: &[u32]) -> Result<Vec<u32>, StoreError> {
            self.0.lock().unwrap().push(items.to_vec());
            self.1.notified().await;
            self.1.notify_one();
            if items.contains(&13) {
                let error = StoreError::new(Dependency::Postgres, Class::Transient, "a damaged page");
                return Err(StoreError { trouble: true, ..error });
            }
            if items.iter().any(|n| n % 2 == 1) {
                return Err(StoreError::new(Dependency::Postgres, Class::Data, "odd"));
            }
            Ok(items.iter().map(|n| n * 10).collect())
        }
    }

    #[tokio::test]
    async fn a_refused_batch_fails_only_its_guilty_item() {
        let evens = Evens::default();
        let coalescer = Coalescer::spawn(
            evens.clone(),
            Limits { in_flight: 1, max_wait: Duration::from_secs(5), ..Limits::default() },
        );
        let deadline = Instant::now() + Duration::from_secs(10);
        let calls: Vec<_> = [2, 4, 5, 6, 8, 13]
            .map(|n| {
                let coalescer = coalescer.clone();
                tokio::spawn(async move { coalescer.call(n, deadline).await.map_err(|e| e.class) })
            })
            .into_iter()
            .collect();
        evens.1.notify_one();
        let mut replies = vec![];
        for call in calls {
            replies.push(call.await.unwrap());
        }
        let refused = [Err(Class::Data), Err(Class::Transient)];
        assert_eq!(replies, [Ok(20), Ok(40), refused[0], Ok(60), Ok(80), refused[1]]);
    }

    #[tokio::test]
    async fn a_withdrawn_or_late_item_is_never_flushed() {
        let evens = Evens::default();
        let coalescer = Coalescer::spawn(evens.clone(), Limits { in_flight: 1, ..Limits::default() });
        let now = Instant::now();
        let first = tokio::spawn({
            let coalescer = coalescer.clone();
            async move { coalescer.call(2, now + Duration::from_secs(10)).await }
        });
        while evens.0.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        let late = coalescer.call(4, now + Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(late.class, Class::Timeout);
        evens.1.notify_one();
        assert_eq!(first.await.unwrap().unwrap(), 20);
        assert_eq!(coalescer.call(6, now + Duration::from_secs(10)).await.unwrap(), 60);
        assert_eq!(*evens.0.lock().unwrap(), [vec![2], vec![6]]);
    }

    #[tokio::test]
    async fn one_guilty_item_of_many_is_found_by_halves() {
        let evens = Evens::default();
        let limits = Limits { in_flight: 1, max_wait: Duration::from_secs(5), ..Limits::default() };
        let coalescer = Coalescer::spawn(evens.clone(), limits);
        let deadline = Instant::now() + Duration::from_secs(20);
        // The first occupies the store, so that the others meet in one batch.
        let calls: Vec<_> = std::iter::once(0)
            .chain((1..=64).map(|n| if n == 37 { 37 } else { 2 * n }))
            .map(|n| {
                let coalescer = coalescer.clone();
                tokio::spawn(async move { (n, coalescer.call(n, deadline).await.map_err(|e| e.class)) })
            })
            .collect();
        while evens.0.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        evens.1.notify_one();
        for call in calls {
            let (n, reply) = call.await.unwrap();
            assert_eq!(reply, if n == 37 { Err(Class::Data) } else { Ok(n * 10) });
        }
        let flushes: Vec<usize> = evens.0.lock().unwrap().iter().map(Vec::len).collect();
        // Two for each of the six halvings, the whole, and what the first ones went with.
        assert!(flushes.len() <= 16, "{flushes:?}");
    }

    /// One thread, on which the coalescer would go first among all that the last caller has woken.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn callers_that_one_event_has_woken_share_a_flush() {
        let evens = Evens::default();
        evens.1.notify_one();
        let coalescer = Coalescer::spawn(evens.clone(), Limits::default());
        let together = Arc::new(tokio::sync::Barrier::new(12));
        let deadline = Instant::now() + Duration::from_secs(20);
        let calls: Vec<_> = (0..12)
            .map(|n| {
                let (coalescer, together) = (coalescer.clone(), Arc::clone(&together));
                tokio::spawn(async move {
                    together.wait().await;
                    coalescer.call(2 * n, deadline).await
                })
            })
            .collect();
        for call in calls {
            call.await.unwrap().unwrap();
        }
        let flushes: Vec<usize> = evens.0.lock().unwrap().iter().map(Vec::len).collect();
        assert_eq!(flushes, [12]);
    }

    /// Loses to another transaction so many times.
    struct Unlucky(Mutex<u32>);

    #[async_trait]
    impl Batch for Unlucky {
        type Item = u32;
        type Reply = u32;
        const OP: &'static str = "unlucky";
        const DEPENDENCY: Dependency = Dependency::Postgres;
        async fn flush(&self, items: &[u32]) -> Result<Vec<u32>, StoreError> {
            let mut left = self.0.lock().unwrap();
            if *left == 0 {
                return Ok(items.to_vec());
            }
            *left -= 1;
            let error = StoreError::new(Dependency::Postgres, Class::Transient, "deadlock");
            Err(StoreError { conflict: true, ..error })
        }
    }

    #[tokio::test]
    async fn protocol_20_a_batch_that_lost_to_another_transaction_is_flushed_again() {
        let deadline = || Instant::now() + Duration::from_secs(10);
        let lucky_in_time = Coalescer::spawn(Unlucky(Mutex::new(LOST_AGAIN)), Limits::default());
        assert_eq!(lucky_in_time.call(7, deadline()).await.unwrap(), 7);
        let unlucky = Coalescer::spawn(Unlucky(Mutex::new(u32::MAX)), Limits::default());
        assert_eq!(unlucky.call(7, deadline()).await.unwrap_err().class, Class::Transient);
    }

    /// Answers when let to, one flush at a time.
    #[derive(Clone)]
    struct Gate(Arc<Semaphore>, Arc<Mutex<Vec<usize>>>);

    #[async_trait]
    impl Batch for Gate {
        type Item = u32;
        type Reply = u32;
        const OP: &'static str = "gate";
        const DEPENDENCY: Dependency = Dependency::Postgres;
        async fn flush(&self, items: &[u32]) -> Result<Vec<u32>, StoreError> {
            self.1.lock().unwrap().push(items.len());
            self.0.acquire().await.unwrap().forget();
            Ok(items.to_vec())
        }
    }

    #[tokio::test]
    async fn a_store_that_does_not_answer_holds_its_callers_back_and_loses_none() {
        let gate = Gate(Arc::new(Semaphore::new(0)), Arc::default());
        let items = Sizes { least: 2, first: 2, most: 2, ..Sizes::default() };
        let limits = Limits { items, in_flight: 1, backlog: 4, ..Limits::default() };
        let coalescer = Coalescer::spawn(gate.clone(), limits);
        let deadline = Instant::now() + Duration::from_secs(20);
        let calls: Vec<_> = (0..50)
            .map(|n| {
                let coalescer = coalescer.clone();
                tokio::spawn(async move { coalescer.call(n, deadline).await })
            })
            .collect();
        while gate.1.lock().unwrap().is_empty() || coalescer.calls.capacity() > 0 {
            assert!(
                Instant::now() < deadline,
                "the backlog has room for all: {}",
                coalescer.calls.capacity()
            );
            tokio::task::yield_now().await;
        }
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        // One batch in flight, one ready, four in the backlog: the others wait to enter.
        assert_eq!(gate.1.lock().unwrap().len(), 1);
        assert!(calls.iter().all(|call| !call.is_finished()) && coalescer.calls.capacity() == 0);
        gate.0.add_permits(50);
        for (n, call) in calls.into_iter().enumerate() {
            assert_eq!(call.await.unwrap().unwrap(), n as u32);
        }
        assert!(gate.1.lock().unwrap().iter().all(|len| *len <= 2), "{:?}", gate.1);
    }

    /// Takes a second, whatever it is given.
    #[derive(Clone, Default)]
    struct Second(Arc<Mutex<Vec<Vec<u32>>>>);

    #[async_trait]
    impl Batch for Second {
        type Item = u32;
        type Reply = u32;
        const OP: &'static str = "second";
        const DEPENDENCY: Dependency = Dependency::Postgres;
        async fn flush(&self, items: &[u32]) -> Result<Vec<u32>, StoreError> {
            self.0.lock().unwrap().push(items.to_vec());
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok(items.to_vec())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_neighbours_of_a_caller_whose_time_is_over_get_their_answers() {
        let store = Second::default();
        let coalescer = Coalescer::spawn(store.clone(), Limits::default());
        let now = Instant::now();
        let after = |ms| now + Duration::from_millis(ms);
        let (hasty, patient) = tokio::join!(coalescer.call(1, after(1)), coalescer.call(2, after(10_000)));
        assert_eq!(hasty.unwrap_err().class, Class::Timeout);
        assert_eq!(patient.unwrap(), 2);
        assert_eq!(*store.0.lock().unwrap(), [vec![1, 2], vec![2]]);
        assert!(now.elapsed() < Duration::from_millis(1100), "{:?}", now.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_hangs_gets_few_flushes_however_far_apart_the_deadlines_are() {
        let gate = Gate(Arc::new(Semaphore::new(0)), Arc::default());
        let coalescer = Coalescer::spawn(gate.clone(), Limits::default());
        let now = Instant::now();
        // One in each millisecond from the first to the hundredth, and one in each tenth of a second until the fifth second.
        let deadlines = (1..=100).chain((2..=50).map(|tenth| tenth * 100));
        let calls = deadlines.map(|ms| {
            let (coalescer, deadline) = (&coalescer, now + Duration::from_millis(ms));
            async move {
                let class = coalescer.call(0, deadline).await.map_err(|error| error.class);
                (class, Instant::now() <= deadline + Duration::from_millis(2))
            }
        });
        let answers = futures::future::join_all(calls).await;
        assert!(answers.iter().all(|answer| *answer == (Err(Class::Timeout), true)), "{answers:?}");
        let flushes = gate.1.lock().unwrap().len();
        // Each makes the time grow by a quarter: 39 from a millisecond to five seconds, and as many of the second batch at most.
        assert!(flushes <= 80, "{flushes}");
    }

    /// Takes 2 ms for each item.
    struct Slow(Arc<Mutex<Vec<usize>>>);

    #[async_trait]
    impl Batch for Slow {
        type Item = ();
        type Reply = ();
        const OP: &'static str = "slow";
        const DEPENDENCY: Dependency = Dependency::Postgres;
        async fn flush(&self, items: &[()]) -> Result<Vec<()>, StoreError> {
            self.0.lock().unwrap().push(items.len());
            tokio::time::sleep(Duration::from_millis(2) * items.len() as u32).await;
            Ok(items.to_vec())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn batches_shrink_until_the_store_answers_within_the_target() {
        let seen = Arc::new(Mutex::new(vec![]));
        let coalescer = Coalescer::spawn(Slow(Arc::clone(&seen)), Limits::default());
        let deadline = Instant::now() + Duration::from_secs(600);
        let callers: Vec<_> = (0..600)
            .map(|_| {
                let coalescer = coalescer.clone();
                tokio::spawn(async move {
                    for _ in 0..20 {
                        coalescer.call((), deadline).await.unwrap();
                    }
                })
            })
            .collect();
        for caller in callers {
            caller.await.unwrap();
        }
        let seen = seen.lock().unwrap();
        assert!(seen.contains(&128), "it begins with 128");
        // 100 ms are 50 items; a step above it is tried, and halved.
        let later = &seen[seen.len() / 4..];
        assert!(later.iter().all(|len| *len <= 58), "{later:?}");
        assert!(later.iter().sum::<usize>() / later.len() >= 20, "{later:?}");
    }
}
