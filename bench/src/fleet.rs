//! Worker processes as the benchmark sees them.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, Command},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};

use crate::sides::Side;

/// Without news for so long a fleet counts as stuck.
const STUCK_AFTER: Duration = Duration::from_secs(60);

/// What a worker said.
#[derive(Debug)]
enum Word {
    Ready,
    /// The worker's number, and how many jobs it has handled so far.
    Handled(usize, u64),
    /// A job's number, and how long it took from enqueue to handler.
    Picked(u64, Duration),
    Ended(Used),
}

/// What one worker used in its life.
#[derive(Debug, Clone, Copy)]
pub struct Used {
    pub handled: u64,
    pub cpu: Duration,
    pub peak_rss_kb: u64,
}

/// Worker processes of one side, started and waiting for the go. Killed when dropped.
pub struct Fleet {
    children: Vec<Child>,
    stdins: Vec<ChildStdin>,
    readers: Vec<JoinHandle<anyhow::Result<()>>>,
    words: mpsc::UnboundedReceiver<Word>,
}

impl Fleet {
    /// Starts the processes and waits until all are ready. `tell`: each job's time is told instead of counts.
    pub async fn start(
        side: Side,
        url: &str,
        database: Option<&str>,
        workers: usize,
        threads: usize,
        tell: bool,
    ) -> anyhow::Result<Self> {
        let (sender, words) = mpsc::unbounded_channel();
        let mut fleet = Self { children: vec![], stdins: vec![], readers: vec![], words };
        for number in 0..workers {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["work", side.name(), "--url", url, "--threads", &threads.to_string()]);
            if let Some(database) = database {
                command.args(["--database", database]);
            }
            if tell {
                command.arg("--tell");
            }
            let mut child = command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .context("a worker can't be started")?;
            fleet.stdins.push(child.stdin.take().context("no stdin")?);
            let mut lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
            let sender = sender.clone();
            fleet.readers.push(tokio::spawn(async move {
                while let Some(line) = lines.next_line().await? {
                    // Nobody listens any more when the fleet is being dropped.
                    sender.send(word(number, &line)?).ok();
                }
                Ok(())
            }));
            fleet.children.push(child);
        }
        for _ in 0..workers {
            match fleet.hear().await? {
                Word::Ready => {}
                other => bail!("a worker said {other:?} instead of being ready"),
            }
        }
        Ok(fleet)
    }

    async fn hear(&mut self) -> anyhow::Result<Word> {
        let word = timeout(STUCK_AFTER, self.words.recv()).await;
        word.map_err(|_| anyhow!("no news from the workers for {STUCK_AFTER:?}"))?
            .context("the workers ended early; what they said is above")
    }

    /// Lets all workers begin.
    pub async fn go(&mut self) -> anyhow::Result<()> {
        for stdin in &mut self.stdins {
            stdin.write_all(b"go\n").await?;
            stdin.flush().await?;
        }
        Ok(())
    }

    /// Begins, and returns how long it took until `jobs` were handled.
    pub async fn drain(&mut self, jobs: u64) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        self.go().await?;
        let mut handled = vec![0; self.children.len()];
        while handled.iter().sum::<u64>() < jobs {
            match self.hear().await? {
                Word::Handled(worker, count) => handled[worker] = count,
                other => bail!("a worker said {other:?} while draining"),
            }
        }
        Ok(begun.elapsed())
    }

    /// The next job that a worker began, and how long after its enqueue.
    pub async fn picked(&mut self) -> anyhow::Result<(u64, Duration)> {
        match self.hear().await? {
            Word::Picked(number, after) => Ok((number, after)),
            other => bail!("a worker said {other:?} instead of picking a job up"),
        }
    }

    /// Lets the workers finish and ack what they have, and waits for their ends.
    pub async fn stop(mut self) -> anyhow::Result<Vec<Used>> {
        self.stdins.clear();
        let mut used = vec![];
        while used.len() < self.children.len() {
            if let Word::Ended(one) = self.hear().await? {
                used.push(one);
            }
        }
        for child in &mut self.children {
            let status = child.wait().await?;
            if !status.success() {
                bail!("a worker ended with {status}");
            }
        }
        for reader in self.readers {
            reader.await??;
        }
        Ok(used)
    }
}

fn word(worker: usize, line: &str) -> anyhow::Result<Word> {
    let mut parts = line.split(' ');
    let kind = parts.next().unwrap_or_default();
    let mut number = || -> anyhow::Result<u64> {
        let part = parts.next().with_context(|| format!("a worker said {line:?}"))?;
        Ok(part.parse()?)
    };
    Ok(match kind {
        "ready" => Word::Ready,
        "handled" => Word::Handled(worker, number()?),
        "picked" => Word::Picked(number()?, Duration::from_micros(number()?)),
        "ended" => Word::Ended(Used {
            handled: number()?,
            cpu: Duration::from_micros(number()?),
            peak_rss_kb: number()?,
        }),
        _ => bail!("a worker said {line:?}"),
    })
}
