//! apalis' board over this queue: its JSON interface for queues, tasks and workers.
//!
//! ```sh
//! REDIS_QUEUE_URL=redis://127.0.0.1:6379 cargo run -p queue --example board
//! curl localhost:8080/api/v1/queues
//! ```
//!
//! `apalis-board` serves its web pages over the same interface (feature `ui`); docs/guides/apalis.md says how.

use apalis_board_api::framework::{ApiBuilder, RegisterRoute};
use axum::Router;
use queue::{Board, Queue, QueueConfig, QueueName, TenantId};

/// The board of the queue `mails`, whose jobs carry JSON. Queues are listed all; tasks of each are shown under its name.
pub fn routes(queue: Queue) -> Result<Router, Box<dyn std::error::Error>> {
    let board: Board<serde_json::Value> =
        Board::new(queue, QueueName::new("mails")?, "mail", TenantId::new("acme")?);
    Ok(Router::new().nest("/api/v1", ApiBuilder::new(Router::new()).register("mails", board).build()))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = QueueConfig { prefix: "plain-example".to_owned(), ..QueueConfig::from_env()? };
    let routes = routes(Queue::connect(config).await?)?;
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 8080)).await?;
    println!("http://{}/api/v1/queues", listener.local_addr()?);
    axum::serve(listener, routes).await?;
    Ok(())
}
