//! Which collections and aliases there are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use parking_lot::{Mutex, RwLock};
use qdrant_client::qdrant as pb;
use tonic::Status;

use super::Collection;
use super::aliases::{self, AliasFile, Aliases};
use crate::convert;
use crate::status::{Answer, invalid, no_collection};

/// Everything in one data directory. Shared by the services and the background loops.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    alias_file: AliasFile,
    /// One lock for both maps, so that a request never sees an alias and its collection at different times.
    catalog: RwLock<Catalog>,
    /// Serialises what changes the catalog, and holds the number of the next directory. Taken before `catalog`,
    /// which is never held while files are written.
    changes: Mutex<u64>,
}

#[derive(Debug)]
struct Catalog {
    collections: BTreeMap<String, Arc<Collection>>,
    aliases: Aliases,
}

impl Store {
    /// Opens every collection under `data`, replaying their logs: seconds after a crash with many points.
    pub fn open(data: &Path) -> Result<Arc<Self>> {
        let directory = data.join("collections");
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let mut collections = BTreeMap::new();
        let mut newest = 0;
        for entry in
            std::fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))?
        {
            let path = entry?.path();
            let number =
                path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<u64>().ok());
            let Some(number) = number else {
                tracing::warn!(path = %path.display(), "not a collection; left alone");
                continue;
            };
            newest = newest.max(number);
            let started = Instant::now();
            if let Some(collection) = Collection::open(path)? {
                tracing::info!(collection = collection.name(), took = ?started.elapsed(), "opened");
                collections.insert(collection.name().to_owned(), Arc::new(collection));
            }
        }
        let alias_file = AliasFile::new(data);
        let mut aliases = alias_file.read()?;
        // A crash between the two steps of a deletion leaves aliases of nothing.
        aliases.retain(|_, collection| collections.contains_key(collection));
        Ok(Arc::new(Self {
            directory,
            alias_file,
            catalog: RwLock::new(Catalog { collections, aliases }),
            changes: Mutex::new(newest + 1),
        }))
    }

    /// The collection of this name or alias.
    pub fn get(&self, name: &str) -> Answer<Arc<Collection>> {
        let catalog = self.catalog.read();
        let real = catalog.aliases.get(name).map_or(name, String::as_str);
        catalog.collections.get(real).cloned().ok_or_else(|| no_collection(name))
    }

    /// All collections, by name.
    pub fn collections(&self) -> Vec<Arc<Collection>> {
        self.catalog.read().collections.values().cloned().collect()
    }

    /// All aliases.
    pub fn aliases(&self) -> Aliases {
        self.catalog.read().aliases.clone()
    }

    /// Creates a collection, or nothing if any of its settings is refused.
    pub fn create(&self, spec: pb::CreateCollection) -> Answer<()> {
        let name = spec.collection_name.clone();
        check_name(&name)?;
        let config = convert::collections::config_in(&spec)?;
        let mut next_directory = self.changes.lock();
        {
            let catalog = self.catalog.read();
            if catalog.collections.contains_key(&name) {
                return Err(Status::already_exists(format!(
                    "Wrong input: Collection `{name}` already exists!"
                )));
            }
            if catalog.aliases.contains_key(&name) {
                return Err(invalid(format!("`{name}` is the name of an alias")));
            }
        }
        let path = self.directory.join(format!("{next_directory:08}"));
        *next_directory += 1;
        let collection = Collection::create(path, spec, config)?;
        self.catalog.write().collections.insert(name, Arc::new(collection));
        Ok(())
    }

    /// Deletes a collection and its aliases; says whether there was one. Aliases are not followed.
    pub fn delete(&self, name: &str) -> Answer<bool> {
        let _changes = self.changes.lock();
        let Some(collection) = self.catalog.read().collections.get(name).cloned() else {
            return Ok(false);
        };
        let old = self.aliases();
        let mut new = old.clone();
        new.retain(|_, target| target != name);
        if new != old {
            self.alias_file.write(&new)?;
            self.catalog.write().aliases = new;
        }
        collection.delete()?;
        self.catalog.write().collections.remove(name);
        Ok(true)
    }

    /// Applies all actions or none; readers switch from one state to the other.
    pub fn change_aliases(&self, actions: Vec<pb::AliasOperations>) -> Answer<()> {
        let _changes = self.changes.lock();
        let new = {
            let catalog = self.catalog.read();
            aliases::changed(catalog.aliases.clone(), actions, |name| catalog.collections.contains_key(name))?
        };
        self.alias_file.write(&new)?;
        self.catalog.write().aliases = new;
        Ok(())
    }

    /// Writes everything out, for an orderly end. Errors are logged: the log files still hold every write.
    pub fn flush(&self) {
        for collection in self.collections() {
            if let Err(error) = collection.flush() {
                tracing::error!(collection = collection.name(), %error, "flush failed");
            }
        }
    }
}

/// Refuses the names that a Qdrant server refuses.
pub fn check_name(name: &str) -> Answer<()> {
    const MAX_BYTES: usize = 255;
    let forbidden = |c: char| c.is_control() || r#"<>:"/\|?*"#.contains(c);
    if name.is_empty() || name.len() > MAX_BYTES || name.contains(forbidden) {
        return Err(invalid(format!(
            "{name:?} is not a name; expected 1 to {MAX_BYTES} bytes without control characters and <>:\"/\\|?*"
        )));
    }
    Ok(())
}
