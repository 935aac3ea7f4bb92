//! One collection: the engine's shard and the rules for using it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use prost::Message;
use qdrant_client::qdrant as pb;
use qdrant_edge as edge;

use super::atomic_file;
use crate::status::{Answer, file_error, from_engine, no_collection};
use crate::validate::VectorShape;

/// Marks a directory as a finished collection; holds the creation request.
const SPEC_FILE: &str = "collection.pb";
const SHARD_DIRECTORY: &str = "shard";
/// Where the engine builds segments. It does not clean up after a crash.
const TEMPORARY_SEGMENTS: &str = "temp_segments";

/// A collection. Requests in flight keep it alive after its deletion; the last of them removes its files.
#[derive(Debug)]
pub struct Collection {
    name: String,
    shape: VectorShape,
    // Dropped before `directory`, which may remove the files under it.
    shard: edge::EdgeShard,
    directory: Directory,
    spec: Mutex<pb::CreateCollection>,
    /// Held by every update and by the flush. An operation changes segments in several steps, and the engine's flush
    /// claims the newest version that it sees as persisted; it may be called only when no update can run (the engine's
    /// `flusher(up_to: None)`, qdrant issue 10402).
    gate: Mutex<()>,
    deleted: AtomicBool,
    unflushed: AtomicBool,
    unoptimised: AtomicBool,
    optimising: AtomicBool,
}

/// The collection's directory; removed on drop once the collection is deleted.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
    remove: AtomicBool,
}

impl Drop for Directory {
    fn drop(&mut self) {
        if self.remove.load(SeqCst)
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            // Without its spec file the next start removes it.
            tracing::warn!(directory = %self.path.display(), %error, "a deleted collection left files behind");
        }
    }
}

impl Collection {
    /// Makes a new collection in `path`, which must not exist.
    pub fn create(path: PathBuf, spec: pb::CreateCollection, config: edge::EdgeConfig) -> Answer<Self> {
        std::fs::create_dir_all(&path).map_err(|error| file_error("cannot create the collection", &error))?;
        let shape = VectorShape::of(&config);
        let shard = edge::EdgeShard::new(&path.join(SHARD_DIRECTORY), config).map_err(from_engine)?;
        // The spec file says "complete", so everything else goes to disk first.
        shard.flush().map_err(from_engine)?;
        let collection = Self::new(path, spec, shard, shape);
        collection.save_spec()?;
        Ok(collection)
    }

