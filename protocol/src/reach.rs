//! The whole graph of reachable states, for two questions that a search for bad states can't answer: can every state
//! still come to a good end, and does each answer really occur?
//!
//! Stateright's `eventually` looks at paths without cycles only. Here a heartbeat is a cycle, so the question is asked as
//! *from every reachable state some continuation ends every job* (AG EF in CTL). Under fair actions that is the same as
//! ending: the graph is finite, and everything that only delays is bounded or returns to a state seen before.

use std::{
    collections::{BTreeMap, HashMap},
    mem::discriminant,
};

use crate::{Action, Outcome, Protocol, State};

/// What the graph says.
#[derive(Debug)]
pub struct Reach {
    /// Reachable states.
    pub states: usize,
    /// Transitions between them.
    pub steps: usize,
    /// How often each action got each answer, by the action's name.
    pub answers: BTreeMap<(String, Outcome), u64>,
    /// Whether some state satisfied each fact of [`FACTS`].
    pub facts: BTreeMap<&'static str, bool>,
    /// The shortest way to a state from which nothing leads to the end of every job.
    pub stuck: Option<Vec<Action>>,
}

/// A name, and whether a state shows it.
pub type Fact = (&'static str, fn(&State) -> bool);

/// Facts of states that must be reachable.
pub const FACTS: &[Fact] = &[
    ("Redis has lost an unfinished job", State::has_really_lost),
    ("two workers work on one job", State::has_a_zombie),
    ("an ended job waits in Redis", State::offers_an_ended_job),
];

/// Explores every state. Needs about 250 bytes for each.
pub fn explore(model: &Protocol) -> Reach {
    let start = State::default();
    let mut numbers: HashMap<State, u32> = HashMap::from([(start, 0)]);
    let mut order = vec![start];
    let mut parents: Vec<(u32, Option<Action>)> = vec![(0, None)];
    let mut edges: Vec<(u32, u32)> = Vec::new();
    let mut counts: HashMap<(std::mem::Discriminant<Action>, Outcome), (Action, u64)> = HashMap::new();
    let mut facts: BTreeMap<&'static str, bool> = FACTS.iter().map(|(name, _)| (*name, false)).collect();
    let mut actions = Vec::new();
    let mut next = 0;
    while let Some(state) = order.get(next).copied() {
        for (name, holds) in FACTS {
            if holds(&state) {
                facts.insert(name, true);
            }
        }
        actions.clear();
        model.possible(&state, &mut actions);
        for action in &actions {
            let Some((after, outcome)) = model.apply(&state, *action) else { continue };
            counts.entry((discriminant(action), outcome)).or_insert((*action, 0)).1 += 1;
            if after == state {
                continue;
            }
            let number = *numbers.entry(after).or_insert_with(|| {
                order.push(after);
                parents.push((next as u32, Some(*action)));
                order.len() as u32 - 1
            });
            edges.push((number, next as u32));
        }
        next += 1;
    }
    drop(numbers);
    let stuck = first_stuck(model, &order, &mut edges).map(|state| way_to(&parents, state));
    let answers = counts.into_values_named();
    Reach { states: order.len(), steps: edges.len(), answers, facts, stuck }
}

/// The first state from which no settled one can be reached.
fn first_stuck(model: &Protocol, order: &[State], edges: &mut [(u32, u32)]) -> Option<u32> {
    edges.sort_unstable();
    let mut first = vec![0_usize; order.len() + 1];
    for (to, _) in edges.iter() {
        first[*to as usize + 1] += 1;
    }
    for state in 0..order.len() {
        first[state + 1] += first[state];
    }
    let mut good: Vec<bool> = order.iter().map(|state| state.is_settled(model.bounds.jobs)).collect();
    let mut todo: Vec<usize> = (0..order.len()).filter(|state| good[*state]).collect();
    while let Some(state) = todo.pop() {
        for (_, from) in &edges[first[state]..first[state + 1]] {
            let from = *from as usize;
            if !good[from] {
                good[from] = true;
                todo.push(from);
            }
        }
    }
    good.iter().position(|good| !good).map(|state| state as u32)
}

fn way_to(parents: &[(u32, Option<Action>)], mut state: u32) -> Vec<Action> {
    let mut way = Vec::new();
    while let (parent, Some(action)) = parents[state as usize] {
        way.push(action);
        state = parent;
    }
    way.reverse();
    way
}

trait Named {
    fn into_values_named(self) -> BTreeMap<(String, Outcome), u64>;
}

impl<K> Named for HashMap<(K, Outcome), (Action, u64)> {
    fn into_values_named(self) -> BTreeMap<(String, Outcome), u64> {
        self.into_iter().map(|((_, outcome), (action, count))| ((action.name(), outcome), count)).collect()
    }
}

impl Action {
    /// The action's name without its fields.
    pub fn name(&self) -> String {
        let text = format!("{self:?}");
        text.split([' ', '{']).next().unwrap_or_default().to_owned()
    }
}
