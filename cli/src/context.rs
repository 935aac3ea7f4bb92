//! Connections to the stores, made when a command needs them; an error names the variable and the address.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use embedding::EmbedderConfig;
use queue::{Access, Queue, QueueConfig};
use sagas::{
    encryption::{Keyring, PayloadCipher},
    kinds::{DocumentSettings, Stores},
    stores::{
        cache::{Cache, CacheConfig},
        postgres::{Postgres, PostgresConfig},
        vectors::{Vectors, VectorsConfig},
    },
};

use crate::{
    config::{Settings, shown_url},
    output::Output,
};

/// What every command gets.
#[derive(Debug, Clone)]
pub struct Context {
    /// Where settings come from.
    pub settings: Settings,
    /// Where data goes.
    pub out: Output,
    /// Directory of the development stack.
    pub dir: std::path::PathBuf,
}

impl Context {
    /// What can't be reached, where, and what to do.
    fn unreachable(&self, variable: &'static str, url: &str, error: impl std::fmt::Display) -> anyhow::Error {
        let advice = if self.settings.is_from_stack(variable) {
            format!(
                ". The address is the development stack's: `flotilla dev status --dir {}`",
                self.dir.display()
            )
        } else {
            String::new()
        };
        anyhow!("{variable} {} can't be used: {error}{advice}", shown_url(url))
    }

    /// How to connect to Postgres.
    pub fn postgres_config(&self) -> anyhow::Result<PostgresConfig> {
        let mut config = PostgresConfig::new(self.settings.require("DATABASE_URL")?);
        config.max_connections = u32::try_from(self.settings.number("FLOTILLA_POSTGRES_CONNECTIONS", 10)?)
            .unwrap_or(u32::MAX)
            .max(1);
        config.call_timeout = self.call_timeout()?;
        Ok(config)
    }

    /// No reply of a store within this time is a time-out.
    pub fn call_timeout(&self) -> anyhow::Result<Duration> {
        self.settings.millis("FLOTILLA_CALL_TIMEOUT_MS", Duration::from_secs(5))
    }

    /// Postgres, which has answered.
    pub async fn postgres(&self) -> anyhow::Result<Postgres> {
        let config = self.postgres_config()?;
        let cipher = self.cipher()?;
        Postgres::connect(&config)
            .await
            .map(|postgres| postgres.with_cipher(cipher))
            .map_err(|e| self.unreachable("DATABASE_URL", &config.url, e.message))
    }

