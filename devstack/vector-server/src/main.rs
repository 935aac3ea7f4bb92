//! `flotilla-vectors`: the part of Qdrant's gRPC API that Flotilla uses, served from one data directory by Qdrant's
//! own engine, for machines without a Qdrant server. For development and tests, not for production: one node, no
//! authentication, loopback only.

mod convert;
mod service;
mod status;
mod store;
mod unsupported;
mod validate;

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use pb::collections_server::CollectionsServer;
use pb::points_server::PointsServer;
use pb::qdrant_server::QdrantServer;
use qdrant_client::qdrant as pb;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tonic::codec::CompressionEncoding::Gzip;
use tonic::transport::server::TcpIncoming;
use tracing_subscriber::EnvFilter;

use crate::service::Service;
use crate::store::{DirectoryLock, Store};

/// The largest request, in bytes: a batch of 10,000 points of 384 dimensions with 4 KiB of payload each fits.
const MAX_REQUEST_BYTES: usize = 64 << 20;
/// How long a stop waits for requests in flight before it flushes and ends without them.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Qdrant's gRPC API over Qdrant's engine, from one directory: a development server without authentication.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Directory that holds the collections; created if absent. One server per directory.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Loopback address to serve gRPC on; port 0 takes a free one, which is logged.
    #[arg(long, value_name = "127.0.0.1:PORT", default_value = "127.0.0.1:6334")]
    listen: SocketAddr,
    /// Milliseconds between two flushes of what changed.
    #[arg(long, value_name = "MS", default_value_t = 5_000, value_parser = clap::value_parser!(u64).range(10..))]
    flush_interval_ms: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let filter =
        EnvFilter::try_from_env("FLOTILLA_LOG").unwrap_or_else(|_| EnvFilter::new("info,qdrant_edge=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    let outcome = runtime.block_on(run(arguments));
    // An engine call that outlived the drain limit must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

async fn run(arguments: Arguments) -> Result<()> {
    let Arguments { data, listen, flush_interval_ms } = arguments;
    ensure!(
        listen.ip().is_loopback(),
        "--listen {listen} is not a loopback address; this server has no authentication, so it serves 127.0.0.1 and \
         [::1] only"
    );
    // First of all, so that a signal during a long recovery also ends in an orderly way.
    let mut stopped = stop_signals()?;
    let _lock = DirectoryLock::take(&data)?;
    let started = Instant::now();
    let store = {
        let data = data.clone();
        tokio::task::spawn_blocking(move || Store::open(&data))
            .await
            .context("opening the store failed")??
    };
    let flusher = store::spawn_flusher(Arc::clone(&store), Duration::from_millis(flush_interval_ms))
        .context("cannot start the flusher")?;
    let _optimiser = store::spawn_optimiser(Arc::clone(&store)).context("cannot start the optimiser")?;

    let incoming = TcpIncoming::bind(listen)
        .with_context(|| format!("cannot listen on {listen} (--listen)"))?
        .with_nodelay(Some(true));
    let address = incoming.local_addr().context("the socket has no address")?;
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<PointsServer<Service>>().await;
    let service = Service::new(Arc::clone(&store));
    let mut draining = stopped.clone();
    let server = tonic::transport::Server::builder()
        .add_service(health)
        .add_service(QdrantServer::new(service.clone()))
        .add_service(CollectionsServer::new(service.clone()).accept_compressed(Gzip).send_compressed(Gzip))
        .add_service(
            PointsServer::new(service)
                .accept_compressed(Gzip)
                .send_compressed(Gzip)
                .max_decoding_message_size(MAX_REQUEST_BYTES),
        )
        .serve_with_incoming_shutdown(incoming, async move { wait_for(&mut stopped).await });
    tracing::info!(data = %data.display(), took = ?started.elapsed(), "listening on http://{address}");

    tokio::select! {
        result = server => result.context("the server failed")?,
        () = async {
            wait_for(&mut draining).await;
            tokio::time::sleep(DRAIN_LIMIT).await;
        } => tracing::warn!("requests were still running after {DRAIN_LIMIT:?}; ending without them"),
    }
    tokio::task::spawn_blocking(move || {
        flusher.stop();
        store.flush();
    })
    .await
    .context("the last flush failed")?;
    tracing::info!("flushed; bye");
    Ok(())
}

/// Becomes true at SIGTERM or SIGINT.
fn stop_signals() -> Result<watch::Receiver<bool>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
            _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
        }
        sender.send_replace(true);
        // The sender stays, so that receivers never see a closed channel.
        std::future::pending::<()>().await;
    });
    Ok(receiver)
}

/// Returns once the channel holds true. A closed channel means that the runtime is ending, which is also a stop.
async fn wait_for(stopped: &mut watch::Receiver<bool>) {
    if stopped.wait_for(|stop| *stop).await.is_err() {
        tracing::debug!("the signal task is gone");
    }
}
