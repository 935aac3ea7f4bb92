//! The queue between `embed` calls and the engines, which share one.
//!
//! A call waits here with its texts. Engines take a few texts from each call in turn (so that one
//! question is not stuck behind a book), turn them into ids, and lay these into `ready`. From there
//! they take batches that mix the texts of all calls. There is no thread that only distributes: an
//! engine that becomes free does whatever is most needed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::EmbedError;

/// Most tokens of one batch: enough rows for the multiplications to run at full speed, few enough that
/// a batch takes some 100 ms and its buffers a few MB.
pub(super) const BATCH_TOKENS: usize = 1024;
/// A batch is not made smaller than this to give another engine something to do.
const SMALLEST_SHARE: usize = 128;
/// Texts tokenised at one go.
const ROUND_TEXTS: usize = 16;
/// Texts that one call gets into a round before the next call has its turn.
const TEXTS_PER_TURN: usize = 4;

pub(super) type Answer = Result<Vec<Vec<f32>>, EmbedError>;

/// One `embed` call's result as it comes together. The first error ends the call.
struct Call {
    state: Mutex<CallState>,
}

struct CallState {
    vectors: Vec<Vec<f32>>,
    missing: usize,
    reply: Option<oneshot::Sender<Answer>>,
}

impl Call {
    fn is_over(&self) -> bool {
        // Closed: whoever awaited the answer has been dropped.
        lock(&self.state).reply.as_ref().is_none_or(oneshot::Sender::is_closed)
    }
}

/// A text with its place in its call, on the way to being a vector.
pub(super) struct Item<T> {
    pub(super) content: T,
    call: Arc<Call>,
    index: usize,
}

impl<T> Item<T> {
    pub(super) fn with<U>(self, content: U) -> Item<U> {
        Item { content, call: self.call, index: self.index }
    }

    /// The text's vector: the last of a call sends the answer.
    pub(super) fn finish(self, vector: Vec<f32>) {
        let mut state = lock(&self.call.state);
        state.vectors[self.index] = vector;
        state.missing -= 1;
        if state.missing == 0 {
            let vectors = std::mem::take(&mut state.vectors);
            send(&mut state, Ok(vectors));
        }
    }

    /// Ends the whole call with `error`, which gets this text's number if it is about the text.
    pub(super) fn fail(self, error: EmbedError) {
        let error = match error {
            EmbedError::BadInput { reason, .. } => EmbedError::BadInput { index: Some(self.index), reason },
            other => other,
        };
        send(&mut lock(&self.call.state), Err(error));
    }
}

fn send(state: &mut CallState, answer: Answer) {
    if let Some(reply) = state.reply.take()
        && reply.send(answer).is_err()
    {
        tracing::trace!("an embed call was dropped before its answer");
    }
}

/// What a free engine is to do next.
pub(super) enum Work {
    /// Turn these texts into ids, then give them to [`Queue::ready`] with the same round.
    Tokenise { round: u64, texts: Vec<Item<String>> },
    /// Turn these ids, at most about [`BATCH_TOKENS`], into vectors.
    Embed(Vec<Item<Vec<u32>>>),
}

#[derive(Default)]
struct State {
    /// Calls with texts not yet tokenised, in the order of their turns.
    calls: VecDeque<VecDeque<Item<String>>>,
    /// By round; within a round the longest first, so that the last batches are small and the engines
    /// finish together.
    ready: BTreeMap<(u64, Reverse<usize>, u64), Item<Vec<u32>>>,
    ready_tokens: usize,
    /// The next round's number, and the next item's, which keeps keys apart.
    round: u64,
    serial: u64,
    closed: bool,
}

pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    engines: usize,
}

