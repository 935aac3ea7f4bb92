//! The API's description for programs.

use axum::Json;
use utoipa::{
    Modify, OpenApi,
    openapi::{
        OpenApi as Description,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use super::{batches, dead_letters, documents, health, jobs, schedules, signals};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Flotilla",
        description = "Enqueue jobs that move documents into Postgres, Qdrant and Redis; follow them; read and search documents."
    ),
    paths(
        jobs::enqueue, jobs::enqueue_many, jobs::list, jobs::show, jobs::change, jobs::cancel, signals::send,
        schedules::create, schedules::list, schedules::show, schedules::update, schedules::delete, schedules::control,
        batches::make, batches::add, batches::seal, batches::list, batches::show, batches::cancel,
        documents::show, documents::search,
        dead_letters::list, dead_letters::show, dead_letters::resolve,
        health::ready
    ),
    components(schemas(super::bodies::JobRequest, schedules::ScheduleRequest)),
    modifiers(&ApiKey),
    security(("api_key" = []))
)]
struct Api;

struct ApiKey;

impl Modify for ApiKey {
    fn modify(&self, description: &mut Description) {
        let scheme = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some(
                "An API key; it names the tenant. With FLOTILLA_AUTH=open send X-Flotilla-Tenant instead.",
            ))
            .build();
        description
            .components
            .get_or_insert_default()
            .add_security_scheme("api_key", SecurityScheme::Http(scheme));
    }
}

pub(super) async fn document() -> Json<Description> {
    Json(Api::openapi())
}
