//! Postgres: the ledger, the saga log, documents and dead letters. Every SQL statement of the project is below here.
//!
//! Rules that all files keep: a saga's write happens in a transaction that holds its job's row locked under the fence
//! ([`lock_alive`]); rows are locked in id order and tables in the order documents, versions, sagas, jobs, where a file
//! that takes only the job's lock may take it first, because nothing else locks that saga's rows without it.

pub mod accept;
pub mod audit;
pub mod auditing;
pub mod batches;
pub mod classes;
pub mod collecting;
pub mod compensation;
pub mod control;
pub mod dead_letters;
pub mod deletion;
pub mod documents;
pub mod ending;
pub mod events;
pub mod fenced;
pub mod forward;
pub mod inspect;
pub mod janitor;
pub mod ledger;
pub mod parked;
pub mod plain;
pub mod policies;
#[cfg(feature = "faults")]
mod probe;
pub mod progress;
pub mod publish;
pub mod refusals;
pub mod relay;
pub mod retention;
pub mod schedules;
pub mod sealing;
pub mod stage;
pub mod take;
pub mod tenants;
pub mod waits;

use std::{collections::HashMap, str::FromStr, time::Duration};

use queue::JobId;
use sqlx::{
    PgConnection, PgPool, Postgres as Db, Row, Transaction,
    migrate::Migrator,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use uuid::Uuid;

use crate::{
    encryption::PayloadCipher,
    error::{Class, Dependency, StoreError},
};

/// The migrations, built into the binary.
pub static MIGRATOR: Migrator = sqlx::migrate!("../migrations");

/// The schema that holds every table, so that Flotilla can live in a database with others.
pub const SCHEMA: &str = "flotilla";

/// The number that only grows, granted by Postgres with each take; every write of a saga carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Fence(pub i64);

/// How to connect.
#[derive(Debug, Clone)]
pub struct PostgresConfig {
    /// `postgres://…`, from `DATABASE_URL`.
    pub url: String,
    /// Connections of this process at most.
    pub max_connections: u32,
    /// No reply within this time counts as a time-out. The server is told to give up the statement then, too.
    pub call_timeout: Duration,
}

impl PostgresConfig {
    /// The defaults: 8 connections, 5 s.
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), max_connections: 8, call_timeout: Duration::from_secs(5) }
    }
}

/// The handle to Postgres; clones share one pool.
#[derive(Debug, Clone)]
pub struct Postgres {
    pool: PgPool,
    call_timeout: Duration,
    cipher: PayloadCipher,
}

impl Postgres {
    /// Makes the pool without connecting; the first call connects. Fails for an unreadable URL.
    pub fn lazy(config: &PostgresConfig) -> Result<Self, StoreError> {
        let options = PgConnectOptions::from_str(&config.url)
            .map_err(|e| {
                StoreError::new(
                    Dependency::Postgres,
                    Class::Permanent,
                    format!("DATABASE_URL can't be read: {e}"),
                )
            })?
            .application_name("flotilla")
            .options([
                ("search_path", SCHEMA.to_owned()),
                // Look-ups by index, also in tables that are small as yet (docs/decisions/0055-one-plan-for-one-job-and-for-many.md).
                ("random_page_cost", "1.1".to_owned()),
                // The server ends what the client has given up, and a dead client's locks.
                ("statement_timeout", config.call_timeout.as_millis().to_string()),
                ("idle_in_transaction_session_timeout", (config.call_timeout * 2).as_millis().to_string()),
                ("tcp_user_timeout", (config.call_timeout * 2).as_millis().to_string()),
            ]);
        let pool = PgPoolOptions::new()
            .max_connections(config.max_connections)
            .acquire_timeout(config.call_timeout)
            .idle_timeout(Duration::from_secs(300))
            .test_before_acquire(false)
            .before_acquire(|connection, used| {
                Box::pin(async move { Ok(used.idle_for < ASK_AFTER || is_usable(connection).await?) })
            })
            .connect_lazy_with(options);
        Ok(Self { pool, call_timeout: config.call_timeout, cipher: PayloadCipher::default() })
    }

    /// Connects once to see that the server answers and may be written to, within the call's time-out.
    pub async fn connect(config: &PostgresConfig) -> Result<Self, StoreError> {
        let this = Self::lazy(config)?;
        this.answers_within(config.call_timeout).await?;
        Ok(this)
    }

