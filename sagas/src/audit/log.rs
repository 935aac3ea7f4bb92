//! The ledger against the saga log, the dead letters and the documents: all inside Postgres, each check one statement and
//! so exact at its instant.

use queue::JobId;
use uuid::Uuid;

use super::{AuditError, Finding, FindingKind as Kind, Run, Suspect, repair::Mend};
use crate::stores::postgres::audit::LOG_CHECKS;

impl Run<'_> {
    pub(super) async fn log(&mut self) -> Result<(), AuditError> {
        for (kind, sql) in LOG_CHECKS {
            let mut after = Uuid::nil();
            loop {
                let rows = self.stores.postgres.audit_log_check(sql, after, self.page()).await?;
                let Some(last) = rows.last() else { break };
                after = last.id;
                let suspects = rows
                    .into_iter()
                    .map(|row| {
                        let mend = match kind {
                            Kind::DeadWithoutLetter => Mend::Letter(JobId(row.id)),
                            Kind::FinishingStuck => Mend::Finishing(row.id),
                            _ => Mend::None,
                        };
                        let finding = Finding {
                            tenant: Some(row.tenant),
                            document: row.document,
                            job: row.job,
                            ..Finding::new(*kind, row.id, row.detail)
                        };
                        Suspect::new(row.id, finding, mend)
                    })
                    .collect();
                self.settle(suspects).await?;
            }
        }
        Ok(())
    }
}
