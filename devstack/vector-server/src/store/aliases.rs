//! Aliases: second names of collections, switched atomically.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pb::alias_operations::Action;
use qdrant_client::qdrant as pb;
use tonic::Status;

use super::atomic_file;
use super::catalog::check_name;
use crate::status::{Answer, file_error, invalid, no_collection};

/// Alias to collection.
pub type Aliases = BTreeMap<String, String>;

/// The file that holds them.
#[derive(Debug)]
pub struct AliasFile {
    path: PathBuf,
}

impl AliasFile {
    /// The file of this data directory, which need not exist yet.
    pub fn new(data: &Path) -> Self {
        Self { path: data.join("aliases.json") }
    }

    /// All aliases; none if there is no file.
    pub fn read(&self) -> Result<Aliases> {
        match std::fs::read(&self.path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", self.path.display()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Aliases::new()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", self.path.display())),
        }
    }

    /// Replaces all aliases at once.
    pub fn write(&self, aliases: &Aliases) -> Answer<()> {
        let bytes =
            serde_json::to_vec_pretty(aliases).map_err(|error| Status::internal(error.to_string()))?;
        atomic_file::replace(&self.path, &bytes)
            .map_err(|error| file_error("cannot save the aliases", &error))
    }
}

/// What the aliases become: all of the actions, in order, or an error.
pub fn changed(
    mut aliases: Aliases,
    actions: Vec<pb::AliasOperations>,
    is_collection: impl Fn(&str) -> bool,
) -> Answer<Aliases> {
    for pb::AliasOperations { action } in actions {
        match action.ok_or_else(|| invalid("an alias action is empty"))? {
            Action::CreateAlias(pb::CreateAlias { collection_name, alias_name }) => {
                if !is_collection(&collection_name) {
                    return Err(no_collection(&collection_name));
                }
                check_free(&alias_name, &is_collection)?;
                aliases.insert(alias_name, collection_name);
            }
            Action::RenameAlias(pb::RenameAlias { old_alias_name, new_alias_name }) => {
                check_free(&new_alias_name, &is_collection)?;
                let collection = aliases
                    .remove(&old_alias_name)
                    .ok_or_else(|| Status::not_found(format!("Alias {old_alias_name} does not exist!")))?;
                aliases.insert(new_alias_name, collection);
            }
            Action::DeleteAlias(pb::DeleteAlias { alias_name }) => {
                aliases.remove(&alias_name);
            }
        }
    }
    Ok(aliases)
}

/// An alias may take the place of another alias, but not of a collection.
fn check_free(alias: &str, is_collection: &impl Fn(&str) -> bool) -> Answer<()> {
    check_name(alias)?;
    if is_collection(alias) { Err(invalid(format!("`{alias}` is the name of a collection"))) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn create(alias: &str, collection: &str) -> pb::AliasOperations {
        let (alias_name, collection_name) = (alias.to_owned(), collection.to_owned());
        pb::AliasOperations {
            action: Some(Action::CreateAlias(pb::CreateAlias { collection_name, alias_name })),
        }
    }

    #[test]
    fn one_bad_action_refuses_all() {
        let is_collection = |name: &str| name == "a" || name == "b";
        let aliases =
            changed(Aliases::new(), vec![create("live", "a"), create("live", "b")], is_collection).unwrap();
        assert_eq!(aliases, Aliases::from([("live".into(), "b".into())]));
        assert!(
            changed(aliases.clone(), vec![create("live", "a"), create("x", "gone")], is_collection).is_err()
        );
        assert!(changed(aliases, vec![create("a", "b")], is_collection).is_err());
    }
}