    /// Begins a transaction, in a task of its own: one whose `BEGIN` was given up before its answer came (a time-out, a lease
    /// that was lost) would stay open on its connection without sqlx knowing of it, and what the next user writes would be
    /// lost with it, or refused if it began read-only.
    pub async fn begin(&self) -> Result<Transaction<'static, Db>, sqlx::Error> {
        self.begin_with("BEGIN").await
    }

    /// As [`begin`](Self::begin), with a statement in place of `BEGIN`.
    #[expect(clippy::disallowed_methods, reason = "this is the way that is left")]
    pub async fn begin_with(&self, statement: &'static str) -> Result<Transaction<'static, Db>, sqlx::Error> {
        let pool = self.pool.clone();
        // It fails to end only together with the runtime.
        tokio::spawn(async move { pool.begin_with(statement).await })
            .await
            .map_err(|_| sqlx::Error::WorkerCrashed)?
    }

    /// A transaction that reads one snapshot, with time for all of a table.
    pub(crate) async fn snapshot(&self) -> Result<Transaction<'static, Db>, sqlx::Error> {
        let mut tx = self.begin().await?;
        sqlx::raw_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY").execute(&mut *tx).await?;
        sqlx::raw_sql("SET LOCAL statement_timeout = '120s'").execute(&mut *tx).await?;
        Ok(tx)
    }

    /// A connection on which the server has just answered, and may be written to: what fails here has begun nothing. Those that are
    /// of no use are closed.
    pub async fn reach(&self) -> Result<PoolConnection<Db>, StoreError> {
        // One more than the pool holds, so that the last at least was made just now.
        for _ in 0..=self.pool.options().get_max_connections() {
            let mut connection = self.pool.acquire().await?;
            match is_usable(&mut connection).await {
                Ok(true) => return Ok(connection),
                Ok(false) => {}
                Err(error) => tracing::debug!(%error, "a connection to Postgres is dead"),
            }
            connection.close_on_drop();
        }
        Err(away(
            "no connection to the server is of use: it may only be read from, or ends those that it has taken",
        ))
    }

    /// The pool, for read-only tools and tests; transactions are begun by [`begin`](Self::begin).
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// No reply within this time is a time-out.
    pub fn call_timeout(&self) -> Duration {
        self.call_timeout
    }

    /// Gives up what the ledger does not answer within the call's time, where no deadline of a step does so: a delivery that
    /// waited on would keep its lease and its slot. What was asked may still be done.
    pub async fn in_time<T>(
        &self,
        asked: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        tokio::time::timeout(self.call_timeout, asked).await.unwrap_or_else(|_| {
            Err(StoreError::new(Dependency::Postgres, Class::Timeout, "no answer in time"))
        })
    }

    /// Whether the server answers within a second and may be written to, on a connection of its own: a hung pool can't speak for the server.
    pub async fn probe(&self) -> Result<(), StoreError> {
        self.answers_within(Duration::from_secs(1)).await
    }

    async fn answers_within(&self, limit: Duration) -> Result<(), StoreError> {
        use sqlx::Connection;
        let work = async {
            let mut connection = PgConnection::connect_with(&self.pool.connect_options()).await?;
            let usable = is_usable(&mut connection).await?;
            connection.close().await?;
            Ok::<_, sqlx::Error>(usable)
        };
        match tokio::time::timeout(limit, work).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(away("the server may only be read from")),
            Ok(Err(error)) => Err(StoreError::from(error)),
            Err(_) => Err(away(format!("no answer within {limit:?}"))),
        }
    }

    /// Applies all migrations that are missing. A database of a newer release, which has all of this one's and others after them, is
    /// left as it is: the newest of its migrations is returned.
    pub async fn migrate_up(&self) -> Result<Option<i64>, StoreError> {
        let applied = self.applied().await?;
        let newest = MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0);
        let newer = applied.iter().copied().filter(|version| *version > newest).max();
        let is_newer =
            newer.is_some() && MIGRATOR.iter().all(|migration| applied.contains(&migration.version));
        let mut connection = self.migration_connection().await?;
        let mut migrator = Migrator::with_migrations(MIGRATOR.iter().cloned().collect());
        // Made under the migrator's lock: of two that do so at once, one would fail.
        migrator.create_schema(SCHEMA);
        migrator.set_ignore_missing(is_newer);
        migrator.run(&mut connection).await.map_err(migration_error)?;
        Ok(newer)
    }

    /// Reverts to `target` (0: everything).
    pub async fn migrate_down(&self, target: i64) -> Result<(), StoreError> {
        let mut connection = self.migration_connection().await?;
        MIGRATOR.undo(&mut connection, target).await.map_err(migration_error)
    }

    /// Each migration's version, description and whether it is applied.
    pub async fn migrations(&self) -> Result<Vec<(i64, String, bool)>, StoreError> {
        let applied = self.applied().await?;
        Ok(MIGRATOR
            .iter()
            .filter(|m| !m.migration_type.is_down_migration())
            .map(|m| (m.version, m.description.to_string(), applied.contains(&m.version)))
            .collect())
    }

    /// The versions of the migrations that are applied.
    async fn applied(&self) -> Result<Vec<i64>, StoreError> {
        // Reads only: a worker that looks whether the schema is there need not be allowed to make it.
        match sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success")
            .fetch_all(&self.pool)
            .await
        {
            Ok(applied) => Ok(applied),
            // 42P01: the table is not there yet, so nothing was applied.
            Err(sqlx::Error::Database(e)) if e.code().as_deref() == Some("42P01") => Ok(vec![]),
            Err(e) => Err(e.into()),
        }
    }

    /// A connection without the statement time-out, on which migrations may take long.
    async fn migration_connection(&self) -> Result<PgConnection, StoreError> {
        use sqlx::Connection;
        let options = self
            .pool
            .connect_options()
            .as_ref()
            .clone()
            .options([("statement_timeout", "0"), ("client_min_messages", "warning")]);
        Ok(PgConnection::connect_with(&options).await?)
    }

    /// The id of this ledger, which stamps the Redis prefix that serves it.
    pub async fn ledger_id(&self) -> Result<Uuid, StoreError> {
        Ok(sqlx::query_scalar("SELECT id FROM ledger").fetch_one(&self.pool).await?)
    }
}

