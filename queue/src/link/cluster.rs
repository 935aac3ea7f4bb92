//! The nodes of a Redis Cluster, and which of them serves which slot.
//!
//! The map comes from `CLUSTER SLOTS` of whichever node answers first. It is asked for again after a redirection or a
//! broken connection, by the next call and at most every 100 ms. A call that was redirected is sent again, because
//! the node that refused it ran nothing; a call that failed otherwise is not, because it may have run.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{
    StreamExt,
    future::join_all,
    stream::{self, FuturesUnordered},
};
use rand::seq::SliceRandom;
use redis::{Arg, Cmd, Pipeline, Value};

use super::{
    Answer, Call, Deadlines,
    node::{Fault, Node},
};
use crate::{
    address::Host,
    dial::Dialer,
    error::QueueError,
    scripts::Script,
    slots::{SLOTS, slot_of},
};

/// How many redirections one call follows: a stale map needs one, a slot that moves meanwhile two.
const REDIRECTIONS: usize = 4;
/// How often the map is asked for at most.
const REFRESH_PAUSE: Duration = Duration::from_millis(100);
/// Connections that `check` opens side by side.
const CHECKS_AT_ONCE: usize = 16;
/// No owner is known.
const NOBODY: u16 = u16::MAX;

pub(super) struct Cluster {
    dialer: Arc<Dialer>,
    seeds: Vec<Host>,
    deadlines: Deadlines,
    map: RwLock<Arc<Map>>,
    /// Something happened that the map doesn't explain.
    stale: AtomicBool,
    /// One caller asks for the map, the others wait for it and share what came of it.
    refreshing: tokio::sync::Mutex<Option<(Instant, Result<(), QueueError>)>>,
    nodes: Mutex<HashMap<Host, Arc<Node>>>,
}

/// Who owns each slot, as a place in `hosts`.
#[derive(Clone)]
struct Map {
    owners: Vec<u16>,
    hosts: Vec<Host>,
}

impl Map {
    fn from_ranges(ranges: Vec<(u16, u16, Host)>) -> Self {
        let mut map = Self { owners: vec![NOBODY; SLOTS], hosts: Vec::new() };
        for (from, to, host) in ranges {
            let place = map.place(host);
            for owner in map.owners.iter_mut().take(usize::from(to) + 1).skip(usize::from(from)) {
                *owner = place;
            }
        }
        map
    }

    fn place(&mut self, host: Host) -> u16 {
        let known = self.hosts.iter().position(|known| *known == host);
        known.unwrap_or_else(|| {
            self.hosts.push(host);
            self.hosts.len() - 1
        }) as u16
    }

    fn owner(&self, slot: u16) -> Option<&Host> {
        self.hosts.get(usize::from(*self.owners.get(usize::from(slot))?))
    }
}

impl Cluster {
    pub(super) fn new(dialer: Arc<Dialer>, seeds: Vec<Host>, deadlines: Deadlines) -> Self {
        Self {
            dialer,
            seeds,
            deadlines,
            map: RwLock::new(Arc::new(Map::from_ranges(Vec::new()))),
            stale: AtomicBool::new(true),
            refreshing: tokio::sync::Mutex::default(),
            nodes: Mutex::default(),
        }
    }

    pub(super) async fn check(&self) -> Result<(), QueueError> {
        self.refresh().await?;
        let masters: Vec<_> = self.map().hosts.iter().map(|host| self.node(host)).collect();
        let results: Vec<_> = stream::iter(masters)
            .map(|node| async move { node.run_id().await })
            .buffer_unordered(CHECKS_AT_ONCE)
            .collect()
            .await;
        let reached = results.iter().any(Result::is_ok);
        let error =
            results.into_iter().filter_map(Result::err).find(|error| !(reached && error.is_unavailable()));
        error.map_or(Ok(()), Err)
    }

    pub(super) async fn command(&self, command: &Cmd) -> Result<Answer, QueueError> {
        match key_of(command) {
            Some(key) => self.send(slot_of(key), Call::Command(command)).await,
            None => self.anywhere(command).await,
        }
    }