    /// Opens a collection and applies the log entries that a crash left behind. `None`, and the directory is
    /// removed, if its creation never finished or its deletion had begun.
    pub fn open(path: PathBuf) -> Result<Option<Self>> {
        let bytes = match std::fs::read(path.join(SPEC_FILE)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                tracing::info!(directory = %path.display(), "removing what is left of a collection");
                std::fs::remove_dir_all(&path)
                    .with_context(|| format!("cannot remove {}", path.display()))?;
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let spec = pb::CreateCollection::decode(bytes.as_slice())
            .with_context(|| format!("{} in {} is damaged", SPEC_FILE, path.display()))?;
        let shard_path = path.join(SHARD_DIRECTORY);
        remove_if_present(&shard_path.join(TEMPORARY_SEGMENTS))?;
        let shard = edge::EdgeShard::load(&shard_path, None)
            .map_err(|error| anyhow::anyhow!("cannot open collection {:?}: {error}", spec.collection_name))?;
        let shape = VectorShape::of(&shard.config());
        let collection = Self::new(path, spec, shard, shape);
        // Replayed entries are in memory only, and a crash may have cut an optimisation short.
        collection.unflushed.store(true, SeqCst);
        collection.unoptimised.store(true, SeqCst);
        Ok(Some(collection))
    }

    fn new(path: PathBuf, spec: pb::CreateCollection, shard: edge::EdgeShard, shape: VectorShape) -> Self {
        Self {
            name: spec.collection_name.clone(),
            shape,
            shard,
            directory: Directory { path, remove: AtomicBool::new(false) },
            spec: Mutex::new(spec),
            gate: Mutex::new(()),
            deleted: AtomicBool::new(false),
            unflushed: AtomicBool::new(false),
            unoptimised: AtomicBool::new(false),
            optimising: AtomicBool::new(false),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names and dimensions of the vectors.
    pub fn shape(&self) -> &VectorShape {
        &self.shape
    }

    /// For reads. Writes go through [`Self::update`].
    pub fn shard(&self) -> &edge::EdgeShard {
        &self.shard
    }

    /// What was asked for at creation, with the metadata of later updates.
    pub fn spec(&self) -> pb::CreateCollection {
        self.spec.lock().clone()
    }

    /// Applies an operation that was checked before. On return it is in the log: a killed process does not lose
    /// it. Blocks while another write or a flush runs.
    pub fn update(&self, operation: edge::UpdateOperation) -> Answer<()> {
        let _gate = self.gate.lock();
        if self.deleted.load(SeqCst) {
            return Err(no_collection(&self.name));
        }
        // Also when it fails: the log has it by then.
        self.unflushed.store(true, SeqCst);
        self.unoptimised.store(true, SeqCst);
        self.shard.update(operation).map_err(from_engine)
    }

    /// Changes tunable settings; everything is checked before anything is changed.
    pub fn reconfigure(
        &self,
        hnsw: Option<edge::HnswIndexConfig>,
        optimizers: Option<edge::EdgeOptimizersConfig>,
        metadata: std::collections::HashMap<String, pb::Value>,
    ) -> Answer<()> {
        let _gate = self.gate.lock();
        if self.deleted.load(SeqCst) {
            return Err(no_collection(&self.name));
        }
        if let Some(hnsw) = hnsw {
            self.shard.set_hnsw_config(hnsw).map_err(from_engine)?;
        }
        if let Some(optimizers) = optimizers {
            self.shard.set_optimizers_config(optimizers).map_err(from_engine)?;
        }
        if !metadata.is_empty() {
            self.spec.lock().metadata.extend(metadata);
            self.save_spec()?;
        }
        self.unoptimised.store(true, SeqCst);
        Ok(())
    }

    fn save_spec(&self) -> Answer<()> {
        let bytes = self.spec.lock().encode_to_vec();
        atomic_file::replace(&self.directory.path.join(SPEC_FILE), &bytes)
            .map_err(|error| file_error("cannot save the collection's settings", &error))
    }

    /// Writes everything out if anything changed since the last time; says whether it did. Blocks writes.
    pub fn flush(&self) -> edge::OperationResult<bool> {
        let _gate = self.gate.lock();
        if self.deleted.load(SeqCst) || !self.unflushed.swap(false, SeqCst) {
            return Ok(false);
        }
        match self.shard.flush() {
            Ok(()) => Ok(true),
            Err(error) => {
                self.unflushed.store(true, SeqCst);
                Err(error)
            }
        }
    }

    /// Optimises if anything changed since the last time; says whether there was anything to do. Takes from
    /// milliseconds to minutes; reads and writes go on.
    pub fn optimise(&self) -> Result<bool> {
        if self.deleted.load(SeqCst) || !self.unoptimised.load(SeqCst) {
            return Ok(false);
        }
        // In this order, so that `is_settled` never sees both as false in between.
        self.optimising.store(true, SeqCst);
        self.unoptimised.store(false, SeqCst);
        // A panic must not end the loop that serves every other collection.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.shard.optimize()));
        self.optimising.store(false, SeqCst);
        match outcome {
            Ok(Ok(changed)) => {
                if changed {
                    self.unflushed.store(true, SeqCst);
                }
                Ok(changed)
            }
            Ok(Err(_)) if self.deleted.load(SeqCst) => Ok(false),
            Ok(Err(error)) => Err(anyhow::anyhow!("{error}")),
            Err(_) => anyhow::bail!("the engine panicked; its message is above"),
        }
    }

    /// Whether the optimiser has nothing left to do.
    pub fn is_settled(&self) -> bool {
        !self.unoptimised.load(SeqCst) && !self.optimising.load(SeqCst)
    }

    /// Deletes the collection: from here on it is gone also after a crash, and every write is refused. The files go
    /// when the last request that still reads has ended.
    pub fn delete(&self) -> Answer<()> {
        let _gate = self.gate.lock();
        atomic_file::remove(&self.directory.path.join(SPEC_FILE))
            .map_err(|error| file_error("cannot delete the collection", &error))?;
        self.deleted.store(true, SeqCst);
        self.directory.remove.store(true, SeqCst);
        Ok(())
    }
}

fn remove_if_present(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
