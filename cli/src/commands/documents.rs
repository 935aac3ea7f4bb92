//! `flotilla documents`: what readers see.

use queue::TenantId;

use super::migrate::DEFAULT_TENANT;
use crate::{
    context::Context,
    failure::{Ending, Outcome, Refused},
    output,
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Print the text of a published document
    Get {
        /// The caller's name for the document
        document: String,
        /// Whose document
        #[arg(long, env = "FLOTILLA_TENANT", default_value = DEFAULT_TENANT)]
        tenant: TenantId,
    },
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let Command::Get { document, tenant } = command;
    let stores = context.stores(context.postgres().await?)?;
    let Some(found) = stores.document(tenant.as_str(), &document).await? else {
        return Err(Refused(format!(
            "tenant {tenant} has no published document {document:?}: it is unknown, deleted, or not ingested yet"
        ))
        .into());
    };
    let version = &found.version;
    context.out.data(&found, || found.text.clone())?;
    if !context.out.json {
        output::say(format!(
            "version {} (order {}), {} chunks in {}, sha256 {}",
            version.version, version.doc_order, version.chunk_count, version.collection, version.content_hash
        ));
    }
    Ok(Ending::Fine)
}
