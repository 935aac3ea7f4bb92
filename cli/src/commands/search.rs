//! `flotilla search`: the nearest chunks of published documents.

use queue::TenantId;
use sagas::search::Query;

use super::migrate::DEFAULT_TENANT;
use crate::{
    context::Context,
    failure::{Ending, Outcome},
    output::{self, short},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to look for
    #[arg(value_name = "TEXT")]
    text: String,
    /// Hits wanted
    #[arg(short, long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    k: u16,
    /// Whose documents
    #[arg(long, env = "FLOTILLA_TENANT", default_value = DEFAULT_TENANT)]
    tenant: TenantId,
    /// Embedding model; the default one if absent
    #[arg(long)]
    model: Option<String>,
    /// Qdrant collection; the model's own if absent
    #[arg(long)]
    collection: Option<String>,
}

pub async fn run(args: Args, context: &Context) -> Outcome {
    let stores = context.stores(context.postgres().await?)?;
    let query = Query {
        tenant: args.tenant.as_str(),
        text: &args.text,
        k: args.k.into(),
        model: args.model.as_deref(),
        collection: args.collection.as_deref(),
    };
    let hits = stores.search(&query).await?;
    context.out.data(&hits, || {
        let mut table = output::table(&["SCORE", "DOCUMENT", "CHUNK", "TEXT"]);
        for hit in &hits {
            let text = hit.text.split_whitespace().collect::<Vec<_>>().join(" ");
            table.add_row([
                output::number(format!("{:.3}", hit.score)),
                short(hit.title.as_deref().unwrap_or(&hit.document), 50).into(),
                output::number(hit.chunk),
                short(&text, 160).into(),
            ]);
        }
        output::rows(&table, "nothing was found")
    })?;
    Ok(Ending::Fine)
}
