//! Private servers for one benchmark.

use std::{collections::BTreeMap, future::Future, path::PathBuf};

use anyhow::Context as _;
use devstack::{Service, Stack, StackOptions};

use crate::{context::Context, output, signals};

/// Servers in a temporary directory, and a context whose settings point at them.
pub struct Sandbox {
    dir: PathBuf,
    /// Settings that name these servers.
    pub context: Context,
}

impl Sandbox {
    /// Runs `work` over fresh servers with an up-to-date schema. They are stopped and removed whatever `work` does, also
    /// after a signal.
    pub async fn with<T, F>(
        services: &[Service],
        settings: &[(&'static str, String)],
        context: &Context,
        work: impl FnOnce(Context) -> F,
    ) -> anyhow::Result<T>
    where
        F: Future<Output = anyhow::Result<T>>,
    {
        let asked = signals::drain_on_signal()?;
        let sandbox = Self::start(services, settings, context).await?;
        let migrated = async {
            let postgres = sandbox.context.postgres().await?;
            postgres.migrate_up().await?;
            work(sandbox.context.clone()).await
        };
        let outcome = signals::unless_asked_to_end(&asked, migrated).await;
        sandbox.stop().await;
        outcome
    }

    async fn start(
        services: &[Service],
        settings: &[(&'static str, String)],
        context: &Context,
    ) -> anyhow::Result<Self> {
        let dir = std::env::temp_dir().join(format!("flotilla-bench-{}", std::process::id()));
        output::say(format!("starting private servers in {}", dir.display()));
        // What the environment names is somebody's data: a benchmark never touches it.
        let options = StackOptions { services: services.to_vec(), external: BTreeMap::new() };
        let started = Box::pin(Stack::up_with(&dir, &options)).await;
        let mut sandbox = Self { dir, context: context.clone() };
        match started {
            Ok(status) => {
                let own = status.env().into_iter().chain(settings.iter().cloned());
                sandbox.context.settings =
                    context.settings.with(own.chain([("FLOTILLA_PREFIX", "bench".to_owned())]));
                Ok(sandbox)
            }
            Err(error) => {
                sandbox.stop().await;
                Err(error).context("the benchmark's servers can't be started")
            }
        }
    }

    async fn stop(self) {
        if let Err(error) = Stack::down(&self.dir).await {
            output::say(format!(
                "the benchmark's servers in {} were not stopped: {error}",
                self.dir.display()
            ));
            return;
        }
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            output::say(format!("{} was not removed: {error}", self.dir.display()));
        }
    }
}
