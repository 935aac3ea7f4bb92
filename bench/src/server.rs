//! The one Redis that all sides share.

use anyhow::Context as _;
use devstack::{RedisOptions, testing::TestServices};
use redis::aio::MultiplexedConnection;

use crate::sides::connect;

/// Room for a million waiting jobs of any side.
const MAX_MEMORY_MB: u32 = 6144;

/// A private Redis with the configuration of production: append-only file, synced each second.
pub struct Server {
    services: TestServices,
    connection: MultiplexedConnection,
}

impl Server {
    pub async fn start() -> anyhow::Result<Self> {
        let options = RedisOptions { max_memory_mb: MAX_MEMORY_MB, ..RedisOptions::queue() };
        let services = TestServices::builder().redis_queue_with(options).start().await?;
        let mut connection = connect(services.redis_queue().url()).await?;
        // A rewrite of the append-only file that one side's run causes must not fall into another's.
        redis::cmd("CONFIG")
            .arg("SET")
            .arg("auto-aof-rewrite-percentage")
            .arg(0)
            .query_async::<()>(&mut connection)
            .await?;
        Ok(Self { services, connection })
    }

    pub fn url(&self) -> &str {
        self.services.redis_queue().url()
    }

    /// Removes everything, at once and not in the background.
    pub async fn clear(&self) -> anyhow::Result<()> {
        redis::cmd("FLUSHALL").arg("SYNC").query_async::<()>(&mut self.connection.clone()).await?;
        redis::cmd("CONFIG").arg("RESETSTAT").query_async::<()>(&mut self.connection.clone()).await?;
        Ok(())
    }

    /// What Redis says about one thing.
    pub async fn info(&self, section: &str) -> anyhow::Result<String> {
        Ok(redis::cmd("INFO").arg(section).query_async(&mut self.connection.clone()).await?)
    }

    /// Memory of the whole instance in bytes.
    pub async fn memory(&self) -> anyhow::Result<f64> {
        Ok(field(&self.info("memory").await?, "used_memory"))
    }

    /// CPU time that the server has used, in seconds.
    pub async fn cpu(&self) -> anyhow::Result<f64> {
        let info = self.info("cpu").await?;
        Ok(field(&info, "used_cpu_user") + field(&info, "used_cpu_sys"))
    }
}

fn field(info: &str, name: &str) -> f64 {
    let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0.0)
}

/// CPU time that all processes of a Postgres on this machine have used, in seconds.
pub async fn postgres_cpu(pool: &sqlx::PgPool) -> anyhow::Result<f64> {
    let backend: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(pool).await?;
    let postmaster = stat(backend as u32).context("this Postgres runs on another machine")?.parent;
    let mut ticks = stat(postmaster).map_or(0, |one| one.own + one.children);
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some(one) = stat(pid).filter(|one| one.parent == postmaster) {
            ticks += one.own;
        }
    }
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock ticks")?;
    Ok(ticks as f64 / per_second as f64)
}

/// CPU time of the whole machine, in ticks. Zeros where /proc doesn't say.
#[derive(Debug, Clone, Copy, Default)]
pub struct MachineTime {
    all: u64,
    /// What the hypervisor gave to others meanwhile.
    stolen: u64,
}

impl MachineTime {
    pub fn now() -> Self {
        std::fs::read_to_string("/proc/stat").map_or_else(|_| Self::default(), |text| Self::read(&text))
    }

    /// The first line is the sum of all cores: user, nice, system, idle, iowait, irq, softirq, steal, and what these hold already.
    fn read(text: &str) -> Self {
        let line = text.lines().next().and_then(|line| line.strip_prefix("cpu ")).unwrap_or_default();
        let ticks: Vec<u64> = line.split_whitespace().take(8).map_while(|tick| tick.parse().ok()).collect();
        Self { all: ticks.iter().sum(), stolen: ticks.get(7).copied().unwrap_or_default() }
    }

    /// How much of the time between the two was stolen, in percent.
    pub fn stolen_until(self, end: Self) -> f64 {
        let all = end.all.saturating_sub(self.all).max(1);
        end.stolen.saturating_sub(self.stolen) as f64 / all as f64 * 100.0
    }
}

/// Of `/proc/<pid>/stat`: the parent, and CPU time in ticks. None if the process has gone.
struct Stat {
    parent: u32,
    own: u64,
    children: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may have blanks.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some(Stat {
        parent: u32::try_from(number(1)?).ok()?,
        own: number(11)? + number(12)?,
        children: number(13)? + number(14)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stolen_is_a_share_of_all_time() {
        let begin = MachineTime::read("cpu  100 1 50 800 9 0 10 30 7 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n");
        let end = MachineTime::read("cpu  150 1 70 900 9 0 10 60 9 0\n");
        assert_eq!((begin.all, begin.stolen), (1000, 30));
        assert!((begin.stolen_until(end) - 15.0).abs() < 1e-9);
        assert!(MachineTime::read("").stolen_until(MachineTime::read("intr 7")).abs() < 1e-9);
    }
}
