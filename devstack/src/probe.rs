//! Asking a server whether it really serves. Used at start, by `status`, and for servers that others run.

use qdrant_client::Qdrant;
use sqlx::Connection;

/// Runs a statement.
pub(crate) async fn postgres(url: &str) -> Result<(), String> {
    let ask = async {
        let mut connection = sqlx::PgConnection::connect(url).await?;
        sqlx::query("SELECT 1").execute(&mut connection).await?;
        connection.close().await
    };
    // Boxed: the client's futures are large, and four services are asked at once.
    Box::pin(ask).await.map_err(|error| error.to_string())
}

/// Sends PING, which is refused while the data is loading; returns the server section of INFO.
pub(crate) async fn redis(url: &str) -> Result<String, String> {
    let ask = async {
        let mut connection = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
        redis::cmd("PING").exec_async(&mut connection).await?;
        redis::cmd("INFO").arg("server").query_async(&mut connection).await
    };
    Box::pin(ask).await.map_err(|error: redis::RedisError| error.to_string())
}

/// Asks for Qdrant's health.
pub(crate) async fn vectors(url: &str) -> Result<(), String> {
    let client =
        Qdrant::from_url(url).skip_compatibility_check().build().map_err(|error| error.to_string())?;
    Box::pin(client.health_check()).await.map(|_| ()).map_err(|error| error.to_string())
}