impl Queue {
    pub(super) fn new(engines: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), engines }
    }

    /// Queues a call's texts (at least one) and never waits. Dropping the receiver cancels the call.
    pub(super) fn submit(&self, texts: Vec<String>) -> oneshot::Receiver<Answer> {
        let (reply, answer) = oneshot::channel();
        let missing = texts.len();
        let state = Mutex::new(CallState { vectors: vec![Vec::new(); missing], missing, reply: Some(reply) });
        let call = Arc::new(Call { state });
        let items = texts.into_iter().enumerate();
        let items = items.map(|(index, content)| Item { content, call: call.clone(), index }).collect();
        lock(&self.state).calls.push_back(items);
        self.changed.notify_all();
        answer
    }

    /// Lays tokenised texts ready for any engine.
    pub(super) fn ready(&self, round: u64, items: Vec<Item<Vec<u32>>>) {
        let mut state = lock(&self.state);
        for item in items {
            let tokens = item.content.len();
            let serial = state.serial;
            state.serial += 1;
            state.ready_tokens += tokens;
            state.ready.insert((round, Reverse(tokens), serial), item);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits for something to do. `None` once the queue is closed.
    pub(super) fn next(&self) -> Option<Work> {
        let mut state = lock(&self.state);
        loop {
            if state.closed {
                return None;
            }
            // Each engine should find a full batch, but no more is tokenised ahead than that, so that a
            // call that comes later does not wait long for its turn.
            if state.ready_tokens < self.engines * BATCH_TOKENS {
                let texts = state.take_round();
                if !texts.is_empty() {
                    let round = state.round;
                    state.round += 1;
                    return Some(Work::Tokenise { round, texts });
                }
            }
            if state.ready.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let share = state.ready_tokens.div_ceil(self.engines).clamp(SMALLEST_SHARE, BATCH_TOKENS);
            let batch = state.take_batch(share);
            // Empty if all that was ready belonged to dropped calls: others may wait behind them.
            if !batch.is_empty() {
                return Some(Work::Embed(batch));
            }
        }
    }

    /// Lets every engine stop after the work it has in hand; queued calls end without an answer.
    pub(super) fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        state.calls.clear();
        state.ready.clear();
        drop(state);
        self.changed.notify_all();
    }
}

impl State {
    /// Up to [`ROUND_TEXTS`] texts, a few from each call in turn.
    fn take_round(&mut self) -> Vec<Item<String>> {
        let mut texts = Vec::with_capacity(ROUND_TEXTS);
        while texts.len() < ROUND_TEXTS {
            let Some(mut call) = self.calls.pop_front() else { break };
            if call.front().is_none_or(|item| item.call.is_over()) {
                continue;
            }
            let turn = TEXTS_PER_TURN.min(call.len());
            texts.extend(call.drain(..turn));
            if !call.is_empty() {
                self.calls.push_back(call);
            }
        }
        texts
    }

    /// Texts in the order of `ready`, while their tokens fit; the first one always does.
    fn take_batch(&mut self, most_tokens: usize) -> Vec<Item<Vec<u32>>> {
        let mut batch = Vec::new();
        let mut total = 0;
        while let Some(entry) = self.ready.first_entry() {
            let tokens = entry.get().content.len();
            if !batch.is_empty() && total + tokens > most_tokens {
                break;
            }
            let item = entry.remove();
            self.ready_tokens -= tokens;
            if !item.call.is_over() {
                total += tokens;
                batch.push(item);
            }
        }
        batch
    }
}