    pub(super) async fn script(
        &self,
        script: &Script,
        partition: &str,
        args: &[Vec<u8>],
    ) -> Result<Answer, QueueError> {
        self.send(slot_of(partition.as_bytes()), Call::Script { script, partition, args }).await
    }

    /// One pipeline for each node, side by side; the answers in the order of the commands.
    pub(super) async fn pipeline(&self, pipeline: &Pipeline) -> Result<Vec<Value>, QueueError> {
        let commands: Vec<&Cmd> = pipeline.cmd_iter().collect();
        let mut groups: BTreeMap<Host, Vec<usize>> = BTreeMap::new();
        let mut keyless = Vec::new();
        for (index, command) in commands.iter().enumerate() {
            match key_of(command) {
                Some(key) => groups.entry(self.owner(slot_of(key)).await?).or_default().push(index),
                None => keyless.push(index),
            }
        }
        match groups.first_entry() {
            Some(mut group) => group.get_mut().extend(keyless),
            None => {
                // Any node will do.
                if let Some(host) = self.hosts().await.into_iter().next() {
                    groups.insert(host, keyless);
                }
            }
        }
        let sent = groups.into_iter().map(|(host, indices)| {
            let node = self.node(&host);
            let commands = &commands;
            async move {
                let answers = node.pipeline(indices.iter().map(|index| commands[*index])).await;
                (node, indices, answers)
            }
        });
        let mut values = vec![Value::Nil; commands.len()];
        for (node, indices, answers) in join_all(sent).await {
            let answers = match answers {
                Ok(answers) => answers,
                Err(fault) => return Err(self.failed(fault)),
            };
            for (index, answer) in indices.into_iter().zip(answers) {
                values[index] = match (answer, key_of(commands[index])) {
                    (Ok(value), _) => value,
                    (Err(error), Some(key)) => {
                        let (slot, call) = (slot_of(key), Call::Command(commands[index]));
                        let next = self.follow(slot, node.fault(error))?;
                        self.send_from(next, slot, call).await?.value
                    }
                    (Err(error), None) => return Err(error.into()),
                };
            }
        }
        Ok(values)
    }

    /// The node that serves a key's slot.
    pub(super) async fn owner_of(&self, key: &str) -> Result<Arc<Node>, QueueError> {
        Ok(self.node(&self.owner(slot_of(key.as_bytes())).await?))
    }

    /// The masters in any order, then the nodes that the URL names.
    pub(super) async fn hosts(&self) -> Vec<Host> {
        if self.stale.load(Ordering::Acquire)
            && let Err(error) = self.refresh().await
        {
            tracing::debug!(%error, "the cluster's map is not known");
        }
        let mut hosts = self.map().hosts.clone();
        hosts.shuffle(&mut rand::rng());
        hosts.extend(self.seeds.iter().cloned());
        hosts
    }

    async fn send(&self, slot: u16, call: Call<'_>) -> Result<Answer, QueueError> {
        let first = (self.node(&self.owner(slot).await?), false);
        self.send_from(first, slot, call).await
    }

    async fn send_from(
        &self,
        first: (Arc<Node>, bool),
        slot: u16,
        call: Call<'_>,
    ) -> Result<Answer, QueueError> {
        let (mut node, mut asking) = first;
        for _ in 0..=REDIRECTIONS {
            let answer = if asking { node.call_asking(call).await } else { node.call(call).await };
            match answer {
                Ok(answer) => return Ok(answer),
                Err(fault) => (node, asking) = self.follow(slot, fault)?,
            }
        }
        Err(QueueError::Unavailable(format!("slot {slot} is on the move: the nodes send us to one another")))
    }

