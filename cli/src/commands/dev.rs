//! `flotilla dev`: private servers on this machine, which outlive the command.

use devstack::{Service, ServiceStatus, Stack, StackStatus, State};
use serde_json::{Value, json};

use crate::{
    context::Context,
    failure::{Ending, Outcome},
    output,
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Start what does not run yet and wait until it answers; data stays in the stack's directory
    ///
    /// A service whose variable (DATABASE_URL, REDIS_QUEUE_URL, REDIS_CACHE_URL, QDRANT_URL) is set is not started.
    Up,
    /// Show what runs and whether it answers; exit code 1 if something does not
    Status,
    /// Stop everything; data stays
    Down,
    /// Show the last lines of the servers' logs
    Logs {
        /// postgres, redis-queue, redis-cache or vectors; all of them if absent
        service: Option<Service>,
        /// Go on with what is written from now on
        #[arg(short, long, requires = "service")]
        follow: bool,
    },
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let dir = &context.dir;
    match command {
        Command::Up => {
            output::say(format!("starting the development stack in {}", dir.display()));
            let status = Stack::up(dir).await?;
            show(context, &status)?;
            output::say(format!(
                "flotilla finds the addresses in {0}/env when it is run here; in a shell: source {0}/env",
                dir.display()
            ));
            Ok(Ending::fine_if(serves(&status)))
        }
        Command::Status => {
            let status = Stack::status(dir).await?;
            show(context, &status)?;
            Ok(Ending::fine_if(serves(&status)))
        }
        Command::Down => {
            let stopped = Stack::down(dir).await?;
            let names: Vec<&str> = stopped.into_iter().map(Service::name).collect();
            context.out.data(&json!({ "stopped": names }), || {
                if names.is_empty() {
                    "nothing was running".to_owned()
                } else {
                    format!("stopped {}", names.join(", "))
                }
            })?;
            Ok(Ending::Fine)
        }
        Command::Logs { service: Some(service), follow } => {
            Stack::logs(dir, service, follow, &mut tokio::io::stdout()).await?;
            Ok(Ending::Fine)
        }
        Command::Logs { service: None, .. } => {
            let with_logs = Stack::status(dir).await?.services.into_iter().filter(|one| one.log.is_some());
            for one in with_logs {
                output::say(format!("==> {} <==", one.service));
                Stack::logs(dir, one.service, false, &mut tokio::io::stdout()).await?;
            }
            Ok(Ending::Fine)
        }
    }
}

fn serves(status: &StackStatus) -> bool {
    status
        .services
        .iter()
        .all(|one| one.problem.is_none() && matches!(one.state, State::Running { .. } | State::External))
}

fn show(context: &Context, status: &StackStatus) -> anyhow::Result<()> {
    let services: Vec<Value> = status
        .services
        .iter()
        .map(|one| {
            json!({
                "service": one.service.name(), "state": state_name(one.state), "pid": pid(one.state),
                "variable": one.service.variable(), "url": one.shown_url(), "problem": one.problem, "note": one.note,
                "log": one.log,
            })
        })
        .collect();
    context.out.data(&json!({ "dir": status.dir, "services": services }), || {
        let mut table = output::table(&["SERVICE", "STATE", "PID", "ADDRESS", "NOTE"]);
        for one in &status.services {
            table.add_row([
                one.service.name().into(),
                output::state(state_name(one.state)),
                output::number(pid(one.state).map_or(String::new(), |pid| pid.to_string())),
                one.shown_url().unwrap_or_default().into(),
                remark(one).into(),
            ]);
        }
        output::tidy(&table)
    })
}

fn remark(one: &ServiceStatus) -> String {
    [one.problem.as_deref(), one.note.as_deref()].into_iter().flatten().collect::<Vec<_>>().join("; ")
}

fn state_name(state: State) -> &'static str {
    match state {
        State::External => "external",
        State::Running { .. } => "running",
        State::Crashed { .. } => "crashed",
        State::Stopped => "stopped",
        State::Absent => "absent",
    }
}

fn pid(state: State) -> Option<u32> {
    match state {
        State::Running { pid } | State::Crashed { pid } => Some(pid),
        _ => None,
    }
}
