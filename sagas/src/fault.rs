//! Fault points, for tests only: built in with the feature `faults`, absent otherwise.
//!
//! `FLOTILLA_FAULTS="ingest.vectors.after=kill;ingest.cache.before=error*3"` makes the named points act; each acts as often
//! as its number says (default once) over all processes that share `FLOTILLA_FAULTS_DIR`, where each firing leaves a file.
//! Actions: `kill` (SIGKILL of this process), `stop` (SIGSTOP), `hang` (never returns), `error` (transient), `permanent`,
//! `unavailable`.
//!
//! `FLOTILLA_FAULTS_TRACE` names a file to which each point is added when it is passed, armed or not: run a saga once, there or
//! back, and the file lists its points.
//!
//! `FLOTILLA_FAULTS_STEP_MS` is the longest time of a step's try, there and back, so that no test waits for a minute.
//!
//! `FLOTILLA_FAULTS_PAGE` is the most points that one request stores, so that a document's points are there in part meanwhile.
//!
//! `FLOTILLA_UNKNOWN_KIND` names a kind that this process is not to know, as if it were an older release.
//!
//! `FLOTILLA_FAULTS_DOCUMENT` narrows them to one document's jobs: then only points around steps act, because those inside
//! store writes know no single job.

/// The points inside store writes: right before their commit; where a write is one statement that commits by itself, before its
/// reply is heard; where it is several, between them. And those around the writes that no step's call makes. Beside those around each step that [`Engine::fault_points`](crate::engine::Engine::fault_points)
/// names, and those around each store call (see [`StepContext::call`](crate::engine::StepContext::call)). The ingest ones are
/// shared by `embed_document`.
pub const INSIDE: [&str; 28] = [
    "ingest.stage.inside",
    "ingest.unstage.inside",
    "ingest.vectors.inside",
    "ingest.publish.inside",
    "delete.tombstone.inside",
    "delete.erase.inside",
    "delete.cache.inside",
    "engine.take.inside",
    "engine.begin.inside",
    "engine.keep.inside",
    "engine.timer.inside",
    "engine.signal.inside",
    "engine.children.inside",
    "engine.cancel_children.inside",
    "engine.suspend.before",
    "engine.suspend.inside",
    "engine.suspend.after",
    "engine.pivot.inside",
    "engine.turn.inside",
    "engine.complete.inside",
    "engine.finish.inside",
    "engine.park.before",
    "engine.park.inside",
    "engine.park.after",
    "engine.release.before",
    "engine.release.inside",
    "engine.release.after",
    "probe.effect.inside",
];

/// Acts if the environment arms this point. Only in a function that returns a `Result` with an error made from a
/// [`StoreError`](crate::error::StoreError).
#[macro_export]
macro_rules! fault_point {
    ($name:expr) => {
        #[cfg(feature = "faults")]
        $crate::fault::point($name, None).await?;
    };
    // Around a step of the job with this payload.
    ($name:expr, $payload:expr) => {
        #[cfg(feature = "faults")]
        $crate::fault::point($name, Some($payload)).await?;
    };
}

/// A statement that writes under a fence, and the fence's predicate in it. The test of the tests takes the predicate out: with
/// the feature `faults`, `FLOTILLA_UNFENCED=stage.rs:86` makes it `true` in the statement that is written, or in [`lock_alive`] for
/// the transaction that begins, at that line of `stores/postgres`.
///
/// [`lock_alive`]: crate::stores::postgres
#[macro_export]
macro_rules! fenced_sql {
    ($sql:expr, $predicate:literal) => {{
        #[cfg(feature = "faults")]
        let sql =
            sqlx::AssertSqlSafe($crate::fault::unfenced($sql, $predicate, std::panic::Location::caller()));
        #[cfg(not(feature = "faults"))]
        let sql = $sql;
        sql
    }};
}

/// The statement, without its fence if the environment asks for that at this place.
#[cfg(feature = "faults")]
pub(crate) fn unfenced(sql: &str, predicate: &str, site: &std::panic::Location<'_>) -> String {
    static UNFENCED: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var("FLOTILLA_UNFENCED").ok());
    let file = site.file().rsplit('/').next().unwrap_or_default();
    match UNFENCED.as_deref() {
        Some(unfenced) if unfenced == format!("{file}:{}", site.line()) => sql.replace(predicate, "true"),
        _ => sql.to_owned(),
    }
}

/// Rules that the environment can take out with `FLOTILLA_WITHOUT=publish.order`, for the tests of the tests: the order of jobs on
/// one document, what a re-embedding replaces, a cancel before the pivot, the order of a deletion, and that the decision to
/// compensate is in the log before the first compensation.
pub const RULES: [&str; 5] =
    ["publish.order", "publish.replaces", "publish.cancel", "bury.order", "engine.turn"];

/// Whether this rule is to be broken. Never without the feature `faults`.
#[cfg(not(feature = "faults"))]
pub(crate) const fn without(_: &str) -> bool {
    false
}

/// Whether this rule is to be broken.
#[cfg(feature = "faults")]
pub(crate) fn without(rule: &str) -> bool {
    static WITHOUT: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var("FLOTILLA_WITHOUT").ok());
    debug_assert!(RULES.contains(&rule), "{rule} is not in the list");
    WITHOUT.as_deref() == Some(rule)
}