    /// Where to go after a redirection, and whether only for this call; any other fault is the call's error.
    fn follow(&self, slot: u16, fault: Fault) -> Result<(Arc<Node>, bool), QueueError> {
        match fault {
            Fault::Redirect { host, ask: true } => Ok((self.node(&host), true)),
            Fault::Redirect { host, ask: false } => {
                let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
                let mut changed = Map::clone(&map);
                let place = changed.place(host.clone());
                if let Some(owner) = changed.owners.get_mut(usize::from(slot)) {
                    *owner = place;
                }
                *map = Arc::new(changed);
                drop(map);
                // More slots may have moved.
                self.stale.store(true, Ordering::Release);
                Ok((self.node(&host), false))
            }
            other @ Fault::Error { .. } => Err(self.failed(other)),
        }
    }

    fn failed(&self, fault: Fault) -> QueueError {
        match fault {
            Fault::Error { error, broken } => {
                if broken {
                    self.stale.store(true, Ordering::Release);
                }
                error
            }
            Fault::Redirect { host, .. } => QueueError::Protocol(format!("sent to {host} without a key")),
        }
    }

    /// For commands without a key: the first node that answers.
    async fn anywhere(&self, command: &Cmd) -> Result<Answer, QueueError> {
        let nodes: Vec<_> = self.hosts().await.iter().map(|host| self.node(host)).collect();
        let mut calls: FuturesUnordered<_> =
            nodes.iter().map(|node| node.call(Call::Command(command))).collect();
        let mut last = QueueError::Unavailable("no node of the cluster is known".to_owned());
        while let Some(answer) = calls.next().await {
            match answer {
                Ok(answer) => return Ok(answer),
                Err(fault) => last = self.failed(fault),
            }
        }
        Err(last)
    }

    async fn owner(&self, slot: u16) -> Result<Host, QueueError> {
        let mut refreshed = Ok(());
        if self.stale.load(Ordering::Acquire) || self.map().owner(slot).is_none() {
            refreshed = self.refresh().await;
        }
        if let Some(host) = self.map().owner(slot) {
            // An old map is better than none.
            return Ok(host.clone());
        }
        refreshed?;
        Err(QueueError::Unavailable(format!("no node of the cluster serves slot {slot}")))
    }

    async fn refresh(&self) -> Result<(), QueueError> {
        let mut last = self.refreshing.lock().await;
        if let Some((at, result)) = &*last
            && at.elapsed() < REFRESH_PAUSE
        {
            return result.clone();
        }
        // Before asking: what happens meanwhile counts for the next time.
        self.stale.store(false, Ordering::Release);
        let result = self.ask().await;
        if result.is_err() {
            self.stale.store(true, Ordering::Release);
        }
        *last = Some((Instant::now(), result.clone()));
        result
    }

    /// Takes the map from the first node that has one.
    async fn ask(&self) -> Result<(), QueueError> {
        let mut hosts = self.map().hosts.clone();
        hosts.extend(self.seeds.iter().filter(|seed| !self.map().hosts.contains(seed)).cloned());
        let mut command = redis::cmd("CLUSTER");
        command.arg("SLOTS");
        let command = &command;
        let mut asked: FuturesUnordered<_> = hosts
            .iter()
            .map(|host| {
                let node = self.node(host);
                async move { (host, node.call(Call::Command(command)).await) }
            })
            .collect();
        let mut problems = Vec::new();
        while let Some((host, answer)) = asked.next().await {
            match answer {
                Ok(answer) => match slot_ranges(&answer.value, host) {
                    Some(ranges) if !ranges.is_empty() => {
                        drop(asked);
                        self.adopt(Map::from_ranges(ranges));
                        return Ok(());
                    }
                    _ => problems.push(format!("{host} knows no slots")),
                },
                // A server that may evict, a wrong password: waiting won't help.
                Err(Fault::Error { error, .. }) if !error.is_unavailable() => return Err(error),
                Err(Fault::Error { error: QueueError::Unavailable(text), .. }) => problems.push(text),
                Err(fault) => problems.push(format!("{host}: {fault:?}")),
            }
        }
        Err(QueueError::Unavailable(format!(
            "no node of the cluster knows its slots: {}",
            problems.join("; ")
        )))
    }