/// No code panics while it holds one of these locks, and what they guard is never half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    use super::{BATCH_TOKENS, Queue, TEXTS_PER_TURN, Work};
    use crate::EmbedError;

    fn tokenise(queue: &Queue, tokens: usize) -> Vec<String> {
        let Some(Work::Tokenise { round, texts }) = queue.next() else { panic!("expected texts") };
        let names = texts.iter().map(|item| item.content.clone()).collect();
        queue.ready(round, texts.into_iter().map(|item| item.with(vec![0; tokens])).collect());
        names
    }

    fn texts(name: &str, count: usize) -> Vec<String> {
        (0..count).map(|n| format!("{name}{n}")).collect()
    }

    #[test]
    fn calls_take_turns_so_that_a_small_one_overtakes_a_big_one() {
        let queue = Queue::new(1);
        let _big = queue.submit(texts("big", 1000));
        let _small = queue.submit(texts("small", 1));
        let first = tokenise(&queue, 1);
        assert_eq!(first[TEXTS_PER_TURN], "small0", "{first:?}");
    }

    #[test]
    fn a_batch_holds_the_texts_of_several_calls_and_at_most_its_tokens() {
        let queue = Queue::new(1);
        let answers: Vec<_> = (0..4).map(|n| queue.submit(texts(&format!("call{n} "), 4))).collect();
        assert_eq!(tokenise(&queue, 100).len(), 16);
        let Some(Work::Embed(batch)) = queue.next() else { panic!("expected a batch") };
        assert_eq!(batch.len(), BATCH_TOKENS / 100);
        let Some(Work::Embed(rest)) = queue.next() else { panic!("expected the rest") };
        assert_eq!(batch.len() + rest.len(), 16);
        for item in batch.into_iter().chain(rest) {
            item.finish(vec![1.0]);
        }
        for answer in answers {
            assert_eq!(answer.blocking_recv().unwrap().unwrap(), vec![vec![1.0]; 4]);
        }
    }

    #[test]
    fn two_engines_share_what_one_batch_could_hold() {
        let queue = Queue::new(2);
        let _answer = queue.submit(texts("t", 8));
        tokenise(&queue, 128);
        for _ in 0..2 {
            let Some(Work::Embed(batch)) = queue.next() else { panic!("expected a batch") };
            assert!(batch.len() <= 4, "{}", batch.len());
        }
    }

    #[test]
    fn a_dropped_call_costs_no_more_work() {
        let queue = Queue::new(1);
        let dropped = queue.submit(texts("dropped", 100));
        tokenise(&queue, 10);
        drop(dropped);
        let _kept = queue.submit(texts("kept", 1));
        assert_eq!(tokenise(&queue, 10), ["kept0"]);
        let Some(Work::Embed(batch)) = queue.next() else { panic!("expected a batch") };
        assert_eq!(batch.len(), 1, "only the kept call's text is left");
    }

    #[test]
    fn a_call_behind_a_dropped_one_is_not_left_waiting() {
        let queue = Arc::new(Queue::new(1));
        let dropped = queue.submit(texts("dropped", 100));
        // So much is ready that no more is tokenised until some of it has been taken.
        tokenise(&queue, BATCH_TOKENS);
        drop(dropped);
        let _kept = queue.submit(texts("kept", 1));
        let (found, next) = mpsc::channel();
        let engine = queue.clone();
        let engine = std::thread::spawn(move || found.send(tokenise(&engine, 1)));
        let names = next.recv_timeout(Duration::from_secs(20));
        queue.close();
        assert_eq!(names.as_deref(), Ok(["kept0".to_owned()].as_slice()));
        engine.join().unwrap().unwrap();
    }

    #[test]
    fn one_bad_text_ends_its_own_call_and_names_itself() {
        let queue = Queue::new(1);
        let (bad, good) = (queue.submit(texts("bad", 2)), queue.submit(texts("good", 1)));
        let Some(Work::Tokenise { texts, .. }) = queue.next() else { panic!("expected texts") };
        for item in texts {
            match item.content.as_str() {
                "bad1" => item.fail(EmbedError::BadInput { index: None, reason: "r".to_owned() }),
                _ => item.finish(vec![1.0]),
            }
        }
        let refused = EmbedError::BadInput { index: Some(1), reason: "r".to_owned() };
        assert_eq!(bad.blocking_recv().unwrap(), Err(refused));
        assert!(good.blocking_recv().unwrap().is_ok());
    }

    #[test]
    fn closing_ends_engines_and_calls() {
        let queue = Queue::new(1);
        let answer = queue.submit(texts("t", 1));
        queue.close();
        assert!(queue.next().is_none());
        assert!(answer.blocking_recv().is_err(), "no answer, so the caller sees the end");
    }
}
