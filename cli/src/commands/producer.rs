//! `flotilla producer`: the HTTP API and the loops that keep ledger and queue agreed.

use std::net::SocketAddr;

use ::producer::{Client, ClientSettings, MaintainSettings, ProducerSettings};
use anyhow::Context as _;
use clap::ValueEnum;
use telemetry::Telemetry;
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    failure::{Ending, Outcome},
    signals,
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the API, /healthz, /readyz and /metrics are served [default: 127.0.0.1:8080]
    #[arg(long, env = "FLOTILLA_PRODUCER_ADDR")]
    addr: Option<SocketAddr>,
    /// `keys`: an API key names the tenant. `open`: anybody may name any tenant, for development [default: keys]
    #[arg(long, env = "FLOTILLA_AUTH", value_enum)]
    auth: Option<AuthArg>,
    /// How long requests under way may go on after SIGTERM or SIGINT, in milliseconds [default: 25000]
    #[arg(long, env = "FLOTILLA_DRAIN_GRACE_MS", value_name = "MS")]
    drain_grace: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum AuthArg {
    Keys,
    Open,
}

pub async fn run(args: Args, context: &Context, telemetry: &Telemetry) -> Outcome {
    let postgres = context.migrated_postgres().await?;
    // Durable jobs are accepted without Redis, so a producer starts without it.
    let queue = context.lazy_queue()?;
    let stores = context.stores(postgres.clone())?;
    let get = |name: &str| match name {
        "FLOTILLA_PRODUCER_ADDR" => args.addr.map(|addr| addr.to_string()),
        "FLOTILLA_AUTH" => args.auth.map(|auth| match auth {
            AuthArg::Keys => "keys".to_owned(),
            AuthArg::Open => "open".to_owned(),
        }),
        "FLOTILLA_DRAIN_GRACE_MS" => args.drain_grace.map(|ms| ms.to_string()),
        _ => context.settings.get(name),
    };
    let settings = ProducerSettings::from_lookup(get)?;
    let maintain = MaintainSettings::from_lookup(get)?;
    let client = Client::new(postgres.clone(), Some(queue.clone()), ClientSettings::from_lookup(get)?);
    let metrics = telemetry.renderer();
    let shutdown = signals::drain_on_signal()?;

    let upkeep = CancellationToken::new();
    let maintaining = tokio::spawn({
        let (upkeep, shutdown) = (upkeep.clone(), shutdown.clone());
        async move {
            let ended = ::producer::maintain(postgres, queue, maintain, upkeep).await;
            // It ends early only when this Redis must not be used: then nothing may be pushed into it either.
            if ended.is_err() {
                shutdown.cancel();
            }
            ended
        }
    });
    let served = ::producer::serve(settings, client, stores, metrics, shutdown).await;
    upkeep.cancel();
    let maintained = maintaining.await.context("the maintenance loops ended")?;
    served?;
    maintained?;
    tracing::info!("drained");
    Ok(Ending::Fine)
}
