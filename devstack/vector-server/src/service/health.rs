//! `qdrant.Qdrant`: who is answering.

use qdrant_client::qdrant as pb;
use tonic::{Request, Response, Status};

use super::Service;

/// The version of Qdrant's API that this server speaks: that of the qdrant-client it is built with, which checks
/// it when it connects.
const API_VERSION: &str = "1.20.0";

#[tonic::async_trait]
impl pb::qdrant_server::Qdrant for Service {
    async fn health_check(
        &self,
        _request: Request<pb::HealthCheckRequest>,
    ) -> Result<Response<pb::HealthCheckReply>, Status> {
        Ok(Response::new(pb::HealthCheckReply {
            title: concat!("flotilla-vectors ", env!("CARGO_PKG_VERSION"), ", a development server").into(),
            version: API_VERSION.into(),
            commit: None,
        }))
    }
}