    /// What payloads are sealed with: the keys of `FLOTILLA_ENCRYPTION_KEYS`, or of the file that
    /// `FLOTILLA_ENCRYPTION_KEYS_FILE` names; nothing without either.
    fn cipher(&self) -> anyhow::Result<PayloadCipher> {
        const KEYS: &str = "FLOTILLA_ENCRYPTION_KEYS";
        const FILE: &str = "FLOTILLA_ENCRYPTION_KEYS_FILE";
        let (name, text) = match (self.settings.get(KEYS), self.settings.get(FILE)) {
            (None, None) => return Ok(PayloadCipher::default()),
            (Some(_), Some(_)) => return Err(anyhow!("{KEYS} and {FILE} are both set: set one of them")),
            (Some(keys), None) => (KEYS, keys),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(&path)
                    .with_context(|| format!("{FILE} is {path:?}: can't be read"))?;
                (FILE, text)
            }
        };
        Ok(Keyring::parse(&text).context(name)?.into())
    }

    /// Postgres with every migration applied.
    pub async fn migrated_postgres(&self) -> anyhow::Result<Postgres> {
        let postgres = self.postgres().await?;
        let missing: Vec<String> = postgres
            .migrations()
            .await
            .context("can't read which migrations are applied")?
            .into_iter()
            .filter(|(_, _, applied)| !applied)
            .map(|(version, _, _)| version.to_string())
            .collect();
        if !missing.is_empty() {
            return Err(anyhow!(
                "the database lacks migration{} {}: run `flotilla migrate up` first",
                if missing.len() == 1 { "" } else { "s" },
                missing.join(", ")
            ));
        }
        Ok(postgres)
    }

    /// The queue's settings.
    pub fn queue_config(&self) -> anyhow::Result<QueueConfig> {
        self.settings.require("REDIS_QUEUE_URL")?;
        Ok(QueueConfig::from_lookup(|name| self.settings.get(name))?)
    }

    /// The queue, which has answered and may be used.
    pub async fn queue(&self) -> anyhow::Result<Queue> {
        let config = self.queue_config()?;
        let url = config.url.clone();
        Queue::connect(config).await.map_err(|e| self.unreachable("REDIS_QUEUE_URL", &url, e))
    }

    /// The queue without a connection; the first call connects.
    pub fn lazy_queue(&self) -> anyhow::Result<Queue> {
        Ok(Queue::lazy(self.queue_config()?)?)
    }

    /// The queue that accepted jobs are put into at once; `None`: it can't be reached, and the relay of a producer or worker puts
    /// them there. Fails if it is another ledger's, which no job of this one may get into.
    pub async fn dispatcher(&self, postgres: &Postgres) -> anyhow::Result<Option<Queue>> {
        let config = match self.queue_config() {
            Ok(config) => config,
            Err(error) => {
                tracing::warn!(%error, "jobs wait for the relay of a producer or worker");
                return Ok(None);
            }
        };
        let queue = Queue::lazy(config)?;
        match queue.is_stamped_by(postgres.ledger_id().await?).await {
            Ok(_) => Ok(Some(queue)),
            Err(error) if error.is_unavailable() => {
                tracing::warn!(%error, "jobs wait for the relay of a producer or worker");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Puts an accepted job into Redis at once. Where that fails, the relay does it: the job is in the ledger.
    pub async fn dispatch(&self, queue: Option<&Queue>, job: queue::JobId, postgres: &Postgres) {
        let Some(queue) = queue else { return };
        let pushed = async {
            let envelope = postgres.envelope(job).await?.into_iter().collect::<Vec<_>>();
            queue.push_accepted(&envelope).await?;
            anyhow::Ok(())
        };
        if let Err(error) = pushed.await {
            tracing::debug!(%job, %error, "left to the relay");
        }
    }

    /// All stores and the embedding provider. Only Postgres is asked whether it answers: workers wait for the others.
    pub fn stores(&self, postgres: Postgres) -> anyhow::Result<Stores> {
        let call_timeout = self.call_timeout()?;
        let vectors = Vectors::lazy(&VectorsConfig {
            url: self.settings.require("QDRANT_URL")?,
            api_key: self.settings.get("QDRANT_API_KEY"),
            call_timeout,
        })?;
        let cache = Cache::lazy(&CacheConfig {
            url: self.settings.require("REDIS_CACHE_URL")?,
            access: Access::from_lookup(|name| self.settings.get(name)),
            prefix: self.settings.get("FLOTILLA_PREFIX").unwrap_or_else(|| "flotilla".to_owned()),
            call_timeout,
        })?;
        let embedder = embedding::open(&EmbedderConfig::from_variables(|name| self.settings.get(name))?)?;
        Ok(Stores::new(postgres, vectors, cache, Arc::clone(&embedder), vec![], self.document_settings()?))
    }

    fn document_settings(&self) -> anyhow::Result<DocumentSettings> {
        let defaults = DocumentSettings::default();
        Ok(DocumentSettings {
            grace: self.settings.millis("FLOTILLA_GRACE_MS", defaults.grace)?,
            sweep_bound: self.settings.millis("FLOTILLA_SWEEP_BOUND_MS", defaults.sweep_bound)?,
            collection: self.settings.get("FLOTILLA_COLLECTION"),
            hand_embedding_over: self.settings.flag("FLOTILLA_HAND_EMBEDDING_OVER", false)?,
            ..defaults
        })
    }
}

/// Who acts, for the audit log: the person's account.
pub fn actor() -> String {
    let user = std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_default();
    if user.is_empty() { "cli".to_owned() } else { format!("cli:{user}") }
}