/// The time that a step's try has, which the environment may shorten.
pub(crate) fn step_timeout(timeout: std::time::Duration) -> std::time::Duration {
    #[cfg(feature = "faults")]
    let timeout = {
        static LONGEST: std::sync::LazyLock<Option<u64>> =
            std::sync::LazyLock::new(|| std::env::var("FLOTILLA_FAULTS_STEP_MS").ok()?.parse().ok());
        LONGEST.map_or(timeout, |longest| timeout.min(std::time::Duration::from_millis(longest)))
    };
    timeout
}

/// Points in one request, which the environment may lessen: so that also a short document's come in several.
pub(crate) fn page(most: usize) -> usize {
    #[cfg(feature = "faults")]
    let most = {
        static LESS: std::sync::LazyLock<Option<usize>> =
            std::sync::LazyLock::new(|| std::env::var("FLOTILLA_FAULTS_PAGE").ok()?.parse().ok());
        LESS.map_or(most, |less| most.min(less.max(1)))
    };
    most
}

/// The kind that this process is not to know.
#[cfg(feature = "faults")]
pub(crate) fn unknown_kind() -> Option<&'static str> {
    static KIND: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var("FLOTILLA_UNKNOWN_KIND").ok());
    KIND.as_deref()
}

#[cfg(feature = "faults")]
pub use armed::point;

#[cfg(feature = "faults")]
mod armed {
    use std::{path::PathBuf, sync::LazyLock};

    use crate::error::{Class, Dependency, StoreError};

    struct Arming {
        point: String,
        action: String,
        times: u32,
    }

    static ARMED: LazyLock<Vec<Arming>> = LazyLock::new(|| {
        std::env::var("FLOTILLA_FAULTS")
            .unwrap_or_default()
            .split(';')
            .filter_map(|part| part.split_once('='))
            .map(|(point, action)| {
                let (action, times) = action.split_once('*').unwrap_or((action, "1"));
                Arming {
                    point: point.trim().to_owned(),
                    action: action.to_owned(),
                    times: times.parse().unwrap_or(1),
                }
            })
            .collect()
    });

    /// Whether one of the firings is still free; the file system decides between processes.
    fn claim(arming: &Arming) -> bool {
        let Some(dir) = std::env::var_os("FLOTILLA_FAULTS_DIR").map(PathBuf::from) else { return true };
        (0..arming.times).any(|n| {
            std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(dir.join(format!("{}.{n}", arming.point)))
                .is_ok()
        })
    }

    static DOCUMENT: LazyLock<Option<String>> =
        LazyLock::new(|| std::env::var("FLOTILLA_FAULTS_DOCUMENT").ok());

    static TRACE: LazyLock<Option<PathBuf>> =
        LazyLock::new(|| std::env::var_os("FLOTILLA_FAULTS_TRACE").map(PathBuf::from));

    /// Adds the point to the trace. One write of one line each, so that threads don't mix theirs.
    fn trace(name: &str, path: &PathBuf) -> std::io::Result<()> {
        use std::io::Write;
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
        file.write_all(format!("{name}\n").as_bytes())
    }

    /// Acts if armed, for the job with this payload if it is narrowed to one document; see the module.
    pub async fn point(name: &str, payload: Option<&serde_json::Value>) -> Result<(), StoreError> {
        use nix::sys::signal::{Signal, raise};
        if let Some(path) = TRACE.as_ref() {
            trace(name, path)
                .map_err(|e| StoreError::new(Dependency::Postgres, Class::Permanent, e.to_string()))?;
        }
        if let Some(document) = DOCUMENT.as_deref()
            && payload.and_then(|p| p.get("document")?.as_str()) != Some(document)
        {
            return Ok(());
        }
        let Some(arming) = ARMED.iter().find(|arming| arming.point == name) else { return Ok(()) };
        if !claim(arming) {
            return Ok(());
        }
        tracing::warn!(point = name, action = arming.action, "fault point acts");
        let error = |class| Err(StoreError::new(Dependency::Postgres, class, format!("fault point {name}")));
        match arming.action.as_str() {
            "kill" => {
                raise(Signal::SIGKILL)
                    .map_err(|e| StoreError::new(Dependency::Postgres, Class::Permanent, e.to_string()))?;
                std::future::pending().await
            }
            "stop" => raise(Signal::SIGSTOP)
                .map_err(|e| StoreError::new(Dependency::Postgres, Class::Permanent, e.to_string())),
            "hang" => std::future::pending().await,
            "permanent" => error(Class::Permanent),
            "unavailable" => error(Class::Unavailable),
            _ => error(Class::Transient),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    /// The points with a name of their own that the files below a folder have.
    fn points_in(folder: &Path, points: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                points_in(&path, points);
            } else {
                let text = std::fs::read_to_string(path).unwrap();
                let named = text.split("fault_point!(\"").skip(1).filter_map(|rest| rest.split('"').next());
                points.extend(named.map(str::to_owned));
            }
        }
    }

    #[test]
    fn every_point_with_a_name_of_its_own_is_in_the_list_that_the_matrix_goes_through() {
        let mut points = BTreeSet::new();
        points_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut points);
        // Of the batches' collector, which no saga passes.
        assert!(points.remove("collector.fold.inside"));
        assert_eq!(points, super::INSIDE.iter().map(|point| (*point).to_owned()).collect());
    }
}