    fn adopt(&self, map: Map) {
        // The connections of nodes that left are closed.
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.retain(|host, _| map.hosts.contains(host) || self.seeds.contains(host));
        drop(nodes);
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(map);
    }

    fn map(&self) -> Arc<Map> {
        Arc::clone(&self.map.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn node(&self, host: &Host) -> Arc<Node> {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = nodes.get(host) {
            return Arc::clone(node);
        }
        let node = Arc::new(Node::new(Arc::clone(&self.dialer), Some(host.clone()), self.deadlines));
        nodes.insert(host.clone(), Arc::clone(&node));
        node
    }
}

/// The key of one of our commands: the first argument, but for scripts, and for commands without any.
fn key_of(command: &Cmd) -> Option<&[u8]> {
    let mut words = command.args_iter().map(|word| match word {
        Arg::Simple(word) => word,
        _ => b"",
    });
    match words.next()?.to_ascii_uppercase().as_slice() {
        b"PING" | b"TIME" | b"INFO" | b"CLUSTER" => None,
        b"EVAL" | b"EVALSHA" => words.nth(2),
        _ => words.next(),
    }
}

/// Reads what `CLUSTER SLOTS` returns: ranges of slots and the master of each. `asked` stands for a node that knows
/// no name of its own.
fn slot_ranges(answer: &Value, asked: &Host) -> Option<Vec<(u16, u16, Host)>> {
    let Value::Array(ranges) = answer else { return None };
    ranges
        .iter()
        .map(|range| {
            let Value::Array(fields) = range else { return None };
            let [Value::Int(from), Value::Int(to), Value::Array(master), ..] = fields.as_slice() else {
                return None;
            };
            let [name, Value::Int(port), ..] = master.as_slice() else { return None };
            let name = match name {
                Value::BulkString(name) => String::from_utf8_lossy(name).into_owned(),
                Value::SimpleString(name) => name.clone(),
                _ => String::new(),
            };
            let name = if matches!(name.as_str(), "" | "?") { asked.name.clone() } else { name };
            let host = Host { name, port: u16::try_from(*port).ok()? };
            Some((u16::try_from(*from).ok()?, u16::try_from(*to).ok()?, host))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn host(name: &str, port: u16) -> Host {
        Host { name: name.to_owned(), port }
    }

    #[test]
    fn rule_21_a_command_goes_to_the_owner_of_its_key() {
        let mut command = redis::cmd("hget");
        command.arg("{p:q:0}:j:1").arg("s");
        assert_eq!(key_of(&command), Some(&b"{p:q:0}:j:1"[..]));
        let mut command = redis::cmd("EVALSHA");
        command.arg("abc").arg(1).arg("{p:q:0}").arg("{x}");
        assert_eq!(key_of(&command), Some(&b"{p:q:0}"[..]));
        assert_eq!(key_of(&redis::cmd("TIME")), None);
    }

    #[test]
    fn the_map_is_read_with_nodes_that_know_no_name_and_slots_that_nobody_serves() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let range = |from, to, name: Value, port| {
            Value::Array(vec![
                Value::Int(from),
                Value::Int(to),
                Value::Array(vec![name, Value::Int(port), text("id"), Value::Array(vec![])]),
            ])
        };
        let answer = Value::Array(vec![
            range(0, 99, text("10.0.0.1"), 1),
            range(100, 199, Value::Nil, 2),
            range(300, 16383, text("10.0.0.1"), 1),
        ]);
        let map = Map::from_ranges(slot_ranges(&answer, &host("asked", 9)).unwrap());
        assert_eq!(map.owner(99), Some(&host("10.0.0.1", 1)));
        assert_eq!(map.owner(100), Some(&host("asked", 2)));
        assert_eq!(map.owner(200), None);
        assert_eq!(map.owner(16383), Some(&host("10.0.0.1", 1)));
        assert_eq!(map.hosts.len(), 2);
        assert!(slot_ranges(&Value::Okay, &host("asked", 9)).is_none());
    }
}