/// A connection that has answered within this time lives.
const ASK_AFTER: Duration = Duration::from_secs(1);

/// Whether a connection lives, is in no transaction (within one `now()` stands still, and a simple query has one time) and is with a
/// server that may be written to: a standby may not, as the old primary after a failover, nor a primary that was told so.
async fn is_usable(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let row = sqlx::raw_sql(
        "SELECT now() = statement_timestamp() AND NOT pg_is_in_recovery()
            AND NOT current_setting('default_transaction_read_only')::boolean",
    )
    .fetch_one(connection)
    .await?;
    row.try_get(0)
}

fn away(why: impl Into<String>) -> StoreError {
    StoreError::new(Dependency::Postgres, Class::Unavailable, why)
}

fn migration_error(error: sqlx::migrate::MigrateError) -> StoreError {
    StoreError::new(Dependency::Postgres, Class::Permanent, crate::error::with_causes(&error))
}

/// A job that is still ours, its row locked until the transaction ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Alive {
    pub cancel_requested: bool,
}

/// **The fence.** Locks the rows of those jobs that still run under the fence given, in id order, and returns them. A
/// job that is absent from the answer has lost its lease: nothing may be written for it. Every write of a saga is in a
/// transaction that began with this statement.
///
/// A sub-select that locks is never merged into the join around it, so that each job is looked up by its id whatever Postgres
/// thinks of the table (`docs/decisions/0052-each-job-by-its-id.md`). It isn't told how many they are, so that the plan for one is
/// that for all (`docs/decisions/0055-one-plan-for-one-job-and-for-many.md`).
#[cfg_attr(feature = "faults", track_caller)]
pub(crate) fn lock_alive<'a>(
    connection: &'a mut PgConnection,
    jobs: &[(JobId, Fence)],
) -> impl Future<Output = Result<HashMap<JobId, Alive>, sqlx::Error>> + Send + use<'a> {
    let ids: Vec<Uuid> = jobs.iter().map(|(id, _)| id.0).collect();
    let fences: Vec<i64> = jobs.iter().map(|(_, fence)| fence.0).collect();
    let sql = crate::fenced_sql!(
        "SELECT held.id, j.cancel_requested
         FROM (SELECT * FROM unnest((SELECT $1::uuid[]), $2::bigint[]) AS held (id, fence) ORDER BY id) AS held
         CROSS JOIN LATERAL (
             SELECT j.cancel_requested_at IS NOT NULL AS cancel_requested FROM jobs j
             WHERE j.id = held.id AND j.fence = held.fence AND j.state = 'running' FOR NO KEY UPDATE
         ) AS j",
        "j.fence = held.fence AND j.state = 'running'"
    );
    async move {
        let rows = sqlx::query(sql).bind(ids).bind(fences).fetch_all(connection).await?;
        rows.iter()
            .map(|row| {
                Ok((JobId(row.try_get("id")?), Alive { cancel_requested: row.try_get("cancel_requested")? }))
            })
            .collect()
    }
}
