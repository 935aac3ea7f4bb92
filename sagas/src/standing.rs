//! What stands of a run, for the person who has to deal with a parked one: its errors, what became of its steps, and what
//! each store holds.

use serde::Serialize;
use uuid::Uuid;

use crate::{
    error::StoreError,
    kinds::Stores,
    stores::postgres::{
        inspect::{SagaView, StepView},
        parked::RunVersion,
    },
};

/// What became of a step's effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// It was done and not undone.
    Stands,
    /// It failed, or its undoing did: some of it may stand.
    MayStand,
    /// It was undone.
    Undone,
}

/// A step of a run and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StepStanding {
    /// Its name.
    pub step: String,
    /// What became of its effect, as the log tells it.
    pub effect: Effect,
    /// The last error, in either direction.
    pub error: Option<String>,
}

/// A version of a run and what the stores hold of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VersionStanding {
    /// Its row, chunk rows and text in Postgres.
    #[serde(flatten)]
    pub row: RunVersion,
    /// Points in its collection; `None`: the vector store could not be asked.
    pub points: Option<usize>,
    /// Whether the cache has an entry of it; `None`: the cache could not be asked.
    pub cached: Option<bool>,
    /// Why a store could not be asked.
    pub unknown: Vec<String>,
}

/// What stands of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Standing {
    /// What keeps it from its end, outermost first; then why it had turned back.
    pub errors: Vec<String>,
    /// Its steps in the order they first ran. A delivery that was lost has logged none of its own.
    pub steps: Vec<StepStanding>,
    /// Its versions. Effects of a saga of one's own elsewhere are not among them.
    pub versions: Vec<VersionStanding>,
}

/// Points of a version that are looked for at once.
const PAGE: usize = 1000;

impl Stores {
    /// Looks at what stands of a run in each store. A store that does not answer is named in the answer; only Postgres
    /// has to.
    pub async fn standing(&self, saga: &SagaView) -> Result<Standing, StoreError> {
        let log = self.postgres.steps(saga.id).await?;
        let mut versions = vec![];
        for row in self.postgres.run_versions(saga.id).await? {
            let mut unknown = vec![];
            let points = self.points_of(&row).await.map_err(|error| unknown.push(error.to_string())).ok();
            let cached = self.cache.peek(row.id).await.map_err(|error| unknown.push(error.to_string())).ok();
            versions.push(VersionStanding {
                row,
                points,
                cached: cached.map(|entry| entry.is_some()),
                unknown,
            });
        }
        Ok(Standing { errors: errors(saga), steps: steps(&log), versions })
    }

    async fn points_of(&self, version: &RunVersion) -> Result<usize, StoreError> {
        let ids: Vec<Uuid> =
            (0..version.chunk_count).map(|no| crate::stores::point_id(version.id, no)).collect();
        let mut points = 0;
        for page in ids.chunks(PAGE) {
            points += self.vectors.points_by_id(&version.collection, page, false).await?.len();
        }
        Ok(points)
    }
}

fn errors(saga: &SagaView) -> Vec<String> {
    let failure = saga.verdict.as_ref().and_then(|verdict| verdict.get("failure"));
    let turned_back = failure.and_then(|failure| failure.get("error")?.as_str()).map(str::to_owned);
    let mut errors: Vec<String> = saga.error.clone().into_iter().chain(turned_back).collect();
    errors.dedup();
    errors
}

fn steps(log: &[StepView]) -> Vec<StepStanding> {
    let mut steps: Vec<StepStanding> = vec![];
    for entry in log {
        let effect = match (entry.direction.as_str(), entry.state.as_str()) {
            ("compensate", "succeeded") => Effect::Undone,
            ("execute", "succeeded") => Effect::Stands,
            _ => Effect::MayStand,
        };
        match steps.iter_mut().find(|known| known.step == entry.step_name) {
            Some(known) => {
                // An undo that failed leaves what was done by then.
                if !(known.effect == Effect::Stands && effect == Effect::MayStand) {
                    known.effect = effect;
                }
                known.error = entry.error.clone().or(known.error.take());
            }
            None => {
                steps.push(StepStanding {
                    step: entry.step_name.clone(),
                    effect,
                    error: entry.error.clone(),
                });
            }
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use chrono::Utc;

    use super::*;

    fn entry(step: &str, direction: &str, error: Option<&str>) -> StepView {
        StepView {
            fence: 1,
            seq: 0,
            step_name: step.to_owned(),
            direction: direction.to_owned(),
            state: if error.is_some() { "failed" } else { "succeeded" }.to_owned(),
            attempts: 1,
            started_at: Utc::now(),
            ended_at: Utc::now(),
            error: error.map(str::to_owned),
        }
    }

    #[test]
    fn the_last_word_on_each_step_counts_and_a_failed_undo_undoes_nothing() {
        let log = [
            entry("stage", "execute", None),
            entry("vectors", "execute", None),
            entry("cache", "execute", None),
            entry("publish", "execute", Some("refused")),
            entry("cache", "compensate", None),
            entry("vectors", "compensate", Some("no right to")),
        ];
        let told: Vec<(String, Effect)> = steps(&log).into_iter().map(|s| (s.step, s.effect)).collect();
        assert_eq!(
            told,
            [
                ("stage".to_owned(), Effect::Stands),
                ("vectors".to_owned(), Effect::Stands),
                ("cache".to_owned(), Effect::Undone),
                ("publish".to_owned(), Effect::MayStand),
            ]
        );
    }
}
